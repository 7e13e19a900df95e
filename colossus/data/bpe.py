"""Tokenizers that are made here: a byte-level BPE, trained on texts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from colossus.data.account import BOS, EOS, Account
from colossus.data.json_tokenizer import JsonTokenizer, putting_in_front
from colossus.errors import UserError

if TYPE_CHECKING:
    import tokenizers


def ours(tokenizer: tokenizers.Tokenizer, bos_id: int, eos_id: int) -> JsonTokenizer:
    """One that we made, which puts its BOS in front."""
    text = putting_in_front(tokenizer, [bos_id]).to_str()
    return JsonTokenizer(text, bos_id, eos_id, account=Account(text, begins=(bos_id,)))


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE with GPT-2's split, trained on `texts`; deterministic.

    Raises:
        UserError: fewer tokens than the 256 bytes and the two special ones.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise UserError(f"model.vocab_size={vocab_size}: a byte-level tokenizer needs at least 258")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer.train_from_iterator(texts, trainer)
    special = tokenizer.get_added_tokens_decoder()
    ids = {token.content: index for index, token in special.items()}
    return ours(tokenizer, ids[BOS], ids[EOS])
