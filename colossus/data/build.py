"""Builds token shards from text: in parallel, resumable, and nothing that loads before all is whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from colossus.data.bpe import train_bpe
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.corpus import Corpus, Part, fingerprint_of
from colossus.data.documents import chats_of, separated_once
from colossus.data.encode import Task, journals
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.sample import tokenizer_sample
from colossus.data.shards import (
    HELD_OUT,
    REMEDY,
    SCHEMA,
    STARTS,
    ShardedTokens,
    crc32,
    fingerprint,
    replace_synced,
    try_to_write,
    write_manifest,
)
from colossus.data.split import Split, divide
from colossus.data.tokenizer import load_tokenizer
from colossus.data.workers import run_tasks
from colossus.errors import MachineError, UserError
from colossus.untrusted import clear, make_folder, open_to_append

Progress = Callable[[int, int], None]  # bytes done, bytes in all

BEGUN = {".lock", "request.json.part"}  # what a kill may leave before a folder is claimed
SHARD_BYTES = 4 * 2**20  # of text a task; grows with the corpus, so that there are never many thousand
MAX_SHARDS = 1024


@dataclass(frozen=True)
class Request:
    """What to build. tokenizer: "bpe", "bytes", or the path of a tokenizer.json."""

    corpora: tuple[Corpus, ...]
    weights: tuple[float, ...]
    tokenizer: str
    vocab_size: int
    held_out: float
    workers: int

    @cached_property
    def given(self) -> JsonTokenizer | BytesTokenizer | None:
        """The tokenizer that is named; None where one is to be made."""
        return load_tokenizer(self.tokenizer) if self.tokenizer not in ("bpe", "bytes") else None

    @cached_property
    def key(self) -> str:
        """Names the result: the same request gives the same shards."""
        given = self.given
        told = self._told(given) if isinstance(given, JsonTokenizer) else ()
        return self._key(given.fingerprint if given is not None else None, told)

    @cached_property
    def earlier_key(self) -> str | None:
        """The one of an earlier build, where its shards are others: it put a token in front of every text,
        and encoded pieces each by itself."""
        if not isinstance(self.given, JsonTokenizer):
            return None
        earlier = self._key(self.given.earlier_fingerprint, ())
        return earlier if earlier != self.key else None

    def _key(self, tokenizer_fingerprint: str | None, told: tuple[Any, ...]) -> str:
        tokenizer: tuple[Any, ...] = (self.tokenizer, self.vocab_size if self.tokenizer == "bpe" else 0)
        if tokenizer_fingerprint is not None:
            tokenizer = (tokenizer_fingerprint,)
        if any(corpus.chats for corpus in self.corpora):
            tokenizer += (chats_of(self.given or BytesTokenizer()).fingerprint,)
        tokenizer += told
        listing = [(corpus.name, corpus.fingerprint) for corpus in self.corpora]
        weights = self.weights if self.tokenizer == "bpe" and len(self.corpora) > 1 else ()
        return fingerprint_of([(SCHEMA,), *listing, tokenizer, weights, (self.held_out,)])

    @property
    def learns_texts(self) -> bool:
        """Whether there is a corpus of something else than chats."""
        return not all(corpus.chats for corpus in self.corpora)

    def _told(self, tokenizer: JsonTokenizer) -> tuple[Any, ...]:
        """What of a tokenizer makes other shards than an earlier build did."""
        taught = tokenizer.taught(self.learns_texts, tokenizer.chats)
        told: list[Any] = []
        if taught.begins != (tokenizer.bos_id,) or separated_once(taught):
            told.append(["begins", *taught.begins])
        if others := tokenizer.account.ends - {tokenizer.eos_id}:
            told.append(["ends", *sorted(others)])
        pieces = any(corpus.masked and not corpus.chats for corpus in self.corpora)
        if pieces and not tokenizer.is_the_same_in_parts:
            told.append("whole")
        return tuple(told)


def build(request: Request, folder: Path, progress: Progress = lambda done, total: None) -> Path:
    """Builds every corpus of `request` under `folder` with one tokenizer; returns `folder`.

    What is there and whole is kept: a build that was killed goes on with the shards it had finished.

    Raises:
        UserError: the folder holds other data, or a corpus is empty or unreadable.
        MachineError: no space, no permission, or a worker was killed.
    """
    with _storage_errors(folder):
        if not is_built(request, folder):  # else nothing is written: it may be another's, or read-only
            _check_free(folder)
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                _build(request, folder, progress)
    _drop_journals(request, folder)
    return folder


def check_buildable(request: Request | None, folder: Path) -> None:
    """Raises what `build` would before it reads a text, and leaves nothing. request: None where its corpora
    are not listed yet: what was built there may be it."""
    with _storage_errors(folder):
        known = (folder / "request.json").is_file() if request is None else is_built(request, folder)
        if not known:
            _check_free(folder)


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"data.folder={folder}: cannot be written ({error.strerror or error})") from error


def _drop_journals(request: Request, folder: Path) -> None:
    """What is built needs none: also where a build was killed when it had just finished."""
    with contextlib.suppress(OSError):  # the folder may be read-only
        for index in range(len(request.corpora)):
            for journal in journals(corpus_folder(folder, index)):
                journal.unlink(missing_ok=True)


def is_built(request: Request, folder: Path) -> bool:
    """Whether all of `request` is there. Raises UserError where the folder holds other data."""
    manifests = [corpus_folder(folder, index) / "manifest.json" for index in range(len(request.corpora))]
    is_whole = all(manifest.is_file() for manifest in manifests)
    return _is_claimed(folder, request, or_earlier=is_whole) and is_whole


def _build(request: Request, folder: Path, progress: Progress) -> None:
    if not _is_claimed(folder, request):
        replace_synced(folder / "request.json", json.dumps(_claim_of(request)).encode())
    divided = [divide(corpus, request.held_out) for corpus in request.corpora]
    tokenizer = _tokenizer(request, divided, folder / "tokenizer")
    if tokenizer.chats is not None and tokenizer.chats.is_default:
        divided = [(_with_note(corpus), split) for corpus, split in divided]
    total = sum(corpus.num_bytes for corpus in request.corpora)
    done = 0
    for index, (corpus, split) in enumerate(divided):
        target = corpus_folder(folder, index)
        if not (target / "manifest.json").is_file():

            def advance(bytes_done: int, before: int = done) -> None:
                progress(before + bytes_done, total)

            _build_corpus(corpus, split, target, folder / "tokenizer", tokenizer, request.workers, advance)
        done += corpus.num_bytes
    progress(total, total)


def _with_note(corpus: Corpus) -> Corpus:
    """Says of chats that their template is not the tokenizer's own."""
    note = (
        "no chat template with the tokenizer: a message is its role, a line's end and its text, between the "
        "tokens that begin and end a document"
    )
    return replace(corpus, notes=(*corpus.notes, note)) if corpus.chats else corpus


def corpus_folder(folder: Path, index: int) -> Path:
    """Where corpus `index` of a request lies."""
    return folder / f"corpus-{index}"


def _claim_of(request: Request) -> dict[str, Any]:
    names = [corpus.name for corpus in request.corpora]
    return {"key": request.key, "corpora": names, "tokenizer": request.tokenizer}


def _is_claimed(folder: Path, request: Request, or_earlier: bool = False) -> bool:
    """Whether the folder is noted as the place of `request`; another's is refused, not mixed in.

    or_earlier: also where an earlier build made it; what it holds keeps its meaning.
    """
    try:
        there = json.loads((folder / "request.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError as error:
        raise UserError(f"{folder / 'request.json'}: cannot be read ({error}); name another folder") from None
    if there["key"] != request.key and not (or_earlier and there["key"] == request.earlier_key):
        raise UserError(
            f"data.folder={folder}: holds other data (corpora {there['corpora']}, tokenizer "
            f"{there['tokenizer']}, or files that changed since); name another folder"
        )
    return True


def _check_free(folder: Path) -> None:
    """Raises UserError where the folder holds something, and no build made it: the request comes first.
    Raises OSError where it cannot be written."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "request.json" not in names and (others := sorted(names - BEGUN)):
        raise UserError(
            f"data.folder={folder}: not empty, and holds no token shards but {others[0]}; name a new folder"
        )
    try_to_write(folder)


def _tokenizer(
    request: Request, divided: Sequence[tuple[Corpus, Split]], folder: Path
) -> JsonTokenizer | BytesTokenizer:
    if folder.is_dir():
        return load_tokenizer(folder)
    tokenizer: JsonTokenizer | BytesTokenizer
    if request.tokenizer == "bytes":
        tokenizer = BytesTokenizer()
    elif request.given is not None:
        tokenizer = request.given
    else:
        tokenizer = train_bpe(tokenizer_sample(divided, request.weights), request.vocab_size)
    chats = chats_of(tokenizer) if any(corpus.chats for corpus in request.corpora) else tokenizer.chats
    if isinstance(tokenizer, JsonTokenizer):
        tokenizer = tokenizer.taught(request.learns_texts, chats)
    else:
        tokenizer = BytesTokenizer(chats)
    temporary = folder.with_name("tokenizer.part")
    clear(temporary)
    tokenizer.save(temporary)
    temporary.replace(folder)
    return tokenizer


def _build_corpus(
    corpus: Corpus,
    split: Split,
    folder: Path,
    tokenizer_folder: Path,
    tokenizer: JsonTokenizer | BytesTokenizer,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    make_folder(folder)
    quick = isinstance(tokenizer, JsonTokenizer) and tokenizer.quicken()
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    tasks = [
        Task(index, parts, folder, tokenizer_folder, split, dtype, corpus.masked, corpus.chats, quick)
        for index, parts in enumerate(_grouped(corpus))
    ]
    results = run_tasks(tasks, workers, progress)
    splits = {side: [r[side] for r in results if r[side]["num_tokens"]] for side in ("train", "validation")}
    if not all(splits.values()):
        raise UserError(
            f"data.corpus={corpus.name}: changed while it was read; build again when nothing writes to it"
        )
    lost = sum(result.get("lost_bytes", 0) for result in results)  # earlier builds did not look
    documents = folder / "validation.documents"
    replace_synced(documents, _held_out_documents(results, folder).tobytes())
    write_manifest(
        folder,
        {
            "schema": SCHEMA,
            "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint, "notes": corpus.notes},
            "fingerprint": fingerprint(splits, tokenizer.fingerprint),
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "bos_id": tokenizer.begin_id,
                "eos_id": tokenizer.eos_id,
                **({"chats": tokenizer.chats.fingerprint} if corpus.chats and tokenizer.chats else {}),
                **({"separated_once": True} if separated_once(tokenizer) and not corpus.chats else {}),
            },
            "dtype": dtype,
            "splits": splits,
            "documents": {
                "name": documents.name,
                "bytes": documents.stat().st_size,
                "crc32": crc32(documents),
                "of": "learned",  # the sizes of documents, where not all of them is learned
                **({"lost_bytes": lost} if lost else {}),  # that tokens do not give back
            },
        },
    )


def _held_out_documents(results: Sequence[dict[str, Any]], folder: Path) -> np.ndarray:
    """The table of held-out documents (dtype HELD_OUT), shuffled by their keys."""
    rows: list[tuple[int, ...]] = []
    first = 0
    for result in results:
        shard = result["validation"]
        if shard["num_tokens"]:
            starts = np.fromfile(folder / shard["files"]["starts"]["name"], STARTS) + first
            pairs = zip(starts.tolist(), result["sizes"], strict=True)
            rows += [(key, start, *sizes) for start, (key, *sizes) in pairs]
            first += shard["num_tokens"]
    return np.array([tuple(row) for _, *row in sorted(rows)], HELD_OUT)


def _grouped(corpus: Corpus) -> list[tuple[Part, ...]]:
    """Parts in order, in groups of about SHARD_BYTES: each becomes one shard."""
    size = max(SHARD_BYTES, corpus.num_bytes // MAX_SHARDS)
    groups: list[tuple[Part, ...]] = []
    group: list[Part] = []
    held = 0
    for part in corpus.parts:
        group.append(part)
        held += part.num_bytes or size
        if held >= size:
            groups.append(tuple(group))
            group, held = [], 0
    return [*groups, tuple(group)] if group else groups


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build of a folder at a time; a second waits, and then finds it done."""
    with os.fdopen(open_to_append(folder / ".lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_split(folder: Path, index: int, split: str) -> ShardedTokens:
    """A split of corpus `index` of what was built in `folder`."""
    return ShardedTokens(corpus_folder(folder, index), split)


def verify(folder: Path, num_corpora: int, progress: Progress = lambda done, total: None) -> int:
    """Reads every byte of what was built in `folder`; returns how many there are.

    Raises:
        UserError: naming the file that changed.
    """
    splits = [open_split(folder, i, side) for i in range(num_corpora) for side in ("train", "validation")]
    tokenizer = load_tokenizer(folder / "tokenizer")
    total = sum(split.num_file_bytes for split in splits)
    done = 0
    for split in splits:
        built_by = split.manifest["tokenizer"]
        chats = tokenizer.chats.fingerprint if tokenizer.chats is not None else None
        if built_by["fingerprint"] != tokenizer.fingerprint or built_by.get("chats", chats) != chats:
            raise UserError(f"{folder / 'tokenizer'}: changed since the shards were built; {REMEDY}")

        def advance(num_bytes: int) -> None:
            nonlocal done
            progress(done := done + num_bytes, total)

        split.verify(advance)
    return total
