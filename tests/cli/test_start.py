"""The command line answers at once, also where torch is missing."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colossus import __version__
from colossus.cli import main
from colossus.job import SECTIONS, preset_names
from tests.cli.commands import ROOT, colossus, without_torch

HEAVY = ("torch", "numpy", "pyarrow", "tokenizers", "tiktoken", "transformers", "rich")
VERBS = ("train", "plan", "dryrun", "generate", "eval", "import", "export", "data", "doctor", "models")


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
    "words",
    [["train", "--dry"], ["doctor"], ["generate", "runs/x", "def "], ["eval", "runs/x"], ["import", "x"]],
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


def test_models_are_listed_by_family_and_size() -> None:
    lines = colossus("models").stdout.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.split() for line in lines]
    table = rows[1 : rows.index([])]
    names = [row[0] for row in table]
    assert sorted(names) == preset_names("model")
    of_llama2 = [name for name in names if name.startswith("llama2")]
    assert of_llama2 == ["llama2-7b", "llama2-13b", "llama2-70b"] == names[names.index("llama2-7b") :][:3]
    by_name = {row[0]: row[1:] for row in table}
    # 6 x (405,853,388,800 - 128,256 x 16,384) + 6 x 126 layers x 16,384 x 4,096 keys
    assert by_name["llama3.1-405b"] == ["406B", "405B", "126", "16,384", "128/8", "131,072", "2,473"]
    assert by_name["deepseek-v3"][:3] == ["671B", "37.6B", "671B/37B"] and "8/256" in by_name["deepseek-v3"]
    assert by_name["grok-2"][2] == "-"  # its makers say nothing


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
@pytest.mark.parametrize("words", ["models", "--help", "--version"])
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


def test_an_interrupt_ends_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        """Whose reader presses Ctrl-C."""

        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", Interrupted())
    assert main(["models"]) == 130


def test_what_the_machine_cannot_do_has_another_code_than_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one\n" * 50)
    words = [f"data.corpus={tmp_path / 'text.txt'}", "data.tokenizer=bytes"]
    done = colossus("data", "build", *words, f"data.folder={tmp_path / 'text.txt' / 'out'}")
    assert done.returncode == 3 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
