"""A small tokenizer of each kind that is published, as `transformers` saves it, and texts for all of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = [
    *("the", "cat", "sat", "on", "a", "mat", "and", "said", "hello", "to", "dogs", "don't", "we'll", "it's"),
    *("naïve", "café", "größer", "北京", "東京", "日本語", "😀", "👍🏽", "é", "e\u0301", "Straße"),
    *("1", "23", "4567", "3.14", "x²", "def", "return", "self.value", "foo_bar(baz)", "==", "!=", "->", "{}"),
    "https://a.b/c?d=e",
]
BLANKS = (" ", " ", " ", " ", "  ", "\n", "\n\n", "\t", "   ", " \n ")
SPELLED = ("<|endoftext|>", "<s>", "</s>", "[SEP]", "<0x41>", "▁", "Ġ")
SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def texts(count: int, seed: int = 0, spelled: bool = False) -> list[str]:
    """Words of several scripts, with blanks of all sorts between, before and behind them."""
    draw = random.Random(seed)
    pool = WORDS + list(SPELLED) if spelled else WORDS
    found = ["", " ", "a", " a", "a ", "  a  b  "]
    while len(found) < count:
        made = [draw.choice(pool) + draw.choice(BLANKS) for _ in range(draw.randint(1, 12))]
        text = "".join(made)
        found.append(draw.choice(["", "", " ", "\n"]) + (text if draw.random() < 0.4 else text.rstrip()))
    return found[:count]


CORPUS = [" ".join(texts(300, seed=1))] * 3


def _front(name: str, made: tokenizers.Tokenizer, behind: str = "") -> Any:
    tokens = [(token, made.token_to_id(token)) for token in (name, behind) if token]
    return processors.TemplateProcessing(
        single=f"{name} $A {behind}".strip(), pair=f"{name} $A $B {behind}".strip(), special_tokens=tokens
    )


def _byte_level(special: list[str], ignore_merges: bool = False) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if ignore_merges:
        split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def byte_level() -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """As GPT-2 and Qwen: nothing is put in front of a text."""
    return _byte_level(["<|endoftext|>"]), {"eos_token": "<|endoftext|>"}


def byte_level_bos() -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """As Llama 3 in that a BOS is put in front."""
    made = _byte_level(["<|begin_of_text|>", "<|end_of_text|>"])
    made.post_processor = _front("<|begin_of_text|>", made)
    return made, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def ignore_merges() -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """As Llama 3: a word that is a token is that token, whatever the merges make of it."""
    made = _byte_level(["<|begin_of_text|>", "<|end_of_text|>"], ignore_merges=True)
    made.post_processor = _front("<|begin_of_text|>", made)
    return made, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def _sentencepiece(prepare: Callable[[tokenizers.Tokenizer], None]) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()  # of SentencePiece, no token crosses a word's begin
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=[*special, *BYTES], show_progress=False, limit_alphabet=60
    )
    made.train_from_iterator([word for text in CORPUS for word in text.split("\n")], trainer)
    state = json.loads(made.to_str()) | {"pre_tokenizer": None}
    state["added_tokens"] = state["added_tokens"][: len(special)]  # bytes are plain tokens
    made = tokenizers.Tokenizer.from_str(json.dumps(state))
    prepare(made)
    made.post_processor = _front("<s>", made)
    return made


def prepend() -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """As Llama 2: a blank is prepended by the normalizer."""

    def prepare(made: tokenizers.Tokenizer) -> None:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1, right=0),
            ]
        )

    return _sentencepiece(prepare), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def metaspace() -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """As Mistral and Gemma: blanks become ▁ as words are split."""

    def prepare(made: tokenizers.Tokenizer) -> None:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
        )

    return _sentencepiece(prepare), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def word_piece() -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """As BERT: words are split at punctuation, and what it does not know is lost."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    made.post_processor = _front("[CLS]", made, "[SEP]")
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return made, names | {"bos_token": "[CLS]", "eos_token": "[SEP]"}


def unigram() -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """As T5 and Gemma's own: the likeliest split, bytes where there is none."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([ascii(text) for text in CORPUS], trainer)
    state = json.loads(made.to_str())
    state["model"]["vocab"] += [[name, -20.0] for name in BYTES]
    state["model"]["byte_fallback"] = True
    made = tokenizers.Tokenizer.from_str(json.dumps(state))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.add_tokens([AddedToken("<extra>", special=False, normalized=False)])
    return made, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


KINDS: dict[str, Callable[[], tuple[tokenizers.Tokenizer, dict[str, str]]]] = {
    kind.__name__: kind
    for kind in (byte_level, byte_level_bos, ignore_merges, prepend, metaspace, word_piece, unigram)
}
BEGINS = {
    "byte_level": [],
    "byte_level_bos": ["<|begin_of_text|>"],
    "ignore_merges": ["<|begin_of_text|>"],
    "prepend": ["<s>"],
    "metaspace": ["<s>"],
    "word_piece": ["[CLS]"],
    "unigram": [],
}
"""What the own encoding of each puts in front of a text."""


def saved(name: str, folder: Path, **settings: Any) -> Path:
    """One of them, as `transformers` saves it."""
    from transformers import PreTrainedTokenizerFast

    made, names = KINDS[name]()
    PreTrainedTokenizerFast(tokenizer_object=made, **names, **settings).save_pretrained(folder)
    return folder


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
