"""Corrupt and malicious files: each gives one clear line and exit status 1. Nothing is written, run or waited for.

The attacker may recompute the digests in an index; then it's the contents that must be refused.
"""

# ruff: noqa: E501 (tables)

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import resource
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.system.files import sha256_bytes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

SHARDS, CODES = Path("data/shards/blobs"), Path("data/codes/blobs-ae")
PICKLE = b"cos\nsystem\n(S'touch owned'\ntR."  # runs a command when unpickled


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which all stages have run."""
    folder = tmp_path_factory.mktemp("finished")
    small.write_raw(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in small.STAGES:
            result = small.run(*stage)
            assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def workspace(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, as working folder; no file may appear next to it."""
    copy = tmp_path / "outside" / "inside"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("raw"))
    (copy / "raw").symlink_to(finished / "raw")  # no test writes there
    monkeypatch.chdir(copy)
    yield copy
    assert [p.name for p in (tmp_path / "outside").iterdir()] == ["inside"]
    assert not list(copy.rglob("owned"))


def refused(*stage: str, mention: str = "") -> str:
    """Runs a stage that must fail; returns its line."""
    before = small.files(Path("."))
    result = small.run(*stage)
    lines = result.stderr.strip().splitlines()
    assert isinstance(result.exception, SystemExit), (result.exception, result.output)
    assert result.exit_code == 1, result.output
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"error: {stage[0]} {stage[1]}: "), result.stderr
    assert len(lines[0]) < 600, result.stderr
    assert mention in lines[0], result.stderr
    after = small.files(Path("."))
    assert {k: v for k, v in after.items() if k in before} == before, "an earlier output has changed"
    assert not [k for k in after if k not in before and not k.startswith("reports/figures")], "something was written"
    return lines[0]


def forge(folder: Path, split: str, data: bytes, number: int = 0) -> None:
    """Puts a file of shards or codes in place, with its digest and length in the index."""
    index = json.loads((folder / "index.json").read_text())
    part = index[split][number]
    (folder / part["name"]).write_bytes(data)
    part["bytes"], part["sha256"] = len(data), sha256_bytes(data)
    (folder / "index.json").write_text(json.dumps(index))


# Damage by accident ---------------------------------------------------------------------------------------------------

FILES = {
    "extract": (("extract", "blobs-ae"), SHARDS / "train-000001.tar"),
    "fit": (("fit", "blobs-lde"), CODES / "train-000001.safetensors"),
    "evaluate": (("evaluate", "blobs-lde"), Path("data/samples/blobs-lde/samples-000001.tar")),
}


@pytest.mark.parametrize("place", range(12))
@pytest.mark.parametrize("kind", FILES)
def test_truncated(workspace: Path, kind: str, place: int) -> None:
    stage, path = FILES[kind]
    data = path.read_bytes()
    path.write_bytes(data[: place * len(data) // 12])
    refused(*stage, mention=f"{path} has ")


@pytest.mark.parametrize("place", range(15))
@pytest.mark.parametrize("kind", FILES)
def test_bit_flipped(workspace: Path, kind: str, place: int) -> None:
    stage, path = FILES[kind]
    data = bytearray(path.read_bytes())
    data[place * len(data) // 15 + place] ^= 1 << place % 8
    path.write_bytes(data)
    refused(*stage, mention=f"{path} doesn't match the digest")


@pytest.mark.parametrize("what", ["missing", "longer", "folder", "pipe", "zeros", "loop", "swapped"])
@pytest.mark.parametrize("kind", FILES)
def test_something_else_in_its_place(workspace: Path, kind: str, what: str) -> None:
    stage, path = FILES[kind]
    data = path.read_bytes()
    path.unlink()
    if what == "longer":
        path.write_bytes(data + b"\0")
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "zeros":
        path.symlink_to("/dev/zero")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "swapped":
        path.write_bytes(data[::-1])
    refused(*stage, mention=str(path))


@pytest.mark.parametrize(
    ("stage", "path"),
    [
        (("extract", "blobs-ae"), SHARDS), (("train", "blobs-ae"), SHARDS), (("control", "blobs"), SHARDS),
        (("extract", "blobs-ae"), Path("data/autoencoders/blobs-ae")),
        (("extract", "blobs-ae"), Path("data/autoencoders/blobs-ae/encoder.safetensors")),
        (("extract", "blobs-ae"), Path("data/autoencoders/blobs-ae/decoder.safetensors")),
        (("fit", "blobs-lde"), CODES), (("sample", "blobs-lde"), CODES / "decoder.safetensors"),
        (("sample", "blobs-lde"), Path("data/densities/blobs-lde/density.safetensors")),
        (("evaluate", "blobs-lde"), Path("data/samples/blobs-lde")), (("prepare", "blobs"), Path("raw/blobs")),
        (("prepare", "points"), Path("raw/points.npy")),
    ],
)  # fmt: skip
def test_missing(workspace: Path, stage: tuple[str, str], path: Path) -> None:
    if path.parts[0] == "raw":
        Path("raw").unlink()
    else:
        path.rename("elsewhere")
    refused(*stage, mention=str(path))


# Shards whose digests are right ---------------------------------------------------------------------------------------


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0), **header: Any) -> bytes:
    """An array file, or one with a forged header."""
    if header:
        values = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | header
        return raw_npy(f"{values}\n", array.tobytes())
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version, allow_pickle=False)
    return buffer.getvalue()


def raw_npy(header: str, body: bytes = b"\0" * 2560) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body


def tar(
    *members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.GNU_FORMAT, pax: dict[str, str] | None = None
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers=pax) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def padded(data: bytes, least: int = 2560) -> bytes:
    """Padded, so its length doesn't reveal the fault."""
    return data + b"\0" * max(least - len(data), 0)


GOOD = np.zeros((40, 1, 8, 8), np.uint8)
LABELS = np.zeros(40, np.int64)
EXAMPLES = ("000000.examples.npy", npy(GOOD))
SPARSE = special("000000.examples.npy", tarfile.GNUTYPE_SPARSE)


def huge_member() -> bytes:
    info = tarfile.TarInfo("000000.examples.npy")
    info.size = 10**12
    return info.tobuf(tarfile.GNU_FORMAT) + EXAMPLES[1]


HOSTILE_SHARDS: dict[str, bytes] = {
    # an array of the wrong kind
    **{f"dtype {d}": tar(("000000.examples.npy", padded(npy(GOOD.astype(d)))))
       for d in ("i1", "bool", "<u2", ">u2", "<i4", "<f4", ">f4", "<f8", "c8", "S1", "U1", "V1")},
    "objects": tar(("000000.examples.npy", raw_npy("{'descr': '|O', 'fortran_order': False, 'shape': (40, 1, 8, 8)}\n", PICKLE))),
    "records": tar(("000000.examples.npy", npy(np.zeros((40, 1, 8, 8), [("a", "u1")])))),
    "dates": tar(("000000.examples.npy", npy(np.zeros((40, 1, 8, 8), "M8[s]")))),
    **{f"shape {s}": tar(("000000.examples.npy", padded(npy(np.zeros(s, np.uint8)))))
       for s in ((40, 1, 8, 9), (40, 3, 8, 8), (40, 64), (2560,), (40, 1, 8, 8, 1), (), (0, 1, 8, 8), (1, 40, 8, 8))},
    **{f"claimed shape {s}": tar(("000000.examples.npy", npy(GOOD, shape=s)))
       for s in ((10**15, 1, 8, 8), (-40, 1, 8, 8), (41, 1, 8, 8), (39, 1, 8, 8), (2**63, 1, 8, 8), (2**64 - 40, 1, 8, 8), (40,))},
    "fortran": tar(("000000.examples.npy", npy(GOOD, fortran_order=True))),
    "version 2": tar(("000000.examples.npy", npy(GOOD, (2, 0)))),
    "version 3": tar(("000000.examples.npy", npy(GOOD, (3, 0)))),
    "version 9": tar(("000000.examples.npy", b"\x93NUMPY\x09\x00" + npy(GOOD)[8:])),
    "header of code": tar(("000000.examples.npy", raw_npy("__import__('os').system('touch owned')\n"))),
    "header of parentheses": tar(("000000.examples.npy", raw_npy("(" * 9000))),
    "header of minuses": tar(("000000.examples.npy", raw_npy("-" * 9000 + "1"))),
    "header too long": tar(("000000.examples.npy", raw_npy("{" + " " * 60000 + "}"))),
    "header without shape": tar(("000000.examples.npy", raw_npy("{'descr': '|u1', 'fortran_order': False}\n"))),
    "header with more": tar(("000000.examples.npy", npy(GOOD, more=1))),
    "header cut": tar(("000000.examples.npy", npy(GOOD)[:40]), ("000000.padding", b"\0" * 2560)),
    "not an array": tar(("000000.examples.npy", b"\0" * 2688)),
    "text": tar(("000000.examples.npy", b"hello" * 600)),
    "pickle": tar(("000000.examples.npy", padded(PICKLE))),
    "empty array file": tar(("000000.examples.npy", b""), ("000000.padding", b"\0" * 2560)),
    "archive of arrays": tar(("000000.examples.npz", padded(b"PK"))),
    # members that don't belong
    "pickle beside": tar(EXAMPLES, ("000000.labels.pkl", PICKLE)),
    "pyd beside": tar(EXAMPLES, ("000000.labels.pyd", PICKLE)),
    "pth beside": tar(EXAMPLES, ("000000.pth", PICKLE)),
    "script beside": tar(EXAMPLES, ("run.py", b"open('owned', 'w')")),
    "unknown array": tar(EXAMPLES, ("000000.more.npy", npy(GOOD))),
    "upper case": tar(("000000.EXAMPLES.npy", npy(GOOD))),
    "twice": tar(EXAMPLES, EXAMPLES),
    "starts at one": tar(("000001.examples.npy", npy(GOOD))),
    "gap": tar(("000000.examples.npy", npy(GOOD[:20])), ("000002.examples.npy", npy(GOOD[20:]))),
    "interleaved": tar(("000000.examples.npy", npy(GOOD[:20])), ("000001.examples.npy", npy(GOOD[20:])),
                       ("000000.labels.npy", npy(LABELS[:20]))),
    "no dot": tar(("examples", npy(GOOD))),
    "no name": tar(("", npy(GOOD))),
    **{f"climbs {n}": tar((n, npy(GOOD)))
       for n in ("../000000.examples.npy", "../../000000.examples.npy", "/tmp/000000.examples.npy", "a/000000.examples.npy",
                 "./000000.examples.npy", "000000/../../owned.examples.npy", "..", "000000.examples.npy/..", "C:\\x.examples.npy")},
    "longest name": tar(("0" * 5000 + ".examples.npy", npy(GOOD))),
    "control characters": tar(("000000\n\x1b[31m.examples.npy", npy(GOOD))),
    "unicode digits": tar(("٠٠٠٠٠٠.examples.npy", npy(GOOD))),
    **{f"special {k!r}": tar(EXAMPLES, special("000000.labels.npy", k, "/etc/passwd"))
       for k in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.CONTTYPE)},
    "link instead": tar(special("000000.examples.npy", tarfile.SYMTYPE, "/etc/passwd"), ("000001.examples.npy", npy(GOOD))),
    "sparse": tar(SPARSE, EXAMPLES),
    "pax": tar(EXAMPLES, form=tarfile.PAX_FORMAT, pax={"GNU.sparse.size": str(10**15), "GNU.sparse.major": "1"}),
    "pax size": tar(EXAMPLES, form=tarfile.PAX_FORMAT, pax={"size": str(10**15)}),
    "pax path": tar(EXAMPLES, form=tarfile.PAX_FORMAT, pax={"path": "../owned"}),
    "huge declared": huge_member(),
    # labels and codes
    "labels too few": tar(EXAMPLES, ("000000.labels.npy", npy(LABELS[:39]))),
    "labels too many": tar(EXAMPLES, ("000000.labels.npy", npy(np.zeros(41, np.int64)))),
    "labels of floats": tar(EXAMPLES, ("000000.labels.npy", npy(LABELS.astype(float)))),
    "labels of 32 bits": tar(EXAMPLES, ("000000.labels.npy", npy(LABELS.astype(np.int32)))),
    "labels of objects": tar(EXAMPLES, ("000000.labels.npy", raw_npy("{'descr': '|O', 'fortran_order': False, 'shape': (40,)}\n", PICKLE))),
    "labels in rows": tar(EXAMPLES, ("000000.labels.npy", npy(LABELS[:, None]))),
    "codes of NaN": tar(EXAMPLES, ("000000.codes.npy", npy(np.full((40, 3), np.nan, np.float32)))),
    "codes of one dimension": tar(EXAMPLES, ("000000.codes.npy", npy(np.zeros(40, np.float32)))),
    "labels alone": tar(("000000.labels.npy", npy(LABELS)), ("000001.examples.npy", npy(GOOD))),
    "labels in some blocks": tar(("000000.examples.npy", npy(GOOD[:20])), ("000000.labels.npy", npy(LABELS[:20])),
                                 ("000001.examples.npy", npy(GOOD[20:]))),
    "too few examples": tar(("000000.examples.npy", padded(npy(GOOD[:39])))),
    "too many examples": tar(EXAMPLES, ("000001.examples.npy", npy(GOOD))),
    # not a tar file
    "gzip": padded(gzip.compress(tar(EXAMPLES))),
    "bzip2": padded(bz2.compress(tar(EXAMPLES))),
    "bomb": padded(lzma.compress(b"\0" * 10**7)),
    "zeros": b"\0" * 10240,
    "ones": b"\xff" * 10240,
    "prose": b"a tar file it isn't " * 500,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_SHARDS)
def test_hostile_shard(workspace: Path, name: str) -> None:
    forge(SHARDS, "train", padded(HOSTILE_SHARDS[name]))
    assert "run `dvc repro -f -s prepare@blobs`" in refused("extract", "blobs-ae", mention="train-000000.tar")


def test_archive_in_an_archive(workspace: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("000000.examples.npy", npy(GOOD))
    forge(SHARDS, "train", buffer.getvalue())
    refused("extract", "blobs-ae", mention="train-000000.tar")


@pytest.mark.parametrize("stage", [("train", "blobs-ae"), ("control", "blobs"), ("evaluate", "blobs-lde")])
def test_every_stage_that_reads_shards_refuses_them(workspace: Path, stage: tuple[str, str]) -> None:
    for split in ("train", "valid", "test"):
        forge(SHARDS, split, padded(HOSTILE_SHARDS["pickle"]))
    refused(*stage, mention=".tar")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_loader_process_refuses_in_one_line_too(workspace: Path, monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    monkeypatch.setenv("LOADER_WORKERS", workers)
    forge(SHARDS, "train", padded(HOSTILE_SHARDS["pickle"]))
    refused("train", "blobs-ae", mention="train-000000.tar")


@pytest.mark.parametrize("place", [*range(0, 148, 8), *range(156, 512, 30)])
def test_flipped_byte_of_a_tar_header_with_a_right_digest(workspace: Path, place: int) -> None:
    data = bytearray((SHARDS / "train-000000.tar").read_bytes())
    data[place] ^= 0x15
    forge(SHARDS, "train", bytes(data))
    refused("extract", "blobs-ae", mention="train-000000.tar")


@pytest.mark.parametrize("place", range(512, 512 + 72, 4))
def test_flipped_byte_of_an_array_header_with_a_right_digest(workspace: Path, place: int) -> None:
    data = bytearray((SHARDS / "train-000000.tar").read_bytes())
    data[place] ^= 0x15
    forge(SHARDS, "train", bytes(data))
    refused("extract", "blobs-ae", mention="train-000000.tar")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=2560, max_size=4000), start=st.booleans())
def test_random_bytes_as_a_shard(workspace: Path, data: bytes, start: bool) -> None:
    forge(SHARDS, "train", (tar(EXAMPLES)[:512] if start else b"") + data)
    refused("extract", "blobs-ae", mention="train-000000.tar")


# Indexes --------------------------------------------------------------------------------------------------------------

WRONG: list[Any] = [None, 1, -1, 1.5, True, "x", "../x", [], {}, [None], [[]], ["x"], [1.5], 10**30, float("nan"), float("inf")]
FINE: dict[str, list[Any]] = {
    "value_range": [], "label_names": [None, [], ["x"]], "samples": [[]], "decoder_sha256": [],
    "mean": [], "source_digest": ["x", "../x"],
}  # fmt: skip


def index_cases(keys: list[str]) -> list[Any]:
    return [
        pytest.param(key, value, id=f"{key}={str(value)[:12]}")
        for key in keys
        for value in WRONG
        if not any(type(value) is type(fine) and value == fine for fine in FINE.get(key, []))
    ]


@pytest.mark.parametrize(
    ("key", "value"), index_cases(["kind", "shape", "dtype", "value_range", "label_names", "train", "samples"])
)
def test_wrong_value_in_an_index_of_shards(workspace: Path, key: str, value: Any) -> None:
    if key == "train" and value == []:
        pytest.skip("no shards to train on: for extract to say")
    index = json.loads((SHARDS / "index.json").read_text()) | {key: value}
    (SHARDS / "index.json").write_text(json.dumps(index))
    refused("extract", "blobs-ae", mention="index.json")


@pytest.mark.parametrize(
    ("key", "value"), index_cases(["dim", "mean", "std", "source_digest", "value_range", "train", "valid"])
)
def test_wrong_value_in_an_index_of_codes(workspace: Path, key: str, value: Any) -> None:
    if key == "value_range" and value is None:
        pytest.skip("as for vectors")
    index = json.loads((CODES / "index.json").read_text()) | {key: value}
    (CODES / "index.json").write_text(json.dumps(index))
    refused("fit", "blobs-lde", mention="index.json")


@pytest.mark.parametrize(("key", "value"), index_cases(["name", "count", "bytes", "sha256"]))
@pytest.mark.parametrize(("folder", "stage"), [(SHARDS, ("extract", "blobs-ae")), (CODES, ("fit", "blobs-lde"))])
def test_wrong_value_in_a_file_of_an_index(workspace: Path, folder: Path, stage: tuple[str, str], key: str, value: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["train"][0][key] = value
    (folder / "index.json").write_text(json.dumps(index))
    refused(*stage)


@pytest.mark.parametrize(
    "name", ["../train-000000.tar", "/etc/passwd", "train-000001.tar", "train-000000.tar\0", "train-0.tar", ""]
)
def test_names_that_lead_elsewhere(workspace: Path, name: str) -> None:
    index = json.loads((SHARDS / "index.json").read_text())
    index["train"][0]["name"] = name
    (SHARDS / "index.json").write_text(json.dumps(index))
    refused("extract", "blobs-ae", mention="expected train-000000.tar, got")


@pytest.mark.parametrize(
    "shape", [[1, 10**9, 10**9], [1, 8], [8], [1, 8, 8, 1], [0, 8, 8], [-1, 8, 8], [1, 16, 16], [3, 8, 8], [1, 4, 4]]
)
@pytest.mark.parametrize("stage", [("extract", "blobs-ae"), ("train", "blobs-ae")])
def test_impossible_shapes(workspace: Path, stage: tuple[str, str], shape: list[int]) -> None:
    index = json.loads((SHARDS / "index.json").read_text()) | {"shape": shape}
    (SHARDS / "index.json").write_text(json.dumps(index))
    refused(*stage)


@pytest.mark.parametrize("key", ["kind", "shape", "dtype", "train"])
def test_key_missing_from_an_index(workspace: Path, key: str) -> None:
    index = json.loads((SHARDS / "index.json").read_text())
    del index[key]
    (SHARDS / "index.json").write_text(json.dumps(index))
    refused("extract", "blobs-ae")


NO_JSON = {
    "empty": b"", "list": b"[]", "null": b"null", "number": b"1", "string": b'"x"', "open": b"{", "binary": b"\xff\xfe\x00",
    "deep": b"[" * 100_000, "long number": b'{"dim": ' + b"9" * 6000 + b"}", "unknown key": b'{"dtype": "uint8", "x": 1}',
    "pickle": PICKLE, "too long": b" " * (65 * 2**20),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_JSON)
@pytest.mark.parametrize(("folder", "stage"), [(SHARDS, ("extract", "blobs-ae")), (CODES, ("fit", "blobs-lde"))])
def test_an_index_that_is_none(workspace: Path, folder: Path, stage: tuple[str, str], name: str) -> None:
    (folder / "index.json").write_bytes(NO_JSON[name])
    refused(*stage, mention="index.json")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_index_with_something_random_in_it(workspace: Path, data: st.DataObject) -> None:
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=5
    )  # fmt: skip
    original = (CODES / "index.json").read_text()
    index = json.loads(original)
    key = data.draw(st.sampled_from(["dim", "valid", "train", "test"]))
    index[key] = data.draw(json_values)
    (CODES / "index.json").write_text(json.dumps(index))
    refused("fit", "blobs-lde", mention="index.json")
    (CODES / "index.json").write_text(original)


# Safetensors ----------------------------------------------------------------------------------------------------------


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


N, D = 40, 3
BODY = np.zeros((N, D), "<f4").tobytes()
CODES_ENTRY = entry("F32", [N, D], 0, 480)
NAN = np.zeros((N, D), "<f4")
NAN[7, 1] = np.nan
HOSTILE_CODES: dict[str, bytes] = {
    "header longer than the file": safetensors({"codes": CODES_ENTRY}, BODY, 10**6),
    "header of all the memory": safetensors({"codes": CODES_ENTRY}, BODY, 2**64 - 1),
    "header of 99 MB": safetensors({"codes": CODES_ENTRY}, BODY, 99_999_999),
    "no header": safetensors(b"", BODY),
    "no JSON": safetensors(b"{", BODY),
    "a list": safetensors([], BODY),
    "deep": safetensors(b"[" * 10_000, BODY),
    "no codes": safetensors({"vectors": CODES_ENTRY}, BODY),
    "no tensors": safetensors({}, b""),
    "one more": safetensors({"codes": CODES_ENTRY, "more": entry("F32", [1], 480, 484)}, BODY + b"\0" * 4),
    **{f"type {t}": safetensors({"codes": entry(t, [N, D], 0, N * D * w)}, b"\0" * (N * D * w))
       for t, w in (("F64", 8), ("F16", 2), ("BF16", 2), ("I32", 4), ("U8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("X", 4))},
    **{f"shape {s}": safetensors({"codes": entry("F32", s, 0, 480)}, BODY)
       for s in ([D, N], [120], [N, D, 1], [1, N, D], [N, D + 1], [10**18, 10**18], [2**63, 2], [-N, D], [], [0], ["x"])},
    "offsets beyond": safetensors({"codes": entry("F32", [N, D], 0, 10**9)}, BODY),
    "offsets reversed": safetensors({"codes": entry("F32", [N, D], 480, 0)}, BODY),
    "offsets negative": safetensors({"codes": entry("F32", [N, D], -480, 0)}, BODY),
    "hole": safetensors({"codes": entry("F32", [N, D], 4, 484)}, BODY + b"\0" * 4),
    "overlap": safetensors({"codes": CODES_ENTRY, "labels": entry("I64", [N], 0, 320)}, BODY),
    "tail": safetensors({"codes": CODES_ENTRY}, BODY + b"\0" * 8),
    "NaN": safetensors({"codes": CODES_ENTRY}, NAN.tobytes()),
    "infinite": safetensors({"codes": CODES_ENTRY}, np.where(np.isnan(NAN), np.inf, NAN).astype("<f4").tobytes()),
    "labels too few": safetensors({"codes": CODES_ENTRY, "labels": entry("I64", [39], 480, 792)}, BODY + b"\0" * 312),
    "labels of floats": safetensors({"codes": CODES_ENTRY, "labels": entry("F64", [N], 480, 800)}, BODY + b"\0" * 320),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}, "codes": CODES_ENTRY}, BODY),
    "pickle": PICKLE * 30,
    "array file": npy(np.zeros((N, D), np.float32)),
    "zeros": b"\0" * 600,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_CODES)
def test_hostile_codes(workspace: Path, name: str) -> None:
    forge(CODES, "train", padded(HOSTILE_CODES[name], 480) if "tail" not in name else HOSTILE_CODES[name])
    assert "run `dvc repro -f -s extract@blobs-ae`" in refused("fit", "blobs-lde", mention="train-000000.safetensors")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=480, max_size=1000), start=st.booleans())
def test_random_bytes_as_codes(workspace: Path, data: bytes, start: bool) -> None:
    forge(CODES, "train", (struct.pack("<Q", 200) + b"{" if start else b"") + data)
    refused("fit", "blobs-lde", mention="train-000000.safetensors")


def rewritten(path: Path, metadata: Callable[[dict[str, Any]], Any], tensors: Callable[[dict[str, np.ndarray]], Any]) -> bytes:
    from safetensors import safe_open
    from safetensors.numpy import save

    with safe_open(path, framework="np") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        key, text = next(iter(file.metadata().items()))
    described = json.loads(text)
    changed = metadata(described)
    arrays = tensors(values)
    return save(values if arrays is None else arrays, {key: json.dumps(described if changed is None else changed)})


def keep(_: Any) -> None:
    return None


def setting(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(described: dict[str, Any]) -> None:
        for key in keys[:-1]:
            described = described[key]
        described[keys[-1]] = to

    return change


def all_nan(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: np.full_like(v, np.nan) if v.dtype.kind == "f" else v for k, v in values.items()}


def one_less(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(list(values.items())[1:])


def one_more(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**values, "more": np.zeros(3, np.float32)}


def flattened(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v.reshape(-1)[:-1].copy() if v.size > 1 else v for k, v in values.items()}


TENSORS = [(keep, all_nan), (keep, one_less), (keep, one_more), (keep, flattened), (keep, lambda _: {})]
DESCRIPTIONS = [lambda d, v=value: v for value in ([], 1, "x", {})]
DENSITY = [
    *TENSORS, *((d, keep) for d in DESCRIPTIONS),
    *((setting("family", to=f), keep) for f in ("x", "", "os", "../lde", "lde.os", "density", "__init__", 1, None, [], {})),
    *((setting("arguments", "dim", to=d), keep) for d in (0, -1, 4, 10**6, 10**30, 1.5, "3", None, [])),
    *((setting("arguments", "components", to=c), keep) for c in (0, -1, 3, 10**7, "2", None)),
    (setting("arguments", "unknown", to=1), keep), (setting("arguments", to=[]), keep),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(DENSITY)))
def test_hostile_density(workspace: Path, number: int) -> None:
    path = Path("data/densities/blobs-lde/density.safetensors")
    path.write_bytes(rewritten(path, *DENSITY[number]))
    refused("sample", "blobs-lde")
    refused("evaluate", "blobs-lde")


NETWORK = [
    *TENSORS, *((d, keep) for d in DESCRIPTIONS), (setting("class", to="os.system"), keep), (setting("unknown", to=1), keep),
    *((setting(k, to=v), keep) for k in ("latent_dim", "blocks", "base_channels") for v in (0, -1, 2, 10**6, 10**30, "3", None, 2.5)),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(NETWORK)))
def test_hostile_networks(workspace: Path, number: int) -> None:
    path = Path("data/autoencoders/blobs-ae/encoder.safetensors")
    path.write_bytes(rewritten(path, *NETWORK[number]))
    refused("extract", "blobs-ae")
    decoder = CODES / "decoder.safetensors"
    data = rewritten(decoder, *NETWORK[number])
    decoder.write_bytes(data)
    refused("sample", "blobs-lde", mention="doesn't match the digest")
    index = json.loads((CODES / "index.json").read_text()) | {"decoder_sha256": sha256_bytes(data)}
    (CODES / "index.json").write_text(json.dumps(index))
    refused("sample", "blobs-lde")


# The environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("LOADER_WORKERS", v) for v in ("x", "-1", "1.5")] + [("CACHE_MIB", v) for v in ("x", "-1", "1e3")]
    + [("PROCESSES", v) for v in ("x", "0", "-1", "1.5", "99999999")],
)  # fmt: skip
def test_the_environment_is_checked(workspace: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    refused("train", "blobs-ae", mention=name)


@pytest.mark.parametrize("value", ["gpu", "cuda:7", "CPU", "x" * 1000])
def test_the_device_is_checked(workspace: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    from pipeline.system.ranks import join

    join.cache_clear()
    monkeypatch.setenv("DEVICE", value)
    refused("train", "blobs-ae", mention="DEVICE")


# A full disk ----------------------------------------------------------------------------------------------------------


def stages() -> list[tuple[str, str]]:
    return [stage for stage in small.STAGES if stage[1].startswith("blobs")]


SHORT = {("features", 500), ("features", 3000), ("evaluate", 3000)}  # stages whose files are all shorter than the limit


@pytest.mark.parametrize(
    ("limit", "stage"),
    [(limit, stage) for limit in (0, 500, 3000) for stage in stages() if (stage[0], limit) not in SHORT],
    ids=str,
)
def test_a_file_that_cant_grow(workspace: Path, limit: int, stage: tuple[str, str]) -> None:
    """As on a full disk: each write beyond the limit fails, in Python, in Rust and in C++."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        before = small.files(Path("data"))
        result = small.run(*stage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    others = ("training", "fitting", "warning: no checkpoint can be written")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(others)]
    assert len(lines) == 1, result.stderr
    assert "a file is too large" in lines[0]
    assert "existing files are intact" in lines[0]
    assert small.files(Path("data")) == before
    assert not list(Path(".").rglob("*.partial"))
    assert small.run(*stage).exit_code == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("stage", [("extract", "blobs-ae"), ("sample", "blobs-lde")], ids=lambda s: s[0])
def test_other_words_of_the_system(workspace: Path, monkeypatch: pytest.MonkeyPatch, stage: tuple[str, str], code: int) -> None:
    def replace(source: Any, target: Any) -> None:
        raise OSError(code, os.strerror(code), str(target))

    monkeypatch.setattr("pipeline.system.files.os.replace", replace)
    refused(*stage)


# What the report reads ------------------------------------------------------------------------------------------------

REPORTED = (
    ("evaluate@blobs-lde", Path("reports/metrics/evaluate/blobs-lde.json")),
    ("fit@points-lde", Path("reports/metrics/fit/points-lde.json")),
    ("prepare@blobs", Path("reports/metrics/prepare/blobs.json")),
    ("evaluate@blobs-lde", Path("reports/runs/evaluate/blobs-lde.json")),
    ("fit@blobs-lde", Path("reports/curves/fit/blobs-lde.tsv")),
    ("train@blobs-ae", Path("reports/arrays/train/blobs-ae/reconstructions.safetensors")),
    ("sample@points-lde", Path("reports/arrays/sample/points-lde/samples.safetensors")),
)


def one_digit(data: bytes) -> bytes:
    place = next(i for i in range(len(data) - 1, -1, -1) if data[i] in b"12345678")
    return data[:place] + bytes([data[place] + 1]) + data[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "list": lambda data: b"[1, 2]",
    "words": lambda data: b'{"seconds": "many", "outputs": 3, "samples": "x"}',
    "zeros": lambda data: bytes(len(data)),
    "digit": one_digit,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("stage", "path"), REPORTED, ids=lambda value: str(value).rpartition("/")[2])
def test_damaged_reports(workspace: Path, stage: str, path: Path, damage: str) -> None:
    if damage == "digit" and path.parts[1] == "runs":
        pytest.skip("a run's seconds are its own record")
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    done = small.run("report")
    assert done.exit_code == 1, done.output
    assert done.output.count("\n") == 1
    assert str(path) in done.output
    assert f"dvc repro -f -s {stage}" in done.output
    assert not Path("reports/index.html").exists()


@pytest.mark.parametrize(("stage", "path"), REPORTED, ids=lambda value: str(value).rpartition("/")[2])
def test_pipes_in_place_of_reports(workspace: Path, stage: str, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # whose reader would wait for ever
    done = small.run("report")
    assert done.exit_code == 1, done.output
    assert done.output.count("\n") == 1
    assert str(path) in done.output
    assert f"dvc repro -f -s {stage}" in done.output
