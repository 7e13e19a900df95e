"""Measures the model on held-out documents: a fixed part now and then, all of them at the end; where training
begins with weights that exist, the same ones before the first step."""

from __future__ import annotations

from dataclasses import asdict

from colossus.evaluation.bits_per_byte import Validation, ValidationResult, evaluate
from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult
from colossus.trainer.training import Stopped, Training

SHARE = 0.05  # of the training time that the validations during a run may take
FINAL_SHARE = 0.1  # that the last one may take; all documents of the default job take less
FINAL_SECONDS = 60.0  # that it may always take where the run's time is not given
FIRST_PART = 8  # documents timed to choose the part
FORWARD_SHARE = 0.45  # of a training step's time: an eager forward pass of as many tokens, on the safe side


class Validate(Hook):
    """How many documents are taken is decided once, from the time that some take, so that every attempt of
    the run is measured on the same ones."""

    def on_start(self, training: Training) -> None:
        self._validation = Validation(training.data.validation, training.job.data.seq_len)
        self._num_positions = int(self._validation.num_positions()[-1])
        self._step_seconds = float("inf")  # of the quickest step of this attempt: the first one compiles
        self._seconds_per_position: float | None = None
        self._begins = training.step == 0 and training.job.model.init_from is not None

    def before_step(self, training: Training) -> None:
        if self._begins:  # here and not at the start, where a wish to stop would not be heard
            self._begins = False
            self._measure(training)
            self._validate(training, training.decide("final_documents", lambda: self._final_part(training)))

    def on_figures(self, training: Training, result: StepResult) -> None:
        if result.seconds < self._step_seconds:
            self._step_seconds = result.seconds
            if self._seconds_per_position is None:
                self._expect(training, FORWARD_SHARE * result.seconds / result.num_tokens)

    def after_step(self, training: Training, result: StepResult) -> None:
        every = training.job.run.validate_every
        if every and training.step % every == 0 and not training.horizon.done(training.step):
            try:
                training.read()
                self._validate(training, self._part(training, every))
            except Stopped:
                return  # the loop ends before its next step

    def on_finish(self, training: Training) -> None:
        if training.stop_reason is not None:
            return
        try:
            if self._seconds_per_position is None:
                self._measure(training)
            self._validate(training, training.decide("final_documents", lambda: self._final_part(training)))
        except Stopped:
            return

    def _part(self, training: Training, every: int) -> int:
        """Documents of each validation during the run."""
        if training.decisions.get("validation_documents", training.step) is None:
            self._measure(training)  # by all ranks together
        budget_seconds = SHARE * every * self._step_seconds
        return training.decide(
            "validation_documents",
            lambda: self._validation.choose_part(self._seconds_per_position or 0.0, budget_seconds),
        )

    def _final_part(self, training: Training) -> int:
        return self._validation.choose_part(self._seconds_per_position or 0.0, self._final_seconds(training))

    def _final_seconds(self, training: Training) -> float:
        minutes = training.job.run.minutes
        run_seconds = training.log.run_seconds if training.log is not None else 0.0
        share = FINAL_SHARE / (1 if training.job.model.init_from is None else 2)  # before and after
        return share * minutes * 60 if minutes is not None else max(FINAL_SECONDS, run_seconds)

    def _measure(self, training: Training) -> None:
        self._note(training, self._evaluate(training, FIRST_PART))

    def _validate(self, training: Training, num_documents: int) -> None:
        result = self._evaluate(training, num_documents)
        self._note(training, result)
        whole = num_documents >= self._validation.num_documents
        training.event("validation", whole=whole, **asdict(result))

    def _evaluate(self, training: Training, num_documents: int) -> ValidationResult:
        return evaluate(
            training.state.model,
            self._validation,
            num_documents=num_documents,
            world=training.world.data,
            before_batch=training.check_stop,
        )

    def _note(self, training: Training, result: ValidationResult) -> None:
        self._expect(training, result.seconds / max(1, result.num_positions))
        self._seconds_per_position = result.seconds / max(1, result.num_positions)

    def _expect(self, training: Training, seconds_per_position: float) -> None:
        """Keeps time free for the last validation."""
        whole = self._num_positions * seconds_per_position
        training.costs["validation"] = min(whole, self._final_seconds(training))
