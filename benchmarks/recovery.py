"""Kills ranks of a real run, which goes on by itself, and measures how long that takes and what it loses.

Two ranks train a small model and save every few steps. At chosen steps one of them, in their turn, is ended
by `kill -9`. The figure is the time from that instant to the next step's event; the losses must be those of
the same run that nobody disturbed, and the rank that was not killed must keep its process.

    python -m benchmarks.recovery [--quick] [--out FILE] [--kills N]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

from colossus import api
from colossus.job import load_job
from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.trainer.hooks import Hook
from colossus.trainer.run import Run
from colossus.trainer.training import Training

EVERY = 10  # steps between two kills
SAVE_EVERY = 4
SETTINGS = ["model.hidden_size=64", "model.num_layers=2", "data.seq_len=64", "layout.dp_shard=2",
            "run.global_batch=8", "run.validate_every=0", f"checkpoint.steps={SAVE_EVERY}"]  # fmt: skip


class Kill(Hook):
    """Before every tenth step one rank ends itself, the first and the second in turn, once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_start(self, training: Training) -> None:
        with (self.folder / f"processes-{training.world.rank}").open("a") as file:
            file.write(f"{os.getpid()}\n")

    def before_step(self, training: Training) -> None:
        number, rest = divmod(training.step, EVERY)
        mark = self.folder / f"killed-{number}"
        if rest == EVERY // 2 and training.world.rank == number % 2 and not mark.exists():
            mark.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def measure(kills: int, folder: Path) -> list[Figure]:
    words = [*SETTINGS, f"run.steps={kills * EVERY}"]
    whole = api.train(load_job(None, [*words, f"run.folder={folder / 'whole'}"]))
    run = api.train(load_job(None, [*words, f"run.folder={folder / 'killed'}"]), [Kill(folder)])
    seconds = [_until_next_step(run, float((folder / f"killed-{n}").read_text())) for n in range(kills)]
    faults = run.events("fault")
    processes = [(folder / f"processes-{rank}").read_text().split() for rank in (0, 1)]
    kept = sum(
        processes[1 - event["culprit"]][n] == processes[1 - event["culprit"]][n + 1]
        for n, event in enumerate(faults)
    )
    named = sum(event["culprit"] == n % 2 for n, event in enumerate(faults))
    return [
        Figure("kills", kills, "kills"),
        Figure("recovered", len(faults) if run.outcome == "finished" else 0, f"of {kills}", str(kills)),
        Figure("the rank that was killed is named", named, f"of {kills}", str(kills)),
        Figure("the other rank keeps its process", kept, f"of {kills}", str(kills)),
        Figure("losses that differ from the undisturbed run's", _differing(run, whole), "steps", "0"),
        Figure("from a kill to the next step: median", statistics.median(seconds), "s", "<= 10"),
        Figure("from a kill to the next step: longest", max(seconds), "s"),
    ]


def _until_next_step(run: Run, killed: float) -> float:
    began = next(event["attempt"] + 1 for event in run.events("fault") if event["time"] > killed)
    return next(event["time"] for event in run.events("step") if event["attempt"] == began) - killed


def _differing(run: Run, whole: Run) -> int:
    return sum(run.loss.get(step) != loss for step, loss in whole.loss.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two kills")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--kills", type=int, help="by default 10, quick 2")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.kills or (2 if arguments.quick else 10), Path(folder))
    print_figures(figures)
    write_receipt("recovery", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
