"""The check of the map catches each kind of break, planted into a small copy of the house."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_floors.py"


@pytest.fixture(scope="module")
def floors() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_floors", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_floors"] = module  # where dataclasses look up their types
    spec.loader.exec_module(module)
    return module


def house(folder: Path, **files: str) -> Path:
    """A package of these files; `trainer__loop` is trainer/loop.py."""
    package = folder / "colossus"
    for name, text in ({"__init__": "from colossus import api\n"} | files).items():
        path = package / (name if name == "__init__" else name.replace("__", "/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(text)
    return package


ALLOWED = {
    "job": "import json\nfrom colossus.errors import UserError\n",
    "errors": "",
    "measure__machine": "import torch\nfrom colossus.job import Job\n",
    "trainer__loop": "import torch.nn as nn\nfrom colossus import job\nfrom colossus.trainer import step\n",
    "trainer__step": "from colossus.measure import machine\n",
    "data__types": "class T: pass\n",
    "data__open": "from colossus.data.types import T\nfrom colossus.data.files import read\n",
    "data__files": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import colossus.data.open\n",
    "data__loader": "def tensor():\n    import torch\n    return torch.ones(1)\n",
    "architecture": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n",
}


def test_what_is_allowed_is_not_reported(floors: ModuleType, tmp_path: Path) -> None:
    assert floors.faults(house(tmp_path, **ALLOWED)) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"job": "import torch\n"}, "colossus/job.py:1: job is below the waterline and imports torch"),
        ({"perf__flops": "from torch import nn\n"}, "perf is below the waterline and imports torch"),
        ({"job": "def f():\n    import torch.nn\n"}, "colossus/job.py:2: job is below the waterline"),
        ({"job": "try:\n    import torch\nexcept ImportError:\n    pass\n"}, "job is below the waterline"),
        ({"data__loader": "import torch\n"}, "data imports torch outside a function"),
        ({"data__loader": "class A:\n    import torch\n"}, "data imports torch outside a function"),
        ({"job": "from colossus.trainer import loop\n"}, "job imports trainer: from floor 0 to floor 4"),
        ({"models__x": "import colossus.cli.train\n"}, "models imports cli: from floor 2 to floor 7"),
        ({"models__x": "from colossus import job, api\n"}, "models imports api: from floor 2 to floor 6"),
        ({"models__x": "def f():\n    from colossus import api\n"}, "models imports api"),
        (
            {"job": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from colossus.api import x\n"},
            "job imports api: from floor 0 to floor 6",
        ),
        ({"job": "from colossus import train\n"}, "job imports api: from floor 0 to floor 6"),
        ({"job": "from . import layout\n"}, "colossus/job.py:1: relative import"),
        ({"job": "from ..torch import x\n"}, "colossus/job.py:1: relative import"),
        ({"cellar__x": ""}, "room 'cellar' is on no floor"),
        (
            {"data__a": "from colossus.data.b import x\n", "data__b": "from colossus.data import a\n"},
            "files import each other: colossus.data.a -> colossus.data.b -> colossus.data.a",
        ),
        (
            {
                "data__a": "def f():\n    from colossus.data import b\n",
                "data__b": "import colossus.data.c\n",
                "data__c": "from colossus.data.a import x\n",
            },
            "files import each other: colossus.data.a -> colossus.data.b -> colossus.data.c",
        ),
        (
            {"optim__a": "from colossus.models import m\n", "models__m": "from colossus.optim import b\n"},
            "rooms of one floor form a cycle: models -> optim -> models",
        ),
        (
            {
                "optim__a": "from colossus import models\n",
                "models__m": "from colossus.precision import p\n",
                "precision__p": "def f():\n    import colossus.optim.a\n",
            },
            "rooms of one floor form a cycle: models -> precision -> optim -> models",
        ),
    ],
)
def test_each_kind_of_break_is_caught(floors: ModuleType, tmp_path: Path, files: dict, said: str) -> None:
    found = floors.faults(house(tmp_path, **files))
    assert len(found) == 1 and said in found[0]


def test_the_house_itself_stands() -> None:
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_break_is_an_exit_code(floors: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    copy = tmp_path / "tools" / "check_floors.py"
    copy.write_text(TOOL.read_text())
    house(tmp_path, job="import torch\n")
    done = subprocess.run([sys.executable, copy], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "below the waterline" in done.stdout


def test_every_floor_has_its_room(floors: ModuleType) -> None:
    """A room that was removed or renamed leaves the map, too."""
    rooms = {path.stem for path in floors.PACKAGE.iterdir() if not path.name.startswith("__py")}
    assert rooms - {"__init__", "py"} == set(floors.FLOORS)
