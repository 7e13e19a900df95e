"""Runs the command as a person does: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Whoever imports torch meets this, as on a machine without it.
NO_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Blocked())
from colossus.cli import main
code = main()
assert "torch" not in sys.modules
sys.exit(code)
"""


def colossus(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m colossus WORDS` in `folder`."""
    return _run([sys.executable, "-m", "colossus", *words], folder)


def without_torch(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The same with torch's import blocked."""
    return _run([sys.executable, "-c", NO_TORCH, *words], folder)


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    import os

    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
