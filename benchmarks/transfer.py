"""Whether a learning rate found at one width is the best at another: three widths, five rates, three seeds,
once with the same rates and initial values at all widths and once scaled by `model.base_width`.

Everything else is the same: AdamW, layers, batch, steps, the corpus of the default job; a run ends with the
loss on held-out windows. A rule transfers where the best rate (mean over seeds) moves by at most one step, a
factor of 2, over all widths. At the base width both rules are one, and its runs are made once. Tokens are
bytes, so that almost all of the work and of what is learned is in the layers, which the rule is about.

    python -m benchmarks.transfer [--quick] [--out FILE] [--widths W ...] [--optimizer NAME] [--done FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from colossus import api
from colossus.data.loader import Batches
from colossus.data.order import BatchSchedule
from colossus.data.packing import fill_window
from colossus.data.prepare import prepare_data
from colossus.data.sources import TrainingData
from colossus.job import Job, load_job
from colossus.measure.machine import this_machine
from colossus.optim.schedule import Decay, wsd_factor
from colossus.parallel.world import World
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.trainer.state import TrainState
from colossus.trainer.step import train_step

WIDTHS = (32, 64, 128)
BASE_WIDTH = 128
RATES = tuple(0.0005 * 2**step for step in range(5))
SEEDS = 3
STEPS = 200
LAYERS, HEAD_DIM, SEQ_LEN, BATCH = 2, 32, 128, 16
HELD_OUT_WINDOWS = 128
RULES = ("standard", "scaled")


@dataclass(frozen=True)
class Trial:
    """One training on one thread; `base_width` is where its rate holds as it is."""

    width: int
    base_width: int
    rate: float
    seed: int
    steps: int
    optimizer: str

    @property
    def name(self) -> str:
        return f"{self.optimizer} {self.width}/{self.base_width} rate {self.rate:g} seed {self.seed}"

    def job(self) -> Job:
        words = {
            "model.hidden_size": self.width,
            "model.base_width": self.base_width,
            "model.num_layers": LAYERS,
            "model.head_dim": HEAD_DIM,
            "model.intermediate_size": 5 * self.width // 2,
            "data.seq_len": SEQ_LEN,
            "data.tokenizer": "bytes",
            "optimizer.name": self.optimizer,
            "optimizer.lr": self.rate,
            "optimizer.warmup_steps": self.steps // 10,
            "run.seed": self.seed,
            "run.steps": self.steps,
            "run.global_batch": BATCH,
            "run.threads": 1,
            "layout.compile": "false",
        }
        return prepare_data(api.resolve(load_job(None, [f"{name}={value}" for name, value in words.items()])))

    def loss(self) -> float:
        """Nats a token on held-out windows, at the end; that of guessing where it diverged."""
        torch.set_num_threads(1)
        job = self.job()
        schedule = BatchSchedule(job.run.batch_schedule)
        data = TrainingData.open(job, schedule)
        world = World(0, 1, torch.device("cpu"))
        state = TrainState.build(job, world)
        decay = Decay(round((1 - job.optimizer.decay_fraction) * self.steps), self.steps)
        with Batches(data.train, data.order, schedule, micro_batch=BATCH) as batches:
            for step in range(self.steps):
                batch = batches.next(step)
                factor = wsd_factor(step, job.optimizer.warmup_steps, decay)
                train_step(state, batch, batch.num_targets, factor, job, world)
        loss = held_out_loss(state, data)
        return loss if math.isfinite(loss) else math.log(job.model.vocab_size)


@torch.no_grad()
def held_out_loss(state: TrainState, data: TrainingData) -> float:
    """Mean loss on the first windows of the held-out text, the same for all trials."""
    tokens_BT = np.zeros((HELD_OUT_WINDOWS, SEQ_LEN), np.int64)
    targets_BT = np.zeros_like(tokens_BT)
    for row in range(HELD_OUT_WINDOWS):
        fill_window(data.validation[0], row, tokens_BT[row], targets_BT[row], None)
    pairs = zip(
        torch.from_numpy(tokens_BT).split(BATCH), torch.from_numpy(targets_BT).split(BATCH), strict=True
    )
    return sum(float(state.model(tokens, targets)[0]) for tokens, targets in pairs) / targets_BT.size


class Done:
    """Losses of trials, kept in a file line by line as they end, so that a sweep may be stopped and go on."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.losses: dict[str, float] = {}
        if path is not None and path.is_file():
            for line in path.read_text().splitlines():
                self.losses |= json.loads(line)

    def add(self, name: str, loss: float) -> None:
        self.losses[name] = loss
        print(f"{name}: {loss:.4f}", flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({name: loss}) + "\n")


def trials_of(rule: str, widths: list[int], rates: list[float], like: Trial, seeds: int) -> list[Trial]:
    """One after another: all widths, rates and seeds of a rule, in other ways like `like`."""
    return [
        replace(like, width=w, base_width=w if rule == "standard" else like.base_width, rate=r, seed=s)
        for w in widths
        for r in rates
        for s in range(seeds)
    ]


def run_all(trials: list[Trial], done: Done) -> None:
    """Runs what is not done yet, one trial a core, the long ones first: the cores end together."""
    left = {trial for trial in trials if trial.name not in done.losses}
    with ProcessPoolExecutor(this_machine().cores, multiprocessing.get_context("spawn")) as pool:
        ordered = sorted(left, key=lambda trial: (-trial.width, trial.name))
        running = {pool.submit(Trial.loss, trial): trial for trial in ordered}
        for future in as_completed(running):
            done.add(running[future].name, future.result())


def figures_of(
    widths: list[int], rates: list[float], like: Trial, seeds: int, losses: dict[str, float]
) -> list[Figure]:
    """The best rate of each rule and width, how far it moves, and the mean losses that say so."""
    figures: list[Figure] = []
    for rule in RULES:
        best: list[int] = []
        rows: list[Figure] = []
        for width in widths:
            means = [
                mean(losses[trial.name] for trial in trials_of(rule, [width], [rate], like, seeds))
                for rate in rates
            ]
            best.append(means.index(min(means)))
            rows += [
                Figure(f"{rule}, width {width}, rate {rate:g}: held-out loss", loss, "nats a token")
                for rate, loss in zip(rates, means, strict=True)
            ]
            figures.append(Figure(f"{rule}, width {width}: best rate", rates[best[-1]], ""))
        moved = float(max(best) - min(best))
        goal = "at most 1" if rule == "scaled" else "above 1"
        figures += [Figure(f"{rule}: the best rate moves by", moved, "factors of 2", goal), *rows]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two narrow widths, two rates, few steps")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="multiples of 32")
    parser.add_argument("--optimizer", default="adamw", help="adamw, whose rate moves most, or muon")
    parser.add_argument("--done", type=Path, help="where losses are kept as they come, and read from")
    arguments = parser.parse_args()
    widths = [32, 64] if arguments.quick else list(arguments.widths)
    rates = list(RATES[:2] if arguments.quick else RATES)
    seeds, steps = (1, 10) if arguments.quick else (SEEDS, STEPS)
    like = Trial(widths[0], BASE_WIDTH, rates[0], 0, steps, arguments.optimizer)
    like.job()  # builds the shards, once
    done = Done(arguments.done)
    run_all([t for rule in RULES for t in trials_of(rule, widths, rates, like, seeds)], done)
    figures = figures_of(widths, rates, like, seeds, done.losses)
    print_figures(figures)
    write_receipt("transfer", figures, arguments.out, hardware=asdict(this_machine()))


if __name__ == "__main__":
    main()
