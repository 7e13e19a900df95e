"""Any corpus as held-out documents, held against a loop over tokens and the run's own validation."""

from __future__ import annotations

import bz2
import gzip
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import Replace

from colossus import api
from colossus.data.bpe import train_bpe
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.lossless import lost_bytes
from colossus.data.tokenizer import load_tokenizer
from colossus.errors import UserError
from colossus.evaluation import corpora
from colossus.evaluation.corpora import choose_texts, evaluate_corpus, run_at
from colossus.models import Decoder, build
from tests.data.kinds import KINDS, saved
from tests.models.reference import architecture

TOKENIZER = BytesTokenizer()
TEXTS = [f"Document {n}: " + "und so weiter é " * (3 * n) for n in range(12)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Decoder:
    arch = architecture(vocab_size=TOKENIZER.vocab_size, max_seq_len=32, initializer_range=0.5)
    model = build(arch, seed=0, dtype=torch.float64)
    assert isinstance(model, Decoder)
    return model


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def by_hand(model: Decoder, text: str, window: int) -> float:
    """Nats of a text and its end, a forward pass a token, from all that precedes or from half a window."""
    tokens = [TOKENIZER.bos_id, *text.encode(), TOKENIZER.eos_id]
    nats, stride = 0.0, window // 2
    for position in range(1, len(tokens)):
        begin = max(0, math.ceil((position - window) / stride) * stride)
        with torch.no_grad():
            logits_V = model(torch.tensor([tokens[begin:position]]))[0, -1]
        nats -= math.log(float(torch.softmax(logits_V, -1)[tokens[position]]))
    return nats


def test_it_is_what_a_loop_over_tokens_gives(model: Decoder, jsonl: Path) -> None:
    found = evaluate_corpus(model, TOKENIZER, str(jsonl), seq_len=16)
    texts = [text.encode() for text in TEXTS]
    num_bytes = sum(map(len, texts))
    nats = sum(by_hand(model, text, 16) for text in TEXTS)
    assert found.result.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-9)
    assert found.result.loss == pytest.approx(nats / (num_bytes + len(TEXTS)), rel=1e-9)
    sizes = {"gzip": (len(gzip.compress(t, 9)) for t in texts), "bz2": (len(bz2.compress(t)) for t in texts)}
    for name, bytes_of in sizes.items():
        expected = 8 * sum(bytes_of) / num_bytes
        assert getattr(found.result, f"{name}_bits_per_byte") == pytest.approx(expected)
    assert (found.whole, found.seq_len, found.corpus) == (True, 16, str(jsonl))
    assert (found.result.num_documents, found.result.num_bytes) == (len(TEXTS), num_bytes)
    assert found.to_dict()["num_tokens"] == num_bytes + len(TEXTS)


def test_every_form_of_a_corpus_gives_the_same(
    model: Decoder, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate_corpus(model, TOKENIZER, str(jsonl)).result
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "texts.parquet")
    (tmp_path / "folder").mkdir()
    for n, text in enumerate(reversed(TEXTS)):
        (tmp_path / "folder" / f"{n}.txt").write_text(text)
    (tmp_path / "my_eval_texts.py").write_text(f"def documents():\n    yield from {TEXTS!r}\n")
    monkeypatch.chdir(tmp_path)
    for name, field in (("texts.parquet", "body"), ("folder", "text"), ("my_eval_texts:documents", "text")):
        found = evaluate_corpus(model, TOKENIZER, name, text_field=field)
        assert found.result.loss == pytest.approx(expected.loss, rel=1e-12)
        assert found.result.num_bytes == expected.num_bytes and found.whole


@settings(max_examples=40, deadline=None)
@given(documents=st.none() | st.integers(1, 20), num_bytes=st.none() | st.integers(1, 4000))
def test_a_choice_is_the_begin_of_any_larger_one(
    documents: int | None, num_bytes: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "choice.jsonl"
    if not path.is_file():
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    megabytes = num_bytes / 1e6 if num_bytes is not None else None
    some = choose_texts(str(path), TOKENIZER, documents=documents, megabytes=megabytes)
    every = choose_texts(str(path), TOKENIZER)
    count = len(some.table)
    assert count <= (documents or len(TEXTS)) and some.table["num_bytes"].sum() <= (num_bytes or 10**6)
    assert some.whole == (count == len(TEXTS)) and every.whole
    texts = [TOKENIZER.decode(part) for part in np.split(some.ids, some.table["start"][1:])]
    whole = [TOKENIZER.decode(part) for part in np.split(every.ids, every.table["start"][1:])]
    assert texts[1:] == whole[1:count] and whole[0].startswith(texts[0].rstrip("\N{REPLACEMENT CHARACTER}"))
    assert sorted(whole) == sorted(TEXTS)


def test_a_part_is_the_same_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    """A sample of the texts, not the begin of a file."""
    chosen = []
    for name, texts in (("as it is", TEXTS), ("turned", TEXTS[::-1])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        chosen.append(choose_texts(str(path), TOKENIZER, documents=2).ids.tolist())
    assert chosen[0] == chosen[1]


def test_much_text_is_read_in_part_from_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(8):
        (tmp_path / f"{n}.txt").write_text(f"{n} " * 400)
    monkeypatch.setattr(corpora, "READ_BYTES", 3000)
    found = choose_texts(str(tmp_path), TOKENIZER)
    assert not found.whole and 4 <= len(found.table) < 8


def test_a_run_s_own_split_gives_the_figure_of_its_last_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLOSSUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{n}.txt").write_text(text)
    settings = "data.tokenizer=bytes data.seq_len=32 data.validation_fraction=0.4 model.hidden_size=32"
    rest = f"run.steps=3 layout.compile=false precision.type=fp32 run.folder={tmp_path / 'run'}"
    job = api.load_job(None, [*settings.split(), *rest.split(), f"data.corpus={tmp_path / 'texts'}"])
    run = api.train(job)
    model, tokenizer = api.load_model(run.folder)
    last = run.events("validation")[-1]
    checkpoint = run.folder / "checkpoints" / "step-00000003"
    for path in (run.folder, checkpoint):
        found = api.evaluate(model, tokenizer, held_out_of=path)
        assert found.result.loss == pytest.approx(last["loss"], rel=1e-6) and found.whole
        assert found.result.xz_bits_per_byte == pytest.approx(last["xz_bits_per_byte"])
    part = api.evaluate(model, tokenizer, held_out_of=run.folder, documents=1)
    assert part.result.num_documents == 1 and not part.whole
    least = api.evaluate(model, tokenizer, held_out_of=run.folder, megabytes=1e-5)
    assert least.result.num_documents == 1 and not least.whole

    assert run_at(checkpoint) == run.folder.resolve() and run_at(tmp_path) is None
    other = train_bpe(TEXTS, 258)
    with pytest.raises(UserError, match="of another tokenizer than the model's"):
        api.evaluate(model, other, held_out_of=run.folder)
    (Path(api.load_job(run.folder).data.folder) / "corpus-0" / "manifest.json").unlink()
    with pytest.raises(UserError, match="what it held out is not there"):
        api.evaluate(model, tokenizer, held_out_of=run.folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"documents": 0}, "documents=0: must be at least 1"),
        ({"megabytes": 0.0}, "megabytes=0.0: must be above 0"),
        ({"megabytes": float("nan")}, "megabytes=nan: must be above 0"),
        ({"megabytes": float("inf")}, "megabytes=inf: must be above 0, and a finite number"),
        ({"seq_len": 33}, "seq_len=33: must be from 2 to 32"),
        ({"seq_len": 1}, "seq_len=1: must be from 2 to 32"),
        ({"text_field": "txt"}, "data.text_field=txt: no text under this name"),
        ({"corpus": "texts.jsnl"}, "did you mean"),
        ({"corpus": "blank.jsonl"}, "corpus=blank.jsonl: no document with text"),
        ({"corpus": None}, "name either a corpus or"),
        ({"held_out_of": "."}, "name either a corpus or"),
        ({"corpus": None, "held_out_of": "."}, "no run, so nothing was held out"),
    ],
)
def test_mistakes(
    changed: dict[str, Any],
    message: str,
    model: Decoder,
    jsonl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    monkeypatch.chdir(tmp_path)
    arguments: dict[str, Any] = {"corpus": "texts.jsonl"} | changed
    with pytest.raises(UserError) as raised:
        api.evaluate(model, TOKENIZER, **arguments)
    assert message in str(raised.value)


def test_a_tokenizer_that_is_not_the_model_s(model: Decoder, jsonl: Path) -> None:
    large = train_bpe(TEXTS, 280)
    with pytest.raises(UserError, match="not the model's own"):
        api.evaluate(model, large, jsonl)


def test_pieces_are_encoded_as_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def documents():\n    yield [('ab', False), ('cd', True)]\n"
    (tmp_path / "my_eval_pieces.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    merged = train_bpe(["bc " * 50], 259)
    assert len(merged.encode("abcd")) == 3  # b and c are one token, but not of two pieces
    found = choose_texts("my_eval_pieces:documents", merged)
    ids: Callable[[str], list[int]] = merged.encode
    assert found.ids.tolist() == [merged.bos_id, *ids("ab"), *ids("cd"), merged.eos_id]


def test_of_a_chat_only_what_the_assistant_says_counts(model: Decoder, tmp_path: Path) -> None:
    chats = [[("user", "abc"), ("assistant", "de")], [("user", "x"), ("assistant", "yz"), ("user", "q")]]
    records = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = evaluate_corpus(model, BytesTokenizer(), str(path)).result
    assert result.num_bytes == len("de") + len("yz")
    assert result.num_tokens == result.num_bytes + len(chats)  # and the end of each answer


def test_a_tokenizer_that_loses_text(tmp_path: Path) -> None:
    """Its figure is withheld: lower case and unknown words cost a model nothing."""
    tokenizer = load_tokenizer(saved("word_piece", tmp_path / "word_piece"))
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    model = build(architecture(vocab_size=tokenizer.vocab_size, max_seq_len=32), seed=0)
    found = api.evaluate(model, tokenizer, path)
    assert found.result.bits_per_byte is None and found.result.loss > 0
    lost = sum(lost_bytes(text, tokenizer.decode(tokenizer.encode(text))) for text in TEXTS)
    assert found.result.lost == lost / len("".join(TEXTS).encode()) and found.result.lost > 0.01
    assert found.to_dict()["bits_per_byte"] is None


@pytest.mark.parametrize(("num_lost", "withheld"), [(0, False), (1, False), (9, False), (10, True)])
def test_what_little_a_tokenizer_loses_is_said(num_lost: int, withheld: bool, tmp_path: Path) -> None:
    """From 0.1% of the bytes on: of 10,000 nine may be lost, but not ten."""
    made, names = KINDS["byte_level"]()
    made.normalizer = Replace("Q", "")
    tokenizer = JsonTokenizer(made.to_str(), None, made.token_to_id(names["eos_token"]))
    text = "".join(("Q" if n < num_lost else "x") + "the cat a" for n in range(1000))
    path = tmp_path / "text.txt"
    path.write_text(text)
    model = build(architecture(vocab_size=tokenizer.vocab_size, max_seq_len=32), seed=0)
    result = api.evaluate(model, tokenizer, path).result
    assert result.num_bytes == 10_000 and result.lost == num_lost / 10_000
    assert (result.bits_per_byte is None) is withheld
