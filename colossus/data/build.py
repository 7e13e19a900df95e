"""Builds token shards from text: in parallel, resumable, and nothing that loads before all is whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colossus.data.corpus import Corpus, Part
from colossus.data.encode import Task, encode_task, is_held_out, text_of
from colossus.data.shards import HELD_OUT, SCHEMA, ShardedTokens, fingerprint, write_manifest, write_synced
from colossus.data.tokenizer import BytesTokenizer, JsonTokenizer, load_tokenizer, train_bpe
from colossus.errors import MachineError, UserError

Progress = Callable[[int, int], None]  # bytes done, bytes in all

SHARD_BYTES = 8 * 2**20  # of text a task; grows with the corpus, so that there are never many thousand
MAX_SHARDS = 4096
HELD_OUT_BYTES = 2**21  # of text that is held out at most, so that measuring on all of it stays short
TRAIN_TOKENIZER_BYTES = 24 * 2**20
PROOF_DOCUMENTS = 200  # on which tiktoken must agree with the tokenizer


@dataclass(frozen=True)
class Request:
    """What to build. tokenizer: "bpe", "bytes", or the path of a tokenizer.json."""

    corpora: tuple[Corpus, ...]
    weights: tuple[float, ...]
    tokenizer: str
    vocab_size: int
    held_out: float
    workers: int

    @property
    def key(self) -> str:
        """Names the result: the same request gives the same shards."""
        from colossus.data.corpus import fingerprint_of

        tokenizer: tuple[Any, ...] = (self.tokenizer, self.vocab_size if self.tokenizer == "bpe" else 0)
        if self.tokenizer not in ("bpe", "bytes"):
            tokenizer = (load_tokenizer(self.tokenizer).fingerprint,)
        listing = [(corpus.name, corpus.fingerprint) for corpus in self.corpora]
        weights = self.weights if self.tokenizer == "bpe" and len(self.corpora) > 1 else ()
        return fingerprint_of([SCHEMA, *listing, tokenizer, weights, (self.held_out,)])


def build(request: Request, folder: Path, progress: Progress = lambda done, total: None) -> Path:
    """Builds every corpus of `request` under `folder` with one tokenizer; returns `folder`.

    What is there and whole is kept: a build that was killed goes on with the shards it had finished.

    Raises:
        UserError: the folder holds other data, or a corpus is empty or unreadable.
        MachineError: no space, no permission, or a worker was killed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"data.folder={folder}: cannot be made ({error.strerror})") from error
    with _locked(folder):
        _claim(folder, request)
        tokenizer = _tokenizer(request, folder / "tokenizer")
        total = sum(corpus.num_bytes for corpus in request.corpora)
        done = 0
        for index, corpus in enumerate(request.corpora):
            target = corpus_folder(folder, index)
            if not (target / "manifest.json").is_file():
                _build_corpus(
                    request,
                    corpus,
                    target,
                    folder / "tokenizer",
                    tokenizer,
                    lambda n, d=done: progress(d + n, total),
                )
            done += corpus.num_bytes
        progress(total, total)
    return folder


def corpus_folder(folder: Path, index: int) -> Path:
    """Where corpus `index` of a request lies."""
    return folder / f"corpus-{index}"


def _claim(folder: Path, request: Request) -> None:
    """Notes what is being built here; another request in the same folder is refused, not mixed in."""
    path = folder / "request.json"
    wanted = {
        "key": request.key,
        "corpora": [c.name for c in request.corpora],
        "tokenizer": request.tokenizer,
    }
    if path.is_file():
        there = json.loads(path.read_text())
        if there["key"] != wanted["key"]:
            raise UserError(
                f"data.folder={folder}: holds other data (corpora {there['corpora']}, tokenizer "
                f"{there['tokenizer']}, or files that changed since); name another folder"
            )
        return
    write_synced(path, json.dumps(wanted).encode())


def _tokenizer(request: Request, folder: Path) -> JsonTokenizer | BytesTokenizer:
    if folder.is_dir():
        return load_tokenizer(folder)
    tokenizer: JsonTokenizer | BytesTokenizer
    if request.tokenizer == "bytes":
        tokenizer = BytesTokenizer()
    elif request.tokenizer == "bpe":
        tokenizer = train_bpe(_tokenizer_sample(request), request.vocab_size)
    else:
        tokenizer = load_tokenizer(request.tokenizer)
    temporary = folder.with_name("tokenizer.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        tokenizer.save(temporary)
        temporary.replace(folder)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be written ({error.strerror})") from error
    return tokenizer


def _tokenizer_sample(request: Request) -> Iterator[str]:
    """Documents of the training parts, spread over each corpus, in proportion to the weights."""
    for corpus, weight in zip(request.corpora, request.weights, strict=True):
        budget = TRAIN_TOKENIZER_BYTES * weight / math.fsum(request.weights)
        share = 1.0 if corpus.num_bytes == 0 else min(1.0, budget / corpus.num_bytes)
        every = max(1, round(1 / share)) if len(corpus.parts) > 64 else 1
        used = 0
        for part in corpus.parts[::every]:
            for document in part.documents():
                text = text_of(document)
                if used < budget and not is_held_out(text, request.held_out):
                    used += len(text.encode())
                    yield text
            if used >= budget:
                break


def _build_corpus(
    request: Request,
    corpus: Corpus,
    folder: Path,
    tokenizer_folder: Path,
    tokenizer: JsonTokenizer | BytesTokenizer,
    progress: Callable[[int], None],
) -> None:
    folder.mkdir(exist_ok=True)
    held_out = request.held_out
    if corpus.num_bytes:
        held_out = min(held_out, HELD_OUT_BYTES / corpus.num_bytes)
    quick = isinstance(tokenizer, JsonTokenizer) and tokenizer.quicken(_proof(corpus))
    masked = any(not isinstance(d, str) for d in _first(corpus, 1))
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    tasks = [
        Task(i, parts, folder, tokenizer_folder, held_out, dtype, masked, quick)
        for i, parts in enumerate(_grouped(corpus))
    ]
    results = _run(tasks, request.workers, progress)
    splits = {
        split: [r[split] for r in results if r[split]["num_tokens"]] for split in ("train", "validation")
    }
    if not splits["train"] and not splits["validation"]:
        raise UserError(f"data.corpus={corpus.name}: empty; it holds no text")
    _hold_out(results, splits, folder, dtype, corpus)
    write_manifest(
        folder,
        {
            "schema": SCHEMA,
            "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint},
            "fingerprint": fingerprint(splits, tokenizer.fingerprint),
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "bos_id": tokenizer.bos_id,
                "eos_id": tokenizer.eos_id,
            },
            "dtype": dtype,
            "splits": splits,
        },
    )
    for task in tasks:
        task.journal.unlink(missing_ok=True)


def _proof(corpus: Corpus) -> list[str]:
    """Documents spread over the corpus, on which the quick encoder must agree with the tokenizer."""
    every = max(1, len(corpus.parts) // PROOF_DOCUMENTS)
    texts: list[str] = []
    for part in corpus.parts[::every]:
        for document in part.documents():
            texts.append(text_of(document)[:100_000])
            if len(texts) >= PROOF_DOCUMENTS or len(corpus.parts) > PROOF_DOCUMENTS:
                break
        if len(texts) >= PROOF_DOCUMENTS:
            break
    return texts


def _first(corpus: Corpus, count: int) -> list[Any]:
    found: list[Any] = []
    for part in corpus.parts:
        for document in part.documents():
            found.append(document)
            if len(found) == count:
                return found
    return found


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


def _run(tasks: Sequence[Task], workers: int, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """The journals of all tasks, in order; each in a process of its own, none of which loads torch."""
    results: dict[int, dict[str, Any]] = {}
    done = 0
    context = multiprocessing.get_context("spawn")
    size = {task.index: sum(part.num_bytes for part in task.parts) for task in tasks}
    todo = [task for task in tasks if not task.journal.is_file()]
    for task in tasks:
        if task.journal.is_file():
            results[task.index] = encode_task(task)
            done += size[task.index]
    if len(todo) <= 1 or workers == 1:
        for task in todo:
            results[task.index] = encode_task(task)
            progress(done := done + size[task.index])
        return [results[task.index] for task in tasks]
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
        futures: dict[Future[dict[str, Any]], Task] = {pool.submit(encode_task, task): task for task in todo}
        try:
            for future in as_completed(futures):
                index = futures[future].index
                results[index] = future.result()
                progress(done := done + size[index])
        except BrokenProcessPool:
            raise MachineError(
                "a process of the build was killed (out of memory?); run it again to go on"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [results[task.index] for task in tasks]


def _hold_out(
    results: Sequence[dict[str, Any]],
    splits: dict[str, list[dict[str, Any]]],
    folder: Path,
    dtype: str,
    corpus: Corpus,
) -> None:
    """Writes the table of held-out documents; a corpus too small to spare one is held out and learned."""
    if not splits["validation"] or not splits["train"]:
        side, other = ("train", "validation") if splits["train"] else ("validation", "train")
        splits[other] = splits[side]
        _sizes_of_all(splits["validation"], folder, dtype, results, corpus)
    rows = np.zeros(sum(s["num_documents"] for s in splits["validation"]), HELD_OUT)
    order = np.zeros(len(rows), np.int64)
    first = row = 0
    for shard, sizes in zip(splits["validation"], [r["sizes"] for r in results if r["sizes"]], strict=True):
        starts = np.load(folder / shard["files"]["starts"]["name"])
        for start, (key, *columns) in zip(starts.tolist(), sizes, strict=True):
            rows[row] = (first + start, *columns)
            order[row] = key
            row += 1
        first += shard["num_tokens"]
    path = folder / "validation.documents.npy"
    with path.open("wb") as file:
        np.save(file, rows[np.argsort(order, kind="stable")])


def _sizes_of_all(
    shards: Sequence[dict[str, Any]],
    folder: Path,
    dtype: str,
    results: Sequence[dict[str, Any]],
    corpus: Corpus,
) -> None:
    """Sizes of documents that were encoded as learned ones, read again from the corpus."""
    from colossus.data.encode import sizes_of

    documents = (document for part in corpus.parts for document in part.documents())
    for result in results:
        if not result["sizes"]:
            count = result["train"]["num_documents"]
            result["sizes"] = [sizes_of(text_of(next(documents)).encode()) for _ in range(count)]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build of a folder at a time; a second waits, and then finds it done."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def default_workers() -> int:
    """Processes of a build: one a core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_split(folder: Path, index: int, split: str) -> ShardedTokens:
    """A split of corpus `index` of what was built in `folder`."""
    return ShardedTokens(corpus_folder(folder, index), split)
