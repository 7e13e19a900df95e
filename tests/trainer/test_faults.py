"""What can go wrong with storage and data: a clear error, nothing lost, and the run goes on afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from colossus import api
from colossus.checkpoints.find import committed, latest_verified
from colossus.checkpoints.load import open_checkpoint, verify
from colossus.data.prepare import prepare_data
from colossus.errors import MachineError, UserError
from colossus.job import Job
from colossus.trainer.hooks import Hook
from colossus.trainer.hooks.guard import PATIENCE
from colossus.trainer.training import Training
from tests.trainer.running import Kill, assert_bitwise_equal, run_of, state_of, train_in_processes

Make = Callable[..., Job]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class Fill(Hook):
    """Leaves so many bytes free before step `step`."""

    def __init__(self, step: int, left: int) -> None:
        self.step, self.left = step, left

    def before_step(self, training: Training) -> None:
        if training.step == self.step:
            training.saver.wait()
            disk = os.statvfs(training.folder)
            (training.folder.parent / "full").write_bytes(bytes(disk.f_bavail * disk.f_bsize - self.left))


@pytest.mark.parametrize(
    ("left", "message"), [(65536, "cannot save step 12"), (0, "events.jsonl: cannot be wr")]
)
def test_a_disk_that_is_full(left: int, message: str, small_job: Make, small_disk: Path) -> None:
    """For a save, or for the next lines of the log; what was saved is whole, and the run goes on."""
    whole = small_job("whole")
    assert train_in_processes(whole) == [0]
    job = small_job("run", f"run.folder={small_disk / 'run'}")
    long = "x" * 5000  # the log fills the rest of a page first

    class Talk(Hook):
        def after_step(self, training: Training, result: Any) -> None:
            if training.step > 6:
                training.event("talk", text=long)

    with pytest.raises(MachineError, match="No space left on device") as caught:
        api.train(job, [Fill(6, left), *([Talk()] if left == 0 else [])])
    assert message in str(caught.value)
    saved = latest_verified(job.run.folder)
    assert saved is not None and saved.name == "step-00000004"
    (small_disk / "full").unlink()
    assert api.train(job).outcome == "finished"
    assert_bitwise_equal(job, whole)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(
    how: str, small_job: Make, caplog: pytest.LogCaptureFixture
) -> None:
    whole, job = small_job("whole"), small_job("run")
    assert train_in_processes(whole) == [0]
    assert train_in_processes(job, [Kill("before", 10)]) == [-9]
    damage(Path(job.run.folder) / "checkpoints" / "step-00000008" / "pieces-00000.safetensors", how)
    assert api.train(job).outcome == "finished"
    assert [e["step"] for e in run_of(job).events("resume")] == [6]
    (said,) = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert said.startswith("skipped a damaged checkpoint: ") and "step-00000008" in said and "\n" not in said
    assert run_of(job).loss == run_of(whole).loss


def test_one_that_cannot_be_opened_is_not_one_of_those_that_are_kept(small_job: Make) -> None:
    job = small_job("run", "checkpoint.keep=2")
    assert train_in_processes(job, [Kill("before", 10)]) == [-9]
    folder = Path(job.run.folder) / "checkpoints"
    damage(folder / "step-00000008" / "pieces-00000.index", "flipped")
    assert api.train(job).outcome == "finished"
    whole = [path for path in committed(job.run.folder) if path.name != "step-00000008"]
    assert len(whole) >= 2
    for path in whole:
        verify(path)


def test_the_checkpoint_that_a_longer_run_goes_back_to_is_damaged(
    small_job: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the rate began to fall, at step 6, a bit is flipped: the steps from 4 on are taken again."""
    keeps = "checkpoint.keep=9"
    job, whole = small_job("run", keeps), small_job("whole", keeps, "run.steps=20")
    for each in (job, whole):
        api.train(each)
    damage(Path(job.run.folder) / "checkpoints" / "step-00000006" / "pieces-00000.safetensors", "flipped")
    api.train(api.resolve(api.load_job(job.run.folder, ["run.steps=20"])))
    assert_bitwise_equal(job, whole)
    assert [e["step"] for e in run_of(job).events("resume")] == [4]
    (said,) = [r.getMessage() for r in caplog.records if "cannot go back" in r.getMessage()]
    assert "step-00000006" in said and "\n" not in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_that_one_rank_alone_reads_is_damaged(rank: int, small_job: Make) -> None:
    """All ranks fall back together, and take the steps that they would have taken."""
    settings = ["layout.dp_shard=2", "checkpoint.keep=1"]
    whole, job = small_job("whole", *settings), small_job("run", *settings, "checkpoint.keep=3")
    assert train_in_processes(whole) == [0, 0]
    assert -9 in train_in_processes(job, [Kill("before", 10)])
    folder = Path(job.run.folder) / "checkpoints"
    newest = open_checkpoint(folder / "step-00000008")
    parts = newest.pieces("embedding.weight")
    assert [p.file for p in parts] == ["pieces-00000.safetensors", "pieces-00001.safetensors"]
    piece = parts[rank]
    data = bytearray((newest.path / piece.file).read_bytes())
    data[piece.begin + 5] ^= 1
    (newest.path / piece.file).write_bytes(data)
    assert train_in_processes(job) == [0, 0]
    assert [e["step"] for e in run_of(job).events("resume")] == [6]  # where the rate begins to fall
    assert_bitwise_equal(job, whole)


def test_no_checkpoint_is_whole(small_job: Make) -> None:
    job = small_job("run")
    assert train_in_processes(job, [Kill("before", 10)]) == [-9]
    for path in (Path(job.run.folder) / "checkpoints").glob("step-*/pieces-*.safetensors"):
        damage(path, "flipped")
    with pytest.raises(MachineError, match=r"no checkpoint in .* is whole"):
        api.train(job)


def test_shards_that_changed_under_a_run(small_job: Make, tmp_path: Path, corpus: Path) -> None:
    """The corpus grew, and its shards were built anew in the same place."""
    texts = tmp_path / "texts"
    shutil.copytree(corpus, texts)
    places = [f"data.corpus={texts}", f"data.folder={tmp_path / 'own'}"]
    job = small_job("run", *places)
    assert train_in_processes(job, [Kill("before", 6)]) == [-9]
    shutil.rmtree(tmp_path / "own")
    (texts / "new.txt").write_text("more words " * 200)
    with pytest.raises(UserError, match=r"the shards of .*texts changed since this run began"):
        api.train(job)


def flip_last(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


@pytest.mark.parametrize(
    "file", ["train-*.bin", "train-*.starts", "validation-*.bin", "validation.documents"]
)
def test_a_shard_whose_bytes_changed_is_seen_before_the_first_step(
    file: str, small_job: Make, tmp_path: Path
) -> None:
    job = small_job("run", f"data.folder={tmp_path / 'own'}")
    prepare_data(job)
    path = next((tmp_path / "own" / "corpus-0").glob(file))
    flip_last(path)
    with pytest.raises(UserError, match=rf"{path.name}: its bytes changed since it was built"):
        api.train(job)
    assert not run_of(job).loss


def test_a_shard_that_another_rank_reads(small_job: Make, tmp_path: Path) -> None:
    """Each reads its share of the files; all end where one of them finds a byte that changed."""
    job = small_job("run", f"data.folder={tmp_path / 'own'}", "layout.dp_shard=2")
    prepare_data(job)
    flip_last(next((tmp_path / "own" / "corpus-0").glob("train-*.starts")))
    assert train_in_processes(job) == [1, 1]
    assert not run_of(job).loss


def test_a_deleted_cache_is_built_again(small_job: Make, tmp_path: Path) -> None:
    whole, job = small_job("whole"), small_job("run", f"data.folder={tmp_path / 'own'}")
    assert train_in_processes(whole) == [0]
    assert train_in_processes(job, [Kill("before", 6)]) == [-9]
    shutil.rmtree(tmp_path / "own")
    assert api.train(job).outcome == "finished"
    assert_bitwise_equal(job, whole)


def test_a_loss_that_has_gone_for_good(small_job: Make) -> None:
    """Steps are skipped, then the run ends; the weights before are what is saved."""

    class Break(Hook):
        def before_step(self, training: Training) -> None:
            if training.step == 5:
                training.state.model.norm.weight.register_hook(lambda grad: grad * float("nan"))

    job = small_job("run", "run.steps=60", "checkpoint.steps=5", "run.validate_every=0")
    with pytest.raises(
        MachineError, match=f"step {4 + PATIENCE}: the gradient was not finite in {PATIENCE} steps"
    ):
        api.train(job, [Break()])
    events = run_of(job).events("step")
    assert [e["step"] for e in events if e.get("skipped")] == list(range(5, 5 + PATIENCE))
    assert {e["grad_norm"] for e in events if e.get("skipped")} == {"nan"}
    step, tensors = state_of(job)
    assert step == 5 + PATIENCE and all(bool(t.isfinite().all()) for t in tensors.values())


def test_a_log_with_a_torn_line_and_a_lost_log(small_job: Make) -> None:
    """The decisions of a run whose log was lost are in its checkpoints."""
    whole, job = small_job("whole"), small_job("run")
    assert train_in_processes(whole) == [0]
    assert train_in_processes(job, [Kill("before", 6)]) == [-9]
    log = Path(job.run.folder) / "events.jsonl"
    decided = run_of(job).events("decision")
    log.write_text('{"schema":1,"torn')
    assert api.train(job).outcome == "finished"
    assert run_of(job).events("resume")[0]["step"] == 4
    again = [d["name"] for d in run_of(job).events("decision")]
    assert "machine" not in again and {d["name"] for d in decided} >= {"machine", "phases"}
    assert {step: loss for step, loss in run_of(whole).loss.items() if step >= 4} == run_of(job).loss
