"""What a run says of its steps: each field computed again from the job, other fields and the clock."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch.overrides import TorchFunctionMode

from colossus import api
from colossus.architecture import Architecture
from colossus.job import Job
from colossus.models import Decoder
from colossus.trainer.hooks import Hook
from colossus.trainer.hooks.log import SUSTAINED, Log
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training
from tests.trainer.running import StopAt, run_of
from tests.trainer.test_in_layouts import EXPERTS, pool, spread  # noqa: F401

Make = Callable[..., Job]
PARTS = ("step_seconds", "data_wait_seconds", "rank_wait_seconds", "between_seconds")
SLOW = 0.05  # s a step
FIRST, LAST = 3, 7  # steps between which calls are counted


class Slow(Hook):
    """One rank loses time in every step: waiting for data, or in a hook before or after it."""

    def __init__(self, where: str, rank: int = 0) -> None:
        self.where, self.rank = where, rank

    def on_start(self, training: Training) -> None:
        self.here = training.world.rank == self.rank
        if self.where == "data" and self.here:
            get = training.batches._ready.get

            def late(block: bool = True) -> Any:
                time.sleep(SLOW * block)
                return get(block)

            training.batches._ready.get = late  # type: ignore[assignment]

    def before_step(self, training: Training) -> None:
        self._sleep("before")

    def after_step(self, training: Training, result: StepResult) -> None:
        self._sleep("after")

    def _sleep(self, where: str) -> None:
        if self.here and self.where == where:
            time.sleep(SLOW)


def by_hand(arch: Architecture, seq_len: int) -> float:
    """Model FLOPs a token: 6 a parameter but those of the input embedding (where it is tied, it is the output
    matrix), and 3 x 2 x heads x width x length / 2 of scores, and as many of values."""
    sizes = {name: p.numel() for name, p in Decoder(arch).named_parameters()}
    weights = sum(sizes.values()) - (0 if arch.tie_embeddings else sizes["embedding.weight"])
    return 6 * weights + 2 * 3 * arch.num_layers * arch.num_heads * arch.head_dim * seq_len


def test_every_field_of_every_step(small_job: Make) -> None:
    """Of samples of two lengths in batches of two sizes; run and went on with."""
    shapes = ["run.batch_schedule=[[0,4],[4,6]]", "data.phases=[{from_step=8,seq_len=16}]"]
    job = small_job("run", *shapes, "optimizer.final_lr_fraction=0.1", "run.validate_every=5")
    api.train(job, [Slow("data"), StopAt(6)])
    run = api.train(job, [Slow("after")])
    start, resume = run.events("start")[0], run.events("resume")[0]
    steps = run.events("step")
    assert [e["step"] for e in steps] == list(range(12)) and resume["step"] == 6
    peak = start["peak_flops_per_second"]
    for e in steps:
        number, seq_len = e["step"], 32 if e["step"] < 8 else 16
        assert e["tokens"] == e["targets"] == (4 if number < 4 else 6) * seq_len
        factor = (number + 1) / 3 if number < 2 else 1 - 0.9 * max(0, number - 6) / 6
        assert e["lr_factor"] == pytest.approx(factor, rel=1e-9)
        assert e["lr"] == pytest.approx(0.003 * factor, rel=1e-9)
        assert e["total_steps"] == 12 and e["rank_wait_seconds"] == 0
        assert min(e[name] for name in PARTS) >= 0
        assert e["tokens_per_second"] == pytest.approx(e["tokens"] / sum(e[n] for n in PARTS), rel=1e-3)
        mfu = e["tokens_per_second"] * by_hand(job.model, seq_len) / peak
        assert e["mfu"] == pytest.approx(mfu, rel=1e-3, abs=1e-5)
        assert "skipped" not in e and "z_loss" not in e
    assert start["model_flops_per_token"] == by_hand(job.model, 32)
    slow_data, slow_hook = steps[:6], steps[7:]
    # The middle one of several: any may be disturbed.
    assert middle(slow_data[1:4], "data_wait_seconds") > SLOW / 2 > middle(slow_data[1:4], "between_seconds")
    assert middle(slow_hook, "between_seconds") > SLOW > middle(slow_hook, "data_wait_seconds")
    # The clock of the run is theirs, and goes on over attempts.
    events = run.events()
    ends = [e["run_seconds"] for e in steps if e["step"] in (5, 11)]
    for last, passed in ((6, ends[0]), (12, ends[1] - resume["run_seconds"])):
        taken = sum(sum(e[n] for n in PARTS) for e in steps[last - 6 : last])
        assert 6 * SLOW < taken < passed + 0.01 and passed < 2 * taken + 0.5
    assert all(one["run_seconds"] <= other["run_seconds"] for one, other in pairwise(events))
    assert resume["run_seconds"] > 6 * SLOW


def middle(steps: list[dict[str, Any]], name: str) -> float:
    return statistics.median(e[name] for e in steps)


# Neither a validation nor a save, at the begin of a decay either, comes between two steps.
NOTHING_BETWEEN = ["run.validate_every=0", "checkpoint.steps=0", "optimizer.schedule=cosine"]


@pytest.mark.parametrize("where", ["data", "before", "after"])
def test_waiting_for_another_rank_has_a_name_and_counts(
    where: str,
    small_job: Make,
    pool: Any,  # noqa: F811
) -> None:
    job = small_job(f"{where}", "layout.dp_shard=2", *NOTHING_BETWEEN)
    run = spread(pool, job, [Slow(where, rank=1)])
    steps = run.events("step")[2:-1]  # the last one asks for no batch
    assert middle(steps, "rank_wait_seconds") > 0.6 * SLOW
    assert middle(steps, "data_wait_seconds") + middle(steps, "between_seconds") < 0.4 * SLOW
    for e in steps:
        assert e["tokens_per_second"] < e["tokens"] / (0.9 * SLOW)
        assert e["tokens_per_second"] == pytest.approx(e["tokens"] / sum(e[n] for n in PARTS), rel=1e-3)


def test_a_stopped_run_measures_and_writes_nothing_more(small_job: Make, corpus: Path) -> None:
    """Neither the last validation, nor an evaluation, nor a sample: whoever stopped it waits for its end."""
    from colossus.trainer.hooks.evaluate import EvaluateHook

    job = small_job("run", "run.validate_every=4")
    hook = EvaluateHook(3, corpus=str(corpus), documents=2)
    run = api.train(job, [StopAt(7), hook])
    assert run.outcome == "asked"
    assert [e["step"] for e in run.events("validation")] == [4]
    assert [e["step"] for e in run.events("eval")] == [3, 6]
    assert run.events("sample") == []
    run = api.train(job, [EvaluateHook(3, corpus=str(corpus), documents=2)])
    assert run_of(job).outcome == "finished" and len(run.events("sample")) == 1
    assert [e["step"] for e in run.events("validation")] == [4, 8, 12]
    assert [e["step"] for e in run.events("eval")] == [3, 6, 9, 12]


class Slower(Hook):
    """As if the machine had been measured in a moment in which it was so many times slower."""

    def __init__(self, times: float) -> None:
        self.times = times

    def on_start(self, training: Training) -> None:
        log = next(hook for hook in training.hooks if isinstance(hook, Log))
        log._peak_flops /= self.times
        self.peak = log._peak_flops


def test_a_peak_that_a_run_surpasses_is_taken_back(small_job: Make) -> None:
    """Nothing computes at more than its peak: it is said once, and MFU is of what the run has reached."""
    job = small_job("run", "run.steps=30", "run.validate_every=0", "checkpoint.steps=0")
    slower = Slower(1e6)
    run = api.train(job, [slower])
    (said,) = run.events("note")
    assert "more than the peak of" in said["text"] and said["step"] == SUSTAINED
    steps = run.events("step")
    reached, walls = slower.peak, [sum(e[name] for name in PARTS) for e in steps]
    for number, e in enumerate(steps):
        last = slice(max(0, number + 1 - SUSTAINED), number + 1)
        flops = e["tokens"] * by_hand(job.model, 32)
        if number + 1 >= SUSTAINED:
            reached = max(reached, flops * SUSTAINED / sum(walls[last]))
            assert e["mfu"] == pytest.approx(flops / walls[number] / reached, rel=1e-2)
            assert e["peak_flops_per_second"] == pytest.approx(reached, rel=1e-2)
    assert sorted(e["mfu"] for e in steps[SUSTAINED:])[len(steps) // 2 - SUSTAINED] < 1.1
    assert small_job("other", "run.steps=12") and not api.train(small_job("other")).events("note")


class Count(Hook):
    """Host synchronisations and sums over the ranks, by step; validation and saving are not counted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_start(self, training: Training) -> None:
        self.reads = Reads()
        self.sums: list[int] = []

    def before_step(self, training: Training) -> None:
        if training.step == FIRST:
            self.reads.__enter__()
        if training.step == LAST:
            self.reads.__exit__(None, None, None)
        groups = training.world.meshes.sums if training.world.meshes is not None else ()
        self.sums.append(sum(group._get_sequence_number_for_group() for group in groups))  # type: ignore[attr-defined]

    def on_finish(self, training: Training) -> None:
        counted = {"reads": self.reads.names, "sums": self.sums}
        (self.folder / f"{training.world.rank}.json").write_text(json.dumps(counted))


class Reads(TorchFunctionMode):
    """Notes each call that makes a host wait for what a device computes."""

    WAIT = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.WAIT:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


# Muon's bookkeeping of parts is in tensors of the host, which here look like the device's.
DEVICE_ALONE = ["optimizer.z_loss=0.001", "optimizer.name=adamw", "model.num_kv_heads=2"]


@pytest.mark.parametrize("model", [[], EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("layout", [["dp_shard=2"], ["pp=2"], ["tp=2"]], ids=["data", "pipeline", "tensor"])
def test_a_step_reads_once_and_sums_once(
    model: list[str],
    layout: list[str],
    small_job: Make,
    pool: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    """What all ranks must know of a step, and of the next one, is one sum, read once (DESIGN, section 9)."""
    settings = [*(f"layout.{setting}" for setting in layout), *model, *DEVICE_ALONE]
    job = small_job("run", *settings, *NOTHING_BETWEEN, "run.steps=8")
    spread(pool, job, [Count(tmp_path)])
    for rank in (0, 1):
        counted = json.loads((tmp_path / f"{rank}.json").read_text())
        between = [other - one for one, other in pairwise(counted["sums"])]
        assert between == [1] * 7, between
        assert counted["reads"] == ["tolist"] * (LAST - FIRST)
