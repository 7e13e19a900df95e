"""Other text and tasks of the harness, measured during training on one rank and on two."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colossus import api
from colossus.errors import UserError
from colossus.events import number
from colossus.job import Job
from colossus.monitor import phrases
from colossus.trainer.hooks.evaluate import EvaluateHook
from colossus.trainer.run import Run
from tests.ranks.pool import Pool
from tests.trainer.test_hooks import Act
from tests.trainer.test_in_layouts import pool, spread  # noqa: F401

Make = Callable[..., Job]
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra: pip install 'colossus-train[eval]'"
)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    folder.mkdir()
    for n in range(5):
        (folder / f"{n}.txt").write_text(f"no step is lost {n} times " * (n + 1))
    return folder


def trained(job: Job, hook: EvaluateHook, pool: Pool) -> Run:  # noqa: F811
    return spread(pool, job, [hook]) if job.layout.num_ranks > 1 else api.train(job, [hook])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_corpus_every_few_steps(ranks: int, small_job: Make, pool: Pool, other: Path) -> None:  # noqa: F811
    job = small_job("run", "run.steps=5", f"layout.dp_shard={ranks}")
    run = trained(job, EvaluateHook(2, corpus=str(other), documents=4), pool)
    events = run.events("eval")
    assert [event["step"] for event in events] == [2, 4, 5]
    assert {(event["corpus"], event["num_documents"], event["whole"]) for event in events} == {
        (str(other), 4, False)
    }
    # the last is of the weights that were saved
    model, tokenizer = api.load_model(run.folder)
    expected = api.evaluate(model, tokenizer, other, documents=4).result
    assert number(events[-1]["loss"]) == pytest.approx(expected.loss, rel=1e-5)
    assert number(events[-1]["bits_per_byte"]) == pytest.approx(expected.bits_per_byte, rel=1e-5)
    said = (
        f"step 5: {other}, 4 documents: {expected.bits_per_byte:.3f} bits per byte, loss {expected.loss:.3f}"
    )
    assert phrases.of(events[-1]) == said
    assert said in (run.folder / "log.txt").read_text()
    assert "Evaluated on" in (run.folder / "report.html").read_text()


def test_a_run_that_goes_on_is_evaluated_further(small_job: Make, other: Path) -> None:
    job = small_job("run", "run.steps=6", "checkpoint.steps=0")
    hook = EvaluateHook(2, corpus=str(other))
    run = api.train(job, [hook, Act(4, lambda training: training.ask_to_stop("asked"))])
    assert run.outcome == "asked" and [event["step"] for event in run.events("eval")] == [2, 4]
    run = api.train(job, [hook])
    assert [event["step"] for event in run.events("eval")] == [2, 4, 6]


def test_a_stop_gives_it_up(small_job: Make, other: Path) -> None:
    def while_evaluating(training: Any) -> None:
        def ask(*_: Any) -> None:
            if not training.state.model.training:
                training.ask_to_stop("asked")

        training.state.model.register_forward_pre_hook(ask)

    hooks = [EvaluateHook(2, corpus=[str(other)] * 2), Act(0, while_evaluating)]
    run = api.train(small_job("run", "run.validate_every=0"), hooks)
    assert run.outcome == "asked" and max(run.loss) == 1 and len(run.events("eval")) <= 1


def test_mistakes(small_job: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every_steps=0: must be at least 1"):
        EvaluateHook(0, corpus="python")
    with pytest.raises(UserError, match="neither a corpus nor a task"):
        EvaluateHook(5)
    for hook, message in (
        (EvaluateHook(5, corpus=str(tmp_path / "none")), "no such file or folder"),
        (EvaluateHook(5, corpus="python", seq_len=64), "seq_len=64: must be from 2 to 32"),
    ):
        with pytest.raises(UserError, match=message):
            api.train(small_job("run", "run.steps=2"), [hook])


@needs_harness
@pytest.mark.parametrize("ranks", [1, 2])
def test_tasks_every_few_steps(ranks: int, small_job: Make, pool: Pool, tmp_path: Path) -> None:  # noqa: F811
    from tests.evaluation.local_tasks import write_tasks

    folder = write_tasks(tmp_path / "tasks")
    job = small_job("run", "run.steps=3", f"layout.dp_shard={ranks}")
    hook = EvaluateHook(2, tasks=["local_choice", "local_rolling"], include_path=folder)
    run = trained(job, hook, pool)
    events = run.events("eval")
    names = ["local_choice", "local_rolling"]
    assert [(event["step"], event["task"]) for event in events] == [(s, n) for s in (2, 3) for n in names]
    model, tokenizer = api.load_model(run.folder)
    for event, found in zip(
        events[2:], api.evaluate_tasks(model, tokenizer, names, include_path=folder), strict=True
    ):
        assert event["metrics"] == pytest.approx(found.metrics, rel=1e-4)
        assert f"{event['task']}: " in str(phrases.of(event))


@needs_harness
def test_texts_are_refused_on_two_ranks(small_job: Make, pool: Pool, tmp_path: Path) -> None:  # noqa: F811
    from tests.evaluation.local_tasks import write_tasks

    hook = EvaluateHook(2, tasks="local_writing", include_path=write_tasks(tmp_path / "tasks"))
    run = api.train(small_job("one", "run.steps=1"), [hook])
    assert [event["task"] for event in run.events("eval")] == ["local_writing"]
    with pytest.raises(AssertionError, match="UserError: tasks=local_writing: has the model write text"):
        trained(small_job("two", "run.steps=1", "layout.dp_shard=2"), hook, pool)
