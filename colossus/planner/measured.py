"""From a calibration's timings to ratios of measured seconds over those of the formulas.

Products, attention and copies compare at once. What lies between them in a layer, and in the loss, is what is
left of the whole, priced by the same ledger that predictions are made of.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

import numpy as np

from colossus.architecture import Architecture
from colossus.hardware.calibration import Calibration, Timing, kept, layer_arch, of_accelerator
from colossus.hardware.catalogue import Accelerator
from colossus.hardware.fleets import Hardware, Pool
from colossus.hardware.machine import Machine
from colossus.perf import communication as comm
from colossus.perf.corrections import NEAR, SAME, Corrections, Key
from colossus.perf.ledger import COMMUNICATION, PHASES, Ledger, Phase, Row
from colossus.perf.parts import ATTENTION, MAX_BLOCKED, kernel_of
from colossus.perf.price import UPDATE_BYTES, Pricer
from colossus.perf.software import OURS
from colossus.planner.columns import Layouts
from colossus.planner.estimate import KEYS, Problem
from colossus.planner.formulas import Piece, layers_ledger, piece_of

MESSAGES = ("all_gather", "reduce_scatter", "all_reduce")
WHOLES = ("layer", "loss")
ALIKE = {"h100-sxm": "h200-sxm", "h800-sxm": "h200-sxm"}  # one processor; memory and links are each one's own
LEAST_REST = 0.02  # of a layer's seconds: products and attention timed alone may add up to more than it took
Rows = list[tuple[tuple[float, ...], float]]


def corrections_for(hardware: Hardware, machine: Machine | None = None) -> Corrections | None:
    """What was measured of a fleet's accelerators, or of the machine that the fleet is.

    machine: this one, where the fleet names no accelerators.
    """
    part = hardware.accelerator
    calibration = None if machine is None else kept(machine)
    if calibration is not None:
        return corrections_of(calibration, replace(part, shared_by=1), here=True)
    calibration = of_accelerator(ALIKE.get(part.name, part.name)) if part.device == "cuda" else None
    return None if calibration is None else corrections_of(calibration, part, here=False)


def basis(problem: Problem, layout: Layouts) -> list[tuple[str, str]]:
    """What one layout's seconds rest on: (what, whether it was measured, interpolated, fitted or assumed)."""
    found = problem.pricer.corrections
    if found is None:
        words = "formulas, and scalars that were fitted to published runs"
        if problem.pricer.hardware.accelerator.device == "cpu":
            words = "this machine's rate of large products, and formulas"
        alone = [("products", words)]
        return [*alone, ("messages", "formulas")] if layout.ranks[0] > 1 else alone
    piece = piece_of({name: layout.number(name) for name in KEYS}, problem.seq_len)
    ledger = problem.ledger(piece)
    rows = [("products", _sure(problem, found, ledger, "product"))]
    rows.append(("attention", _sure(problem, found, ledger, "fused_attention")))
    ours = any(kind == "elementwise" for kind, *_ in found.surfaces)
    rows.append(("between them", "measured in whole layers" if ours else "a scalar fitted to published runs"))
    talks = any(kind in MESSAGES for kind, *_ in found.surfaces)
    if layout.ranks[0] > 1:
        rows.append(("messages", "measured between ranks of one machine" if talks else "formulas"))
    return rows


def _sure(problem: Problem, found: Corrections, ledger: Ledger, kind: str) -> str:
    """Of the FLOPs of a kind: how near the shapes are that were measured."""
    taken = ledger.take(ledger.where(kind=kind))
    distances = problem.pricer.distances(taken)[:, 0]
    flops = (taken.executed * taken.repeat)[:, 0]
    known = np.isfinite(distances)
    if not flops[known].sum():
        return "formulas, and scalars that were fitted to published runs"
    total = flops.sum()
    at, near = (flops[known & (distances <= reach)].sum() / total for reach in (SAME, NEAR))
    words = f"{100 * at:.0f}% of FLOPs at shapes measured on {found.source}, {100 * (near - at):.0f}% between"
    return words + (f", {100 * (1 - near):.0f}% beyond them" if near < 0.995 else "")


@lru_cache(maxsize=32)
def corrections_of(calibration: Calibration, part: Accelerator, *, here: bool) -> Corrections:
    """Ratios for `part`, which was calibrated or is made like what was.

    here: it is the very machine: what long runs keep of short ones' rate is the calibration's; else it is the
    scalar of published runs.
    """
    return _Comparison(calibration, part, here).corrections()


class _Comparison:
    def __init__(self, calibration: Calibration, part: Accelerator, here: bool) -> None:
        self.calibration, self.part, self.here = calibration, part, here
        self.found: dict[Key, Rows] = defaultdict(list)
        self.hardware = _alone(part)

    def pricer(self, variant: str = "", found: Corrections | None = None) -> Pricer:
        """Formulas without what was fitted, with what was `found` so far. variant: of attention."""
        software = replace(OURS, flash="flash2") if variant == "flash2" else OURS
        plain = Pricer.of(self.hardware, software, found)
        return replace(plain, scalars=dict.fromkeys(plain.scalars, 1.0))

    def corrections(self) -> Corrections:
        for timing in self.calibration.timings:
            if timing.kind in MESSAGES:
                group = comm.Group(np.array([timing.shape[0]]), np.ones(1))
                hardware = replace(self.hardware, node_size=int(timing.shape[0]))
                plain = replace(self.pricer(), hardware=hardware)
                self.add(timing, float(plain.messages(timing.kind, np.array([timing.shape[1]]), group)[0]))
            elif timing.kind == "update":
                self.add(timing, timing.shape[0] * UPDATE_BYTES / self.part.copy)
            elif timing.kind not in WHOLES:
                ledger = _ledger_of(timing, self.part)
                self.add(timing, float(self.pricer(timing.variant).seconds(ledger).sum()))
        so_far = Corrections.of(self.found, held=1.0)
        for timing in self.calibration.timings:
            if timing.kind == "layer":
                self.rest(timing, "elementwise", self.of_layer(timing), so_far)
            elif timing.kind == "loss":
                self.rest(timing, "loss", self.of_loss(timing), so_far)
        made = self.calibration
        source = f"{made.title}, {made.date}"
        held = made.held if self.here else None
        return Corrections.of(self.found, held=held, source=source, best=self.best())

    def best(self) -> dict[str, float]:
        """By type, FLOP/s of the quickest product."""
        found: dict[str, float] = defaultdict(float)
        for timing in self.calibration.timings:
            if timing.kind == "product":
                rate = 2 * math.prod(timing.shape) / timing.seconds
                found[timing.precision] = max(found[timing.precision], rate)
        return dict(found)

    def add(self, timing: Timing, plain: float) -> None:
        """plain: seconds by formula."""
        key = (timing.kind, timing.variant, timing.precision, timing.phase)
        shape = timing.shape
        if timing.kind == "attention":  # as `Pricer.keys` has it
            shape = (*shape[:3], shape[0] * shape[3])
        self.found[key].append((shape, timing.seconds / plain))

    def rest(self, timing: Timing, kind: str, ledger: Ledger, so_far: Corrections) -> None:
        """What is left of a whole, for the rows of a ledger that are elementwise, or the loss."""
        rows = ledger.where(kind="elementwise") if kind == "elementwise" else ledger.where(name="loss")
        priced = (self.pricer(found=so_far).seconds(ledger) * ledger.repeat)[~rows].sum()
        left = max(timing.seconds - float(priced), LEAST_REST * timing.seconds)
        sizes = (ledger.bytes * ledger.repeat)[rows, 0]
        key = (kind, timing.variant, timing.precision, timing.phase)
        self.found[key].append(((float(sizes.mean()),), left / float(sizes.sum() / self.part.copy)))

    def of_layer(self, timing: Timing) -> Ledger:
        samples, tokens, width, heads, ffn = timing.shape
        arch = layer_arch(int(tokens), int(width), int(heads), int(ffn))
        ledger = self.ledger(arch, samples, int(tokens), timing.precision)
        phases = ("forward",) if timing.phase == "forward" else ("backward", "weights")
        return ledger.take(ledger.where(stage="dense", phase=phases))

    def of_loss(self, timing: Timing) -> Ledger:
        tokens, width, vocabulary = timing.shape
        arch = layer_arch(int(tokens), int(width), 1, 64, int(vocabulary))
        ledger = self.ledger(arch, 1.0, int(tokens), timing.precision)
        return ledger.take(ledger.where(stage="last", name=("head", "loss")))

    def ledger(self, arch: Architecture, samples: float, tokens: int, precision: str) -> Ledger:
        one, none = np.ones(1), np.zeros(1)
        piece = Piece(np.array([samples]), one, one, one, one, one, none, tokens)
        kernel = kernel_of(arch, tokens, self.part.device)
        ledger = layers_ledger(arch, piece, OURS, precision, kernel)
        return ledger.take(~ledger.where(kind=COMMUNICATION))


def _ledger_of(timing: Timing, part: Accelerator) -> Ledger:
    """What one operation is in the language of the ledger."""
    phase: Phase = next((phase for phase in PHASES if phase == timing.phase), "forward")
    if timing.kind == "copy":
        return Ledger.of([Row("copy", phase, "", "memory", precision="fp32", bytes=timing.shape[0])])
    m, n, k, count = timing.shape
    if timing.kind == "attention":
        # of the scores and the weighted values: how often each is multiplied, see `perf.parts`
        blocked = part.device == "cpu" and m <= MAX_BLOCKED
        times = (1.0, 1.0) if phase == "forward" else (2.0, 2.0) if blocked else (3.0, 2.0)
        return Ledger.of(
            Row(
                name,
                phase,
                "",
                "fused_attention",
                precision=timing.precision,
                m=m,
                n=n * again,
                k=k,
                count=count,
            )
            for name, again in zip(ATTENTION, times, strict=True)
        )
    width = {"fp8": 1, "bf16": 2}.get(timing.precision, 4)
    moved = count * (width * (m * k + n * k) + max(width, 2) * m * n)
    name = "experts.product" if timing.kind == "grouped" else "product"
    row = Row(
        name, phase, "", "product", "compute", timing.precision, m=m, n=n, k=k, count=count, bytes=moved
    )
    return Ledger.of([replace(row, bytes=moved)])


def _alone(part: Accelerator) -> Hardware:
    return Hardware(
        name=part.name, pools=(Pool(part, 1),), node_size=1, nic=part.nvlink, pod=1, oversubscription=1.0,
        failures=(0.0, 0.0), restart_seconds=0.0, save_seconds=0.0, repair_seconds=0.0, watts=part.watts,
        usd_per_hour=0.0, usd_per_kwh=0.0, pue=1.0,
    )  # fmt: skip
