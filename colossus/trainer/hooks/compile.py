"""Compiles layers in the first steps of a run where that is likely to pay, and keeps what was quicker."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

from colossus.data.loader import micro_batches
from colossus.derive.machine import USABLE, expected_compiling, may_compile, optimizer_of
from colossus.hardware.timings import Timing
from colossus.measure import accounting
from colossus.measure.machine import this_machine
from colossus.measure.training import keep_compiled
from colossus.parallel.apply import compile_layers, uncompile_layers
from colossus.parallel.program import decoders, forward_backward
from colossus.perf.flops import model_flops_per_token
from colossus.trainer.decisions import CLOCK_FOLLOWS, Decision
from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult, drop_step
from colossus.trainer.training import Training

UNSTEADY = 2  # first steps, after the start and after each switch, that do not count
WATCHED = 8  # steps of a look
LOOKS = 6  # at most at steps of each kind, until they were seen for
LOOK_SECONDS = 4.0  # and other programs did not disturb the last: a machine may be slow for a second
KEPT = 1.0  # the least gain over eager steps with which layers stay compiled


class Compile(Hook):
    """Where the user left `layout.compile` open and it is not known from earlier runs, the run's first steps
    are timed as they are. If rank 0 then expects compiling to pay in what is left, all compile; and if the
    steps that follow are no quicker, all go back. What compiling gained, and what it took, is kept for later
    runs on this machine.

    Steps of each kind count as in their quickest look. Where other programs took the cores, it looks again;
    a trial that was disturbed to its end, beside eager steps that were not, shows nothing unless it gained:
    what was expected holds.

    Both switches are decisions of the name `machine`: on disk before the step that they hold for, and
    replayed by later attempts. The steps at which something may be decided follow from where the attempt
    began and from what rank 0 said last, so that every rank knows them, and nothing is asked in between.
    """

    def on_start(self, training: Training) -> None:
        self._compiled = bool(training.job.layout.compile)
        self._compile_seconds = 0.0
        self._begin(training)
        follows = training.decisions.get(CLOCK_FOLLOWS, 0)
        self._open = not follows and not training.job.asked_for("layout.compile")

    def before_step(self, training: Training) -> None:
        value: dict[str, Any] = training.decisions.get("machine", training.step) or {}
        self._open &= "compiled_gain" not in value
        if training.step == self._from:
            self._before = accounting.read()
        if self._open and training.step == self._from + WATCHED:
            value = self._decide(training, value)
        if value.get("compile", self._compiled) != self._compiled:
            self._switch(training, value["compile"])

    def on_figures(self, training: Training, result: StepResult) -> None:
        if result.step >= self._from and len(self._times) < WATCHED:
            self._times.append(result.seconds)

    def _begin(self, training: Training) -> None:
        """Steps of another kind are timed from here on."""
        self._looks, self._seen_seconds, self._best_seconds = 0, 0.0, float("inf")
        self._look(training.step + UNSTEADY)

    def _look(self, step: int) -> None:
        self._from, self._times, self._before = step, list[float](), accounting.read()

    def _decide(self, training: Training, value: dict[str, Any]) -> dict[str, Any]:
        """The value of `machine` from this step on."""
        training.read()
        if any(d.name == "machine" for d in training.decisions.to_come(training.step)):
            return value  # an earlier attempt decided what comes; it is replayed
        if self._compiled and "eager_step_seconds" not in value:
            return value
        chosen = training.world.broadcast(self._judge(training, value) if training.world.rank == 0 else None)
        if chosen == value:
            self._look(training.step)
            return value
        if chosen is None:
            self._open = False
            return value
        training.decisions.record(Decision("machine", chosen, training.step), training.log)
        return dict(chosen)

    def _judge(self, training: Training, value: dict[str, Any]) -> dict[str, Any] | None:
        """A new value of `machine`; the same to look again; None where nothing is compiled."""
        disturbed = accounting.was_disturbed(self._before, accounting.read(), value["threads"])
        self._looks += 1
        self._seen_seconds += sum(self._times)
        look_again = (disturbed or self._seen_seconds < LOOK_SECONDS) and self._looks < LOOKS
        self._best_seconds = seconds = min(self._best_seconds, statistics.median(self._times))
        if look_again:
            return value
        if "eager_step_seconds" not in value:
            if not self._may_pay(training, seconds):
                return None
            seen = {"eager_step_seconds": round(seconds, 6), "eager_quiet": not disturbed}
            return value | {"compile": True} | seen
        gain, eager_quiet = value["eager_step_seconds"] / seconds, value.get("eager_quiet", True)
        if not disturbed and eager_quiet:
            self._keep(training, value, gain)
        is_known = gain > KEPT or not (disturbed and eager_quiet)
        settled = {name: v for name, v in value.items() if name not in ("eager_step_seconds", "eager_quiet")}
        return settled | {
            "compile": gain > KEPT or not is_known,
            "compiled_gain": round(gain, 3) if is_known else None,
            "compile_seconds": round(self._compile_seconds, 3),
        }

    def _may_pay(self, training: Training, step_seconds: float) -> bool:
        job, machine = training.job, this_machine()
        if not may_compile(job, machine):
            return False
        tokens = job.run.global_batch * job.data.seq_len
        rate = tokens * model_flops_per_token(job.model, job.data.seq_len) / step_seconds
        timing = Timing(job.precision.type, job.run.threads, rate / training.world.size)
        return expected_compiling(job, machine, job.model, timing).pays(_seconds_left(training, step_seconds))

    def _keep(self, training: Training, value: dict[str, Any], gain: float) -> None:
        if not self._compile_seconds:  # an earlier attempt compiled
            return
        job = training.job
        flops = job.run.global_batch * job.data.seq_len * model_flops_per_token(job.model, job.data.seq_len)
        rate = flops / value["eager_step_seconds"] / training.world.size
        seen = Timing(value["type"], value["threads"], rate, gain, round(self._compile_seconds, 3))
        keep_compiled(job.model, job.data.seq_len, job.fleet.device or "cpu", optimizer_of(job), seen)

    def _switch(self, training: Training, compiled: bool) -> None:
        models = decoders(training.state.model)
        for model in models:
            compile_layers(model) if compiled else uncompile_layers(model)
        began = time.perf_counter()
        if compiled:
            _warm_up(training)
        self._compile_seconds = time.perf_counter() - began
        training.job = dataclasses.replace(
            training.job, layout=training.job.layout.model_copy(update={"compile": compiled})
        )
        if training.deadline is not None:
            training.deadline.forget_steps()
        self._compiled = compiled
        self._begin(training)


def _warm_up(training: Training) -> None:
    """Forward and backward passes whose gradients are dropped: what is compiled is compiled here, between two
    updates, so that it can be given up, and so that steps have the seconds of steps."""
    batch, state, job = training.batch, training.state, training.job
    assert batch is not None
    micro_batch = job.layout.of_replica(training.world.place.dp_replicate).micro_batch
    state.model.train()
    training.between_steps = True
    try:
        forward_backward(
            state.model,
            micro_batches(batch, micro_batch),
            num_targets=max(1, batch.num_targets),
            num_tokens=batch.num_tokens_global,
            zero=job.layout.zero,
            z_loss=job.optimizer.z_loss,
        )
    finally:
        training.between_steps = False
        drop_step(state)


def _seconds_left(training: Training, step_seconds: float) -> float:
    """Of eager steps."""
    total, job = training.horizon.total_steps(training.step), training.job
    if total is not None:
        return (total - training.step) * step_seconds
    assert job.run.minutes is not None and training.log is not None
    return job.run.minutes * 60 * USABLE - training.log.run_seconds
