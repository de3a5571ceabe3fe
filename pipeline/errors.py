"""Errors that a user can mend: each carries one clear line saying what is wrong and what to do."""

from __future__ import annotations

__all__ = ["DataError", "PipelineError", "SettingsError", "TrainingError"]


class PipelineError(Exception):
    """Base of all errors whose message is meant for the user. The command line prints it and exits with 1."""


class SettingsError(PipelineError):
    """A setting is unknown, of the wrong type, or impossible. The message names the row and the key."""


class DataError(PipelineError):
    """A file is missing, truncated, corrupt or of the wrong shape. The message names the file."""


class TrainingError(PipelineError):
    """Training can't go on, for example after a NaN. The message names the step and the likely cause."""
