"""Tasks of the standard harness, lm-eval, run on our own models."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colossus.errors import UserError
from colossus.evaluation.bits_per_byte import Ranks
from colossus.evaluation.corpora import check_vocabulary, window

if TYPE_CHECKING:
    from colossus.data.tokenizer import Tokenizer
    from colossus.evaluation.harness import Generate
    from colossus.models import Decoder

# The harness's own, so that it chooses the same examples as elsewhere.
PYTHON_SEED, NUMPY_SEED, SHOTS_SEED = 0, 1234, 1234
BOOTSTRAP = 1000  # draws for the error of a metric that has no formula for it
FAILURE = 200  # characters of what another library says


@dataclass(frozen=True)
class TaskResult:
    """A task's, or a group's, figures.

    metrics: by name, with the filter behind a comma where there is one (`acc`, `exact_match,strict`).
    errors: the standard errors of those that have one.
    shots, num_examples: None of a group. version: of the task's definition.
    """

    task: str
    version: str | None
    shots: int | None
    num_examples: int | None
    metrics: dict[str, float]
    errors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data at hand. loaded: as the harness's task manager gives them."""

    loaded: dict[str, Any]

    @property
    def writing(self) -> list[str]:
        """Those that have the model write text."""
        tasks = self.loaded["tasks"].items()
        return [name for name, task in tasks if task.OUTPUT_TYPE == "generate_until"]


def load_tasks(
    names: Sequence[str], *, include_path: str | Path | None = None, shots: int | None = None
) -> LoadedTasks:
    """Finds tasks, groups or tags by name, and loads their data (from the network, where it is not kept).

    include_path: a folder with definitions of one's own (YAML files of the harness).
    shots: examples that precede each question; by default as each task says, else none.

    Raises:
        UserError: the extra is not installed, there is no such task or folder, its data cannot be had, or
            it runs code that a model wrote.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"include-path={include_path}: no such folder; one with the YAML files of tasks")
    if shots is not None and shots < 0:
        raise UserError.field("shots", shots, "must be 0 or more")
    if not names:
        raise UserError("tasks: none is named")
    tasks = _installed()
    with _seeded():
        manager = _manager(tasks, include_path, names)
        for name in names:
            if name not in manager.all_tasks:
                raise UserError.field("tasks", name, "no such task of the harness", manager.all_tasks)
        try:
            loaded = manager.load(list(names))
        except Exception as error:  # the harness, `datasets` and a task's own code raise all kinds
            raise UserError(f"tasks={','.join(names)}: cannot be loaded: {_said(error)}") from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs code that the model wrote" if getattr(task, "UNSAFE_CODE", False) else "shows images"
            raise UserError(f"tasks={name}: {what}; such tasks are not run")
        own = task.get_config("num_fewshot")
        if (shots is not None and own != 0) or own is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SHOTS_SEED)
    return LoadedTasks(loaded)


def run_tasks(
    model: Decoder,
    tokenizer: Tokenizer,
    tasks: LoadedTasks,
    generate: Generate,
    *,
    limit: int | None = None,
    seq_len: int | None = None,
    world: Ranks | None = None,
    errors: bool = True,
    quiet: bool = True,
    before_batch: Callable[[], None] | None = None,
) -> list[TaskResult]:
    """The figures of loaded tasks, those of groups among them.

    limit: examples of each task, from the first on; by default all.
    seq_len: tokens of a window; by default the most that the model can take.
    world: ranks that share the work; each gets the same results.
    errors: whether standard errors are wanted; those of some metrics take a while.
    quiet: without the harness's own progress.

    Raises:
        UserError: a limit is out of range; the tokenizer is not the model's; tasks write text and there
            are several ranks, whose forward calls would have to stay equal in number.
    """
    from lm_eval.evaluator import evaluate

    from colossus.evaluation.harness import HarnessModel, sampling_of

    if limit is not None and limit < 1:
        raise UserError.field("limit", limit, "must be at least 1")
    check_vocabulary(model, tokenizer)
    check_ranks(tasks, world)
    most = window(model, seq_len, model.arch.max_seq_len)
    asked = HarnessModel(model, tokenizer, generate, world=world, max_length=most, before_batch=before_batch)
    for name, task in tasks.loaded["tasks"].items():
        if name in tasks.writing:
            try:
                sampling_of(task.get_config("generation_kwargs") or {})
            except UserError as error:
                raise UserError(f"tasks={name}: {error}") from None
    with _seeded(), _without_processes(), _silence(quiet):
        found = evaluate(
            lm=asked,
            task_dict=tasks.loaded,
            limit=limit,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP if errors else 0,
        )
    assert found is not None, "every rank is the harness's only one"
    return [_result(name, figures, found) for name, figures in found["results"].items()]


def check_ranks(tasks: LoadedTasks, world: Ranks | None) -> None:
    """Raises `UserError` where tasks write text and there are several ranks."""
    if tasks.writing and world is not None and world.size > 1:
        raise UserError(
            f"tasks={','.join(tasks.writing)}: has the model write text, which it does on one rank, not "
            f"on {world.size}; evaluate a checkpoint: colossus eval PATH --tasks {tasks.writing[0]}"
        )


def _result(name: str, figures: dict[str, Any], found: dict[str, Any]) -> TaskResult:
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in figures.items():
        metric, comma, kind = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        plain = metric.removesuffix("_stderr")
        shown = plain if kind == "none" else f"{plain},{kind}"
        (errors if metric != plain else values)[shown] = float(value)
    version, shots = found["versions"].get(name), found["n-shot"].get(name)
    counts = found["n-samples"].get(name)
    return TaskResult(
        name,
        str(version) if version is not None else None,
        int(shots) if isinstance(shots, int) else None,
        int(counts["effective"]) if counts else None,
        values,
        errors,
    )


def _installed() -> Any:
    """The harness's module of tasks."""
    try:
        import lm_eval.tasks
    except ImportError:
        raise UserError("--tasks: needs the extra: pip install 'colossus-train[eval]'") from None
    return lm_eval.tasks


def _manager(tasks: Any, include_path: str | Path | None, names: Sequence[str]) -> Any:
    """The harness's finder of tasks. Its own definitions are 15,000 files, which take seconds to read: they
    are left out where all `names` are plain tasks of the user's folder."""
    if include_path is None:
        return tasks.TaskManager()
    try:
        own = tasks.TaskManager(include_path=str(include_path), include_defaults=False)
    except Exception as error:  # whatever is wrong with a user's files
        raise UserError(f"include-path={include_path}: {_said(error)}") from None
    return own if {*names} <= {*own.all_subtasks} else tasks.TaskManager(include_path=str(include_path))


def _said(error: Exception) -> str:
    """The first line of what another library says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:FAILURE]}" if lines else type(error).__name__


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The state of the global generators from which tasks draw; what was there is put back."""
    python, numeric = random.getstate(), np.random.get_state()
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)


@contextlib.contextmanager
def _without_processes() -> Iterator[None]:
    """The harness would start a process a core to draw for standard errors: here a fork of PyTorch."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        del os.environ["DISABLE_MULTIPROC"]
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


@contextlib.contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    """Keeps what the harness prints from the output; where `quiet`, its progress and remarks too. What goes
    wrong is raised."""
    err = io.StringIO() if quiet else sys.stderr
    with contextlib.redirect_stdout(err), contextlib.redirect_stderr(err):
        yield
