"""Ctrl-C in a verb: one line, exit code 130, and no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.commands import ROOT

ENDLESS = """
import pathlib, time

def documents():
    yield "one document" * 100
    pathlib.Path("begun").touch()
    while True:
        time.sleep(0.01)
"""
CORPUS = ["data.corpus=endless:documents", "data.tokenizer=bytes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "build", *CORPUS], "error: interrupted"),
        (["train", *CORPUS, "run.steps=1"], "error: stopped by SIGINT without saving"),
    ],
    ids=["data build", "train"],
)
def test_an_interrupted_verb_says_so_once(words: list[str], message: str, tmp_path: Path) -> None:
    """As a terminal does it: SIGINT to the verb and to all that it started."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "COLOSSUS_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", "colossus", *words],
        cwd=tmp_path, env=os.environ | paths, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert said.startswith(message) and said.count("\n") == 1, said
    assert process.returncode == (130 if message == "error: interrupted" else 3)
