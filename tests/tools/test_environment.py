"""What the two commands put into an environment, as far as it can be told without downloading."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "environment.py"


@pytest.fixture
def environment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "inside"),
    [
        ("2.11", True),
        ("2.11.0", True),
        ("2.11.0+cu128", True),
        ("2.12.1", True),
        ("2.13.0", True),
        ("2.13.0+cpu", True),
        ("2.13", True),
        ("2.13.0a0+git1234", True),  # before the release that is in range
        ("2.13.0.dev20260601", True),
        ("2.11.0rc2", False),  # before the first that is
        ("2.11.0a0+ecf3bae40a.nv25.02", False),
        ("2.10.9", False),
        ("2.9.1+cpu", False),
        ("2.13.1", False),
        ("2.13.0.post1", True),
        ("2.14.0.dev20260601+cpu", False),
        ("3.0", False),
        (None, False),
    ],
)
def test_the_range_of_torch(environment: ModuleType, version: str | None, inside: bool) -> None:
    assert environment.torch_in_range(version) == inside


def test_versions_in_order(environment: ModuleType) -> None:
    order = ["2.9", "2.11.0a0", "2.11", "2.11.1rc1", "2.11.1+cu128", "2.12", "2.100"]
    numbers = [environment.numbers(version) for version in order]
    assert numbers == sorted(numbers) and len(set(numbers)) == len(numbers)
    assert environment.numbers("2.11") == environment.numbers("2.11.0") == environment.numbers("2.11.0+cpu")


@pytest.mark.parametrize("group", ["base", "test", "hf", "eval", "lint"])
def test_pins_lie_within_the_ranges(environment: ModuleType, group: str) -> None:
    """Every requirement of pyproject.toml has its pin, and the pin fits it."""
    pins = dict(line.split("==") for line in environment.pins(group).read_text().split())
    for requirement in environment.ranges(group):
        name, *bounds = re.split(r"(?=[<>=]=)|,", requirement)
        assert name in pins, name
        for bound in filter(None, bounds):
            pin, limit = environment.numbers(pins[name]), environment.numbers(bound[2:])
            assert {">=": pin >= limit, "<=": pin <= limit, "==": pin == limit}[bound[:2]], requirement


def test_pins_of_all_groups_agree(environment: ModuleType) -> None:
    """The groups land in one environment: none asks for another version than the others."""
    seen: dict[str, str] = {}
    for group in ("base", "test", "hf", "eval", "lint"):
        for line in environment.pins(group).read_text().split():
            name, version = line.split("==")
            assert seen.setdefault(environment.normal(name), version) == version, name


def test_names_as_indexes_compare_them(environment: ModuleType) -> None:
    assert environment.normal("Typing_Extensions") == environment.normal("typing.extensions")


def test_an_index_of_one_s_own(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    assert environment.extra_index() == []
    monkeypatch.setenv("TORCH_INDEX_URL", "https://example.org/cpu")
    assert environment.extra_index() == ["--extra-index-url", "https://example.org/cpu"]


def test_the_machine_s_packages_are_seen_through(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real environment, made where the Python that makes it has a torch in range: nothing is downloaded."""
    monkeypatch.setattr(environment, "FOLDER", tmp_path / "venv")
    monkeypatch.setattr(environment, "PYTHON", tmp_path / "venv" / "bin" / "python")
    environment.make()
    site = environment.site_packages()
    assert (site / environment.LINK).exists() and environment.torch_in_range(environment.installed_torch())
    script = "import importlib.util as u, sys; print(u.find_spec('torch').origin, sys.prefix)"
    out = subprocess.run(
        [environment.PYTHON, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    origin, prefix = out.split()
    mine = importlib.util.find_spec("torch")
    assert mine is not None and origin == mine.origin and prefix == str(tmp_path / "venv")


def test_a_group_that_cannot_be_had_is_an_exit_code(
    environment: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(environment, "FOLDER", tmp_path / "venv")
    monkeypatch.setattr(environment, "PYTHON", tmp_path / "venv" / "bin" / "python")
    monkeypatch.setattr(environment, "make", lambda: None)
    monkeypatch.setattr(environment, "install_pinned", lambda group: False)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "lib" / "python3" / "site-packages").mkdir(parents=True)
    assert environment.main(["base"]) == 3
    assert "error: base: not installed" in capsys.readouterr().err
    monkeypatch.setattr(environment, "install_pinned", lambda group: True)
    assert environment.main(["base"]) == 0
    command = tmp_path / "venv" / "bin" / "colossus"
    assert command.stat().st_mode & 0o111 and "from colossus.cli import main" in command.read_text()


def test_ci_lints_and_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-2:] == ["make lint", "make test"]
    for target in ("lint", "test", "train", "bench"):
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr
