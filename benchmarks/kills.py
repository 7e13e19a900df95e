"""Kills a real training run at random instants, again and again, and looks at what was lost.

A small run saves every few steps and validates now and then. Each life is forked from a process that has
imported everything, goes on from what the one before left, and is ended by `kill -9` at a random instant:
while it starts, loads, steps, saves, deletes, validates or writes its log. A run that reaches its end is
compared with one that nobody disturbed, and another begins.

    python -m benchmarks.kills [--quick] [--out FILE] [--folder FOLDER] [--kills N] [--seed N]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch._dynamo  # every optimizer imports it: once here, not in every life
from torch.distributed import fsdp  # noqa: F401

from colossus import api
from colossus.checkpoints.find import latest_verified
from colossus.checkpoints.format import COMMITTED
from colossus.checkpoints.load import open_checkpoint
from colossus.checkpoints.pieces import read_manifest
from colossus.job import Job, load_job
from colossus.measure.machine import this_machine
from colossus.monitor import report  # noqa: F401
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.trainer import loop  # noqa: F401
from colossus.trainer.run import Run

STEPS, SAVE_EVERY = 120, 5
SETTINGS = [
    "data.tokenizer=bytes",
    "data.seq_len=32",
    "data.validation_fraction=0.2",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=16",
    "model.intermediate_size=64",
    "run.global_batch=4",
    f"run.steps={STEPS}",
    "run.threads=1",
    "run.validate_every=8",
    f"checkpoint.steps={SAVE_EVERY}",
    "layout.compile=false",
]
WORDS = [
    "the",
    "run",
    "goes",
    "on",
    "from",
    "the",
    "last",
    "whole",
    "checkpoint",
    "and",
    "no",
    "step",
    "is",
    "lost",
]


@dataclass
class Tally:
    """What the kills met and did. repeated: steps that were taken again, by kill."""

    kills: int = 0
    finished: int = 0
    before_first_step: int = 0
    in_a_save: int = 0
    repeated: list[int] = field(default_factory=list)
    losses_compared: int = 0
    losses_differing: int = 0
    checkpoints_lost: int = 0
    wrong_loads: int = 0
    failed_starts: int = 0


def small_job(folder: Path, name: str) -> Job:
    places = [
        f"data.corpus={folder / 'corpus'}",
        f"data.folder={folder / 'data'}",
        f"run.folder={folder / name}",
    ]
    return api.resolve(load_job(None, [*SETTINGS, *places]))


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    for n in range(40):
        text = " ".join(WORDS[(n * 3 + i * i) % len(WORDS)] for i in range(60 + n))
        (folder / f"{n:02}.txt").write_text(text)


def fork(live: Callable[[], object], errors: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, sys.stderr.fileno())
        live()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def exit_code(child: int) -> int:
    """The exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Lives:
    """The lives of one run after another."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._draw = random.Random(seed)
        self.tally = Tally()
        undisturbed = small_job(folder, "undisturbed")
        began = time.monotonic()
        assert exit_code(fork(lambda: api.train(undisturbed), folder / "errors")) == 0
        self.life_seconds = time.monotonic() - began
        self._losses = Run(folder / "undisturbed").loss
        self._final = folder / "undisturbed"

    def run_until_finished(self, name: str, max_kills: int) -> None:
        """One run, killed at random instants until it ends, or there were enough kills."""
        job, run = small_job(self._folder, name), Run(self._folder / name)
        while self.tally.kills < max_kills:
            saved = self._whole_step(run)
            child = fork(lambda: api.train(job), self._folder / "errors")
            time.sleep(self._draw.uniform(0.0, 0.6 * self.life_seconds))
            os.kill(child, signal.SIGKILL)
            code = exit_code(child)
            if code == 1:
                self.tally.failed_starts += 1
                print((self._folder / "errors").read_text(), file=sys.stderr)
                return
            self._check_life(run, saved)
            if code == 0:
                self._check_end(run)
                return
            self._count_kill(run)

    def _whole_step(self, run: Run) -> int:
        """The step that a life must go on from: that of the newest checkpoint that is whole."""
        found = latest_verified(run.folder)
        return read_manifest(found).step if found is not None else 0

    def _count_kill(self, run: Run) -> None:
        self.tally.kills += 1
        events = run.events() if run.folder.is_dir() else []
        attempt = max((e["attempt"] for e in events), default=0)
        taken = [e["step"] + 1 for e in events if e["kind"] == "step" and e["attempt"] == attempt]
        self.tally.before_first_step += not taken
        uncommitted = [p for p in run.folder.glob("checkpoints/step-*") if not (p / COMMITTED).exists()]
        self.tally.in_a_save += bool(uncommitted)
        if taken:
            self.tally.repeated.append(taken[-1] - self._whole_step(run))
        reported = max((e["saved_step"] for e in events if e["kind"] == "checkpoint"), default=0)
        self.tally.checkpoints_lost += reported > self._whole_step(run)

    def _check_life(self, run: Run, saved: int) -> None:
        """Every loss of the latest attempt is the undisturbed run's, from the step that was saved on."""
        events = run.events() if run.folder.is_dir() else []
        attempt = max((e["attempt"] for e in events), default=0)
        steps = {e["step"]: e["loss"] for e in events if e["kind"] == "step" and e["attempt"] == attempt}
        begun = [e for e in events if e["kind"] in ("start", "resume") and e["attempt"] == attempt]
        if begun and steps:
            self.tally.wrong_loads += min(steps) != begun[0]["step"]
        self.tally.losses_compared += len(steps)
        self.tally.losses_differing += sum(self._losses[step] != loss for step, loss in steps.items())

    def _check_end(self, run: Run) -> None:
        self.tally.finished += 1
        if run.loss != self._losses:
            self.tally.losses_differing += 1
        ours, theirs = (latest_verified(folder) for folder in (run.folder, self._final))
        assert ours is not None and theirs is not None
        one, other = open_checkpoint(ours), open_checkpoint(theirs)
        same = one.names() == other.names()
        self.tally.wrong_loads += not (
            same and all(torch.equal(one.read(*k), other.read(*k)) for k in one.names())
        )


def figures_of(tally: Tally, life_seconds: float) -> list[Figure]:
    repeated = tally.repeated or [0]
    return [
        Figure("kills", tally.kills, "kills"),
        Figure("of them before the first step of a life", tally.before_first_step, "kills"),
        Figure("of them in the middle of a save", tally.in_a_save, "kills"),
        Figure("runs that reached their end", tally.finished, "runs"),
        Figure("an undisturbed run", life_seconds, "s"),
        Figure("lives that failed to start", tally.failed_starts, "lives", "0"),
        Figure("wrong loads", tally.wrong_loads, "loads", "0"),
        Figure("checkpoints lost that were told as saved", tally.checkpoints_lost, "checkpoints", "0"),
        Figure("losses compared with the undisturbed run's", tally.losses_compared, "steps"),
        Figure("losses that differ in any bit", tally.losses_differing, "steps", "0"),
        Figure("steps between saves", SAVE_EVERY, "steps"),
        Figure("steps repeated, mean of a kill", statistics.mean(repeated), "steps"),
        Figure("steps repeated, most of a kill", max(repeated), "steps", f"<= {2 * SAVE_EVERY}"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="10 kills")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--folder", default=".", help="where to train: its disk is tried, too")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    max_kills = 10 if arguments.quick else arguments.kills
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    machine = this_machine()  # measured here, so that no life spends its time on it
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".kills-") as name:
        folder = Path(name).resolve()
        write_corpus(folder / "corpus")
        lives = Lives(folder, arguments.seed)
        number = 0
        while lives.tally.kills < max_kills and not lives.tally.failed_starts:
            lives.run_until_finished(f"run-{number}", max_kills)
            number += 1
    figures = figures_of(lives.tally, lives.life_seconds)
    print_figures(figures)
    write_receipt(
        "kills", figures, arguments.out, hardware=json.loads(json.dumps(dataclasses.asdict(machine)))
    )
    t = lives.tally
    lost = t.failed_starts + t.wrong_loads + t.checkpoints_lost + t.losses_differing
    return 1 if lost or max(t.repeated or [0]) > 2 * SAVE_EVERY else 0


if __name__ == "__main__":
    sys.exit(main())
