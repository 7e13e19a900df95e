"""What a newcomer gets: `make train` in a fresh clone, with an empty package cache.

Measures the seconds from the command to the first training step and to its end, and what was learned, beside
compressors on the same held-out documents. The packages are downloaded, so the first seconds are the
network's. `--minutes 30` trains longer.

    python -m benchmarks.first_run [--quick] [--out FILE] [--minutes M]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="half a minute of training")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--minutes", type=float, default=5.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(0.5 if arguments.quick else arguments.minutes, Path(folder))
    print_figures(figures)
    write_receipt("first_run", figures, arguments.out, hardware=asdict(this_machine()))


if __name__ == "__main__":
    main()
