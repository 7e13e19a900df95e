"""Receipts: what a benchmark measured, how, and on what. Every published figure has one."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Variables of the environment that change how quick PyTorch is: a receipt says those that were set.
SPEED_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
)
PACKAGES = ("colossus-train", "torch", "numpy", "tokenizers", "tiktoken", "transformers", "safetensors")


@dataclass(frozen=True)
class Figure:
    """One measured number. goal: what it should reach. peer: the same of another program, in the same run;
    ratio: ours over the peer's."""

    name: str
    value: float
    unit: str
    goal: str | None = None
    peer: float | None = None
    ratio: float | None = None


def write_receipt(
    name: str, figures: Iterable[Figure], out: str | Path | None, hardware: Mapping[str, Any] | None = None
) -> None:
    """Writes the receipt of benchmark `name` to `out`; nothing where `out` is None.

    hardware: as measured in the same run; `Machine.to_dict()` and what else matters.
    """
    if out is None:
        return
    receipt = {
        "name": name,
        "command": command(name),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions(),
        "hardware": dict(hardware or {}),
        "figures": [{k: v for k, v in asdict(f).items() if v is not None} for f in figures],
    }
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(receipt, indent=1) + "\n")


def command(name: str) -> str:
    """The command line that runs benchmark `name` as this process does."""
    variables = [f"{v}={os.environ[v]}" for v in SPEED_VARIABLES if v in os.environ]
    return shlex.join([*variables, "python", "-m", f"benchmarks.{name}", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, where they are installed."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def print_figures(figures: Iterable[Figure]) -> None:
    """A table for people."""
    rows = [("figure", "value", "goal", "peer", "ratio")]
    for f in figures:
        peer = "" if f.peer is None else f"{f.peer:,.4g}"
        rows.append(
            (
                f.name,
                f"{f.value:,.4g} {f.unit}",
                f.goal or "",
                peer,
                "" if f.ratio is None else f"{f.ratio:.3f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
