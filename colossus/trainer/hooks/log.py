"""Writes what happens to the event log: the start, every step, the end."""

from __future__ import annotations

import platform
from collections import deque
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from colossus.architecture import num_parameters
from colossus.derive.machine import peak_flops_per_second
from colossus.events import kept_and_lost, read_events
from colossus.job import CHECKED, PREDICTED, SECTIONS, Job
from colossus.measure.machine import this_machine
from colossus.measure.memory import peak_device_bytes, peak_memory_bytes
from colossus.perf.flops import model_flops_per_token
from colossus.trainer.decisions import BRANCH, CHANGE
from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training
from colossus.words import percent, rate

NO_TARGETS = (
    "no token of this step is a target, so nothing is learned from its samples; "
    "how many such steps there were is said at the end"
)
SUSTAINED = 8  # steps that must together be quicker than the measured peak before that is taken back


class Log(Hook):
    """Tokens a second are counted from the end of a step to the end of the next, whatever is done or waited
    for in between. MFU counts model FLOPs (6 x active parameters without the input embedding, causal
    attention halved) over the best matrix rate: measured for a CPU, the dense bf16 peak for a GPU."""

    def on_start(self, training: Training) -> None:
        if training.log is None:
            return
        job, world = training.job, training.world
        machine = this_machine()
        self._flops_per_token = cache(partial(model_flops_per_token, job.model))
        self._without_targets = 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=SUSTAINED)
        self._was_surpassed = False
        self._peak_flops = peak_flops_per_second(job, machine)
        training.event(
            "resume" if training.step else "start",
            num_ranks=world.size,
            processor=machine.processor,
            device=job.fleet.device,
            machine=asdict(machine),
            peak_flops_per_second=self._peak_flops,
            model_flops_per_token=self._flops_per_token(job.data.seq_len),
            num_parameters=num_parameters(job.model),
            torch=str(torch.__version__),
            python=platform.python_version(),
            total_steps=training.horizon.total_steps(training.step),
            minutes=job.run.minutes,
            **_changes(training),
            job={section: getattr(job, section).model_dump(exclude_none=True) for section in SECTIONS},
            origins=job.origins,
        )
        if PREDICTED[0] in job.made:
            seconds, size = (float(job.made[name]) for name in PREDICTED)
            layout = job.layout.model_dump(exclude_none=True)
            training.event("plan", predicted_step_seconds=seconds, predicted_bytes=int(size), layout=layout)
        if CHECKED[0] in job.made:
            size, there, seconds = (float(job.made[name]) for name in CHECKED)
            training.event(
                "dry_run", predicted_bytes=int(size), memory_bytes=int(there), dry_run_seconds=seconds
            )
        training.event("data", corpora=training.data.facts())
        training.log.start_clock()

    def after_step(self, training: Training, result: StepResult) -> None:
        if training.log is None:
            return
        if training.deadline is not None:
            training.deadline.step_ended(training.step, training.log.run_seconds)

    def on_figures(self, training: Training, result: StepResult) -> None:
        if training.log is None:
            return
        job = training.job_of(result.step)
        tokens_per_second = result.num_tokens / result.wall_seconds
        flops_per_second = tokens_per_second * self._flops_per_token(result.seq_len)
        training.log.write(
            "step",
            step=result.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr_factor=result.lr_factor,
            lr=result.lr_factor * job.optimizer.lr,
            tokens=result.num_tokens,
            targets=result.num_targets,
            step_seconds=round(result.seconds, 6),
            data_wait_seconds=round(result.data_wait_seconds, 6),
            rank_wait_seconds=round(result.rank_wait_seconds, 6),
            between_seconds=round(result.between_seconds, 6),
            tokens_per_second=round(tokens_per_second, 1),
            mfu=round(flops_per_second / self._peak(training, result, flops_per_second), 5),
            total_steps=training.horizon.total_steps(result.step),
            **_where_there_is(result, job),
            **self._corrected(),
        )
        if not result.num_targets:
            self._without_targets += 1
            if self._without_targets == 1:
                training.event("note", text=NO_TARGETS)

    def on_error(self, training: Training) -> None:
        if training.unread is not None:  # all ranks have begun its sum
            self.on_figures(training, training.unread)

    def _peak(self, training: Training, result: StepResult, flops_per_second: float) -> float:
        """What MFU counts against: the measured peak, or what the run itself has reached for some steps."""
        self._recent.append((flops_per_second * result.wall_seconds, result.wall_seconds))
        reached = sum(flops for flops, _ in self._recent) / sum(seconds for _, seconds in self._recent)
        if len(self._recent) == SUSTAINED and reached > self._peak_flops:
            if not self._was_surpassed:
                self._was_surpassed = True
                training.event("note", text=surpassed(self._peak_flops, reached))
            self._peak_flops = reached
        return self._peak_flops

    def _corrected(self) -> dict[str, Any]:
        return {"peak_flops_per_second": self._peak_flops} if self._was_surpassed else {}

    def on_finish(self, training: Training) -> None:
        if training.log is not None and (said := _share_without_targets(training.folder)) is not None:
            training.event("note", text=said)
        reason = training.stop_reason or "finished"
        most = {"peak_memory_bytes": peak_memory_bytes()} | peak_device_bytes()
        training.event("end", synced=True, reason=reason, **most)


def surpassed(peak_flops: float, reached: float) -> str:
    """What is said of a peak that a run surpasses."""
    return (
        f"training computes {rate(reached)}, more than the peak of {rate(peak_flops)} that was measured in a "
        "slow moment: from here on MFU counts against the most that this run has reached"
    )


def _changes(training: Training) -> dict[str, Any]:
    """What a user changed that holds from here on, or the run that this one is a branch of."""
    decisions = (d for d in training.decisions if d.name in (CHANGE, BRANCH))
    found = [asdict(d) for d in decisions if d.first_step == training.step]
    return {"changes": found} if found else {}


def _where_there_is(result: StepResult, job: Job) -> dict[str, Any]:
    """What only some steps have to say."""
    fields: dict[str, Any] = {"skipped": True} if result.skipped else {}
    if job.optimizer.z_loss:
        fields["z_loss"] = result.z_loss
    settings = job.model.experts
    if result.experts is not None and settings is not None:
        terms = {"balance_loss": settings.balance_loss, "router_z_loss": settings.z_loss}
        for name, value in asdict(result.experts).items():
            if name not in terms:
                fields[name] = round(value, 4)
            elif terms[name]:
                fields[name] = value
    return fields


def _share_without_targets(folder: Path) -> str | None:
    """Of the steps that the run is made of, in words; None where all had targets."""
    steps = [event for event in kept_and_lost(read_events(folder))[0] if event["kind"] == "step"]
    without = sum(event.get("targets") == 0 for event in steps)
    if not without:
        return None
    return f"{without:,} of {len(steps):,} steps ({percent(without / len(steps))}) had no targets"
