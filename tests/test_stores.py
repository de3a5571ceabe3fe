"""Parts in a store: whole or not at all, checked on arrival, tried again, and cached within a bound."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from fsspec.implementations.local import LocalFileSystem

from benchmarks.stores import server
from pipeline.errors import DataError, PipelineError, SettingsError
from pipeline.storage import stores
from pipeline.storage.batches import Batches
from pipeline.storage.codes import CodeReader
from pipeline.storage.shards import ShardReader
from pipeline.storage.stores import Store, current_store
from pipeline.system.files import sha256_bytes

DATA = bytes(range(256)) * 4
SHA = sha256_bytes(DATA)


class Faulty(LocalFileSystem):
    """Raises or returns what it is told to, once each."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[Any] = []
        self.asked = 0

    def cat_file(self, path: str, *arguments: Any, **keywords: Any) -> bytes:
        self.asked += 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        return super().cat_file(path) if fault is None else fault


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.0)
    made = Store(f"file://{tmp_path}/store", tmp_path / "cache", 2500)
    made.files = Faulty()
    (tmp_path / "part").write_bytes(DATA)
    made.put(tmp_path / "part", SHA)
    return made


def get(store: Store) -> bytes:
    return store.get("train-000000.tar", SHA, len(DATA))


def test_a_part_is_read_once_and_then_from_the_cache(store: Store) -> None:
    assert get(store) == get(store) == DATA
    assert store.files.asked == 1
    cached = store.cache / SHA[:2] / SHA
    cached.write_bytes(DATA[:-1] + b"x")  # damaged
    assert get(store) == DATA
    assert store.files.asked == 2


@pytest.mark.parametrize("fault", [TimeoutError("slow"), OSError("500"), DATA[:100], DATA[:-1] + b"x", ConnectionError()])
def test_faults_that_pass_are_tried_again(store: Store, fault: Any) -> None:
    store.files.faults = [fault] * (stores.TRIES - 1)
    assert get(store) == DATA
    assert store.files.asked == stores.TRIES


@pytest.mark.parametrize(
    ("fault", "kind", "message", "asked"),
    [
        (
            OSError("500"),
            PipelineError,
            rf"can't be read from file://.* after {stores.TRIES} tries \(OSError: 500\)",
            stores.TRIES,
        ),
        (DATA[:100], DataError, "tries .*100 bytes of another content", stores.TRIES),
        (FileNotFoundError(), DataError, "train-000000.tar can't be read from file://.*: it isn't there", 1),
        (PermissionError("AccessDenied"), PipelineError, r"no permission \(PermissionError: AccessDenied\)", 1),
    ],
)
def test_faults_that_stay_are_told_in_a_line(store: Store, fault: Any, kind: type[Exception], message: str, asked: int) -> None:
    store.files.faults = [fault] * 100
    with pytest.raises(kind, match=message) as caught:
        get(store)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is kind
    assert store.files.asked == asked
    assert not list(store.cache.rglob("*"))


def test_the_cache_keeps_its_bound_and_what_was_read_last(store: Store, tmp_path: Path) -> None:
    parts = {}
    for number in range(4):
        data = bytes([number]) * 1000
        (tmp_path / "part").write_bytes(data)
        parts[sha256_bytes(data)] = data
        store.put(tmp_path / "part", sha256_bytes(data))
    for age, (sha, data) in enumerate(parts.items()):
        assert store.get("a", sha, 1000) == data
        os.utime(store.cache / sha[:2] / sha, (age + 1, age + 1))
    kept = {path.name for path in store.cache.glob("??/*")}
    assert kept == set(list(parts)[-2:])  # 2 of 1000 bytes within 2500
    store.cache_bytes = 10
    assert store.get("a", next(iter(parts)), 1000) == bytes(1000)  # longer than the cache


def test_a_write_is_whole_or_not_at_all(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part").write_bytes(b"other")

    def half(source: str, target: str) -> None:
        Path(target).write_bytes(b"ot")
        raise OSError("broken off")

    monkeypatch.setattr(store.files, "put_file", half)
    with pytest.raises(PipelineError, match=r"part can't be written to file://.* tries .OSError: broken off"):
        store.put(tmp_path / "part", "ab12")
    assert not list((tmp_path / "store/ab").rglob("*"))


def test_a_damaged_part_is_written_again(store: Store, tmp_path: Path) -> None:
    place = tmp_path / "store" / SHA[:2] / SHA
    place.write_bytes(DATA[:-1] + b"x")
    with pytest.raises(DataError, match="1024 bytes of another content"):
        get(store)
    store.put(tmp_path / "part", SHA)
    assert get(store) == DATA
    written = place.stat().st_mtime_ns
    store.put(tmp_path / "part", SHA)
    assert place.stat().st_mtime_ns == written


def test_a_long_part_is_read_in_pieces_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PIECE_BYTES", 100)
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.0)
    with server(tmp_path / "served", latency=0.0, rate=1e9) as url:
        (tmp_path / "served" / SHA[:2]).mkdir(parents=True)
        part = tmp_path / "served" / SHA[:2] / SHA
        part.write_bytes(DATA)
        over_http = Store(url, tmp_path / "cache", 2500)
        asked: list[tuple[int, int]] = []
        cat_ranges = over_http.files.cat_ranges
        monkeypatch.setattr(
            over_http.files,
            "cat_ranges",
            lambda paths, starts, stops, **options: (
                asked.extend(zip(starts, stops, strict=True)) or cat_ranges(paths, starts, stops, **options)
            ),
        )
        assert get(over_http) == get(over_http) == DATA
        assert asked == [(start, min(start + 100, 1024)) for start in range(0, 1024, 100)]
        shutil.rmtree(tmp_path / "cache")
        part.write_bytes(DATA[:-1] + b"x")
        with pytest.raises(DataError, match="1024 bytes of another content"):
            get(over_http)
        part.unlink()
        with pytest.raises(DataError, match="it isn't there"):
            get(over_http)


def test_loader_processes_read_a_store_that_their_parent_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.0)
    with server(tmp_path / "served", latency=0.0, rate=1e9) as url:
        (tmp_path / "served" / SHA[:2]).mkdir(parents=True)
        (tmp_path / "served" / SHA[:2] / SHA).write_bytes(DATA)
        monkeypatch.setenv("STORE", url)
        monkeypatch.setenv("STORE_CACHE_GIB", "0")

        def load(_number: int) -> dict[str, np.ndarray]:
            found = current_store()
            assert found is not None
            return {"bytes": np.frombuffer(get(found), np.uint8)}

        load(0)
        batches = Batches(load, [len(DATA)] * 2, batch_size=2 * len(DATA), seed=0, workers=1)
        assert [sorted(batch["bytes"].tolist()) for batch in batches.epoch(0)] == [sorted(DATA + DATA)]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"STORE": "bucket"}, "STORE is 'bucket': expected a URL"),
        ({"STORE": "nothing://x"}, "STORE is 'nothing://x': it can't be opened"),
        ({"STORE": "file:///x", "STORE_CACHE_GIB": "much"}, "STORE_CACHE_GIB is 'much': expected a number"),
    ],
)
def test_values_of_the_environment_are_checked(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        current_store()


def chain(folder: Path, monkeypatch: pytest.MonkeyPatch, stages: tuple[tuple[str, str], ...]) -> None:
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    if not Path("params.yaml").exists():
        small.write_raw(folder, images=0, points=600)
    for stage in stages:
        result = small.run(*stage)
        assert result.exit_code == 0, result.output


POINTS = tuple(stage for stage in small.STAGES if stage[1].startswith("points") and stage[0] != "features")


def test_a_chain_with_a_store_gives_the_scores_of_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKING", "off")
    chain(tmp_path / "local", monkeypatch, POINTS)
    monkeypatch.setenv("STORE", f"file://{tmp_path}/store")
    chain(tmp_path / "stored", monkeypatch, POINTS)
    for stage, row in POINTS:
        local, stored = (
            json.loads((tmp_path / name / f"reports/metrics/{stage}/{row}.json").read_text()) for name in ("local", "stored")
        )
        assert local == stored, stage
    for folder, reader in (("shards/points", ShardReader), ("codes/points", CodeReader), ("samples/points-lde", ShardReader)):
        assert [path.name for path in Path("data", folder).iterdir()] == ["index.json"]
        assert reader(Path("data", folder)).index.digest == reader(tmp_path / "local/data" / folder).index.digest
    shutil.rmtree(".cache")
    objects = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert all(sha256_bytes(path.read_bytes()) == path.name for path in objects)
    codes = CodeReader("data/codes/points").index.train[0]
    (tmp_path / "store" / codes.sha256[:2] / codes.sha256).unlink()
    result = small.run("fit", "points-lde")
    assert result.exit_code == 1
    assert "it isn't there; run `dvc repro -f -s extract@points`" in result.output
    monkeypatch.delenv("STORE")
    result = small.run("fit", "points-lde")
    assert "train-000000.safetensors can't be read (No such file or directory)" in result.output


# A real server --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None:
        pytest.skip("moto and s3fs aren't installed: pip install 'moto[server]' '.[s3]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-c", f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        process.kill()


def connect(url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    import s3fs

    variables = {
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": url,
        "FSSPEC_S3_ENDPOINT_URL": url, "STORE": "s3://bucket/prefix", "TRACKING": "off",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    stores._store.cache_clear()
    files = s3fs.S3FileSystem(endpoint_url=url)
    files.makedirs("bucket", exist_ok=True)
    return files


@contextlib.contextmanager
def faulty(url: str, faults: list[str]) -> Iterator[str]:
    """A proxy of the server. A fault is taken for each object that is read: `500`, `slow`, `cut off` or `slow down`."""
    host = url.removeprefix("http://")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = faults.pop(0) if self.command == "GET" and "/prefix/" in self.path and faults else ""
            connection = http.client.HTTPConnection(host)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data, status = answer.read(), answer.status
            connection.close()
            if fault in ("500", "slow down"):
                code = "SlowDown" if fault == "slow down" else "InternalError"
                data, status = (
                    f"<Error><Code>{code}</Code><Message>it is</Message></Error>".encode(),
                    503 if code == "SlowDown" else 500,
                )
            time.sleep(1.0 if fault == "slow" else 0.0)
            self.send_response(status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fault == "cut off" else data)
            self.close_connection = fault == "cut off"

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def authorise(url: str, actions: str) -> None:
    """From now on, so many actions need no rights."""
    plain = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset-auth", actions.encode(), plain)).close()


@pytest.mark.slow
def test_faults_of_an_s3_server(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[str] = []
    with faulty(s3, faults) as url:
        files = connect(url, monkeypatch)
        (tmp_path / "part").write_bytes(DATA)
        store = Store("s3://bucket/prefix", tmp_path / "cache", 0)
        store.put(tmp_path / "part", SHA)
        for each in (["500", "500"], ["slow"], ["cut off", "cut off"], ["slow down", "slow down"]):
            faults[:] = each
            assert get(store) == DATA, each
            assert not faults
        monkeypatch.setattr(stores, "PIECE_BYTES", 100)
        faults[:] = ["500", "cut off", "slow"]
        assert get(store) == DATA
        monkeypatch.setattr(stores, "FIRST_WAIT", 0.0)
        monkeypatch.setattr(stores, "TRIES", 2)
        faults[:] = ["500"] * 1000
        with pytest.raises(PipelineError, match=r"can't be read from s3://bucket/prefix after 2 tries \(OSError: .*it is\)"):
            get(store)
        faults.clear()
        files.rm_file(f"bucket/prefix/{SHA[:2]}/{SHA}")
        with pytest.raises(DataError, match="can't be read from s3://bucket/prefix: it isn't there"):
            get(store)
        with pytest.raises(DataError, match="part can't be written to s3://nobody/prefix: it isn't there"):
            Store("s3://nobody/prefix", tmp_path / "cache", 0).put(tmp_path / "part", SHA)
        store.put(tmp_path / "part", SHA)
        authorise(s3, "0")
        try:  # from now on, nobody has any rights
            for action in (lambda: get(store), lambda: store.put(tmp_path / "part", "ab12")):
                with pytest.raises(PipelineError, match=r"s3://bucket/prefix: no permission \(PermissionError: .*\)") as caught:
                    action()
                assert "\n" not in str(caught.value)
        finally:
            authorise(s3, "inf")


@pytest.mark.slow
def test_a_chain_with_an_s3_server(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = connect(s3, monkeypatch)
    chain(tmp_path / "stored", monkeypatch, POINTS)
    assert len(files.find("bucket/prefix")) >= 8
    shutil.rmtree(".cache")
    assert small.run("evaluate", "points-lde").exit_code == 0
    shard = ShardReader("data/shards/points").index.train[0]
    files.pipe_file(f"bucket/prefix/{shard.sha256[:2]}/{shard.sha256}", b"truncated")
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.0)
    shutil.rmtree(".cache")
    result = small.run("extract", "points")
    assert result.exit_code == 1
    assert "bytes of another content" in result.output
