"""The pipeline on machines that we haven't got: reading, computing, waiting and losing nodes, played as discrete events.

Run with `python -m benchmarks.simulate`. It measures unit costs on one core (`--units FILE` takes earlier ones), plays every
stage of the AE + LDE row of presets/celeba128.yaml on 1, 8, 64 and 256 GPUs, before and after processes shared all stages, and
writes the tables of scaling.md. `--validate` also plays a small row on one and two processes of this machine and runs it.

A process of a stage reads its parts (shards, or files of codes) through the store and the node's network, or from its disk;
loader cores decode them, a core gathers batches, and a GPU computes. Training processes wait for one another in every step.
Nodes are slow for a while at random, and are lost at a fixed pace. A lump is the parts that are played as one event.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.events import Clock, Cores, Line, Link, Process, through
from benchmarks.units import SMALL, Row, measure, preset, write_photos
from pipeline.settings import meanings_of
from pipeline.system.files import read_json, write_json, write_text

HERE = Path(__file__).parent
START, END = "<!-- played by benchmarks/simulate.py -->", "<!-- end -->"
IMAGES = 100_000_000
EPOCHS = 3  # over so many images; the preset's number would be far too large
GPUS = (1, 8, 64, 256)
LUMPS = 2000  # of a stage, at most about
VALID_CODES = 100_000  # that fit scores after each epoch, at most
SCORED_CODES = 20_000  # of each split that fit scores at its end, at most
SCORED_IMAGES = 200_000  # of training, and of validation, that train scores at its end, at most; and all test images
SAMPLED = 1000  # samples of a shard, as by default
ROWS = 4  # that run side by side
HASHING = 4  # threads of DVC
FAILURES = 3  # in a row without a step forward, after which a stage never ends


@dataclass(frozen=True)
class Machines:
    """Where the pipeline is played. None of the defaults was measured.

    Attributes:
        gpus: Processes, one for each GPU.
        node_gpus: GPUs of a node.
        cores: CPU cores for each GPU, as fast as the one that was measured.
        threads: Cores that a process computes on, besides its GPU.
        workers: Loader cores (LOADER_WORKERS).
        flops: Operations per second of a GPU at its peak, of NVIDIA's data sheet of the A100 80GB SXM in bfloat16.
        utilisation: Share of it that convolutions reach.
        lde_utilisation: Share of it that the narrow products of the LDE reach.
        store: Bytes per second that the store gives in all.
        latency: Seconds until it answers.
        network: Bytes per second of a node to the store and to other nodes.
        disk: Bytes per second of a node's disk.
        cache: Bytes of a node's disk for parts that were read (STORE_CACHE_GIB).
        link: Bytes per second of a GPU to its neighbours within a node.
        exchange: Seconds that two processes need to exchange a number.
        slow_share: Share of the time that a node is slow.
        slow_factor: How many times as long everything then takes.
        slow_seconds: How long it is slow.
        loss_hours: Hours between two losses of a node, if there are several nodes.
        restart: Seconds until the others notice and have started again.
        replace: Seconds until another node takes its place.
        person: Seconds until somebody types the command again.
        start: Seconds until a stage computes.
        price: Dollars for a GPU and an hour, with its share of the node.
    """

    gpus: int
    node_gpus: int = 8
    cores: int = 16
    threads: int = 8
    workers: int = 7
    flops: float = 312e12
    utilisation: float = 0.3
    lde_utilisation: float = 0.05
    store: float = 10e9
    latency: float = 0.05
    network: float = 25e9
    disk: float = 3e9
    cache: float = 2e12
    link: float = 250e9
    exchange: float = 30e-6
    slow_share: float = 0.02
    slow_factor: float = 1.5
    slow_seconds: float = 300.0
    loss_hours: float = 1.0
    restart: float = 90.0
    replace: float = 900.0
    person: float = 3600.0
    start: float = 20.0
    price: float = 2.0

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return math.ceil(self.gpus / self.node_gpus)


@dataclass(frozen=True)
class Pipeline:
    """What the pipeline does by itself.

    Attributes:
        shares_preparation: Whether all machines prepare shards.
        runs_ahead: Whether a thread gathers batches while others are trained on.
        exchanges: Exchanges of numbers in a step.
        caches: Whether parts that were read stay on the node's disk.
        restarts: Whether a stage goes on by itself, on the nodes that are left.
        keeps_manifests: Whether DVC hashes and copies an index only, instead of all parts.
        limits_scores: Whether `train` ends by comparing some training and validation images, instead of all.
    """

    shares_preparation: bool
    runs_ahead: bool
    exchanges: float
    caches: bool
    restarts: bool
    keeps_manifests: bool
    limits_scores: bool


BEFORE = Pipeline(False, False, 3.0, False, False, False, False)
AFTER = Pipeline(True, True, 0.0, True, True, True, True)


@dataclass(frozen=True)
class Work:
    """Passes over parts that the processes of a stage share.

    Attributes:
        parts: Number of parts.
        examples: Examples of a part.
        passes: Passes over them.
        read_bytes, written_bytes: Bytes of a part.
        read: Seconds of a loader core for an example.
        gather: Seconds of the gathering core for an example.
        compute: Seconds of a GPU for an example.
        batch: Examples of a step of all processes, which wait for one another; 0 if they don't.
        gradient_bytes: Bytes that are summed in a step.
        validation: Seconds of a GPU after each pass, shared by all.
        one_machine: Whether one node does it alone.
    """

    parts: int
    examples: int
    passes: int = 1
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    read: float = 0.0
    gather: float = 0.0
    compute: float = 0.0
    batch: int = 0
    gradient_bytes: float = 0.0
    validation: float = 0.0
    one_machine: bool = False


@dataclass(frozen=True)
class Stage:
    """Work that is done one after the other, with the outputs, which DVC hashes and copies.

    Attributes:
        name: Its name.
        works: What its processes do.
        output_bytes: Bytes of its outputs.
        hashing: Seconds of a core for a byte.
    """

    name: str
    works: tuple[Work, ...]
    output_bytes: float = 0.0
    hashing: float = 0.0


@dataclass
class Played:
    """What became of a stage.

    Attributes:
        seconds: How long it took; infinite if it never ends.
        spent: Seconds by what the processes did or waited for; the mean over processes.
        busy: Share of the time that each resource was busy.
        losses: Nodes lost.
    """

    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    losses: int = 0

    @property
    def bottleneck(self) -> str:
        """What took most of the time; if that was waiting for data, the resource that was busy for longest."""
        most = max(self.spent, key=lambda name: self.spent[name])
        return max(self.busy, key=lambda name: self.busy[name]) if most == "data" else most


class _Attempt:
    """A work on the nodes that there are, from a position on: an order of parts and the processes that play it.

    Arguments:
        work, machines, pipeline, clock: What is played, and when.
        ranks: Number of processes.
        position: Rounds of lumps that are done already.
        caches: For each node, the lumps on its disk.
        seed: Seed of the order of parts and of slow nodes.
    """

    def __init__(
        self,
        work: Work,
        machines: Machines,
        pipeline: Pipeline,
        clock: Clock,
        ranks: int,
        position: int,
        caches: Sequence[OrderedDict[int, None]],
        seed: int,
    ) -> None:
        self.work, self.machines, self.pipeline = work, machines, pipeline
        self.clock, self.ranks, self.seed = clock, ranks, seed
        self.nodes, self.caches = math.ceil(ranks / machines.node_gpus), caches
        # Lumps of whole parts; at least a few for each process and pass.
        share = max(work.parts // (4 * machines.gpus), 1)
        self.lump = max(min(work.parts * work.passes // LUMPS, share), 1)
        self.lumps = math.ceil(work.parts / self.lump)
        self.rounds = math.ceil(self.lumps / ranks)  # of a pass
        self.position = self.saved = position
        self.saved_at = clock.now
        self.left = 1 if work.batch else ranks
        self.spent = dict.fromkeys(("computing", "data", "gradients", "slow nodes"), 0.0)
        self.store, self.network = Link(machines.store), [Link(machines.network) for _ in range(self.nodes)]
        self.disks = [Link(machines.disk) for _ in range(self.nodes)]
        self.loaders = [Cores(max(machines.workers, 1)) for _ in range(ranks)]
        self.gatherers = [Cores(1) for _ in range(ranks)]
        self.lines = [Line(1) for _ in range(ranks)]
        for rank in range(ranks):
            waiting = Line(2 * max(machines.workers, 1))
            dealt = self._dealt(rank)
            for _ in range(max(machines.workers, 1)):
                clock.start(self._load(rank, dealt, waiting))
            clock.start(self._gather(rank, waiting))
            if not work.batch:
                clock.start(self._compute(rank))
        if work.batch:
            clock.start(self._train())

    @property
    def all_rounds(self) -> int:
        """Rounds of lumps in all passes."""
        return self.rounds * self.work.passes

    def _examples(self, lump: int) -> int:
        return min(self.lump, self.work.parts - lump * self.lump) * self.work.examples

    def _bytes(self, of_part: float, lump: int) -> float:
        return of_part * self._examples(lump) / self.work.examples

    def _node(self, rank: int) -> int:
        return rank // self.machines.node_gpus

    def _dealt(self, rank: int) -> Iterator[int]:
        """The lumps of a process, each pass in an order of its own."""
        for turn in range(self.position, self.all_rounds):
            number, place = divmod(turn, self.rounds)
            place = place * self.ranks + rank
            if place < self.lumps:
                yield _order(self.lumps, self.seed, number)[place]

    def _slowness(self, node: int) -> float:
        episode = int(self.clock.now // self.machines.slow_seconds)
        slow = random.Random(f"{self.seed} {node} {episode}").random() < self.machines.slow_share
        return self.machines.slow_factor if slow else 1.0

    # Processes --------------------------------------------------------------------------------------------------------

    def _load(self, rank: int, dealt: Iterator[int], waiting: Line) -> Process:
        work, node = self.work, self._node(rank)
        cache, room = self.caches[node], int(self.machines.cache / max(work.read_bytes * self.lump, 1.0))
        for lump in dealt:
            size = self._bytes(work.read_bytes, lump)
            if size and self.pipeline.caches and work.passes > 1 and lump in cache:
                cache.move_to_end(lump)
                yield self.disks[node].take(self.clock.now, size)
            elif size:
                yield through([self.store, self.network[node]], self.clock.now + self.machines.latency, size)
                if self.pipeline.caches and work.passes > 1:
                    self.disks[node].take(self.clock.now, size)
                    cache[lump] = None
                    if len(cache) > room:
                        cache.popitem(last=False)
            yield self.loaders[rank].take(self.clock.now, work.read * self._examples(lump))
            yield waiting.put(lump)

    def _gather(self, rank: int, waiting: Line) -> Process:
        seconds = self.work.gather if self.pipeline.runs_ahead else 0.0
        while True:
            lump = yield waiting.get()
            yield self.gatherers[rank].take(self.clock.now, seconds * self._examples(lump))
            yield self.lines[rank].put(lump)

    def _compute(self, rank: int) -> Process:
        work, node = self.work, self._node(rank)
        for _ in self._dealt(rank):
            began = self.clock.now
            lump = yield self.lines[rank].get()
            self._spend("data", (self.clock.now - began) / self.ranks)
            seconds = self._own(work) * self._examples(lump)
            yield self.clock.now + self._work(seconds, self._slowness(node), 1 / self.ranks)
            size = self._bytes(work.written_bytes, lump)
            if size:
                began = self.clock.now
                yield through([self.store, self.network[node]], self.clock.now, size)
                self._spend("data", (self.clock.now - began) / self.ranks)
        self.left -= 1

    def _train(self) -> Process:
        work = self.work
        while self.position < self.all_rounds:
            began = self.clock.now
            number = self.position % self.rounds
            present = min(self.ranks, self.lumps - number * self.ranks)
            lumps: list[int] = []
            for line in self.lines[:present]:
                lumps += [(yield line.get())]
            self._spend("data", self.clock.now - began)
            # Every batch is shared by all, also that of the last lumps.
            examples = sum(map(self._examples, lumps)) / self.ranks
            steps = examples * self.ranks / work.batch
            slowness = max(map(self._slowness, range(self.nodes)))
            yield self.clock.now + self._work(self._own(work) * examples, slowness)
            gradients = steps * self._exchange(work.compute * examples / max(steps, 1e-9))
            self._spend("gradients", gradients)
            yield self.clock.now + gradients
            self.position += 1
            if self.position % self.rounds == 0 and work.validation:
                yield self.clock.now + self._work(work.validation / self.ranks, slowness)
            if self.clock.now - self.saved_at >= 60:  # checkpoint_minutes: 1
                self.saved, self.saved_at = self.position, self.clock.now
        self.left -= 1

    def _own(self, work: Work) -> float:
        """Seconds of an example that nothing else goes on in."""
        return work.compute + (0.0 if self.pipeline.runs_ahead else work.gather)

    def _work(self, seconds: float, slowness: float, share: float = 1.0) -> float:
        self._spend("computing", seconds * share)
        self._spend("slow nodes", seconds * (slowness - 1) * share)
        return seconds * slowness

    def _exchange(self, step: float) -> float:
        """Seconds of a step in which gradients are summed and nothing is computed: half of it overlaps."""
        if self.ranks == 1:
            return 0.0
        machines = self.machines
        # A ring leaves each node once.
        link = machines.link if self.nodes == 1 else min(machines.link, machines.network)
        ring = 2 * self.work.gradient_bytes * (self.ranks - 1) / self.ranks / link
        numbers = (1 + self.pipeline.exchanges) * math.ceil(math.log2(self.ranks)) * machines.exchange
        return max(ring - step / 2, 0.0) + numbers

    def _spend(self, name: str, seconds: float) -> None:
        self.spent[name] += seconds

    def position_on(self, ranks: int) -> int:
        """The round that another number of processes begins with after the last checkpoint; 0 if there are none."""
        if not self.work.batch:
            return 0
        passes, rounds = divmod(self.saved, self.rounds)
        return passes * math.ceil(self.lumps / ranks) + rounds * self.ranks // ranks

    def busy(self) -> dict[str, float]:
        """Seconds that each kind of resource was busy; the mean over its members."""
        resources = {
            "store": [self.store],
            "network": self.network,
            "disks": self.disks,
            "loader cores": self.loaders,
            "gathering cores": self.gatherers,
        }
        return {name: sum(one.busy / one.count for one in members) / len(members) for name, members in resources.items()}


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, number: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed} {number}").shuffle(order)
    return order


def play(stage: Stage, machines: Machines, pipeline: Pipeline, elapsed: float = 0.0, seed: int = 0) -> Played:
    """Plays a stage.

    After a node was lost, the stage starts again: training from its last checkpoint, everything else from the beginning.

    Arguments:
        stage: What is played.
        machines: Where.
        pipeline: By what.
        elapsed: Seconds that earlier stages took; nodes are lost by the clock of all stages.
        seed: Seed of orders and of slow nodes.
    """
    played = Played(machines.start, {"starting": machines.start})
    pace = machines.loss_hours * 3600 if machines.nodes > 1 else math.inf
    loss = pace * (elapsed // pace + 1) - elapsed if pace < math.inf else math.inf

    def spend(name: str, seconds: float) -> None:
        played.spent[name] = played.spent.get(name, 0.0) + seconds

    for number, work in enumerate(stage.works):
        caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(machines.nodes)]
        alone = work.one_machine and not pipeline.shares_preparation
        full = ranks = min(machines.gpus, machines.node_gpus) if alone else machines.gpus
        position = failures = 0
        while True:
            began = played.seconds
            attempt = _Attempt(work, machines, pipeline, Clock(began), ranks, position, caches, seed + number)
            attempt.clock.run(until=loss)
            lost = attempt.left > 0
            kept = (attempt.saved_at - began) / max(loss - began, 1e-9) if lost else 1.0
            for name, seconds in attempt.spent.items():
                spend(name, seconds * kept)
            for name, seconds in attempt.busy().items():
                played.busy[name] = played.busy.get(name, 0.0) + seconds
            played.seconds = attempt.clock.now
            if not lost:
                break
            played.losses += 1
            failures = 0 if attempt.saved > position else failures + 1
            if failures > FAILURES:  # it begins again and again
                played.seconds = math.inf
                return played
            waits = machines.restart if pipeline.restarts else machines.replace + machines.person
            spend("lost nodes", waits + machines.start + played.seconds - attempt.saved_at)
            played.seconds += waits + machines.start
            while loss <= played.seconds:
                loss += pace
            # Its disk is lost with it. The others go on, and the next restart brings a new node in.
            caches = [*caches[1:], OrderedDict()]
            ranks = full - machines.node_gpus if pipeline.restarts and full > machines.node_gpus else full
            position = attempt.position_on(ranks)
    if stage.output_bytes and not pipeline.keeps_manifests:
        seconds = stage.output_bytes * (stage.hashing / HASHING + 2 / min(machines.store, machines.network))
        spend("DVC", seconds)
        played.seconds += seconds
    played.busy = {name: seconds / max(played.seconds, 1e-9) for name, seconds in played.busy.items()}
    return played


# The stages -----------------------------------------------------------------------------------------------------------


def chain(
    row: Row, units: dict[str, float], images: int, hashing: float, machines: Machines, pipeline: Pipeline, rates: Rates
) -> list[Stage]:
    """The stages of a row.

    Arguments:
        row: The row.
        units: Its unit costs, of `benchmarks.units`.
        images: Number of images.
        hashing: Seconds of a core for a byte that is hashed.
        machines: Where they run.
        pipeline: By what.
        rates: Seconds of a processor, for an example or a pair.
    """
    train, valid, test = (round(share * images) for share in row.splits)
    parts = functools.partial(_parts, row.part_examples)
    handled = {"read_bytes": units["shard_bytes"] * row.part_examples, "read": units["read"]}
    coded = {"read_bytes": units["code_bytes"] * row.part_examples}
    used = 4 * units["density_parameters"]
    batch = {"batch": row.batch * rates.batches}
    prepare = Work(
        **parts(images), read_bytes=units["raw_bytes"] * row.part_examples, compute=units["prepare"] / machines.cores,
        written_bytes=handled["read_bytes"], one_machine=True,
    )  # fmt: skip
    training = Work(
        **parts(train), **handled, **batch, passes=row.epochs, gather=units["gather"], compute=rates.train,
        gradient_bytes=4 * units["parameters"],
    )  # fmt: skip
    reconstruct = rates.encode + rates.decode
    compared = test + sum(min(count, SCORED_IMAGES) if pipeline.limits_scores else count for count in (train, valid))
    scores = Work(**parts(compared), **handled, compute=reconstruct + units["compare"] / machines.threads)
    opened = Work(**parts(test), **handled, compute=rates.encode + units["opened"] * rates.decode)
    extract = Work(**parts(images), **handled, compute=rates.encode, written_bytes=coded["read_bytes"])
    fitting = Work(
        **parts(train), **coded, **batch, passes=row.fit_epochs, compute=rates.fit, gradient_bytes=used,
        validation=min(valid, VALID_CODES) * rates.log_prob,
    )  # fmt: skip
    scored = sum(min(count, SCORED_CODES) for count in (train, valid, test))
    scoring = Work(**parts(scored), **coded, compute=rates.log_prob)
    sampling = Work(
        _count(row.samples, SAMPLED), SAMPLED, compute=rates.draw + rates.decode, written_bytes=SAMPLED * units["sample_bytes"]
    )
    parzen = Work(**parts(valid + test), **handled, compute=row.samples * rates.pair)
    likelihood = Work(**parts(test), **coded, compute=rates.log_prob)
    return [
        Stage("prepare", (prepare,), images * units["shard_bytes"], hashing),
        Stage("train", (training, scores, opened), 4 * units["parameters"], hashing),
        Stage("extract", (extract,), images * units["code_bytes"], hashing),
        Stage("fit", (fitting, scoring), used, hashing),
        Stage("sample", (sampling,), row.samples * units["sample_bytes"], hashing),
        Stage("evaluate", (parzen, likelihood)),
    ]


def _count(total: int, each: int) -> int:
    return max(math.ceil(total / each), 1)


def _parts(each: int, total: int) -> dict[str, int]:
    return {"parts": _count(total, each), "examples": each}


@dataclass(frozen=True)
class Rates:
    """Seconds of a processor for an example: an image, a code, a draw, or a pair of a sample and an image.

    Attributes:
        train, encode, decode, fit, log_prob, draw, pair: What for.
        batches: The row's batches that all processes together take in a step.
    """

    train: float
    encode: float
    decode: float
    fit: float
    log_prob: float
    draw: float
    pair: float
    batches: int = 1


def core_rates(units: dict[str, float]) -> Rates:
    """Of one core, as they were measured."""
    return Rates(**{field.name: units[field.name] for field in dataclasses.fields(Rates) if field.name != "batches"})


def gpu_rates(row: Row, units: dict[str, float], machines: Machines, measured: dict[str, Any] | None = None) -> Rates:
    """Of one GPU: those of `benchmarks.gpu` where there are any, otherwise operations by the share of the peak.

    Each GPU gets the row's batch, so that the batch of all grows with their number.
    """
    convolutions, narrow = (machines.flops * share for share in (machines.utilisation, machines.lde_utilisation))
    # Each weight is used at each place of a code; PyTorch doesn't count products that are added to what is there.
    used = 2 * units["density_parameters"] * row.latent_dim
    pair = 2 * row.channels * row.image_px**2
    train, fit = units["train_flops"] / convolutions, 3 * used / narrow
    if measured is not None:
        perceptual = "yes" if row.perceptual else "no"
        trained = [r for r in measured["train"] if r["px"] == row.image_px and r["perceptual"] == perceptual]
        train = min((1 / r["pipeline, images/s"] for r in trained), default=train)
        fit = min((1 / r["LDE, codes/s"] for r in measured["fit"] if r["D"] == row.latent_dim), default=fit)
    return Rates(
        train, units["encode_flops"] / convolutions, units["decode_flops"] / convolutions, fit, fit / 3, fit / 3,
        pair / convolutions, machines.gpus,
    )  # fmt: skip


# The report -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One line of the tables: the pipeline, the number of GPUs, and what became of each stage."""

    name: str
    gpus: int
    stages: dict[str, Played]

    @property
    def hours(self) -> dict[str, float]:
        """Hours of each stage."""
        return {name: played.seconds / 3600 for name, played in self.stages.items()}


def play_chain(row: Row, units: dict[str, Any], images: int, machines: Machines, pipeline: Pipeline, rates: Rates) -> Case:
    """Plays all stages of a row, one after the other."""
    found: dict[str, Played] = {}
    for stage in chain(row, units["large"], images, units["hash"], machines, pipeline, rates):
        found[stage.name] = play(stage, machines, pipeline, sum(played.seconds for played in found.values()))
    return Case("before" if pipeline == BEFORE else "after", machines.gpus, found)


def plan(row: Row, units: dict[str, Any], images: int, gpus: Sequence[int], measured: dict[str, Any] | None) -> list[Case]:
    """A row before and after, on each number of GPUs; and after on a share of them, as one of ROWS rows side by side."""
    cases = []
    for pipeline, count in itertools.product((BEFORE, AFTER), gpus):
        machines = Machines(count)
        rates = gpu_rates(row, units["large"], machines, measured)
        cases.append(play_chain(row, units, images, machines, pipeline, rates))
        if pipeline == AFTER and count >= ROWS:
            share = dataclasses.replace(
                machines, gpus=count // ROWS, store=machines.store / ROWS, loss_hours=machines.loss_hours * ROWS
            )
            rates = gpu_rates(row, units["large"], share, measured)
            cases.append(dataclasses.replace(play_chain(row, units, images, share, pipeline, rates), name="shared"))
    return cases


def table_of_rows(cases: Sequence[Case]) -> list[str]:
    """Hours of ROWS rows of one data set, one after another and side by side."""
    cells = []
    for case in cases:
        if case.name != "shared":
            continue
        whole = {other.name: other.hours for other in cases if other.gpus == case.gpus * ROWS and other.name != "shared"}
        alone = [hours["prepare"] + ROWS * (sum(hours.values()) - hours["prepare"]) for hours in whole.values()]
        together = whole["after"]["prepare"] + sum(case.hours.values()) - case.hours["prepare"]
        cells.append([str(case.gpus * ROWS), *map(number, alone), number(together)])
    return table(["GPUs", "before", "after, one after another", "after, side by side"], cells)


def number(value: float) -> str:
    """A number with three significant digits."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "never ends"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{round(value, 2 - math.floor(math.log10(abs(value)))):,.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """A Markdown table whose first columns are text, the others numbers."""
    lines = [f"| {' | '.join(header)} |", "|---" * texts + "|--:" * (len(header) - texts) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def report(units: dict[str, Any], row: Row, images: int, cases: Sequence[Case], measured: dict[str, Any] | None) -> str:
    """The tables."""
    machines = Machines(1)
    rates = "are those of `benchmarks/results/gpu.json`" if measured else "are assumed: no GPU was measured"
    title = f"{images:,} images of {row.image_px} px, {row.epochs} epochs of `train`, {row.fit_epochs} of `fit`"
    lines = [f"{title}. GPU rates {rates}.", ""]
    stages = list(cases[0].stages)
    whole = [case for case in cases if case.name != "shared"]
    for title, price in (("Hours", None), ("Dollars", machines.price)):
        cells = []
        for case in whole:
            numbers = [hours if price is None else hours * price * case.gpus for hours in case.hours.values()]
            cells.append([case.name, str(case.gpus), *map(number, numbers), number(sum(numbers))])
        lines += [f"**{title}**", "", *table(["", "GPUs", *stages, "all"], cells, texts=2)]
    cells = [
        [
            case.name,
            str(case.gpus),
            *(p.bottleneck for p in case.stages.values()),
            str(sum(p.losses for p in case.stages.values())),
        ]
        for case in whole
    ]
    lines += ["**What took most of the time**", "", *table(["", "GPUs", *stages, "nodes lost"], cells, texts=2)]
    lines += [f"**Hours of {ROWS} such rows of one data set** (`JOBS={ROWS}`)", "", *table_of_rows(cases)]
    lines += ["**Unit costs, measured on one core**", ""]
    shown = {
        "prepare: JPEG to shard, images/s": 1 / units["large"]["prepare"],
        "read a shard and check its digest, images/s": 1 / units["large"]["read"],
        "shuffle and scale, images/s": 1 / units["large"]["gather"],
        "train, images/s": 1 / units["large"]["train"],
        "train, GFLOP an image": units["large"]["train_flops"] / 1e9,
        "compare an image with its reconstruction, images/s": 1 / units["large"]["compare"],
        "fit, codes/s": 1 / units["large"]["fit"],
        "Parzen, pairs/s": 1 / units["large"]["pair"],
        "MD5 of DVC, MB/s": 1e-6 / units["hash"],
        "bytes of an image in a shard": units["large"]["shard_bytes"],
        "bytes of a code": units["large"]["code_bytes"],
    }
    lines += table(["what", "rate"], [[name, number(value)] for name, value in shown.items()])
    lines += ["**Assumed**", ""]
    texts = meanings_of(Machines)
    assumed = [
        [texts[f.name].rstrip("."), f"{getattr(machines, f.name):g}"] for f in dataclasses.fields(machines) if f.name != "gpus"
    ]
    lines += table(["what", "value"], assumed)
    if "validation" in units:
        lines += ["**Played and run on this machine**", "", *validated(units["validation"])]
    return "\n".join(lines)


# Against a real run ---------------------------------------------------------------------------------------------------

PARAMS = """\
datasets:
  photos: {{source: images, root: raw/photos.zip, image_px: {row.image_px}, channels: {row.channels},
    shard_examples: {row.part_examples}, valid_share: {row.splits[1]}, test_share: {row.splits[2]}}}
controls: {{}}
autoencoders:
  photos-ae: {{dataset: photos, objective: ae, latent_dim: {row.latent_dim}, blocks: {row.blocks}, epochs: {row.epochs},
    batch_size: {row.batch}}}
densities:
  photos-lde: {{codes: photos-ae, dataset: photos, family: lde, components: {row.components}, epochs: {row.fit_epochs},
    batch_size: {row.batch}}}
sampling: {{count: {row.samples}, shard_examples: 1000}}
evaluations: {{photos: {{}}}}
detections: {{}}
"""
STAGES = {"prepare": "photos", "train": "photos-ae", "extract": "photos-ae", "fit": "photos-lde", "sample": "photos-lde"}
TINY = 40  # images of a run that shows what it takes to start


def run(row: Row, images: int, processes: int, stages: Sequence[str]) -> dict[str, dict[str, float]]:
    """Runs stages of a row on this machine: for each, the seconds that passed and those of all its cores."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "PROCESSES": str(processes)}
    environment |= {"TRACKING": "off", "DEVICE": "cpu", "LAUNCHER": "local"}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "raw").mkdir()
        write_photos(Path(folder) / "raw/photos.zip", images)
        (Path(folder) / "params.yaml").write_text(PARAMS.format(row=row))
        for stage in stages:
            began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [sys.executable, "-m", "stages", stage, STAGES[stage]],
                cwd=folder,
                env=environment,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            found[stage] = {"seconds": time.monotonic() - began, "core seconds": cores}
    return found


def validate(row: Row, units: dict[str, Any], images: int, stages: Sequence[str]) -> list[dict[str, Any]]:
    """A row played and run, on one process and on two."""
    rows = []
    available = os.cpu_count() or 1
    tiny = dataclasses.replace(row, epochs=1, fit_epochs=1, samples=10)
    for processes in (1, 2):
        costs = units["small"][str(processes)]
        if processes >= available:  # no core is left for the thread that reads ahead
            costs = costs | {"gather": costs["gather"] + costs["read"], "read": 0.0}
        pipeline = dataclasses.replace(AFTER, runs_ahead=processes < available)
        starting, running = (run(*what, processes, stages) for what in ((tiny, TINY), (row, images)))
        exchange = units["exchange"]
        machines = Machines(
            processes,
            node_gpus=processes,
            cores=max(available // processes, 1),
            threads=1,
            workers=1,
            store=math.inf,
            latency=0.0,
            network=math.inf,
            disk=math.inf,
            link=exchange["bytes_per_second"],
            exchange=exchange["latency"],
            slow_share=0.0,
        )
        for stage in chain(row, costs, images, 0.0, machines, pipeline, core_rates(costs)):
            if stage.name not in stages:
                continue
            start = starting[stage.name]
            played = play(stage, dataclasses.replace(machines, start=start["seconds"]), pipeline)
            # Processes of `prepare` use all cores.
            width = machines.cores if stage.name == "prepare" else 1
            busy = start["core seconds"] + sum(width * _core_seconds(work) for work in stage.works)
            rows.append(
                {
                    "stage": stage.name,
                    "processes": processes,
                    "played, s": played.seconds,
                    "run, s": running[stage.name]["seconds"],
                    "played, core s": busy,
                    "run, core s": running[stage.name]["core seconds"],
                    "load average": os.getloadavg()[0],
                }
            )
    return rows


def _core_seconds(work: Work) -> float:
    examples = work.parts * work.examples * work.passes
    return examples * (work.read + work.gather + work.compute) + work.passes * work.validation


def validated(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of what was played and run."""
    cells = []
    for row in rows:
        pairs = [(row[f"played, {unit}"], row[f"run, {unit}"]) for unit in ("s", "core s")]
        numbers = [text for played, ran in pairs for text in (number(played), number(ran), f"{played / ran:.2f}")]
        cells.append([row["stage"], str(row["processes"]), *numbers])
    header = ["stage", "processes", "played, s", "run, s", "ratio", "played, core s", "run, core s", "ratio"]
    return table(header, cells)


def main(arguments: list[str] | None = None) -> None:
    """Measures, plays, and writes results/units.json and the tables of scaling.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=Path, help="unit costs of an earlier run, instead of measuring")
    parser.add_argument("--validate", action="store_true", help="play and run a small row on this machine, too")
    parser.add_argument("--seconds", type=float, default=5.0, help="CPU seconds of each measurement, about")
    parser.add_argument("--photos", type=int, default=1000, help="synthetic photos that are prepared to measure it")
    parser.add_argument("--images", type=int, default=IMAGES, help="images that are played")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES), help="those that are run")
    parser.add_argument("--small-images", type=int, default=6000, help="images that are run")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "units.json")
    parser.add_argument("--page", type=Path, default=HERE / "scaling.md")
    options = parser.parse_args(arguments)
    row = dataclasses.replace(preset(), epochs=EPOCHS, fit_epochs=EPOCHS)
    units = read_json(options.units) if options.units else measure(row, SMALL, options.seconds, options.photos)
    if options.validate:
        units["validation"] = validate(SMALL, units, options.small_images, options.stages)
    write_json(options.output, units)
    rates = HERE / "results" / "gpu.json"
    measured = read_json(rates) if rates.exists() else None
    cases = plan(row, units, options.images, options.gpus, measured)
    before, _, rest = options.page.read_text().partition(START)
    _, _, after = rest.partition(END)
    write_text(options.page, f"{before}{START}\n\n{report(units, row, options.images, cases, measured)}\n{END}{after}")


if __name__ == "__main__":
    main()
