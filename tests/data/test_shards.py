"""Token shards: types, masks, borders; nothing that changed is taken for what was built."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from colossus.data.build import open_split
from colossus.data.open import open_corpus
from colossus.data.shards import ShardedTokens, read_manifest, write_manifest
from colossus.errors import UserError
from tests.data.building import built, contents, decoded, in_memory, write_corpus

pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten shards or so, for those who only read."""
    root = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("colossus.data.build.SHARD_BYTES", 10_000)
        built(root / "out", write_corpus(root / "text"))
    return root / "out"


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """A corpus that may be damaged."""
    built(tmp_path / "out", write_corpus(tmp_path / "text", num=12))
    return tmp_path / "out" / "corpus-0"


def test_all_text_is_there_and_once(folder: Path) -> None:
    expected = [path.read_text() for path in sorted((folder.parent / "text").iterdir())]
    train, validation = open_split(folder, 0, "train"), open_split(folder, 0, "validation")
    assert len(train.shards) > 5
    assert sorted(decoded(train) + decoded(validation)) == sorted(expected)
    assert train.num_documents + validation.num_documents == len(expected)
    assert train.num_bytes + validation.num_bytes == sum(map(len, expected))
    train.verify()
    validation.verify()


def test_slices_across_shards(folder: Path) -> None:
    source = open_split(folder, 0, "train")
    whole = np.concatenate([source.tokens(i, i + 1) for i in range(source.num_tokens)])
    draw = random.Random(0)
    for _ in range(300):
        start = draw.randrange(source.num_tokens)
        stop = draw.randrange(start, min(source.num_tokens, start + 30_000) + 1)
        assert np.array_equal(source.tokens(start, stop), whole[start:stop])
        borders = start + np.flatnonzero(whole[start:stop] == 256)
        assert np.array_equal(source.document_starts(start, stop), borders)
    assert source.mask(0, 10) is None


def test_reading_is_a_view_of_the_file(folder: Path) -> None:
    source = open_split(folder, 0, "train")
    assert not source.tokens(5, 50).flags.owndata
    assert not source.tokens(5, 50).flags.writeable


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_16_or_32_bits(tmp_path: Path, vocabulary: int, dtype: type) -> None:
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"filler-{i}": i for i in range(256, vocabulary - 1)}
    library = tokenizers.Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    text = write_corpus(tmp_path / "text", num=4)
    train, _ = built(tmp_path / "out", text, tokenizer=str(tmp_path / "tokenizer.json"))
    assert train.tokens(0, 9).dtype == dtype
    assert train.tokens(0, 1).tolist() == [vocabulary - 1]  # the end of a document, which begins one too
    assert (train.folder / "train-00000.bin").stat().st_size == train.num_tokens * dtype().itemsize


def test_the_mask_of_targets(tmp_path: Path) -> None:
    chats = [[(f"question {i}? ", False), (f"answer {i}.", True)] for i in range(40)]
    train, validation = built(tmp_path / "out", in_memory(chats, parts=4, masked=True))
    assert len(train.shards) > 1
    for source in (train, validation):
        mask = source.mask(0, source.num_tokens)
        assert mask is not None
        ids = source.tokens(0, source.num_tokens)
        learned = bytes(ids[(mask == 1) & (ids < 256)].astype(np.uint8)).decode()
        others = bytes(ids[(mask == 0) & (ids < 256)].astype(np.uint8)).decode()
        assert learned.startswith("answer")
        assert "question" not in learned
        assert "answer" not in others
        assert (mask[ids == 257] == 1).all()  # the end of an answer is learned
        assert (mask[ids == 256] == 0).all()
        source.verify()


def test_a_mask_only_where_something_is_masked(tmp_path: Path) -> None:
    """Text first, pieces later, in a corpus that may hold both: the pieces' mask is not lost."""
    documents = [f"plain text {i}" for i in range(50)]
    chats = [[(f"question {i}", False), ("yes", True)] for i in range(50)]
    train, _ = built(tmp_path / "out", in_memory(documents + chats, parts=10, masked=True))
    kinds = [set(shard.files) for shard in train.shards]
    assert kinds[0] == {"tokens", "starts"}
    assert kinds[-1] == {"tokens", "starts", "mask"}
    mask = train.mask(0, train.num_tokens)
    assert mask is not None
    ids = train.tokens(0, train.num_tokens)
    learned = bytes(ids[(mask == 1) & (ids < 256)].astype(np.uint8)).decode()
    assert "plain text 1" in learned
    assert "question" not in learned
    plain, _ = built(tmp_path / "plain", in_memory(documents, masked=True))
    assert plain.mask(0, 10) is None


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def opens_and_verifies(folder: Path) -> None:
    for split in ("train", "validation"):
        ShardedTokens(folder, split).verify()


def test_any_flipped_bit_is_seen(corpus_folder: Path) -> None:
    """In every file, at its ends and anywhere in it: by opening, or by `verify`."""
    opens_and_verifies(corpus_folder)
    draw = random.Random(0)
    for path in files_of(corpus_folder):
        whole = path.read_bytes()
        assert whole, "no file without a purpose"
        for place in {0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(25))}:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(UserError, match=path.name.replace(".", r"\.")):
                opens_and_verifies(corpus_folder)
        path.write_bytes(whole)
    opens_and_verifies(corpus_folder)


def test_any_other_length_is_seen_at_opening(corpus_folder: Path) -> None:
    for path in files_of(corpus_folder):
        whole = path.read_bytes()
        for data in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"x"):
            path.write_bytes(data)
            with pytest.raises(UserError, match=path.name.replace(".", r"\.")):
                [ShardedTokens(corpus_folder, split) for split in ("train", "validation")]
        path.unlink()
        with pytest.raises(UserError, match=r"missing|no token shards here"):
            [ShardedTokens(corpus_folder, split) for split in ("train", "validation")]
        path.write_bytes(whole)


def test_the_table_of_held_out_documents_is_checked_when_it_is_read(corpus_folder: Path) -> None:
    source = ShardedTokens(corpus_folder, "validation")
    path = corpus_folder / "validation.documents"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"validation\.documents: its bytes changed"):
        source.documents()


def test_shards_of_another_version(corpus_folder: Path) -> None:
    manifest = read_manifest(corpus_folder)
    write_manifest(corpus_folder, manifest | {"schema": 99})
    with pytest.raises(UserError, match=r"of another version of Colossus \(schema 99\)"):
        ShardedTokens(corpus_folder, "train")


@pytest.mark.parametrize("text", ["[]", "3", "{}", "not JSON", ""])
def test_a_manifest_that_is_none(corpus_folder: Path, text: str) -> None:
    (corpus_folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        ShardedTokens(corpus_folder, "train")


def test_no_manifest_no_corpus(corpus_folder: Path) -> None:
    (corpus_folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no token shards here \(no manifest\.json\); build them first"):
        ShardedTokens(corpus_folder, "train")


def test_the_fingerprint_follows_every_byte(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text", num=12)
    first, _ = built(tmp_path / "one", text)
    again, _ = built(tmp_path / "two", text)
    assert first.fingerprint == again.fingerprint
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    path = next(text.iterdir())
    path.write_text(path.read_text().replace("line 1 ", "line 7 "))
    changed, _ = built(tmp_path / "three", text)
    assert changed.fingerprint != first.fingerprint


def test_the_manifest_is_plain_json(folder: Path) -> None:
    manifest = json.loads((folder / "corpus-0" / "manifest.json").read_text())
    assert manifest["tokenizer"] == {"fingerprint": "bytes", "vocab_size": 258, "bos_id": 256, "eos_id": 257}
    assert manifest["corpus"]["name"] == str(folder.parent / "text")
    assert manifest["corpus"]["fingerprint"] == open_corpus(str(folder.parent / "text")).fingerprint


def test_more_shards_than_files_may_be_open(folder: Path) -> None:
    """A map keeps its file open; the usual limit would end a corpus of a few GB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = len([*Path("/dev/fd").iterdir()]) + 6
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
        source = open_split(folder, 0, "train")
        assert len(source.tokens(0, source.num_tokens)) == source.num_tokens
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: shard_of(m)["files"]["tokens"].update(name="/etc/hostname"), "no file of the folder"),
        (lambda m: shard_of(m)["files"]["tokens"].update(name="../manifest.json"), "no file of the folder"),
        (lambda m: shard_of(m)["files"]["starts"].update(name=".."), "no file of the folder"),
        (lambda m: m["documents"].update(name="sub/x"), "no file of the folder"),
        (lambda m: m.update(dtype="O"), "tokens of the type 'O'"),
        (lambda m: m.update(dtype=["uint16"]), "no manifest of shards"),
        (lambda m: shard_of(m).update(num_tokens=10**15), "bytes"),
        (lambda m: shard_of(m).update(num_documents=-1), "bytes"),
        (lambda m: shard_of(m)["files"].pop("starts"), "lacks a file"),
        (lambda m: shard_of(m)["files"]["tokens"].update(crc32="x"), "no size or no checksum"),
        (lambda m: shard_of(m).update(further=1), "no manifest of shards"),
        (lambda m: m.pop("splits"), "no manifest of shards"),
        (lambda m: m.update(splits=[]), "no manifest of shards"),
        (lambda m: m.update(documents=None), "no manifest of shards"),
        (lambda m: m.pop("schema"), "of another version"),
    ],
)
def test_a_manifest_that_no_build_writes(
    change: Callable[[dict[str, Any]], Any], message: str, corpus_folder: Path
) -> None:
    """Whoever made it also made its checksum."""
    manifest = read_manifest(corpus_folder)
    change(manifest)
    write_manifest(corpus_folder, manifest)
    with pytest.raises(UserError, match=message) as caught:
        ShardedTokens(corpus_folder, "train")
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize("kind", ["fifo", "device", "link"])
def test_a_shard_that_is_no_file_of_the_folder(kind: str, corpus_folder: Path, tmp_path: Path) -> None:
    path = corpus_folder / shard_of(read_manifest(corpus_folder))["files"]["tokens"]["name"]
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere if kind == "link" else "/dev/zero")
    with pytest.raises(UserError, match=path.name):
        ShardedTokens(corpus_folder, "train")


def test_shards_are_synced_before_the_manifest_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = os.fsync

    def record(descriptor: int) -> None:
        sync(descriptor)
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr(os, "fsync", record)
    built(tmp_path / "out", write_corpus(tmp_path / "text", num=12), workers=1)
    manifest = read_manifest(tmp_path / "out" / "corpus-0")
    shards = [shard for split in manifest["splits"].values() for shard in split]
    names = {file["name"] for shard in shards for file in shard["files"].values()}
    ends = synced.index("manifest.json.part")
    assert names | {"validation.documents"} <= {name.removesuffix(".part") for name in synced[:ends]}
    assert synced[ends:] == ["manifest.json.part", "corpus-0"]


def shard_of(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["splits"]["train"][0]
    return found
