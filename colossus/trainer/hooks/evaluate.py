"""Measures the model during training on other text than what was held out, or in tasks of the harness."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from colossus.errors import UserError
from colossus.evaluation.bits_per_byte import Validation, evaluate
from colossus.evaluation.corpora import SEQ_LEN, Texts, check_vocabulary, choose_texts, window
from colossus.evaluation.tasks import LoadedTasks, check_ranks, load_tasks, run_tasks
from colossus.generation import generate
from colossus.models import Decoder
from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult
from colossus.trainer.together import on_first_rank
from colossus.trainer.training import Stopped, Training

MEGABYTES = 0.1  # of each corpus that are scored every time where nothing is said


class EvaluateHook(Hook):
    """Every `every_steps` updates, and at the end, writes an event `eval` for each corpus and each task.

    corpus: what `data.corpus` can name, one or several. tasks: of lm-eval, the standard harness (the extra
        `eval`); such that have the model write text need a single rank, all of them a model without stages.
    documents, megabytes: of each corpus; the choice is the same every time. seq_len: tokens of a window.
    include_path, shots, limit: see `colossus.evaluation.tasks`.

    All ranks make the same forward calls, so sharded models are measured too. Its time is the run's.

    Raises:
        UserError: neither a corpus nor a task is named, or `every_steps` is below 1; at the start of
            training, what `choose_texts` and `load_tasks` raise.
    """

    def __init__(
        self,
        every_steps: int,
        *,
        corpus: str | Sequence[str] = (),
        tasks: str | Sequence[str] = (),
        documents: int | None = None,
        megabytes: float = MEGABYTES,
        text_field: str = "text",
        seq_len: int | None = None,
        include_path: str | Path | None = None,
        shots: int | None = None,
        limit: int | None = None,
    ) -> None:
        if every_steps < 1:
            raise UserError.field("every_steps", every_steps, "must be at least 1")
        self.every_steps, self.seq_len, self.limit = every_steps, seq_len, limit
        self._corpora = [corpus] if isinstance(corpus, str) else [*corpus]
        self._names = [tasks] if isinstance(tasks, str) else [*tasks]
        self._choice = {"documents": documents, "megabytes": megabytes, "text_field": text_field}
        self._definitions = {"include_path": include_path, "shots": shots}
        if not self._corpora and not self._names:
            raise UserError("EvaluateHook: neither a corpus nor a task is named")
        if limit is not None and limit < 1:
            raise UserError.field("limit", limit, "must be at least 1")
        self._texts: list[Texts] = []
        self._tasks: LoadedTasks | None = None

    def on_start(self, training: Training) -> None:
        """Reads the text once, on rank 0 for all; loads the tasks, on rank 0 first, which may download."""
        model = cast(Decoder, training.state.model)
        check_vocabulary(model, training.data.tokenizer)
        self._window = window(model, self.seq_len, min(SEQ_LEN, training.job.data.seq_len))
        on_first_rank(training.world, lambda: self._read(training))
        self._texts = training.world.broadcast(self._texts)
        if self._names:
            if training.world.layout.pp > 1:
                raise UserError(
                    f"tasks={','.join(self._names)}: need logits, which layout.pp={training.world.layout.pp} "
                    f"leaves on its last stage; evaluate a checkpoint: colossus eval PATH --tasks "
                    f"{self._names[0]}"
                )
            on_first_rank(training.world, self._load)
            if self._tasks is None:
                self._load()
            assert self._tasks is not None
            check_ranks(self._tasks, training.world)

    def after_step(self, training: Training, result: StepResult) -> None:
        if training.step % self.every_steps == 0 and not training.horizon.done(training.step):
            self._evaluate(training)

    def on_finish(self, training: Training) -> None:
        if training.stop_reason is None:
            self._evaluate(training)

    def _read(self, training: Training) -> None:
        self._texts = [
            choose_texts(name, training.data.tokenizer, **self._choice)  # type: ignore[arg-type]
            for name in self._corpora
        ]

    def _load(self) -> None:
        self._tasks = load_tasks(self._names, **self._definitions)  # type: ignore[arg-type]

    def _evaluate(self, training: Training) -> None:
        began = time.perf_counter()
        training.read()
        try:
            for texts in self._texts:
                self._score(training, texts)
            if self._tasks is not None:
                self._ask(training, self._tasks)
        except Stopped:
            return  # the loop ends before its next step
        what = ", ".join([*self._corpora, *self._names])
        training.costs[f"evaluation of {what}"] = time.perf_counter() - began

    def _score(self, training: Training, texts: Texts) -> None:
        result = evaluate(
            training.state.model,
            Validation(texts, self._window),
            world=training.world.data,
            before_batch=training.check_stop,
        )
        training.event("eval", corpus=texts.corpus, whole=texts.whole, **asdict(result))

    def _ask(self, training: Training, tasks: LoadedTasks) -> None:
        began = time.perf_counter()
        results = run_tasks(
            cast(Decoder, training.state.model),
            training.data.tokenizer,
            tasks,
            generate,
            limit=self.limit,
            seq_len=self._window if self.seq_len is not None else None,
            world=training.world.rows,
            errors=False,
            before_batch=training.check_stop,
        )
        seconds = (time.perf_counter() - began) / max(1, len(results))
        for result in results:
            training.event(
                "eval",
                task=result.task,
                metrics=result.metrics,
                num_examples=result.num_examples,
                shots=result.shots,
                limit=self.limit,
                seconds=seconds,  # its part of the time of all
            )
