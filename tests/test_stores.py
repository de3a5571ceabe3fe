"""Parts in a store: whole or not at all, checked on arrival, tried again, and cached within a bound."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import DataError, PipelineError, SettingsError
from pipeline.storage import stores
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
def server() -> Iterator[str]:
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


@pytest.mark.slow
def test_a_chain_with_an_s3_server(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    variables = {
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": server,
        "FSSPEC_S3_ENDPOINT_URL": server, "STORE": "s3://bucket/prefix", "TRACKING": "off",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    files = s3fs.S3FileSystem(endpoint_url=server)
    files.mkdir("bucket")
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
