"""What the README and docs/ say is true, and texts are plain English."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from stages.__main__ import STAGES, TOOLS, cli
from stages.reporting.metrics import METRICS, Metric
from stages.reporting.scoreboard import plus_minus

PROJECT = Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(PROJECT): path.read_text() for path in (PROJECT / "README.md", *sorted(PROJECT.glob("docs/*.md")))}
TEXT = "\n".join(PAGES.values())

PYTHON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
LIBRARY = [code for code in PYTHON if not code.startswith("# ") and "Generator.load" not in code]  # tests/test_serving.py loads
FILES = {code.splitlines()[0].removeprefix("# "): code for code in PYTHON if code.startswith("# ")}  # path -> text
ROWS = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
SMALL = {"datasets": {}, "autoencoders": {"base_channels": 4, "epochs": 1, "batch_size": 500}, "densities": {"epochs": 1}}

with (PROJECT / "reports/paper/results.csv").open() as file:
    RESULTS = list(csv.DictReader(file))
MACHINES = {"1": "1 core", "2": "2 cores", "16 + NVIDIA H200": "H200 GPU"}  # as in results.csv -> as in the README

# Words of the drafts, and what plain English says instead.
HABITS = {
    r"\b(stands?|stood)\b": "is",
    r"\b(has|have) to be\b": "must be",
    r"\banew\b": "again",
    r"\b(don't|doesn't) compare\b": "isn't comparable",
    r"(?<!-)\bbeside\b(?!-)": "next to, with",
    r"\b(be rid of|foretells?|mend(s|ed)?|put aside)\b": "delete, predict, fix, ignore",
}
WRITTEN = (
    *(PROJECT / path for path in PAGES),
    *(
        PROJECT / name
        for name in ("CHANGELOG.md", "CONTRIBUTING.md", "presets/README.md", "data/raw/README.md", "params.yaml", "dvc.yaml")
    ),
    *(PROJECT / "reports/paper" / name for name in ("README.md", "findings.md")),
    PROJECT / "benchmarks/scaling.md",
    *sorted(PROJECT.glob("presets/*.yaml")),
    *sorted(PROJECT.glob("stages/reporting/templates/*")),
    *(path for room in ("pipeline", "stages", "benchmarks") for path in sorted(PROJECT.glob(f"{room}/**/*.py"))),
)


def test_the_readme_is_read_in_one_go() -> None:
    assert 8000 <= len((PROJECT / "README.md").read_bytes()) <= 9216


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of a file with their first lines: all of it, or the strings and comments of Python code."""
    if path.suffix != ".py":
        yield 1, path.read_text()
        return
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    with tokenize.open(path) as file:
        yield from ((token.start[0], token.string) for token in tokenize.generate_tokens(file.readline) if token.type in kinds)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(PROJECT)))
def test_texts_are_plain_english(path: Path) -> None:
    places = [
        f"line {start + text.count(chr(10), 0, match.start())}: {match[0]!r}; write {better}"
        for start, text in _texts(path)
        for habit, better in HABITS.items()
        for match in re.finditer(habit, text)
    ]
    assert not places, "\n".join(places)


@pytest.mark.parametrize("code", LIBRARY)
def test_the_library_example_runs(
    code: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(code.splitlines()) <= 14
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    score = float(capsys.readouterr().out.splitlines()[0])
    # The sum of four standard normals after one another: entropy 4 * 0.5 log(2 pi e) = 5.68 nats, and no fit does better.
    assert -6.2 < score < -5.5
    assert names["samples"].shape == (1000, 4)  # type: ignore[attr-defined]


ALL_STAGES = """\
from click.testing import CliRunner
from stages.__main__ import cli
for stage, row in (
    ("prepare", "stripes"),
    *((stage, "stripes-sparse") for stage in ("train", "extract")),
    *((stage, row) for row in ("stripes-independent", "stripes-given") for stage in ("fit", "sample", "evaluate")),
):
    result = CliRunner().invoke(cli, [stage, row])
    assert result.exit_code == 0, result.output
"""


def test_a_data_set_an_objective_and_a_density_take_a_file_each(tmp_path: Path) -> None:
    for name in ("pipeline", "stages"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert [Path(path).parent.name for path in FILES] == ["sources", "autoencoders", "densities", "densities"]
    for path, code in FILES.items():
        assert (tmp_path / path).parent.is_dir()
        (tmp_path / path).write_text(code)
    tables = {"controls": {}, "sampling": {"count": 20}, "evaluations": {"stripes": {}}}
    yaml = YAML(typ="safe", pure=True)
    for text in ROWS:
        for table, rows in yaml.load(text).items():
            tables[table] = tables.get(table, {}) | {name: row | SMALL[table] for name, row in rows.items()}
    with (tmp_path / "params.yaml").open("w") as file:
        yaml.dump(tables, file)
    done = subprocess.run([sys.executable, "-c", ALL_STAGES], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "penalty" in (tmp_path / "reports/curves/train/stripes-sparse.tsv").read_text().splitlines()[0]
    assert (tmp_path / "reports/arrays/sample/stripes-independent/samples.safetensors").exists()


@pytest.mark.parametrize("line", re.findall(r"^\| .* \| `([a-z0-9-]+)` \| (.*) \| .* \|$", TEXT, flags=re.MULTILINE))
def test_results_are_those_on_record(line: tuple[str, str]) -> None:
    found = [r for r in RESULTS if (r["row"], r["metric"]) == (line[0], "test_log_likelihood")]
    assert line[1] in [plus_minus(float(r["value"]), float(r["error"])) for r in found]
    assert (PROJECT / "reports/paper" / line[0] / "params.yaml").exists()


HEADLINES = re.findall(r"\| \[([^\]]+)\]\(reports/paper/([a-z0-9-]+)\) \| ([\d.]+) \| (.+) \|$", TEXT, flags=re.MULTILINE)


def test_six_rows_are_shown() -> None:
    assert len(HEADLINES) == 6


@pytest.mark.parametrize(("score", "row", "minutes", "machine"), HEADLINES)
def test_scores_minutes_and_machines_are_those_on_record(score: str, row: str, minutes: str, machine: str) -> None:
    kept = [r for r in RESULTS if r["row"] == row and r["metric"] in ("test_log_likelihood", "kid")]
    lines = [(plus_minus(float(r["value"]), float(r["error"])), r["minutes"], MACHINES[r["cores"]]) for r in kept]
    assert (score, minutes, machine) in lines


def test_every_metric_on_record_is_explained() -> None:
    patterns = []  # stage, key
    names = {"SPLIT": "(train|valid|test)", "NETWORK": "(classifier|vgg19|inception)", "K": r"\d+", "A": r"[\d.]+"}
    for keys, stages in re.findall(r"^\| (`.*?) \| ([a-z, ]+) \|", PAGES[Path("docs/scores.md")], flags=re.MULTILINE):
        for key in re.findall(r"`([^`]+)`", keys):
            pattern = "_".join(names.get(word, word) for word in key.split("_")).replace("..", "(parzen|classifier|vgg19)_.+")
            patterns += [(stage, re.compile(pattern + "(_se)?")) for stage in stages.split(", ")]
    for path in sorted((PROJECT / "reports/paper").glob("*/metrics.json")):
        for name, metrics in json.loads(path.read_text()).items():
            for key in metrics if isinstance(metrics, dict) else ():  # one row was recorded before there were stages
                stage = name.split()[0]
                assert key == "run" or any(s == stage and p.fullmatch(key) for s, p in patterns), (path.parent.name, stage, key)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_docs_agree_with_the_table_of_metrics(metric: Metric) -> None:
    key = re.sub("^(test)_(mse)$", r"SPLIT_\2", metric.key)
    arrow = {"higher": " ↑", "lower": " ↓", "neither": ""}[metric.better]
    rows = [line.split(" | ") for line in PAGES[Path("docs/scores.md")].splitlines() if line.startswith("| `")]
    (unit,) = [cells[-1] for cells in rows if f"`{key}`{arrow}" in re.split(", |[|] ", cells[0])]
    assert metric.unit in unit.removesuffix(" |").split("; ")


def test_speeds_are_those_measured() -> None:
    measured = {
        name: json.loads((PROJECT / f"benchmarks/results/{name}.json").read_text()) for name in ("lde", "parzen", "autoencoder")
    }
    by_dim = {row["D"]: row["times as fast"] for row in measured["lde"]["sampling"]["rows"]}
    assert f"drawn {by_dim[63]:.0f} times as fast" in TEXT
    assert f"at D = 200 {by_dim[200]:.0f} times" in TEXT
    assert f"in {measured['parzen']['rows'][-1]['peak_mib']:.0f} MiB" in TEXT
    slowest = max(1 / row["pipeline_to_bare"] for row in measured["autoencoder"]["rows"])
    assert f"at most {100 * (slowest - 1):.0f} % longer" in TEXT
    rivals = measured["lde"]["rivals"]["rows"]
    for dim, digits in ((8, 2), (63, 1)):
        cells = [f"{row['test, nats']:.{digits}f}" for row in rivals if f", {dim} principal" in row["codes"]]
        assert f"| {dim} numbers | {' | '.join(cells)} |" in TEXT


# Shell -> what asks for the completions of "stages fit grid" in it, after the page's lines.
ASK = {
    "bash": 'COMP_WORDS=(stages fit grid); COMP_CWORD=2; _stages; printf "%s\\n" "${COMPREPLY[@]}"',
    "zsh": 'compadd() { shift; print -l -- "$@"; }; words=(stages fit grid); CURRENT=3; _stages',
    "fish": 'complete --do-complete "stages fit grid"',
}


@pytest.mark.parametrize("shell", ASK)
def test_tab_completion_in_a_shell(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} isn't installed")
    lines = (PROJECT / f"completions/stages.{shell}").read_text()
    start = "compdef() { :; }\n" if shell == "zsh" else ""  # of an interactive shell
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [shell, "-c", start + lines + ASK[shell]], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["grid-lde"], done.stderr


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m stages ([a-z]+)", TEXT))))
def test_commands_exist(command: str) -> None:
    assert command in (*STAGES, *TOOLS)
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z-]+)`|^    make ([a-z-]+)", TEXT, flags=re.MULTILINE))))
def test_make_targets_exist(target: tuple[str, str]) -> None:
    assert re.search(rf"^{''.join(target)}:", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)


LINKS = {(page.parent, link) for page, text in PAGES.items() for link in re.findall(r"\]\((?!http)([^)#]+)\)", text)}


@pytest.mark.parametrize(("folder", "path"), sorted(LINKS))
def test_links_lead_somewhere(folder: Path, path: str) -> None:
    assert (PROJECT / folder / path).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b(tests/\w+\.py|benchmarks\.\w+)", TEXT))))
def test_tests_and_benchmarks_exist(name: str) -> None:
    assert (PROJECT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")).is_file()


def test_every_command_answers_help() -> None:
    for name in (*STAGES, *TOOLS):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert command.help


def test_the_citation_is_that_of_the_readme() -> None:
    citation = YAML(typ="safe").load(PROJECT / "CITATION.cff")
    readme = PAGES[Path("README.md")]
    (title,) = re.findall(r"title=\{(.*)\},", readme)
    assert citation["preferred-citation"]["title"] == title
    names = [f"{author['family-names']}, {author['given-names']}" for author in citation["preferred-citation"]["authors"]]
    assert f"author={{{' and '.join(names)}}}" in readme
    assert citation["version"] in (PROJECT / "pyproject.toml").read_text()


def test_continuous_integration_is_the_script_of_the_repository() -> None:
    workflow = YAML(typ="safe").load(PROJECT / ".github/workflows/ci.yml")
    assert [step["run"] for step in workflow["jobs"]["check"]["steps"] if "run" in step] == [".ci/run"]


def example(name: str, folder: Path) -> str:
    """What a script of `examples/` prints in a copy of the project."""
    for part in ("pipeline", "stages", "examples"):
        shutil.copytree(PROJECT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "output"))
    (command,) = re.findall(
        r"^Run with `python ([^`[]+?)(?: \[.*)?`", (folder / f"examples/{name}.py").read_text(), flags=re.MULTILINE
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(PROJECT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_an_example_that_imports_the_project_runs_as_a_module(path: Path) -> None:
    # `make install` installs the requirements and not the project, which only `python -m` finds in the working folder.
    text = path.read_text()
    assert bool(re.search(r"^from pipeline", text, flags=re.MULTILINE)) == (f"`python -m examples.{path.stem}" in text)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_of_tables_runs(tmp_path: Path) -> None:
    (difference,) = re.findall(r"^difference (-?[\d.]+) ± [\d.]+$", example("own_tables", tmp_path), flags=re.MULTILINE)
    assert float(difference) > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_of_processes_runs(tmp_path: Path) -> None:
    (difference,) = re.findall(r"^relative difference: ([\d.e+-]+), ", example("cluster", tmp_path), flags=re.MULTILINE)
    assert float(difference) < 1e-2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quickstart_runs(tmp_path: Path) -> None:
    output = example("quickstart", tmp_path)
    found = re.findall(r"^(.+): log-density .*?(-?[\d.]+) nats, squared error ([\d.]+)$", output, flags=re.MULTILINE)
    likelihoods, errors = ({name: float(line[i]) for name, *line in found} for i in (0, 1))
    assert likelihoods["test images"] > likelihoods["upside down"]
    assert errors["noise"] > 3 * errors["test images"]
    assert {path.name for path in (tmp_path / "examples/output").iterdir()} == {"samples.png", "unusual.png"}
