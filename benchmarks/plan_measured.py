"""What `plan` says of this machine against what training here measures: seconds of a step and peak memory.

A dozen jobs, each a real `colossus train`: sizes, batches, one and two ranks, recomputation, compiled or not;
on a GPU, models of 0.1 to 7 billion weights. No job has the shapes that calibrated anything. Predictions are
written first (`--predict FILE`), from the calibration of this machine (`colossus plan --calibrate`), and
committed; then the jobs run. A processor's rate wanders, so on one a square product is timed before and after
every step, and steps beside which it moved by over 10% do not count; seconds are those at its best rate.
A job's figure is the median of its steps.

    python -m benchmarks.plan_measured [--quick] [--out] [--predict] [--predictions] [--only]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colossus.hardware.calibration import kept
from colossus.job import load_job
from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training

ROOT = Path(__file__).resolve().parent.parent
WARM_STEPS, STEPS = 3, 8
WANDERED = 0.10
REFERENCE_RUNS = 8
ATTEMPTS = 4  # at a job of whose steps too few count
SAMPLE_SECONDS = 0.004
COMMON = (
    "optimizer.name=adamw",
    "optimizer.warmup_steps=1",
    "data.tokenizer=bytes",
    "data.validation_fraction=0.05",
    "run.validate_every=1000",
    "run.prompt=the",
    "checkpoint.minutes=1000",
)


@dataclass(frozen=True)
class Case:
    """A job by name, in the words of the command line."""

    name: str
    words: tuple[str, ...]


def _cpu(width: int, layers: int, heads: int, ffn: int, vocab: int, seq_len: int, micro: int, batch: int,
         compiled: bool = False, ranks: int = 1, recompute: str = "none") -> Case:  # fmt: skip
    words = (
        f"model.hidden_size={width}", f"model.num_layers={layers}", f"model.num_heads={heads}",
        f"model.num_kv_heads={heads}", f"model.head_dim={width // heads}", f"model.intermediate_size={ffn}",
        f"model.vocab_size={vocab}", f"model.max_seq_len={seq_len}", "model.tie_embeddings=true",
        f"data.seq_len={seq_len}", f"layout.micro_batch={micro}", f"run.global_batch={batch}",
        f"layout.compile={str(compiled).lower()}", f"layout.recompute={recompute}",
        f"layout.dp_shard={ranks}", "layout.zero=1", "model.qk_norm=false",
    )  # fmt: skip
    name = f"width {width}, {layers} layers, {batch} x {seq_len}" + (f" by {micro}" if micro < batch else "")
    for extra in (f"{ranks} ranks" if ranks > 1 else "", "compiled" if compiled else "",
                  f"recompute {recompute}" if recompute != "none" else ""):  # fmt: skip
        name += f", {extra}" if extra else ""
    return Case(name, words)


def _gpu(preset: str, seq_len: int, micro: int, batch: int, compiled: bool = True, recompute: str = "none",
         *more: str) -> Case:  # fmt: skip
    words = (
        f"model={preset}", f"data.seq_len={seq_len}", f"layout.micro_batch={micro}",
        f"run.global_batch={batch}", f"layout.compile={str(compiled).lower()}",
        f"layout.recompute={recompute}", "layout.zero=1", *more,
    )  # fmt: skip
    name = f"{preset}, {batch} x {seq_len}" + (f" by {micro}" if micro < batch else "")
    name += ", compiled" if compiled else ", eager"
    return Case(name + (f", recompute {recompute}" if recompute != "none" else ""), words)


CPU_CASES = (
    _cpu(96, 3, 3, 288, 1024, 192, 8, 8),
    _cpu(192, 4, 6, 512, 4096, 256, 8, 8),
    _cpu(320, 5, 5, 864, 2048, 384, 4, 8),
    _cpu(384, 6, 6, 1024, 4096, 512, 8, 8),
    _cpu(640, 4, 10, 1728, 8192, 256, 4, 4),
    _cpu(192, 8, 3, 768, 512, 768, 2, 4),
    _cpu(384, 6, 6, 1024, 4096, 512, 8, 8, recompute="full"),
    _cpu(320, 5, 5, 864, 2048, 384, 4, 8, recompute="full"),
    _cpu(192, 4, 6, 512, 4096, 256, 4, 8, ranks=2),
    _cpu(384, 6, 6, 1024, 4096, 512, 4, 8, ranks=2),
    _cpu(192, 4, 6, 512, 4096, 256, 8, 8, compiled=True),
    _cpu(384, 4, 6, 1024, 2048, 256, 8, 8, compiled=True),
)
GPU_CASES = (
    _gpu("gpt2-124m", 1024, 16, 32),
    _gpu("qwen3-0.6b", 4096, 4, 4, True, "none", "model.max_seq_len=4096"),
    _gpu("llama3.2-1b", 8192, 2, 2),
    _gpu("llama3.2-1b", 4096, 2, 4, False),
    _gpu("llama3.2-3b", 8192, 1, 2),
    _gpu("llama3.2-3b", 4096, 2, 4, True, "full"),
    _gpu("qwen3-30b-a3b", 4096, 2, 2, True, "none", "model.num_layers=6", "model.max_seq_len=4096"),
)


class Clock(Hook):
    """Seconds of each step and the reference beside it, and the most memory of the steps before those that
    are timed; each rank writes its own file."""

    def on_start(self, training: Training) -> None:
        self.rows: list[dict[str, float]] = []
        self.cuda = training.world.device.type == "cuda"
        self._most, self._stop = 0, False
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            state = sum(p.nbytes for p in training.state.model.parameters())
            state += sum(t.nbytes for t in training.state.optimizer.state().values())
            self._base = _private_bytes() - state
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()

    def before_step(self, training: Training) -> None:
        self._before = self._reference()
        if training.step == WARM_STEPS:
            self._stop_sampling()
        self._began = time.perf_counter()

    def after_step(self, training: Training, result: StepResult) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        self.rows.append({"seconds": seconds, "before": self._before, "after": self._reference()})

    def on_finish(self, training: Training) -> None:
        self._stop_sampling()
        peak = {"bytes": float(self._most)}
        if self.cuda:
            peak = {"bytes": float(torch.cuda.max_memory_allocated()),
                    "reserved": float(torch.cuda.max_memory_reserved())}  # fmt: skip
        else:
            peak["bytes"] -= self._base
        found = {"steps": self.rows, **peak, "torch": str(torch.__version__)}
        (training.folder / f"clock-{training.world.rank}.json").write_text(json.dumps(found))

    def _reference(self) -> float:
        from colossus.measure.calibrate import reference_rate

        return 0.0 if self.cuda else reference_rate(this_machine().best, REFERENCE_RUNS)

    def _stop_sampling(self) -> None:
        self._stop = True
        if not self.cuda:
            self._sampler.join()

    def _sample(self) -> None:
        while not self._stop:
            self._most = max(self._most, _private_bytes())
            time.sleep(SAMPLE_SECONDS)


def _private_bytes() -> int:
    """Of this process, now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def corpus(folder: Path) -> Path:
    """Texts of random words: training reads them, and nothing is learned."""
    folder.mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(500)]
    for n in range(24):
        (folder / f"{n:02}.txt").write_text(" ".join(draw.choices(words, k=5_000)))
    return folder


def run(case: Case, folder: Path, texts: Path) -> list[dict[str, Any]]:
    """Trains a job; what its ranks measured."""
    words = [*case.words, *COMMON, f"data.corpus={texts}", f"data.folder={folder.parent / 'shards'}",
             f"run.folder={folder}", f"run.steps={WARM_STEPS + STEPS}",
             "run.hooks=benchmarks.plan_measured:Clock"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "colossus", "train", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}")
    return [json.loads(path.read_text()) for path in sorted(folder.glob("clock-*.json"))]


@dataclass(frozen=True)
class Measured:
    """seconds: of a step, at the processor's best rate. bytes: of all ranks; on a processor private memory
    above what a process holds before its first step, but for weights and optimizer state, which count."""

    seconds: float
    bytes: float
    steps: int


def measure(case: Case, folder: Path, texts: Path) -> Measured:
    """Runs a job, again where the reference wandered beside too many of its steps."""
    good: list[float] = []
    for attempt in range(ATTEMPTS):
        ranks = run(case, folder / f"{case.name.replace(' ', '-').replace(',', '')}-{attempt}", texts)
        for index in range(WARM_STEPS, WARM_STEPS + STEPS):
            rows = [rank["steps"][index] for rank in ranks]
            seconds = max(row["seconds"] for row in rows)
            before, after = (sum(row[name] for row in rows) for name in ("before", "after"))
            if not before:
                good.append(seconds)
            elif abs(before - after) / max(before, after) <= WANDERED:
                good.append(seconds * (before + after) / 2 / this_machine().best.flops_per_second)
        if len(good) >= 3:
            break
    if len(good) < 3:
        raise RuntimeError(f"{case.name}: the reference wandered beside nearly every step")
    return Measured(statistics.median(good), sum(rank["bytes"] for rank in ranks), len(good))


def cases(device: str) -> tuple[Case, ...]:
    return GPU_CASES if device == "cuda" else CPU_CASES


def predict(case: Case) -> dict[str, float]:
    """What `plan` says of a job whose layout is given."""
    from colossus import api

    job = load_job(None, [*case.words, *COMMON, "run.steps=11"])
    plan = api.plan(job)
    best = plan.best
    if plan.hardware.accelerator.device == "cpu":  # private memory; of a GPU what its allocator counts
        return {"seconds": best.seconds, "bytes": best.reserved * best.ranks}
    tensors = best.allocated - best.memory["context"]
    return {"seconds": best.seconds, "bytes": tensors * best.ranks}


def report(found: dict[str, Measured], said: dict[str, dict[str, float]], cuda: bool) -> list[Figure]:
    figures, times, sizes = [], [], []
    for name, measured in found.items():
        expected = said.get(name)
        if expected is None:
            figures.append(Figure(f"{name}: step", measured.seconds, "s"))
            figures.append(Figure(f"{name}: memory", measured.bytes / 2**20, "MiB"))
            continue
        size = measured.bytes
        times.append(abs(expected["seconds"] / measured.seconds - 1))
        figures.append(Figure(f"{name}: step", measured.seconds, "s", None, expected["seconds"],
                              expected["seconds"] / measured.seconds))  # fmt: skip
        if cuda or "compiled" not in name:  # a processor compiles in processes of its own
            sizes.append(abs(expected["bytes"] / size - 1))
            figures.append(Figure(f"{name}: memory", size / 2**20, "MiB", None, expected["bytes"] / 2**20,
                                  expected["bytes"] / size))  # fmt: skip
    if times:
        figures.append(Figure("mean error of time", statistics.mean(times), "", "<= 0.10"))
        figures.append(Figure("mean error of memory", statistics.mean(sizes), "", "<= 0.05"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the first two jobs")
    parser.add_argument("--predict", metavar="FILE", help="write predictions, and run nothing")
    parser.add_argument("--predictions", metavar="FILE", help="what was predicted before")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--only", help="jobs whose names hold this")
    arguments = parser.parse_args()
    machine = this_machine()
    chosen = [c for c in cases(machine.device) if arguments.only is None or arguments.only in c.name]
    chosen = chosen[: 2 if arguments.quick else None]
    if arguments.predict:
        said = {case.name: predict(case) for case in chosen}
        calibration = kept(machine)
        about = {"processor": machine.processor, "calibrated": calibration.date if calibration else None}
        Path(arguments.predict).write_text(json.dumps({"about": about, "jobs": said}, indent=1) + "\n")
        print(json.dumps(said, indent=1))
        return
    said = json.loads(Path(arguments.predictions).read_text())["jobs"] if arguments.predictions else {}
    found = {}
    with tempfile.TemporaryDirectory(prefix="measured-") as folder:
        texts = corpus(Path(folder) / "texts")
        for case in chosen:
            found[case.name] = measure(case, Path(folder), texts)
            print(f"{case.name}: {found[case.name].seconds:.4g} s, {found[case.name].bytes / 2**20:,.0f} MiB",
                  flush=True)  # fmt: skip
    figures = report(found, said, machine.device == "cuda")
    print_figures(figures)
    write_receipt("plan_measured", figures, arguments.out, machine.to_dict())


if __name__ == "__main__":
    main()
