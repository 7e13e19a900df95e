"""The data of a run: what its phases see, and that its shards are those that it began with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from colossus.data.build import corpus_folder
from colossus.data.order import BatchSchedule
from colossus.data.sources import TrainingData, phases_of
from colossus.errors import UserError
from colossus.job import Job, load_job
from tests.data.building import built, write_corpus


def job_of(folder: Path, *words: str) -> Job:
    usual = {"data.corpus": "['a']", "data.weights": "[1.0]", "data.seq_len": "32", "run.seed": "0"}
    usual |= {"data.skip": "[]", "data.phases": "[]", "run.batch_schedule": "[[0, 4], [10, 6]]"}
    usual |= {"data.folder": str(folder)}
    given = dict(word.split("=", 1) for word in words)
    return load_job(None, [f"{name}={value}" for name, value in (usual | given).items()])


def schedule_of(job: Job) -> BatchSchedule:
    return BatchSchedule(job.run.batch_schedule)


def test_a_phase_keeps_what_it_does_not_change() -> None:
    """Ten steps of 4 samples, then 6 a step: step 12 begins with sample 52, step 20 with sample 100."""
    phases = "[{from_step=20, weights=[0, 5]}, {from_step=12, seq_len=64}]"
    job = job_of(Path("x"), "data.corpus=['a', 'b']", "data.weights=[1, 3]", f"data.phases={phases}")
    found = phases_of(job, schedule_of(job), ["f", "g"])
    assert [(p.first_sample, p.seq_len, p.weights) for p in found] == [
        (0, 32, (1.0, 3.0)),
        (52, 64, (1.0, 3.0)),
        (100, 64, (0.0, 5.0)),
    ]
    assert all(phase.fingerprints == ("f", "g") for phase in found)


def test_a_phase_from_the_first_step_is_the_first() -> None:
    job = job_of(Path("x"), "data.phases=[{from_step=0, seq_len=16}]")
    assert [(p.first_sample, p.seq_len) for p in phases_of(job, schedule_of(job), ["f"])] == [(0, 16)]


def test_other_shards_than_a_run_began_with_are_refused(tmp_path: Path) -> None:
    for name, num in (("one", 20), ("other", 21)):
        built(tmp_path / name, write_corpus(tmp_path / f"{name}-text", num=num))
    one, other = (job_of(tmp_path / name) for name in ("one", "other"))
    data = TrainingData.open(one, schedule_of(one))
    running = [asdict(phase) for phase in data.phases]
    assert TrainingData.open(one, schedule_of(one), running).phases == data.phases
    with pytest.raises(UserError, match=r"the shards of a changed since this run began"):
        TrainingData.open(other, schedule_of(other), running)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_flipped_bit_of_either_split_is_seen(split: str, tmp_path: Path) -> None:
    built(tmp_path / "out", write_corpus(tmp_path / "text", num=20))
    job = job_of(tmp_path / "out")
    TrainingData.open(job, schedule_of(job)).verify()
    path = corpus_folder(tmp_path / "out", 0) / f"{split}-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:9] + bytes([whole[9] ^ 4]) + whole[10:])
    with pytest.raises(UserError, match=rf"{split}-00000\.bin: its bytes changed since it was built"):
        TrainingData.open(job, schedule_of(job)).verify()


def test_the_facts_are_those_of_both_splits(tmp_path: Path) -> None:
    train, held_out = built(tmp_path / "out", write_corpus(tmp_path / "text", num=20))
    job = job_of(tmp_path / "out")
    (facts,) = TrainingData.open(job, schedule_of(job)).facts()
    found = [facts[name] for name in ("documents", "tokens", "bytes")]
    assert found == [train.num_documents, train.num_tokens, train.num_bytes]
    found = [facts[f"held_out_{name}"] for name in ("documents", "tokens", "bytes")]
    assert found == [held_out.num_documents, held_out.num_tokens, held_out.num_bytes]
    assert facts["documents"] + facts["held_out_documents"] == 20
