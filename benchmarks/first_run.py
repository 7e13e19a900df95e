"""What a newcomer gets: `make train` in a fresh clone, with an empty package cache.

Measures the seconds from the command to the first training step and to its end, and what was learned, beside
compressors on the same held-out documents. The packages are downloaded, so the first seconds are the
network's. `--minutes 30` trains longer.

`--baseline FOLDER` trains instead with the packages of this environment, ours and then another checkout's
default job of the same model and batch, each with an empty cache: tokens/s once steps are steady (the median
of the second half), and tokens over the whole.

    python -m benchmarks.first_run [--quick] [--out FILE] [--minutes M] [--baseline FOLDER]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from colossus.events import number, read_events
from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt

ROOT = Path(__file__).resolve().parent.parent


def measure(minutes: float, folder: Path) -> list[Figure]:
    """Clones, makes and trains in `folder`, and reads the run's event log."""
    clone, run = folder / "clone", folder / "run"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)], check=True)
    environment = os.environ | {
        "PIP_CACHE_DIR": str(folder / "pip"),
        "COLOSSUS_CACHE": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    arguments = f"ARGS=run.minutes={minutes:g} run.folder={run}"
    began_at, began = time.time(), time.monotonic()
    subprocess.run(["make", "train", arguments], cwd=clone, env=environment, check=True)
    total = time.monotonic() - began
    return _figures(read_events(run), began_at, total, minutes)


def _figures(
    events: list[dict[str, Any]], began_at: float, total_seconds: float, minutes: float
) -> list[Figure]:
    steps = [event for event in events if event["kind"] == "step"]
    final = [event for event in events if event["kind"] == "validation"][-1]
    start = next(event for event in events if event["kind"] == "start")
    trained = number(events[-1]["run_seconds"])
    bits = number(final["bits_per_byte"])

    def against(tool: str) -> Figure:
        theirs = number(final[f"{tool}_bits_per_byte"])
        return Figure(
            f"bits per byte against {tool}", bits, "bits per byte", "ratio < 1", theirs, bits / theirs
        )

    goal = "< 480" if minutes == 5 else None
    return [
        Figure("minutes asked for", minutes, "minutes"),
        Figure("command to first step", steps[0]["time"] - began_at, "s", "< 120 where the download allows"),
        Figure("command to end", total_seconds, "s", goal),
        Figure("training, all told", trained, "s", f"<= {60 * minutes:g}"),
        Figure("parameters", start["num_parameters"], "parameters"),
        Figure("steps", len(steps), "steps"),
        Figure("tokens", sum(step["tokens"] for step in steps), "tokens"),
        Figure("held-out documents", final["num_documents"], "documents"),
        *(against(tool) for tool in ("gzip", "bz2", "xz")),
    ]


def against(baseline: Path, minutes: float, folder: Path) -> list[Figure]:
    """Both checkouts' runs, and ours over theirs."""
    ours = _trained(ROOT, [f"run.minutes={minutes:g}"], folder / "ours")
    job = _start(ours)["job"]
    same = [f"model.{name}={job['model'][name]}" for name in ("hidden_size", "num_layers", "vocab_size")]
    same += [f"run.minutes={minutes:g}", f"run.global_batch={job['run']['global_batch']}"]
    theirs = _trained(baseline.resolve(), same, folder / "theirs")

    def figure(
        name: str, unit: str, of: Callable[[list[dict[str, Any]]], float], goal: str | None = "ratio >= 1"
    ) -> Figure:
        mine, other = of(ours), of(theirs)
        return Figure(name, mine, unit, goal, other, mine / other)

    def parameters(events: list[dict[str, Any]]) -> float:
        return number(_start(events)["num_parameters"])

    assert parameters(ours) == parameters(theirs), "the checkouts make other models of the same words"
    return [
        Figure("minutes asked for", minutes, "minutes"),
        Figure("parameters", parameters(ours), "parameters"),
        figure("steady rate", "tokens/s", _steady),
        figure("tokens over the whole", "tokens", lambda events: sum(s["tokens"] for s in _steps(events))),
        figure("best rate of products", "FLOP/s", lambda e: number(_start(e)["peak_flops_per_second"]), None),
        figure("bits per byte", "bits per byte", _bits_per_byte, "ratio <= 1"),
    ]


def _trained(root: Path, words: list[str], folder: Path) -> list[dict[str, Any]]:
    run = folder / "run"
    caches = {"COLOSSUS_CACHE": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    command = [sys.executable, "-m", "colossus", "train", f"run.folder={run}", *words]
    environment = os.environ | caches | {"PYTHONPATH": str(root)}
    subprocess.run(command, cwd=root, env=environment, check=True)
    return read_events(run)


def _steps(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["kind"] == "step"]


def _start(events: list[dict[str, Any]]) -> dict[str, Any]:
    return next(event for event in events if event["kind"] == "start")


def _bits_per_byte(events: list[dict[str, Any]]) -> float:
    return number([event for event in events if event["kind"] == "validation"][-1]["bits_per_byte"])


def _steady(events: list[dict[str, Any]]) -> float:
    steps = _steps(events)
    return statistics.median(number(step["tokens_per_second"]) for step in steps[len(steps) // 2 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="half a minute of training")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--baseline", type=Path, metavar="FOLDER", help="another checkout to compare with")
    arguments = parser.parse_args()
    minutes = 0.5 if arguments.quick else arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        if arguments.baseline is not None:
            figures = against(arguments.baseline, minutes, Path(folder))
        else:
            figures = measure(minutes, Path(folder))
    print_figures(figures)
    write_receipt("first_run", figures, arguments.out, hardware=asdict(this_machine()))


if __name__ == "__main__":
    main()
