"""The command line: `python -m stages STAGE NAME`."""

from __future__ import annotations

import importlib
import warnings

import click

from stages.workspace import TABLE_OF_STAGE

STAGES = (*TABLE_OF_STAGE, "report")
TOOLS = ("repro", "compare", "set", "settings", "score", "record", "export", "check", "preset", "doctor", "complete", "draw")


class LazyGroup(click.Group):
    """Loads a command's module only when the command is used, which keeps `--help` fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order in which the pipeline runs them."""
        return [*STAGES, *TOOLS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a module of the same name."""
        if cmd_name not in (*STAGES, *TOOLS):
            return None
        package = "stages" if cmd_name in STAGES else "stages.tools"
        command: click.Command = getattr(importlib.import_module(f"{package}.{cmd_name}"), cmd_name)
        return command


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    epilog="Environment variables set where things run, and never change a result: DEVICE (auto, cpu, cuda), LAUNCHER (local, "
    "torchrun, ray, slurm), PROCESSES, RESTARTS, LOADER_WORKERS, CACHE_MIB, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, "
    "TRACKING (on, off), TRACKING_PICTURES (epochs).",
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Generative models from autoencoders, one stage after another.

    Each stage takes the NAME of a row of params.yaml. Without a command, lists the stages and rows with their
    state. `dvc repro` runs everything that is out of date.
    """
    if context.invoked_subcommand is None:
        from stages.tools.overview import print_overview

        click.echo("Stages and commands (python -m stages COMMAND --help for details)\n")
        for name in cli.list_commands(context):
            command = cli.get_command(context, name)
            click.echo(f"  {name:9} {command.get_short_help_str(100) if command is not None else ''}")
        print_overview()


def main() -> None:
    """Runs the command line, from the project's folder."""
    # One line, like errors; Python's own form quotes the code that warns.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    cli(prog_name="python -m stages", complete_var="_STAGES_COMPLETE")


if __name__ == "__main__":
    main()
