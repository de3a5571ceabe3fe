"""Messages: any text becomes one printable line of bounded length."""

from __future__ import annotations

import pickle

import pytest

from pipeline.errors import DataError, PipelineError, printable


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("ü 日本語 😀", "ü 日本語 😀"),
        (" a\n\tb\r\nc\u2028d\x85e ", "a b c d e"),
        ("\x1b[31mred\x07\x00\x7f\x9b", r"\x1b[31mred\x07\x00\x7f\x9b"),
        ("gnp.\u202efdp", r"gnp.\u202efdp"),
        ("caf\udce9.png", r"caf\xe9.png"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_printable(text: str, line: str) -> None:
    assert printable(text) == line
    assert printable(line) == line
    assert str(DataError(text)) == line
    line.encode()


@pytest.mark.parametrize("text", ["x" * 700_000, "\x1b" * 700_000, "a " * 1500, "y" * 2001])
def test_long_messages_lose_their_middle(text: str) -> None:
    line = printable(f"row.key: {text}; do this")
    assert len(line) <= 2000
    assert line.startswith("row.key: ")
    assert line.endswith("; do this")
    assert " [..] " in line
    assert printable(line) == line


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DataError("a\nb")))
    assert isinstance(error, PipelineError)
    assert str(error) == "a b"
