"""What training a model reaches on this machine, by type and threads, and what compiling its layers gains.

Rates of products do not say it: a library may run products of one size on one thread and of the next on two,
and small models are mostly other work. So whole steps are timed, forward and backward and the update of the
weights, of the very model or a part of it, and kept beside the machine's table. Settings take turns, so that
what else runs meets all of them; those that fall far behind are dropped at once. Steps that are compiled take
long to begin with: these a run times itself (`trainer.hooks.compile`), and keeps them here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from colossus import optim
from colossus.architecture import Architecture
from colossus.hardware.machine import Machine, available_cores, keep_text
from colossus.hardware.timings import Setting, Timing, Timings
from colossus.measure import accounting
from colossus.measure.attention import fused_is_quicker
from colossus.measure.machine import DISTURBED_SECONDS, age_seconds, kept_folder, processor_name
from colossus.measure.memory import keep_freed
from colossus.models import Decoder, build
from colossus.optim import Optimizer
from colossus.perf.flops import model_flops_per_token
from colossus.precision import apply_precision, torch_type
from colossus.sections import Optimizer as OptimizerSettings

PROBE_LAYERS = 4  # layers are alike
PROBE_VOCABULARY = 8192
PROBE_SEQ_LEN = 512
PROBE_TOKENS = 2048
STEP_TOKENS = 2048  # for which the weights are updated once: those of a short run's step
UPDATED_WIDTH = 512  # up to which updates are timed: wider, they take seconds, and are products like the rest
PASS_SECONDS = 0.15  # that a pass is expected to take, at a usual share of the best rate of products
USUAL_SHARE = 0.3
FIRST_TOKENS = 32  # of the pass that shows a hopeless setting, and the least of any
FAR, BEHIND = 4.0, 1.3  # times slower than the best: not timed at full size, not timed again
SURE = 2  # more turns of all, before one counts as behind: a single pass may have met other work
ROUNDS = 7
SHAPE_SECONDS = 2.4  # for all settings of one shape; a run's choice takes four shapes at most


def step_timings(
    machine: Machine,
    arch: Architecture,
    seq_len: int,
    settings: Sequence[Setting],
    device: str,
    optimizer: str = "muon",
) -> tuple[Timing, ...]:
    """Of training `arch` with each of the settings: as kept, else timed now.

    A machine that is not this one cannot be timed: its products' rates are all that is known of it.
    """
    if not _is_here(machine):
        return tuple(_expected(machine, setting) for setting in settings)
    path = _file(arch, seq_len, device, optimizer)
    kept = _read(path)
    is_old = kept is not None and not kept.quiet and age_seconds(path) > DISTURBED_SECONDS
    known = set() if kept is None or is_old else {timing.setting for timing in kept.timings}
    if missing := [setting for setting in settings if setting not in known]:
        found = time_steps(machine, arch, seq_len, missing, device, optimizer)
        kept = found if kept is None else found.with_best_of(kept)
        _write(path, kept)
    assert kept is not None
    return kept.of(settings)


def keep_compiled(arch: Architecture, seq_len: int, device: str, optimizer: str, seen: Timing) -> None:
    """Keeps what compiling gained a run, and the seconds that it took, for later ones. The rate of `seen`
    counts only where that setting was never timed: it is of the whole model, not of a part."""
    path = _file(arch, seq_len, device, optimizer)
    kept = _read(path) or Timings(arch.hidden_size, (), quiet=True)
    timings = {timing.setting: timing for timing in kept.timings}
    known = timings.get(seen.setting, seen)
    timings[seen.setting] = dataclasses.replace(known, gain=seen.gain, compile_seconds=seen.compile_seconds)
    _write(path, dataclasses.replace(kept, timings=tuple(timings.values())))


def forget_timings() -> None:
    """Of this machine, all that was kept."""
    shutil.rmtree(_folder(), ignore_errors=True)


def compiled_timings(machine: Machine) -> list[tuple[int, Timing]]:
    """(width, what compiling gained there) of all that was kept; none of a machine that is not this one."""
    if not _is_here(machine):
        return []
    kept = (_read(path) for path in sorted(_folder().glob("*.json")))
    return [(k.width, t) for k in kept if k is not None for t in k.timings if t.gain is not None]


def time_steps(
    machine: Machine,
    arch: Architecture,
    seq_len: int,
    settings: Iterable[Setting],
    device: str,
    optimizer: str = "muon",
) -> Timings:
    """Times whole steps of `arch`, or of a part of it; restores the thread count.

    A large model is measured by a part of it: few layers, short samples, few tokens.
    """
    before, began, width = torch.get_num_threads(), accounting.read(), arch.hidden_size
    seq_len, arch = min(seq_len, PROBE_SEQ_LEN), _part(arch)
    flops_per_token = model_flops_per_token(arch, seq_len)
    fits = PASS_SECONDS * USUAL_SHARE * machine.peak_flops_per_second(device) / flops_per_token
    tokens = int(max(FIRST_TOKENS, min(PROBE_TOKENS, fits)))
    keep_freed(machine.keeps_freed_memory)  # as a run does
    models = _Models(arch, seq_len, optimizer, device)
    likely = sorted(settings, key=lambda s: _expected(machine, s).flops_per_second, reverse=True)
    trials = [_Trial(setting, models) for setting in likely]
    try:
        _take_turns(trials, max(1, tokens // seq_len), min(seq_len, tokens))
    finally:
        torch.set_num_threads(before)
    timed = [trial for trial in trials if trial.seconds_per_token < float("inf")]
    threads = max(trial.setting.threads for trial in timed)
    timings = tuple(Timing(*t.setting, flops_per_token / t.seconds_per_token) for t in timed)
    return Timings(width, timings, quiet=not accounting.was_disturbed(began, accounting.read(), threads))


class _Models:
    """A part of a model, in each type that is asked of it, with its optimizer."""

    def __init__(self, arch: Architecture, seq_len: int, optimizer: str, device: str) -> None:
        self.arch, self.device, self._seq_len = arch, device, seq_len
        self._settings = OptimizerSettings.model_validate(
            {"name": optimizer, "lr": 1e-4, "matrix_lr": 1e-4, "weight_decay": 0.0, "momentum": 0.9}
            | {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
        )
        self._made: dict[str, tuple[Decoder, Optimizer]] = {}

    def pass_seconds(self, kind: str, rows: int, seq_len: int) -> float:
        """Forward and backward, of a token."""
        decoder, _ = self._of(kind)
        tokens_BT = torch.randint(self.arch.vocab_size, (rows, seq_len), device=self.device)
        began = time.perf_counter()
        loss, num_targets = decoder(tokens_BT, tokens_BT)
        (loss / num_targets).backward()
        self._finish()
        return (time.perf_counter() - began) / (rows * seq_len)

    def update_seconds(self, kind: str) -> float:
        """A token's share of an update by the gradients of the passes before."""
        _, optimizer = self._of(kind)
        began = time.perf_counter()
        if self.arch.hidden_size <= UPDATED_WIDTH:
            optimizer.step(1.0)
        optimizer.zero_grad()
        self._finish()
        return (time.perf_counter() - began) / STEP_TOKENS

    def _of(self, kind: str) -> tuple[Decoder, Optimizer]:
        if kind not in self._made:
            decoder = build(self.arch, seed=0, device=self.device)
            apply_precision(decoder, kind)
            threads = torch.get_num_threads()
            decoder.fused_attention = fused_is_quicker(self.arch, self._seq_len, kind, threads, self.device)
            self._made[kind] = decoder, optim.build(decoder, self.arch, self._settings, torch_type(kind))
        return self._made[kind]

    def _finish(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@dataclasses.dataclass
class _Trial:
    """A setting, and the least that a pass and an update took a token with it."""

    setting: Setting
    models: _Models
    pass_seconds: float = float("inf")
    update_seconds: float | None = None  # not timed

    @property
    def seconds_per_token(self) -> float:
        return self.pass_seconds + (self.update_seconds or 0.0)

    def take(self, rows: int, seq_len: int) -> None:
        """A first pass of a size does not count."""
        torch.set_num_threads(self.setting.threads)
        self.pass_seconds = min(self.pass_seconds, self.models.pass_seconds(self.setting.type, rows, seq_len))

    def take_first(self, rows: int, seq_len: int) -> None:
        self.take(rows, seq_len)
        self.pass_seconds = float("inf")
        self.take(rows, seq_len)

    def update(self) -> None:
        torch.set_num_threads(self.setting.threads)
        seconds = self.models.update_seconds(self.setting.type)
        self.update_seconds = min(self.update_seconds or seconds, seconds)


def _take_turns(trials: list[_Trial], rows: int, seq_len: int) -> None:
    """Until it is plain which is quickest, or the time is up; the likely ones come first. A short pass shows
    which are far behind. Updates take long in wide models: they are timed of those alone that are not behind
    without one, and the rest are charged alike."""
    end = time.perf_counter() + SHAPE_SECONDS
    first = min(seq_len, FIRST_TOKENS)
    for trial in trials:
        trial.take_first(1, first)
        if time.perf_counter() > end:
            return
    left = _within(trials, FAR)
    # On a busy machine a full pass may take seconds.
    tokens = max(first, int(2 * PASS_SECONDS / min(trial.pass_seconds for trial in left)))
    rows, seq_len = max(1, min(rows, tokens // seq_len)), min(seq_len, tokens)
    for trial in left:
        trial.take_first(rows, seq_len)
        if time.perf_counter() > end:
            break
    for turn in range(ROUNDS):
        if turn >= SURE:
            left = _within(left, BEHIND)
        for trial in left:
            if time.perf_counter() > end and turn != SURE:  # each has an update, or none has
                break
            trial.take(rows, seq_len)
            if turn >= SURE:
                trial.update()
    _charge_updates(trials)


def _charge_updates(trials: list[_Trial]) -> None:
    """Where none was timed, an update takes as many passes as with the quickest."""
    timed = [trial for trial in trials if trial.update_seconds is not None]
    if timed:
        best = min(timed, key=lambda trial: trial.seconds_per_token)
        for trial in trials:
            if trial.update_seconds is None:
                trial.update_seconds = best.seconds_per_token / best.pass_seconds * trial.pass_seconds
                trial.update_seconds -= trial.pass_seconds


def _within(trials: list[_Trial], times: float) -> list[_Trial]:
    best = min(trial.seconds_per_token for trial in trials)
    return [trial for trial in trials if trial.seconds_per_token <= times * best]


def _part(arch: Architecture) -> Architecture:
    """A model of few layers, of which as large a share has experts, and at least one has if any has."""
    layers = min(arch.num_layers, PROBE_LAYERS if arch.hidden_size <= 1024 else 1)
    update: dict[str, object] = {"num_layers": layers, "vocab_size": min(arch.vocab_size, PROBE_VOCABULARY)}
    if arch.experts is not None:
        dense = min(layers - 1, round(arch.experts.dense_layers * layers / arch.num_layers))
        update["experts"] = arch.experts.model_copy(update={"dense_layers": dense})
    return arch.model_copy(update=update)


def _is_here(machine: Machine) -> bool:
    return machine.processor == processor_name() and machine.cores == available_cores()


def _expected(machine: Machine, setting: Setting) -> Timing:
    rates = [rate for rate in machine.rates if rate.type == setting.type] or list(machine.rates)
    here = [rate for rate in rates if rate.threads <= setting.threads] or rates
    return Timing(*setting, USUAL_SHARE * max(rate.flops_per_second for rate in here))


def _folder() -> Path:
    return kept_folder()


def _file(arch: Architecture, seq_len: int, device: str, optimizer: str) -> Path:
    part = _part(arch).model_dump(mode="json", exclude={"preset", "init_from", "base_width", "max_seq_len"})
    shape = json.dumps([part, min(seq_len, PROBE_SEQ_LEN), optimizer], sort_keys=True)
    mark = hashlib.sha256(shape.encode()).hexdigest()[:12]
    return _folder() / f"{device}-width-{arch.hidden_size}-{mark}.json"


def _read(path: Path) -> Timings | None:
    try:
        return Timings.from_json(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, timings: Timings) -> None:
    with contextlib.suppress(OSError):  # where nothing can be kept, timing again costs seconds
        keep_text(path, timings.to_json())
