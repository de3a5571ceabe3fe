"""Stages, rows and their state."""

from __future__ import annotations

import click

from pipeline.errors import PipelineError
from pipeline.settings import read_params
from stages.reporting.states import DONE, states
from stages.workspace import TABLE_OF_STAGE

__all__ = ["print_overview"]


def print_overview() -> None:
    """Prints each row with the state of its stages."""
    try:
        params = read_params()
    except PipelineError as error:
        click.echo(f"\nerror: {error}", err=True)
        raise SystemExit(1) from None
    state_of = states(params)
    click.echo("\nRows of params.yaml, with their state by dvc.lock (`dvc status` also checks files and code)")
    tables = dict.fromkeys(TABLE_OF_STAGE.values())
    width = max((len(row) for table in tables for row in params.rows(table)), default=0)
    for table in tables:
        stages = [stage for stage, of in TABLE_OF_STAGE.items() if of == table]
        click.echo(f"\n  {table}" + ("" if params.rows(table) else ": no rows"))
        for row in params.rows(table):
            by_stage = {stage: state_of[stage, row] for stage in stages}
            if len(set(by_stage.values())) == 1 and len(stages) > 1:
                text = f"{', '.join(stages)}: {by_stage[stages[0]]}"
            else:
                text = "; ".join(f"{stage}: {state}" for stage, state in by_stage.items())
            click.echo(f"    {row:{width}}  {text}")
    counts = list(state_of.values())
    waiting = sum(state != DONE for state in counts)
    click.echo(f"\n{len(counts) - waiting} of {len(counts)} stages done" + ("; `dvc repro` runs the rest" if waiting else ""))
