"""What a ledger costs on a fleet: seconds of every row, by one model for all sources of ledgers."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources

import numpy as np

from colossus.hardware.catalogue import Accelerator
from colossus.hardware.fleets import Hardware
from colossus.perf import communication as comm
from colossus.perf.corrections import Corrections, Key
from colossus.perf.ledger import Columns, Ledger
from colossus.perf.software import Software

TILE = (128.0, 256.0)  # of a product that one multiprocessor makes at once, on Hopper and later
AMPERE_TILE = (128.0, 128.0)
DEPTH = 256.0  # of k at which a product reaches half of its rate; twice that in float8, whose measured rates
# still rise by a tenth from 4,096 to 16,384
CPU_ATTENTION = 0.5  # of the peak that a processor's attention reaches, where it was not measured
KEYS = 600.0  # that a query meets at which fused attention reaches half of its rate: an H100 makes 400
# TFLOP/s of causal sequences of 2,048 and 616 of 16,384 (arXiv 2407.08608, figure 5)
BACKWARD_PASSES = 2.5  # over the keys, of the forward pass's one
AMPERE_KERNEL_SHARE = (
    0.6  # FlashAttention-2 on Hopper: 35% of the peak, where Hopper's own instructions reach up to
)
# 75% forward and 55% backward (arXiv 2407.08608, figures 5 and 6)
GAP = 5e-6  # seconds between two kernels of a GPU, ramps included: what products of 1024 and 2048 lose beside
# those of 8192, in the catalogue's measured tables (4 to 9 us)
NIC_SHARE = 0.94  # of a card's rate that messages reach: 46 to 48 of 50 GB/s (NVIDIA/nccl-tests issue 290)
SPREAD = 0.0  # of the nodes' speeds in published runs: none shows beyond the other losses
SKEW_TILES = 16.0  # from so many waves on, kernels spread the last one over all multiprocessors


UPDATE_BYTES = 34.0  # AdamW a weight: gradient, weight and two moments in fp32, read and written; a copy
CLIP_BYTES = 3.0  # times a gradient's own: its norm, and it scaled


@lru_cache(maxsize=1)
def fitted() -> Mapping[str, float]:
    """The calibrated scalars, by name."""
    path = resources.files("colossus") / "perf" / "scalars.toml"
    return {name: row["value"] for name, row in tomllib.loads(path.read_text(encoding="utf-8")).items()}


@dataclass(frozen=True)
class Pricer:
    """Turns rows into seconds. scalars: see `scalars.toml`. corrections: what of it was measured."""

    hardware: Hardware
    software: Software
    scalars: Mapping[str, float]
    corrections: Corrections | None = None

    @classmethod
    def of(
        cls, hardware: Hardware, software: Software, corrections: Corrections | None = None, **changed: float
    ) -> Pricer:
        return cls(hardware, software, {**fitted(), **changed}, corrections)

    def on(self, accelerator: Accelerator) -> Pricer:
        """The same with another pool's accelerator."""
        pool = replace(self.hardware.pools[0], accelerator=accelerator)
        return replace(self, hardware=replace(self.hardware, pools=(pool,)))

    def seconds(self, ledger: Ledger, groups: comm.Groups | None = None) -> Columns:
        """Of each row once, [R, N]; `repeat` is not counted in. groups: by name, for rows with messages."""
        out = np.zeros(ledger.size)
        shared = self.hardware.accelerator.shared_by
        for kind in set(ledger.kind.tolist()):
            mask = ledger.where(kind=kind)
            if kind == "product":
                out[mask] = shared * self.products(ledger.take(mask))
            elif kind == "fused_attention":
                out[mask] = shared * self.attention(ledger.take(mask))
            elif kind in ("memory", "elementwise"):
                out[mask] = shared * self.moves(kind, ledger.take(mask))
            else:
                assert groups is not None, "rows with messages need their groups"
                for name in set(ledger.group[mask].tolist()):
                    rows = mask & ledger.where(group=name)
                    out[rows] = self.messages(kind, ledger.sent[rows], groups[name], ledger.count[rows])
        return out

    def moves(self, kind: str, ledger: Ledger) -> Columns:
        """What moves bytes and computes little: as measured of our own, else by what was fitted."""
        seconds = ledger.bytes / self.hardware.accelerator.copy
        habit, found, ours = self.software.elementwise, self.corrections, self.software.measured
        fitted = self.scalars[habit] if kind == "elementwise" else 1.0
        rows: dict[Key, list[int]] = defaultdict(list)
        words = zip(ledger.name, ledger.phase, ledger.precision, strict=True)
        for i, (name, phase, precision) in enumerate(words):
            key: Key = ("copy", "", "fp32", "")
            if kind == "elementwise":
                key = (kind, habit, precision, "backward" if phase == "backward" else "forward")
            elif name == "loss" and ours:
                key = ("loss", "", precision, "")
            rows[key].append(i)
        for key, mine in rows.items():
            measured = found is not None and found.has(key) and (ours or kind == "memory")
            seconds[mine] *= found.ratio(key, ledger.bytes[mine]) if found and measured else fitted
        return seconds

    def products(self, ledger: Ledger) -> Columns:
        """Matrix products: by formula times what was measured of shapes like these, else what was fitted."""
        seconds = self.plain_products(ledger)
        for key, rows, shape in self.keys(ledger):
            for i in rows:
                if "experts." in ledger.name[i] and (key is None or key[0] != "grouped"):
                    seconds[i] = seconds[i] / self.scalars["experts"]
            if self.corrections is not None and key is not None:
                seconds[rows] *= self.corrections.ratio(key, *shape)
        return self.possible(seconds, ledger)

    def possible(self, seconds: Columns, ledger: Ledger) -> Columns:
        """A processor's, no shorter than at its best rate: that was timed, if perhaps in another moment."""
        if self.hardware.accelerator.device != "cpu":
            return seconds
        ranks = self.hardware.accelerator.shared_by
        best = {"fp32": self.best("fp32") * ranks, "bf16": self.best("bf16") * ranks}
        best["attention"] = max(best.values())  # which may compute in another type than it is given
        fused = ledger.kind == "fused_attention"
        of = np.where(fused, "attention", np.where(ledger.precision == "fp32", "fp32", "bf16"))
        rates = np.array([[best[name]] for name in of])
        return np.maximum(seconds, 2 * ledger.m * ledger.n * ledger.k * ledger.count / rates)

    def best(self, precision: str) -> float:
        """FLOP/s of a rank: of a GPU its peak, of a processor the best that was measured of products."""
        part, found = self.hardware.accelerator, self.corrections
        timed = found.best.get(precision, 0.0) if found is not None and part.device == "cpu" else 0.0
        return max(part.peak(precision), timed) / part.shared_by

    def keys(self, ledger: Ledger) -> Iterator[tuple[Key | None, list[int], list[Columns]]]:
        """Of products and attention: under which key they were measured, None where they were not, which rows
        these are, and their shapes as that key has them."""
        found = self.corrections
        variant = "" if self.hardware.accelerator.device == "cpu" else self.software.flash
        rows: dict[Key | None, list[int]] = defaultdict(list)
        for i, (name, kind, phase) in enumerate(zip(ledger.name, ledger.kind, ledger.phase, strict=True)):
            side, precision = "forward" if phase == "recompute" else phase, ledger.precision[i]
            kinds = ("grouped", "product") if "experts." in name else ("product",)
            keys: list[Key] = [(kind, "", precision, side) for kind in kinds]
            if kind == "fused_attention":
                keys = [("attention", variant, precision, side)]
            rows[next((key for key in keys if found is not None and found.has(key)), None)].append(i)
        for key, mine in rows.items():
            shape = [column[mine] for column in (ledger.m, ledger.n, ledger.k, ledger.count)]
            if key is not None and key[0] == "attention":
                shape[3] = shape[0] * shape[3]  # all queries: what can be done at once
                shape[1] = shape[1] / (BACKWARD_PASSES if key[3] == "backward" else 1.0)
            yield key, mine, shape

    def distances(self, ledger: Ledger) -> Columns:
        """Of each product and attention, octaves to the nearest shape that was measured: [R, N]."""
        out = np.full(ledger.size, np.inf)
        for key, rows, shape in self.keys(ledger):
            if self.corrections is not None and key is not None:
                out[rows] = self.corrections.ratio_and_distance(key, *shape)[1]
        return out

    def plain_products(self, ledger: Ledger) -> Columns:
        """By formula: of what is measured the best, less for part-filled tiles, waves and short k."""
        part = self.hardware.accelerator
        rate = np.empty((ledger.size[0], 1))
        for i, precision in enumerate(ledger.precision):
            rate[i] = self.rate(precision)
        flops = 2 * ledger.m * ledger.n * ledger.k * ledger.count
        if part.device == "cpu":
            return np.maximum(flops / rate, ledger.bytes / part.copy)
        depth = np.where(ledger.precision == "fp8", 2 * DEPTH, DEPTH)[:, None]
        share = product_share(ledger.m, ledger.n, ledger.k, ledger.count, part, depth)
        return np.maximum(flops / (rate * share), ledger.bytes / part.copy)

    def rate(self, precision: str) -> float:
        """FLOP/s of a large product."""
        part = self.hardware.accelerator
        if part.device == "cpu":
            return part.peak(precision)
        generation = part.generation if f"{part.generation}_products" in self.scalars else "hopper"
        if precision == "fp8" and part.fp8:
            scalar = self.scalars.get(f"{generation}_fp8", self.scalars["hopper_fp8"])
            return part.fp8 * part.reachable_fp8 * self.held(scalar)
        return part.peak(precision) * part.reachable * self.held(self.scalars[f"{generation}_products"])

    def held(self, scalar: float) -> float:
        """What long runs keep of products' rate: as measured on this machine, else as in published runs."""
        found = self.corrections
        return scalar if found is None or found.held is None else found.held

    def attention(self, ledger: Ledger) -> Columns:
        """Fused attention: by formula times what was measured of the same kernel, else what was fitted."""
        seconds = self.plain_attention(ledger)
        usual = CPU_ATTENTION if self.hardware.accelerator.device == "cpu" else self.scalars["attention"]
        for key, rows, shape in self.keys(ledger):
            if self.corrections is not None and key is not None:
                seconds[rows] *= self.corrections.ratio(key, *shape)
            else:
                seconds[rows] /= usual
        return self.possible(seconds, ledger)

    def plain_attention(self, ledger: Ledger) -> Columns:
        """m queries, n keys that each meets, of width k, `count` heads, if long ones ran at the peak."""
        part, share = self.hardware.accelerator, 1.0
        if self.software.flash != "hopper" and part.generation not in ("ampere", "cpu"):
            share *= AMPERE_KERNEL_SHARE
        rate = np.array([[part.peak(p) * share] for p in ledger.precision])
        # heads of 64 run at 0.85 of the rate of 128 (FlashAttention-2, arXiv 2307.08691, figures 4 to 6)
        full = np.minimum(1.0, ledger.k / 128.0) ** 0.25
        passes = np.where(ledger.phase == "backward", BACKWARD_PASSES, 1.0)[:, None]
        keys = ledger.n / passes
        long = keys / (keys + KEYS)
        return 2 * ledger.m * ledger.n * ledger.k * ledger.count / (rate * full * long)

    def messages(self, kind: str, sent: Columns, group: comm.Group, copies: Columns | float = 0.0) -> Columns:
        """Seconds of a message; in programs whose host starts kernel by kernel at least what ranks wait for
        each other. copies: of a token among those that go to experts."""
        if kind == "all_to_all":
            once = copies if self.software.sends_once else 0.0
            return comm.exchange_seconds(sent, group, self.hardware, NIC_SHARE, once)
        of = {
            "all_gather": comm.gather_seconds,
            "reduce_scatter": comm.gather_seconds,
            "all_reduce": comm.reduce_seconds,
            "send": comm.send_seconds,
        }[kind]
        seconds = of(sent, group, self.hardware, NIC_SHARE)
        if self.corrections is not None and self.corrections.has(key := (kind, "", "", "")):
            return seconds * self.corrections.ratio(key, group.size, np.maximum(sent, 1.0))
        if self.software.dispatch == "eager_host" and kind != "send":
            # The last of so many hosts: E[max] of n normals grows as the root of log n.
            wait = self.scalars["eager_message"] * np.sqrt(np.log2(np.maximum(group.size, 2.0)))
            return np.where(seconds > 0, np.maximum(seconds, wait), 0.0)
        return seconds

    def update(self, weights: Columns, gradients: Columns) -> Columns:
        """Seconds to clip so many gradient elements by their norm, and to update so many weights by AdamW."""
        part = self.hardware.accelerator
        if self.corrections is not None and self.corrections.has(key := ("update", "", "fp32", "")):
            return part.shared_by * UPDATE_BYTES * weights / part.copy * self.corrections.ratio(key, weights)
        clipped = gradients * self.software.gradient_bytes * CLIP_BYTES
        return part.shared_by * (weights * UPDATE_BYTES + clipped) / part.copy

    @property
    def gap(self) -> float:
        """Seconds between two kernels of a GPU; measured layers have them in what lies between products."""
        timed = self.corrections is not None and self.software.measured
        return 0.0 if timed or self.hardware.accelerator.device == "cpu" else GAP

    def dispatch(self) -> float:
        """Seconds of the host for each kernel. A processor's own operations were timed with it."""
        if self.software.graphs or (
            self.corrections is not None and self.hardware.accelerator.device == "cpu"
        ):
            return 0.0
        if self.software.dispatch == "eager_host":
            return self.scalars["eager_host"]
        return self.hardware.accelerator.dispatch

    def slowest(self, nodes: Columns) -> Columns:
        """By how much the slowest of so many nodes is slower than the mean: E[max of n normals]."""
        return 1 + SPREAD * np.sqrt(2 * np.log(np.maximum(nodes, 1.0)))


def product_share(
    m: Columns, n: Columns, k: Columns, count: Columns, part: Accelerator, depth: Columns | float = DEPTH
) -> Columns:
    """The share of the best rate that a shape reaches: full tiles, full waves, and k long enough."""
    rows, columns = AMPERE_TILE if part.generation == "ampere" else TILE
    # A kernel may turn its tile: the better of both ways.
    tiles = np.minimum(
        np.ceil(m / rows) * np.ceil(n / columns), np.ceil(m / columns) * np.ceil(n / rows)
    ) * np.maximum(count, 1.0)
    area = m * n * count / (rows * columns)
    waves = tiles / part.units
    whole = np.ceil(waves) * part.units
    filled = area / np.where(waves > SKEW_TILES, tiles, whole)
    return np.clip(filled, 0.02, 1.0) * k / (k + depth)
