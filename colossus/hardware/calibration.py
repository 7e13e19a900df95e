"""A calibration: what single operations of a training step took on one machine, kept as JSON.

`measure.calibrate` writes it; `planner.measured` makes of it what prices are corrected by. Those of
accelerators that come with the project lie beside the catalogue; each machine keeps its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path

from pydantic import TypeAdapter

from colossus.architecture import Architecture
from colossus.hardware.machine import Machine, Positive, cache_folder, keep_text, slug


@dataclass(frozen=True)
class Timing:
    """Seconds of one operation.

    kind: "product", "grouped" (products of experts), "attention", "layer", "loss", "update", "copy", or the
        kind of a message.
    variant: of attention on a GPU the kernel; of a layer "fused" (compiled) or "eager"; else "".
    phase: "forward", "backward", "weights", or "" where that makes no difference.
    shape: of products m, n, k and how many at once; of attention queries, keys that each meets, width of a
        head, heads; of a layer samples, tokens, width, heads, feed-forward width (see `layer_arch`); of the
        loss tokens, width, vocabulary; of an update weights; of a copy bytes; of a message ranks and bytes of
        the full tensor.
    """

    kind: str
    variant: str
    precision: str
    phase: str
    shape: tuple[float, ...]
    seconds: Positive


@dataclass(frozen=True)
class Calibration:
    """Timings of one device. threads: of a processor, that each took. seconds: what measuring took.

    held: the rate that a large product keeps up for seconds on end over that of its timing, 1 where power
    never limits it.
    """

    device: str
    title: str
    threads: int
    timings: tuple[Timing, ...]
    versions: dict[str, str] = field(hash=False)
    date: str
    seconds: float
    held: float = 1.0

    def to_json(self) -> str:
        """One timing a line: such a file can be compared and read."""
        head = {name: value for name, value in asdict(self).items() if name != "timings"}
        rows = ",\n ".join(json.dumps(asdict(timing)) for timing in self.timings)
        return json.dumps(head)[:-1] + ', "timings": [\n ' + rows + "\n]}\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Reads what `to_json` wrote. Raises ValueError where that is damaged."""
        return TypeAdapter(cls).validate_json(text)


def layer_arch(tokens: int, width: int, heads: int, ffn: int, vocabulary: int = 64) -> Architecture:
    """A model of one layer, like those that are timed whole."""
    return Architecture(
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        intermediate_size=ffn,
        max_seq_len=tokens,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        initializer_range=0.02,
        tie_embeddings=True,
        qk_norm=False,
    )


def kept_file(machine: Machine) -> Path:
    """Where the calibration of this machine is kept."""
    gpus = f"{len(machine.gpus)} {machine.gpus[0].name}" if machine.gpus else "no gpus"
    name = f"{machine.processor} {machine.cores} cores {gpus} torch {machine.versions.get('torch', '')}"
    return cache_folder() / "calibrations" / f"{slug(name)}.json"


def keep(calibration: Calibration, machine: Machine) -> Path:
    """Writes it whole or not at all."""
    path = kept_file(machine)
    keep_text(path, calibration.to_json())
    return path


def kept(machine: Machine) -> Calibration | None:
    """This machine's, if it was calibrated with this PyTorch."""
    try:
        return Calibration.from_json(kept_file(machine).read_text())
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=16)
def of_accelerator(name: str) -> Calibration | None:
    """That of an accelerator of the catalogue, where one was measured."""
    path = resources.files("colossus") / "hardware" / "catalogue" / "calibrations" / f"{name}.json"
    return Calibration.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None
