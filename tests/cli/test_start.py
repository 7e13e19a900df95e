"""The command line answers at once, also where torch is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colossus import __version__
from colossus.job import SECTIONS, preset_names
from tests.cli.commands import ROOT, colossus, without_torch

HEAVY = ("torch", "numpy", "pyarrow", "tokenizers", "tiktoken", "transformers", "rich")
VERBS = ("train", "generate", "import", "export", "data", "doctor", "models")


def best_seconds(*command: str, runs: int = 5) -> float:
    """What the quickest of several runs took: what else runs on the machine only makes one slower."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def test_help_comes_within_a_third_of_a_second() -> None:
    """On a slow machine Python itself and pydantic, typer's like in weight, take as much longer."""
    help_seconds, nothing = best_seconds("-m", "colossus", "--help"), best_seconds("-c", "pass")
    if help_seconds > 0.3:
        assert help_seconds < 0.05 + nothing + 1.5 * (best_seconds("-c", "import typer.main") - nothing)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["models", "--help"], ["--version"]])
def test_nothing_heavy_is_imported_for_help(words: list[str]) -> None:
    script = (
        f"import sys; from colossus.cli import main; main({words!r}); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {name.partition(".")[0] for name in done.stderr.split()} & set(HEAVY)


def test_importing_the_package_is_light() -> None:
    script = "import sys; before = set(sys.modules); import colossus; print(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    roots = {name.partition(".")[0] for name in done.stdout.split()}
    assert roots <= {"colossus", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["models"], *([verb, "--help"] for verb in VERBS)]
)
def test_without_torch(words: list[str]) -> None:
    done = without_torch(*words)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


@pytest.mark.parametrize("words", [["train", "run.stesp=1"], ["train", "model=no"], ["train", "no.toml"]])
def test_mistakes_are_told_without_torch(words: list[str]) -> None:
    done = without_torch(*words)
    assert done.returncode == 2 and done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "words", [["train", "--dry"], ["doctor"], ["generate", "runs/x", "def "], ["import", "x"]]
)
def test_what_needs_torch_says_so(words: list[str]) -> None:
    done = without_torch(*words)
    assert done.returncode == 3
    assert done.stderr == "error: this needs PyTorch, which is not installed: pip install torch\n"


def test_help_fits_one_screen_and_names_every_verb() -> None:
    done = colossus("--help")
    lines = done.stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines[lines.index("Commands:") + 1 :]} == set(VERBS)
    assert "..." not in done.stdout.partition("Commands:")[2]  # no description is cut off
    assert colossus().stdout == done.stdout and colossus("-h").stdout == done.stdout
    assert colossus().returncode == 0


def test_the_help_of_train_names_every_section() -> None:
    text = " ".join(colossus("train", "--help").stdout.split())
    assert f"Sections: {', '.join(SECTIONS)}." in text


def test_the_version() -> None:
    assert colossus("--version").stdout == f"{__version__}\n"


def test_models_are_listed_by_size() -> None:
    rows = [line.split() for line in colossus("models").stdout.splitlines()]
    table = rows[1 : rows.index([])]
    assert [row[0] for row in table][:2] == ["llama3.2-1b", "llama3.2-3b"]
    assert {row[0] for row in table} == set(preset_names("model"))
    by_name = {row[0]: row[1:] for row in table}
    assert by_name["llama3.1-405b"] == ["406B", "126", "16,384", "128/8", "53,248", "128,256", "131,072"]


def test_the_command_is_the_module() -> None:
    """The entry point that pyproject.toml names and `python -m colossus` are one function."""
    script = "import sys; from colossus.cli import main; sys.exit(main())"
    for words in (["models"], ["train", "run.steps=-1"], ["--version"]):
        command = [sys.executable, "-c", script, *words]
        entry = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        module = colossus(*words)
        assert entry.returncode == module.returncode
        assert entry.stderr == module.stderr and entry.stdout.split() == module.stdout.split()


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m colossus models; echo $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"({command}) | true"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "0"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["models", "--help"])
def test_output_that_cannot_be_written_is_one_line(words: str) -> None:
    command = f"{sys.executable} -m colossus {words} > /dev/full"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "error: the output cannot be written (No space left on device)\n"


@pytest.mark.parametrize("asked", [None, "7"])
def test_waiting_threads_turn_in_circles_briefly_unless_asked_otherwise(asked: str | None) -> None:
    script = (
        "import os; from colossus.cli import main; main(['--version']); print(os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if asked is not None:
        environment["GOMP_SPINCOUNT"] = asked
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [__version__, asked or "3000"]
