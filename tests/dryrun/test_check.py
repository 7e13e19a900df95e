"""Ranks on several nodes are run dry before they start, by the first of them alone."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from colossus.dryrun import check
from colossus.job import CHECKED, Job, load_job
from colossus.layout import Layout
from colossus.measure import machine
from colossus.trainer.run import Run
from tests.cli.test_several import command
from tests.cli.test_train import small_words
from tests.parallel.real_ranks import in_ranks
from tests.ranks.cases import Case
from tests.trainer.running import kept_machine

WORDS = ["run.steps=2", "layout.dp_replicate=2", "layout.dp_shard=1", "layout.micro_batch=1"]
WORDS += ["layout.zero=3", "layout.recompute=full", "model.hidden_size=256", "model.num_layers=4"]


def on_two_nodes(words: list[str], folder: Path, cache: str, memory: int | None = None) -> dict[str, Any]:
    """memory: of each node, where it is not this machine's."""
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "COLOSSUS_CACHE": cache}
    if memory is not None:
        here = machine.this_machine()
        machine.this_machine = lambda: dataclasses.replace(here, memory_bytes=memory)  # type: ignore[assignment]
    return command(words, folder, cache)


def test_what_fits_starts_and_what_does_not_is_refused(tmp_path: Path) -> None:
    """On this machine, and on one that has a little less memory than the former said that it takes."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    words = [*small_words(tmp_path / "first"), *WORDS]
    ends = in_ranks(2, on_two_nodes, words, tmp_path, kept_machine())
    assert [end["code"] for end in ends] == [0, 0]
    (event,) = Run(tmp_path / "first" / "run").events("dry_run")
    assert 0 < event["predicted_bytes"] < event["memory_bytes"] and event["dry_run_seconds"] > 0
    assert sum("a dry run says" in line for end in ends for line in end["said"]) == 1

    words = [*small_words(tmp_path / "second"), *WORDS]
    little = int(0.9 * event["predicted_bytes"])
    ends = in_ranks(2, on_two_nodes, words, tmp_path, kept_machine(), little)
    assert [end["code"] for end in ends] == [2, 2]
    (said,) = [line for end in ends for line in end["said"] if "error" in line]
    assert said.startswith("error: layout: does not fit: ") and "fleet.check_fit=false" in said
    assert "fits with layout.dp_replicate=1 layout.dp_shard=2" in said
    assert not (tmp_path / "second" / "run").exists() and not (tmp_path / "second" / "data").exists()


def job_on(fleet: list[str], **layout: Any) -> Job:
    job = dataclasses.replace(Case.of(type="bf16").job(), layout=Layout(**layout).filled())
    return dataclasses.replace(job, fleet=load_job(None, fleet).fleet)


@pytest.mark.parametrize(
    ("fleet", "ranks", "local", "asked"),
    [
        ([], 16, None, False),  # all on this machine
        ([], 16, "8", True),
        ([], 8, "8", False),
        (["fleet.check_fit=false"], 16, "8", False),
        (["fleet=dgx-h100-4"], 8, None, False),  # of one server
        (["fleet=dgx-h100-4"], 16, None, True),
    ],
)
def test_who_is_asked(
    fleet: list[str], ranks: int, local: str | None, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    job = job_on(fleet, dp_shard=ranks)
    assert check.is_asked(job) is asked
    known = dataclasses.replace(job, made=dict.fromkeys(CHECKED, "1"))
    assert not check.is_asked(known)
