"""Errors that a user can fix: each says in one line what is wrong and what to do."""

from __future__ import annotations

import re

__all__ = ["DataError", "PipelineError", "SettingsError", "TrainingError", "printable"]

MESSAGE_CHARACTERS = 2000


def printable(text: str) -> str:
    r"""Text that may hold names of files, as one line that any terminal can show.

    White space becomes a single space. Characters that aren't printable, such as ESC and bytes that aren't UTF-8, become
    escapes. The middle of a text of more than 2,000 characters is left out.

    Example:
        >>> printable("a\n\x1b[31mb\udcff")
        'a \\x1b[31mb\\xff'
    """
    half = MESSAGE_CHARACTERS // 2
    if len(text) > 4 * MESSAGE_CHARACTERS:  # first, since the time grows with the length
        text = f"{text[: 2 * half]}{text[-2 * half :]}"
    line = "".join(c if c.isprintable() else _escape(c) for c in re.sub(r"\s+", " ", text).strip())
    return line if len(line) <= MESSAGE_CHARACTERS else f"{line[: half - 3].rstrip()} [..] {line[-half + 3 :].lstrip()}"


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that isn't UTF-8, as os.fsdecode reads it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class PipelineError(Exception):
    """Base of all errors whose message is meant for the user. The command line prints it and exits with 1."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class SettingsError(PipelineError):
    """A setting is unknown, of the wrong type, or impossible. The message names the row and the key."""


class DataError(PipelineError):
    """A file is missing, truncated, corrupt or of the wrong shape. The message names the file."""


class TrainingError(PipelineError):
    """Training can't go on, for example after a NaN. The message names the step and the likely cause."""
