"""Data sets of Hugging Face's `datasets`, from local folders: streamed, killed, resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from colossus.data import build as building
from colossus.data import hugging_face
from colossus.data.build import corpus_folder, open_split
from colossus.data.open import open_corpus
from colossus.errors import UserError
from tests.data.building import built, contents, decoded, request_for

datasets = pytest.importorskip("datasets")
TEXTS = [f"document {i}\n" + f"{i * i} words, " * (i % 40) for i in range(300)]


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hugging_face, "ROWS_A_PART", 50)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """As `save_to_disk` leaves it."""
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": TEXTS, "n": [*range(300)]}).save_to_disk(str(folder))
    return folder


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of files, one a shard, as a repository of the hub holds."""
    folder = tmp_path / "files"
    folder.mkdir()
    for shard in range(3):
        rows = TEXTS[shard * 100 : (shard + 1) * 100]
        datasets.Dataset.from_dict({"text": rows}).to_parquet(str(folder / f"train-{shard}.parquet"))
    return folder


def texts(name: str, text_field: str = "text") -> list[str]:
    return [str(document) for document in open_corpus(name, text_field).documents()]


def test_a_saved_data_set(saved: Path) -> None:
    """By its path alone, too; in parts that several processes read."""
    for name in (f"hf:{saved}", str(saved), f"hf:{saved}:train"):
        corpus = open_corpus(name)
        assert len(corpus.parts) == 6
        assert texts(name) == TEXTS


def test_a_saved_data_set_of_splits(tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    parts = {"train": TEXTS[:200], "test": TEXTS[200:]}
    made = {name: datasets.Dataset.from_dict({"text": rows}) for name, rows in parts.items()}
    datasets.DatasetDict(made).save_to_disk(str(folder))
    assert texts(str(folder)) == TEXTS[:200]
    assert texts(f"hf:{folder}:test") == TEXTS[200:]
    with pytest.raises(UserError, match=r"its splits are \['train', 'test'\]"):
        open_corpus(f"hf:{folder}:tset")


def test_a_folder_of_parquet(files: Path) -> None:
    corpus = open_corpus(f"hf:{files}")
    assert len(corpus.parts) == 3
    assert texts(f"hf:{files}") == TEXTS


def test_a_folder_of_jsonl(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (folder / "train.jsonl").write_text(rows)
    assert texts(f"hf:{folder}", "body") == TEXTS
    with pytest.raises(UserError, match=r"data\.text_field=text: .*it has \['body'\]"):
        texts(f"hf:{folder}")


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a", None, "", "b"]}).save_to_disk(str(folder))
    assert texts(str(folder)) == ["a", "b"]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.corpus=hf:.*nothing:train: cannot be opened"):
        open_corpus(f"hf:{tmp_path / 'nothing'}")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the extra: pip install 'colossus-train\[hf\]'"):
        open_corpus("hf:some/thing")


def test_the_fingerprint_follows_the_files(files: Path) -> None:
    before = open_corpus(f"hf:{files}").fingerprint
    assert open_corpus(f"hf:{files}").fingerprint == before
    datasets.Dataset.from_dict({"text": ["other"]}).to_parquet(str(files / "train-1.parquet"))
    assert open_corpus(f"hf:{files}").fingerprint != before


def test_built_in_parallel(files: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "SHARD_BYTES", 1000)
        train, validation = built(tmp_path / "out", f"hf:{files}", workers=2)
    assert len(train.shards) == 3
    assert sorted(decoded(train) + decoded(validation)) == sorted(TEXTS)


def test_killed_and_resumed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was streamed before the kill is not streamed again."""
    program = f"""
import os, signal
os.environ["USE_TORCH"] = "0"
from pathlib import Path
from colossus.data import build as building, hugging_face, workers
from tests.data.building import built
hugging_face.ROWS_A_PART = 50
building.SHARD_BYTES = 1000
encode = workers.encode_task
def third_kills(task, encoder):
    if task.index == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(task, encoder)
workers.encode_task = third_kills
built(Path({str(tmp_path / "out")!r}), "hf:{saved}")
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    with pytest.raises(UserError, match="no token shards here"):
        open_split(tmp_path / "out", 0, "train")
    assert len([*corpus_folder(tmp_path / "out", 0).glob("part-*.json")]) == 3
    monkeypatch.setattr(building, "SHARD_BYTES", 1000)
    streamed: list[int] = []
    read = hugging_face._Streamed.__call__

    def spy(self: hugging_face._Streamed) -> object:
        streamed.append(self.index)
        return read(self)

    monkeypatch.setattr(hugging_face._Streamed, "__call__", spy)
    request = request_for(f"hf:{saved}")
    divided = building.divide
    monkeypatch.setattr(building, "divide", lambda *a: (divided(*a), streamed.clear())[0])
    building.build(request, tmp_path / "out")
    assert sorted({*streamed}) == [3, 4, 5]
    built(tmp_path / "whole", f"hf:{saved}")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
