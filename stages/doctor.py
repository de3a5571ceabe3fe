"""What the machine has: versions, device, memory, disk, data, tracking server, DVC and git."""

from __future__ import annotations

import click

__all__ = ["doctor"]


@click.command("doctor")
def doctor() -> None:
    """Check versions, device, disk space, data and the tracking server."""
