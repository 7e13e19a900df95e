"""Writes what happens to the event log: the start, every step, the end."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

from colossus.architecture import num_parameters
from colossus.job import PREDICTED, SECTIONS
from colossus.measure.machine import this_machine
from colossus.perf.flops import model_flops_per_token
from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training


class Log(Hook):
    """MFU counts model FLOPs (6 x active parameters without the input embedding, causal attention halved)
    over the best matrix rate: measured for a CPU, the dense bf16 peak for a GPU."""

    def on_start(self, training: Training) -> None:
        job, world = training.job, training.world
        machine = this_machine()
        self._flops_per_token = model_flops_per_token(job.model, job.data.seq_len)
        self._peak_flops = machine.peak_flops_per_second(job.fleet.device)
        if job.fleet.device == "cuda":
            self._peak_flops *= world.size
        if training.log is None:
            return
        training.event(
            "resume" if training.step else "start",
            num_ranks=world.size,
            processor=machine.processor,
            device=job.fleet.device,
            machine=asdict(machine),
            peak_flops_per_second=self._peak_flops,
            model_flops_per_token=self._flops_per_token,
            num_parameters=num_parameters(job.model),
            torch=str(torch.__version__),
            python=platform.python_version(),
            total_steps=training.horizon.total_steps(training.step),
            minutes=job.run.minutes,
            job={section: getattr(job, section).model_dump(exclude_none=True) for section in SECTIONS},
            origins=job.origins,
        )
        if PREDICTED[0] in job.made:
            seconds, size = (float(job.made[name]) for name in PREDICTED)
            layout = job.layout.model_dump(exclude_none=True)
            training.event("plan", predicted_step_seconds=seconds, predicted_bytes=int(size), layout=layout)
        training.event("data", corpora=training.data.facts())
        training.log.start_clock()

    def after_step(self, training: Training, result: StepResult) -> None:
        if training.log is None:
            return
        if training.deadline is not None:
            training.deadline.step_ended(training.step, training.log.run_seconds)
        tokens_per_second = result.num_tokens / (result.seconds + result.data_wait_seconds)
        training.log.write(
            "step",
            step=result.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr_factor=result.lr_factor,
            lr=result.lr_factor * training.job.optimizer.lr,
            tokens=result.num_tokens,
            targets=result.num_targets,
            step_seconds=round(result.seconds, 6),
            data_wait_seconds=round(result.data_wait_seconds, 6),
            tokens_per_second=round(tokens_per_second, 1),
            mfu=round(tokens_per_second * self._flops_per_token / self._peak_flops, 5),
            total_steps=training.horizon.total_steps(result.step),
            **_where_there_is(result),
        )

    def on_finish(self, training: Training) -> None:
        training.event("end", synced=True, reason=training.stop_reason or "finished")


def _where_there_is(result: StepResult) -> dict[str, Any]:
    """What only some steps have to say."""
    fields: dict[str, Any] = {"skipped": True} if result.skipped else {}
    if result.experts is not None:
        fields |= {name: round(value, 4) for name, value in asdict(result.experts).items()}
    return fields
