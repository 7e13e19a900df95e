"""A tokenizer goes with a model, or is told apart from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossus.data.account import Account, read_account
from colossus.data.prepare import check_vocabulary, prepare_data, vocabulary_to_train
from colossus.derive import derive_data
from colossus.errors import UserError
from colossus.job import load_job
from tests.data.kinds import saved


def test_a_model_has_at_least_the_tokens_of_its_tokenizer() -> None:
    job = load_job(None, ["model.vocab_size=300", "data.tokenizer=some.json"])
    for tokens in (258, 299, 300):
        check_vocabulary(job, tokens)
    with pytest.raises(UserError, match=r"model\.vocab_size=300: the tokenizer some\.json has 301 tokens"):
        check_vocabulary(job, 301)


def test_a_tokenizer_is_trained_for_what_was_asked_for_and_small_for_a_preset() -> None:
    """A published vocabulary of 128,256 is filled up to 32,768; one that was asked for is made whole."""
    assert vocabulary_to_train(load_job(None, ["model=llama3.2-1b"])) == 2**15
    assert vocabulary_to_train(load_job(None, ["model=llama2-7b"])) == 32_000
    assert vocabulary_to_train(load_job(None, ["model=llama3.2-1b", "model.vocab_size=50000"])) == 50_000


def test_a_tokenizer_is_read_once_for_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be of tens of megabytes; a worker reads what was built."""
    read: list[Path] = []

    def counted(path: Path, root: Path) -> Account:
        read.append(path)
        return read_account(path, root)

    monkeypatch.setattr("colossus.data.tokenizer.read_account", counted)
    folder = saved("byte_level", tmp_path / "tokenizer")
    (tmp_path / "texts").mkdir()
    for n in range(8):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"the cat {n} sat on the mat " * 20)
    words = [f"data.corpus={tmp_path / 'texts'}", f"data.tokenizer={folder}", "data.validation_fraction=0.3"]
    job = derive_data(load_job(None, [*words, "model.vocab_size=420", f"data.folder={tmp_path / 'shards'}"]))
    for times in (1, 2):
        prepare_data(job)
        assert read.count(folder / "tokenizer.json") == times
    assert len(read) == 3
