"""Measures the model on held-out documents: a fixed part now and then, all of them at the end."""

from __future__ import annotations

import time
from dataclasses import asdict

from colossus.evaluation.bits_per_byte import Validation, ValidationResult, evaluate
from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training

SHARE = 0.05  # of the training time that validation may take
FIRST_PART = 8  # documents timed to choose the part


class Validate(Hook):
    """The part is chosen once, from the time that a few documents take: a decision, so that every attempt
    of the run is measured on the same documents."""

    def on_start(self, training: Training) -> None:
        self._validation = Validation(training.data.validation, training.job.data.seq_len)
        self._step_seconds = 0.0

    def after_step(self, training: Training, result: StepResult) -> None:
        self._step_seconds = result.seconds
        every = training.job.run.validate_every
        if every and training.step % every == 0 and not training.horizon.done(training.step):
            part = training.decide("validation_documents", lambda: self._choose_part(training, every))
            self._validate(training, part)

    def on_finish(self, training: Training) -> None:
        if training.stop_reason is None:
            self._validate(training, None)

    def _choose_part(self, training: Training, every: int) -> int:
        started = time.perf_counter()
        timed = self._evaluate(training, FIRST_PART)
        seconds_per_token = (time.perf_counter() - started) / max(1, timed.num_tokens)
        return self._validation.choose_part(seconds_per_token, SHARE * every * self._step_seconds)

    def _validate(self, training: Training, num_documents: int | None) -> None:
        result = self._evaluate(training, num_documents)
        whole = num_documents is None or num_documents >= self._validation.num_documents
        training.costs["validation"] = (
            result.seconds * self._validation.num_tokens() / max(1, result.num_tokens)
        )
        training.event("validation", whole=whole, **asdict(result))

    def _evaluate(self, training: Training, num_documents: int | None) -> ValidationResult:
        return evaluate(
            training.state.model, self._validation, num_documents=num_documents, world=training.world
        )
