"""Bits per byte on the documents of any corpus, or on those that a run held out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colossus.checkpoints.format import is_committed
from colossus.data.build import open_split
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.corpus import Corpus, Document, text_of
from colossus.data.documents import Encoder
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.open import open_corpus
from colossus.data.shards import HELD_OUT, ShardedTokens
from colossus.data.split import key_of, sizes_of
from colossus.data.tokenizer import Tokenizer
from colossus.errors import UserError
from colossus.evaluation.bits_per_byte import HeldOut, Validation, ValidationResult, evaluate
from colossus.job import Job, load_run_job

if TYPE_CHECKING:
    from colossus.models import Decoder

MEGABYTES = 1.0  # of a corpus that are scored where nothing is said
SEQ_LEN = 2048  # of the windows, at most, where nothing is said: the attention of longer ones takes gigabytes
READ_BYTES = 2**26  # of a corpus that are read at most, to choose from
PART_BYTES = 2**20  # that are read of each of its parts at least, where there are many


@dataclass(frozen=True)
class CorpusResult:
    """What a model is worth on one corpus.

    whole: nothing of it was left out. seq_len: tokens of a window. result: see `ValidationResult`.
    """

    corpus: str
    whole: bool
    seq_len: int
    result: ValidationResult

    def to_dict(self) -> dict[str, Any]:
        """As plain data, in one level."""
        return {"corpus": self.corpus, "whole": self.whole, "seq_len": self.seq_len} | asdict(self.result)


@dataclass(frozen=True)
class Texts:
    """Documents of a corpus as tokens, each from its begin to its end. A `HeldOut`.

    ids: of all documents, one after the other; mask: which of them count. table: a row a document (dtype
    HELD_OUT), in fixed order; its bytes are of the text that counts: of chats, what the assistant says.
    num_lost_bytes: of that text, what its tokens do not give back.
    """

    corpus: str
    whole: bool
    ids: np.ndarray
    mask: np.ndarray
    table: np.ndarray
    num_lost_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]

    def scored(self, start: int, stop: int) -> np.ndarray:
        return self.mask[start:stop]

    def documents(self) -> np.ndarray:
        return self.table


def choose_texts(
    name: str,
    tokenizer: Tokenizer,
    *,
    documents: int | None = None,
    megabytes: float | None = None,
    text_field: str = "text",
) -> Texts:
    """Documents of the corpus that `name` stands for (see `open_corpus`), encoded.

    The choice is the same every time: those whose text has the smallest hash, up to `documents` in number
    and `megabytes` of text, by default 1. Of a single document beyond it, its begin.

    Raises:
        UserError: there is no such corpus, it cannot be read, or it holds no text; a limit is not above 0.
    """
    if documents is not None and documents < 1:
        raise UserError.field("documents", documents, "must be at least 1")
    _check_megabytes(megabytes)
    max_bytes = max(1, int((MEGABYTES if megabytes is None else megabytes) * 1e6))
    found, whole = _read(open_corpus(name, text_field))
    if not found:
        raise UserError(f"corpus={name}: no document with text")
    found.sort(key=lambda document: key_of(text_of(document)))
    chosen: list[Document] = []
    total = 0
    for document in found[:documents]:
        data = text_of(document).encode()
        if total + len(data) > max_bytes:
            if chosen:
                break
            if isinstance(document, str):
                document, whole = data[:max_bytes].decode(errors="ignore") or document[:1], False
        chosen.append(document)
        total += len(data)
    assert isinstance(tokenizer, JsonTokenizer | BytesTokenizer)
    encoder = Encoder(tokenizer)
    encoded = list(encoder(chosen))
    starts = np.cumsum([0, *(len(document.ids) for document in encoded)])
    rows = [(s, *sizes_of(d.learned.encode())) for s, d in zip(starts, encoded, strict=False)]
    ids, mask = np.concatenate([d.ids for d in encoded]), np.concatenate([d.mask for d in encoded])
    whole = whole and len(chosen) == len(found)
    lost = sum(map(encoder.lost_bytes, encoded))
    return Texts(name, whole, ids.astype(np.int64), mask, np.array(rows, HELD_OUT), lost)


def _read(corpus: Corpus) -> tuple[list[Document], bool]:
    """Documents from parts all over the corpus, READ_BYTES of text at most; whether these are all."""
    found: list[Document] = []
    left, whole = READ_BYTES, True
    of_each = max(PART_BYTES, READ_BYTES // max(1, len(corpus.parts)))
    for part in sorted(corpus.parts, key=lambda part: key_of(part.name)):
        of_this = min(left, of_each)
        for document in part.documents():
            if of_this <= 0:
                whole = False
                break
            size = len(text_of(document).encode())
            of_this, left = of_this - size, left - size
            found.append(document)
        if left <= 0 and not whole:
            break
    return found, whole


def evaluate_corpus(
    model: Decoder,
    tokenizer: Tokenizer,
    name: str,
    *,
    seq_len: int | None = None,
    documents: int | None = None,
    megabytes: float | None = None,
    text_field: str = "text",
    before_batch: Callable[[], None] | None = None,
) -> CorpusResult:
    """Loss and bits per byte on documents of any corpus, as `choose_texts` takes them.

    seq_len: tokens of a window; by default what the model can take, up to 2,048.

    Raises:
        UserError: as `choose_texts`; the window is none that the model can take; the tokenizer has more
            tokens than the model.
    """
    seq_len = window(model, seq_len, SEQ_LEN)
    check_vocabulary(model, tokenizer)
    texts = choose_texts(name, tokenizer, documents=documents, megabytes=megabytes, text_field=text_field)
    result = evaluate(model, Validation(texts, seq_len), before_batch=before_batch)
    return CorpusResult(name, texts.whole, seq_len, result)


def evaluate_held_out(
    model: Decoder,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    seq_len: int | None = None,
    documents: int | None = None,
    megabytes: float | None = None,
    before_batch: Callable[[], None] | None = None,
) -> CorpusResult:
    """Loss and bits per byte on what the run at `path` (its folder, or one of its checkpoints) held out.

    seq_len: by default that of the run, so that all documents give the figure of its last validation.

    Raises:
        UserError: there is no run; what it held out is gone, or has tokens of another tokenizer.
    """
    job, splits = held_out_of(path, tokenizer)
    seq_len = window(model, seq_len, job.data.seq_len)
    check_vocabulary(model, tokenizer)
    corpora: list[HeldOut] = [*splits]
    validation = Validation(corpora, seq_len)
    count = _fitting(validation, documents, megabytes)
    result = evaluate(model, validation, count, before_batch=before_batch)
    name = ", ".join(job.data.corpus)
    return CorpusResult(f"held out of {name}", count >= validation.num_documents, seq_len, result)


def held_out_of(path: str | Path, tokenizer: Tokenizer) -> tuple[Job, list[ShardedTokens]]:
    """The job of the run at `path` and what it held out of each corpus. Raises UserError: see above."""
    run = run_at(path)
    if run is None:
        raise UserError(f"{path}: no run, so nothing was held out for it; name a corpus: --corpus NAME")
    job = load_run_job(run)
    if job.data.folder is None:
        raise UserError(f"{run / 'job.toml'}: says nothing of its data; name a corpus: --corpus NAME")
    splits = []
    for index in range(len(job.data.corpus)):
        try:
            split = open_split(Path(job.data.folder), index, "validation")
        except UserError as error:
            raise UserError(f"{path}: what it held out is not there ({error}); --corpus NAME") from None
        if split.manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
            raise UserError(
                f"data.folder={job.data.folder}: its tokens are of another tokenizer than the model's; "
                f"score the text itself: --corpus {job.data.corpus[index]}"
            )
        splits.append(split)
    return job, splits


def run_at(path: str | Path) -> Path | None:
    """The folder of the run that `path`, a run or one of its checkpoints, belongs to; None of no run."""
    path = Path(path)
    if not os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises for a name that no folder can have
        return None
    run = path.resolve().parent.parent if is_committed(path) else path
    return run if (run / "job.toml").is_file() else None


def window(model: Decoder, asked: int | None, usual: int) -> int:
    """Tokens of a window: as asked, else what is usual or the most that the model can take.

    Raises:
        UserError: it is asked for more than that, or for fewer than 2.
    """
    most = model.arch.max_seq_len
    if asked is None:
        return min(usual, most)
    if not 2 <= asked <= most:
        raise UserError.field("seq_len", asked, f"must be from 2 to {most}, the model's longest window")
    return asked


def check_vocabulary(model: Decoder, tokenizer: Tokenizer) -> None:
    """Raises `UserError` where the tokenizer has more tokens than the model has embeddings."""
    tokens, embeddings = tokenizer.vocab_size, model.arch.vocab_size
    if tokens > embeddings:
        raise UserError(
            f"tokenizer: has {tokens:,} tokens, the model embeddings for {embeddings:,}; not the model's own"
        )


def _check_megabytes(megabytes: float | None) -> None:
    if megabytes is not None and not 0 < megabytes < float("inf"):
        raise UserError.field("megabytes", megabytes, "must be above 0, and a finite number")


def _fitting(validation: Validation, documents: int | None, megabytes: float | None) -> int:
    """How many of the held-out documents, from the first on, are asked for; at least one."""
    if documents is not None and documents < 1:
        raise UserError.field("documents", documents, "must be at least 1")
    _check_megabytes(megabytes)
    count = min(validation.num_documents, documents or validation.num_documents)
    if megabytes is not None:
        sizes: Sequence[int] = validation.num_bytes()[:count].tolist()
        count = max(1, sum(size <= megabytes * 1e6 for size in sizes))
    return count
