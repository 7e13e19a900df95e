"""Text to ids and back: trained, given, plain bytes; tiktoken only where its ids are equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from colossus.data.bpe import train_bpe
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.tokenizer import BOS, EOS, load_tokenizer
from colossus.errors import UserError

TEXTS = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
ODD = [
    "",
    " ",
    "\n\n\n   \t x",
    "it's we'll I'M",
    "naïve café 北京 😀 e\u0301",
    "\u2028\x85\x0b\x0c\x1c|",
    "x²½ ٣ Ⅷ",
    f"{BOS}a{EOS} <|endoftext|>",
    "\ufeff\ufffd\u200b",
    "a" * 5000,
    " " * 5000,
]
TRAINED = train_bpe(TEXTS, 500)


def by_library(tokenizer: JsonTokenizer, text: str) -> list[int]:
    plain = tokenizers.Tokenizer.from_str(tokenizer._text)
    plain.encode_special_tokens = True
    return plain.encode(text, add_special_tokens=False).ids


@pytest.fixture
def quick() -> JsonTokenizer:
    tokenizer = JsonTokenizer(TRAINED._text, TRAINED.bos_id, TRAINED.eos_id)
    assert tokenizer.quicken()
    return tokenizer


def test_settings_of_somebodys_batches_are_left_out() -> None:
    """A published file may cut or pad what it encodes."""
    theirs = tokenizers.Tokenizer.from_str(TRAINED._text)
    theirs.enable_truncation(4)
    theirs.enable_padding(length=64)
    ours = JsonTokenizer(theirs.to_str(), TRAINED.bos_id, TRAINED.eos_id)
    for text in (TEXTS[0], "a"):
        assert list(ours.encode(text)) == list(TRAINED.encode(text)) == by_library(TRAINED, text)


def test_training_is_deterministic() -> None:
    """Also in another process, whose hashes are seeded differently."""
    program = (
        "import sys; from tests.data.test_tokenizer import TEXTS, TRAINED; sys.stdout.write(TRAINED._text)"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout == TRAINED._text
    assert TRAINED.vocab_size == 500
    assert len(TRAINED.encode(TEXTS[0])) < 0.5 * len(TEXTS[0])


def test_a_vocabulary_too_small_for_the_bytes() -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size=257: .* at least 258"):
        train_bpe(TEXTS, 257)
    assert train_bpe(["x"], 258).vocab_size == 258


@pytest.mark.parametrize("text", [*TEXTS[:3], *ODD])
def test_tiktoken_has_the_same_ids(quick: JsonTokenizer, text: str) -> None:
    assert quick.encode(text) == by_library(quick, text)


@given(st.text())
def test_tiktoken_has_the_same_ids_for_any_text(text: str) -> None:
    tokenizer = JsonTokenizer(TRAINED._text, TRAINED.bos_id, TRAINED.eos_id)
    assert tokenizer.quicken()
    assert tokenizer.encode(text) == by_library(tokenizer, text)


@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    for tokenizer in (TRAINED, BytesTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
        assert not {tokenizer.bos_id, tokenizer.eos_id} & {*ids}
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_text_that_spells_the_end_of_a_document_is_text(quick: JsonTokenizer) -> None:
    for tokenizer in (TRAINED, quick):
        ids = tokenizer.encode(f"before{EOS}after{BOS}")
        assert not {tokenizer.bos_id, tokenizer.eos_id} & {*ids}
        assert tokenizer.decode(ids) == f"before{EOS}after{BOS}"


def test_runs_of_blanks_that_tiktoken_gives_up_on(quick: JsonTokenizer) -> None:
    text = "x" + " " * 1_000_000 + "y"
    with pytest.raises(ValueError, match=r"[Rr]egex"):
        quick._quick.encode_to_numpy(text)  # else this test shows nothing
    assert quick.encode(text) == by_library(quick, text)
    assert [ids.tolist() for ids in quick.encode_many(["a b", text])] == [
        by_library(quick, "a b"),
        by_library(quick, text),
    ]


def test_many_texts_at_once(quick: JsonTokenizer) -> None:
    for tokenizer in (TRAINED, quick):
        many = tokenizer.encode_many(ODD)
        assert [ids.dtype for ids in many] == [np.dtype(np.uint32)] * len(ODD)
        assert [ids.tolist() for ids in many] == [tokenizer.encode(text) for text in ODD]


def saved(folder: Path, tokenizer: tokenizers.Tokenizer, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def trained_by_library(pre: Any, special: list[str], normalizer: Any = None) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


PRE = {
    "plain": (pre_tokenizers.ByteLevel(add_prefix_space=False), None, True),
    "prefix": (pre_tokenizers.ByteLevel(add_prefix_space=True), None, False),
    "no split": (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None, False),
    "digits": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        None,
        False,
    ),
    "normalized": (pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC(), False),
}


@pytest.mark.parametrize("name", PRE)
def test_any_tokenizer_json(tmp_path: Path, name: str) -> None:
    """Ids are those of the library, whatever it does; tiktoken only for the plain one."""
    pre, normalizer, is_plain = PRE[name]
    path = saved(tmp_path, trained_by_library(pre, ["<|endoftext|>"], normalizer))
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, JsonTokenizer)
    assert tokenizer.quicken() is is_plain
    assert tokenizer.bos_id == tokenizer.eos_id == 0
    for text in [TEXTS[0], *ODD]:
        assert tokenizer.encode(text) == by_library(tokenizer, text)


def test_a_word_that_was_added_keeps_tiktoken_away(tmp_path: Path) -> None:
    library = trained_by_library(pre_tokenizers.ByteLevel(add_prefix_space=False), ["</s>"])
    library.add_tokens(["colossus"])
    tokenizer = load_tokenizer(saved(tmp_path, library))
    assert isinstance(tokenizer, JsonTokenizer)
    assert not tokenizer.quicken()
    assert len(tokenizer.encode("colossus")) == 1


@pytest.mark.parametrize(
    ("special", "config", "bos", "eos"),
    [
        (["<s>", "</s>"], {}, "<s>", "</s>"),
        (["</s>", "<unk>"], {}, "</s>", "</s>"),
        (["<a>", "<b>"], {"bos_token": "<a>", "eos_token": {"content": "<b>"}}, "<a>", "<b>"),
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], {}, "<|begin_of_text|>", "<|end_of_text|>"),
        (["<s>", "</s>"], {"bos_token": None, "eos_token": "</s>"}, "<s>", "</s>"),
    ],
)
def test_the_tokens_of_documents(
    tmp_path: Path, special: list[str], config: dict[str, Any], bos: str, eos: str
) -> None:
    library = trained_by_library(pre_tokenizers.ByteLevel(add_prefix_space=False), special)
    tokenizer = load_tokenizer(saved(tmp_path, library, **config))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (library.token_to_id(bos), library.token_to_id(eos))
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint  # by its folder, too


def test_a_model_that_does_not_say_its_type(tmp_path: Path) -> None:
    """As files of early versions of the library, which still reads them."""
    state = json.loads(TRAINED._text)
    del state["model"]["type"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, JsonTokenizer)
    assert not tokenizer.quicken()
    assert tokenizer.encode(TEXTS[0]) == TRAINED.encode(TEXTS[0])


@pytest.mark.parametrize("config", [b"", b"{", b"[]", b"\xff"])
def test_a_broken_configuration_is_named(tmp_path: Path, config: bytes) -> None:
    TRAINED.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(UserError, match=r"data\.tokenizer: .*tokenizer_config\.json: "):
        load_tokenizer(tmp_path)


def test_a_token_of_the_configuration_that_is_no_text(tmp_path: Path) -> None:
    TRAINED.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ["</s>"], "bos_token": {"content": []}}')
    assert load_tokenizer(tmp_path).eos_id == TRAINED.eos_id


def test_no_token_ends_a_document(tmp_path: Path) -> None:
    library = trained_by_library(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<mask>"])
    with pytest.raises(UserError, match=r"none of its special tokens \['<mask>'\] .*tokenizer_config\.json"):
        load_tokenizer(saved(tmp_path, library))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"added_tokens": 3}'])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"data\.tokenizer=.*tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(path)


def test_a_tokenizer_that_the_library_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"added_tokens": [{"content": "</s>", "id": 0}], "model": {"type": "Magic"}}')
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        load_tokenizer(path).encode("x")


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer=.*nothing: cannot be read"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"xx: cannot be read"):
        load_tokenizer(300 * "x")


@pytest.mark.parametrize("tokenizer", [TRAINED, BytesTokenizer()], ids=["bpe", "bytes"])
def test_saved_and_loaded(tmp_path: Path, tokenizer: JsonTokenizer | BytesTokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path / "tokenizer")
    assert type(again) is type(tokenizer)
    for name in ("fingerprint", "vocab_size", "bos_id", "eos_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_transformers_reads_what_we_save(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    TRAINED.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs(TEXTS[0], add_special_tokens=False)["input_ids"] == TRAINED.encode(TEXTS[0])
    assert (theirs.bos_token_id, theirs.eos_token_id) == (TRAINED.bos_id, TRAINED.eos_id)


def test_a_published_tokenizer_that_adds_its_own_beginning(tmp_path: Path) -> None:
    """As Llama's does by its post-processor. Older conversions name plain tokens of the vocabulary."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    made = tokenizers.Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="name eos_token"):
        load_tokenizer(tmp_path)
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.encode("ab") == [2, 3] and made.encode("ab").ids == [0, 2, 3]


def test_bytes_as_a_tokenizer_json_give_the_same_ids() -> None:
    text = "größer\n\x00\t'll  do <|eos|>"
    assert BytesTokenizer().as_json().encode(text) == BytesTokenizer().encode(text)
    assert BytesTokenizer().as_json().decode([*text.encode(), 257]) == text
    assert BytesTokenizer().as_json().vocab_size == BytesTokenizer.vocab_size
