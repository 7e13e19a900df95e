"""Builds: the same bytes however they come about, nothing that loads before the end, clear errors."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from colossus.data import build as building
from colossus.data.build import build, corpus_folder, is_built, open_split
from colossus.data.documents import Encoder
from colossus.errors import MachineError, UserError
from tests.data.building import built, contents, decoded, in_memory, request_for, start_build, write_corpus


def wait_for_corpus(folder: Path, patience_seconds: float = 60.0) -> None:
    """Until a build has begun to write a corpus."""
    deadline = time.monotonic() + patience_seconds
    while not corpus_folder(folder, 0).is_dir():
        assert time.monotonic() < deadline, "the build never began"
        time.sleep(0.001)


@pytest.mark.parametrize(("tokenizer", "workers"), [("bytes", 1), ("bpe", 2)])
def test_killed_at_any_instant(tmp_path: Path, tokenizer: str, workers: int) -> None:
    """Nothing loads; and the build that follows takes up what was finished and ends with the same bytes."""
    text = write_corpus(tmp_path / "text", num=80)
    undisturbed = start_build(text, tmp_path / "whole", tokenizer, workers)
    wait_for_corpus(tmp_path / "whole")
    began = time.perf_counter()
    assert undisturbed.wait() == 0
    usual = (
        time.perf_counter() - began
    )  # of encoding: imports come before, and take most of a build this small
    whole = contents(tmp_path / "whole")
    draw = random.Random(f"{tokenizer} {workers}")
    for life in range(2):
        out, unfinished = tmp_path / f"life-{life}", 0
        for _ in range(12):
            builder = start_build(text, out, tokenizer, workers)
            wait_for_corpus(out)
            time.sleep(draw.random() * usual * 0.6)
            builder.kill()
            builder.wait()
            if (corpus_folder(out, 0) / "manifest.json").exists():  # too late: it is quicker now
                shutil.rmtree(out)
                usual *= 0.5
                continue
            with pytest.raises(UserError, match="no token shards here"):
                open_split(out, 0, "train")
            unfinished += 1
            if unfinished == 2:
                break
        assert unfinished, "every kill came too late to show anything"
        assert start_build(text, out, tokenizer, workers).wait() == 0
        assert contents(out) == whole


@pytest.mark.usefixtures("small_shards")
def test_what_was_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from colossus.data import workers

    text = write_corpus(tmp_path / "text")
    built(tmp_path / "whole", text)
    done: list[int] = []
    encode = workers.encode_task

    def encode_five(task: building.Task, encoder: Encoder) -> object:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(task.index)
        return encode(task, encoder)

    monkeypatch.setattr(workers, "encode_task", encode_five)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "out", text)
    assert done == [0, 1, 2, 3, 4]
    done.clear()
    monkeypatch.setattr(workers, "encode_task", lambda t, by: done.append(t.index) or encode(t, by))
    progress: list[tuple[int, int]] = []
    request = request_for(text)
    build(request, tmp_path / "out", lambda at, total: progress.append((at, total)))
    assert min(done) == 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    total = request.corpora[0].num_bytes
    assert progress == sorted(progress)
    assert {all_bytes for _, all_bytes in progress} == {total}
    assert progress[-1] == (total, total)
    done.clear()
    build(request, tmp_path / "out")
    assert not done


def test_a_folder_of_another_request_is_refused(tmp_path: Path) -> None:
    one, other = write_corpus(tmp_path / "one", num=5), write_corpus(tmp_path / "other", num=6)
    built(tmp_path / "out", one)
    before = contents(tmp_path / "out")
    message = r"data\.folder=.*out: holds other data .*one.*; name another folder"
    for request in (
        request_for(other),
        request_for(one, tokenizer="bpe"),
        request_for(one, held_out=0.3),
        request_for(one, other),
    ):
        with pytest.raises(UserError, match=message):
            build(request, tmp_path / "out")
    (one / "000.txt").write_text("changed")
    with pytest.raises(UserError, match=message):
        build(request_for(one), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_folder_of_other_files_stays_as_it_is(tmp_path: Path) -> None:
    """Also that of the texts themselves. What a kill leaves before there is a request is no other file."""
    text = write_corpus(tmp_path / "text", num=5)
    before = sorted(text.iterdir())
    with pytest.raises(UserError, match=r"data\.folder=.*text: not empty, and holds no token shards but 000"):
        build(request_for(text), text)
    assert sorted(text.iterdir()) == before
    (tmp_path / "begun").mkdir()
    for name in (".lock", "request.json.part"):
        (tmp_path / "begun" / name).touch()
    assert build(request_for(text), tmp_path / "begun").is_dir()


def test_no_link_of_a_folder_is_written_through(tmp_path: Path) -> None:
    """What a kill may have left, as a link that somebody else put there: what it leads to stays as it is."""
    text = write_corpus(tmp_path / "text", num=5)
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("precious")

    def out(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    (out("lock") / ".lock").symlink_to(other / "kept")
    (out("new") / ".lock").symlink_to(other / "made")
    for name in ("lock", "new"):
        with pytest.raises(MachineError, match=r"cannot be written \(a link, and no file itself\)"):
            built(tmp_path / name, text)
    for name, path in (("a", "corpus-0"), ("b", "corpus-0/train-00000.bin"), ("c", "tokenizer.part")):
        folder = out(name)
        claim = {"key": request_for(text).key, "corpora": [str(text)], "tokenizer": "bytes"}
        (folder / "request.json").write_text(json.dumps(claim))
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).symlink_to(other / "kept" if path.endswith("bin") else other)
    for name in ("a", "b"):
        with pytest.raises(MachineError, match=r"cannot be written \(a link, and no f"):
            built(tmp_path / name, text)
    built(tmp_path / "c", text)
    assert {path.name: path.read_text() for path in other.iterdir()} == {"kept": "precious"}


def test_a_claim_that_cannot_be_read(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text", num=5)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "request.json").write_text("{")
    with pytest.raises(UserError, match=r"request\.json: cannot be read"):
        built(tmp_path / "out", text)


def test_several_corpora_share_a_tokenizer(tmp_path: Path) -> None:
    one, other = write_corpus(tmp_path / "one", num=9), write_corpus(tmp_path / "other", num=7)
    request = request_for(one, other, tokenizer="bpe")
    build(request, tmp_path / "out")
    assert is_built(request, tmp_path / "out")
    manifests = [open_split(tmp_path / "out", i, "train").manifest for i in range(2)]
    assert [m["corpus"]["name"] for m in manifests] == [str(one), str(other)]
    assert manifests[0]["tokenizer"] == manifests[1]["tokenizer"]


def test_the_key_names_the_result(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text", num=5)
    request = request_for(text)
    assert dataclasses.replace(request, workers=7, vocab_size=999).key == request.key  # of plain bytes
    bpe = dataclasses.replace(request, tokenizer="bpe")
    assert len({request.key, bpe.key, dataclasses.replace(bpe, vocab_size=999).key}) == 3
    assert dataclasses.replace(request, held_out=0.2).key != request.key


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(small_disk: Path, tmp_path: Path, workers: int) -> None:
    """Said with the path; with more room, the build goes on."""
    text = write_corpus(tmp_path / "text", num=150)
    with pytest.raises(MachineError, match=r"disk/.*cannot be written \(No space left on device\)"):
        built(small_disk / "out", text, workers=workers)
    with pytest.raises(UserError, match="no token shards here"):
        open_split(small_disk / "out", 0, "train")
    finished = len([*corpus_folder(small_disk / "out", 0).glob("part-*.json")])
    assert finished > 5
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    built(small_disk / "out", text, workers=workers)
    built(tmp_path / "whole", text)
    assert contents(small_disk / "out") == contents(tmp_path / "whole")


def test_a_disk_that_cannot_be_written(small_disk: Path, tmp_path: Path) -> None:
    """Whole shards on it are read nevertheless."""
    text = write_corpus(tmp_path / "text", num=5)
    built(small_disk / "out", text)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(MachineError, match=r"data\.folder=.*disk/new: cannot be written \(Read-only file"):
        built(small_disk / "new", text)
    train, _ = built(small_disk / "out", text)
    train.verify()


def test_no_permission(tmp_path: Path) -> None:
    """As a user who may not write there."""
    text = write_corpus(tmp_path / "text", num=5)
    (tmp_path / "closed").mkdir(mode=0o555)
    program = f"""
import os, sys
from pathlib import Path
from colossus.data.build import build
from colossus.errors import MachineError
from tests.data.building import request_for
request = request_for({str(text)!r})
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
try:
    build(request, Path({str(tmp_path / "closed" / "out")!r}))
except MachineError as error:
    print(error)
"""
    for folder in (tmp_path, *tmp_path.parents):  # which others may enter
        if folder.stat().st_uid == os.geteuid() and folder.is_relative_to(tmp_path.parents[1]):
            folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = f"data.folder={tmp_path / 'closed' / 'out'}: cannot be written (Permission denied)\n"
    assert done.stdout == expected


def test_a_file_below_which_nothing_can_lie(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text", num=5)
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"data\.folder=.*file/out: cannot be written"):
        built(tmp_path / "file" / "out", text)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Much more text, in large documents, takes a little more (benchmarks/data_speed.py has 1 GB)."""
    program = """
import sys, resource
from pathlib import Path
from tests.data.building import built, open_corpus
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
built(Path(sys.argv[1]) / "first", Path(sys.argv[2]), tokenizer="bpe")
first = peak()
built(Path(sys.argv[1]) / "second", Path(sys.argv[3]), tokenizer="bpe")
print(peak() - first)
"""
    small, large = write_corpus(tmp_path / "small", num=2, size=5 * 10**5), tmp_path / "large"
    large.mkdir()
    text = (small / "000.txt").read_text()
    (large / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"{i}\n" + text * 6}) + "\n" for i in range(4))
    )
    words = [sys.executable, "-c", program, str(tmp_path), str(small), str(large)]
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell the peak")
    grown = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert grown < 120 * 1024


def test_the_journal_is_gone_at_the_end(tmp_path: Path) -> None:
    built(tmp_path / "out", in_memory([f"document {i}" for i in range(50)], parts=5))
    names = {path.name for path in corpus_folder(tmp_path / "out", 0).iterdir()}
    assert not [name for name in names if name.startswith("part-") or name.endswith(".part")]
    request = json.loads((tmp_path / "out" / "request.json").read_text())
    assert request["corpora"] == ["given"]


def test_journals_go_that_a_build_killed_at_its_end_left(tmp_path: Path) -> None:
    corpus = in_memory([f"document {i}" for i in range(50)], parts=5)
    built(tmp_path / "out", corpus)
    whole = contents(tmp_path / "out")
    left = corpus_folder(tmp_path / "out", 0) / "part-00003.json"
    left.write_text("{}")
    built(tmp_path / "out", corpus)
    assert contents(tmp_path / "out") == whole and not left.exists()


@pytest.mark.parametrize("name", [".lock", "corpus-0/train-00000.bin"])
def test_a_build_waits_for_another_that_writes_there(name: str, tmp_path: Path) -> None:
    """For the folder's lock; and for a worker of a build that was killed, which still holds its file."""
    corpus = in_memory([f"document {i}" for i in range(50)])
    built(tmp_path / "whole", corpus)
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    if name != ".lock":
        shutil.copy(tmp_path / "whole" / "request.json", out)
    with (out / name).open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(b"half of what the other")
        held.flush()
        thread = threading.Thread(target=built, args=(out, corpus))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not [*out.glob("corpus-0/*.json")]
        if name != ".lock":
            assert (out / name).read_bytes() == b"half of what the other"
    thread.join(60)
    assert not thread.is_alive() and contents(out) == contents(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files")
def test_every_file_is_on_storage_whole_before_the_manifest_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        sync(descriptor)
        name = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 - also of what has no other name
        synced.append((name.removesuffix(".part"), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", recorded)
    documents = [[(f"question {i}", False), (f"answer {i}", True)] for i in range(50)]
    train, held_out = built(tmp_path / "out", in_memory(documents, parts=3, masked=True))
    folder = corpus_folder(tmp_path / "out", 0)
    at = next(i for i, (name, _) in enumerate(synced) if name == str(folder / "manifest.json"))
    before = dict(synced[:at])
    files = [file for split in (train, held_out) for shard in split.shards for file in shard.files.values()]
    assert {file["name"].partition(".")[2] for file in files} == {"bin", "starts", "mask"}
    for file in [*files, train.manifest["documents"]]:
        assert before.get(str(folder / file["name"])) == file["bytes"], file["name"]
    assert synced[at][1] == (folder / "manifest.json").stat().st_size
    assert synced[at + 1][0] == str(folder)  # the name is, too


def test_held_out_documents_of_every_shard_are_where_the_table_says(tmp_path: Path) -> None:
    documents = [f"document {i} " + "x" * i for i in range(60)]
    train, held_out = built(tmp_path / "out", in_memory(documents, parts=6), held_out=0.4)
    assert sum(shard.num_documents > 0 for shard in held_out.shards) > 3
    table, found = held_out.documents(), []
    for start, num_bytes in zip(table["start"].tolist(), table["num_bytes"].tolist(), strict=True):
        ids = held_out.tokens(start, start + num_bytes + 2)
        assert (ids[0], ids[-1]) == (256, 257)
        found.append(bytes(ids[1:-1].astype("uint8")).decode())
    assert sorted(found + decoded(train)) == sorted(documents)
