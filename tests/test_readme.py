"""What the README says holds."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from stages.__main__ import COMMANDS, cli

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_examples_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert re.search(r"tensor\(-?\d", capsys.readouterr().out)
    assert tuple(names["samples"].shape) == (1000, 4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m stages ([a-z]+)", README))))
def test_commands_exist(command: str) -> None:
    assert command in COMMANDS
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z-]+)`|^    make ([a-z-]+)", README, flags=re.MULTILINE))))
def test_make_targets_exist(target: tuple[str, str]) -> None:
    assert re.search(rf"^{''.join(target)}:", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(path: str) -> None:
    assert (PROJECT / path).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b(tests/\w+\.py|benchmarks\.\w+)", README))))
def test_tests_and_benchmarks_exist(name: str) -> None:
    assert (PROJECT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")).is_file()


def test_every_command_answers_help() -> None:
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert command.help
