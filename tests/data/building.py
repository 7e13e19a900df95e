"""Small corpora and requests, and what a build left."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import itertools
import lzma
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow

from colossus.data.build import Request, build, open_split
from colossus.data.corpus import Corpus, Document, Part
from colossus.data.open import open_corpus
from colossus.data.shards import ShardedTokens


def write_corpus(folder: Path, num: int = 60, size: int = 2000) -> Path:
    """`num` files of about `size` bytes, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        lines = (f"line {j} of document {i}: {(i * 7919 + j * j) % 10007} words\n" for j in range(size // 40))
        (folder / f"{i:03}.txt").write_text("".join(lines))
    return folder


def request_for(
    *corpora: Path | Corpus | str, workers: int = 1, tokenizer: str = "bytes", held_out: float = 0.1
) -> Request:
    opened = tuple(c if isinstance(c, Corpus) else open_corpus(str(c)) for c in corpora)
    return Request(opened, (1.0,) * len(opened), tokenizer, 300, held_out, workers)


def built(
    folder: Path, *corpora: Path | Corpus | str, **options: object
) -> tuple[ShardedTokens, ShardedTokens]:
    """The training and the held-out split of the first corpus, built."""
    build(request_for(*corpora, **options), folder)  # type: ignore[arg-type]
    return open_split(folder, 0, "train"), open_split(folder, 0, "validation")


def in_memory(documents: Sequence[Document], parts: int = 1, masked: bool = False) -> Corpus:
    """A corpus of given documents; can travel to other processes."""
    step = -(-len(documents) // parts)
    groups = [documents[i : i + step] for i in range(0, len(documents), step)]
    made = tuple(Part(f"part {i}", 0, Given(tuple(group))) for i, group in enumerate(groups))
    return Corpus("given", made, "fingerprint", masked=masked)


@dataclasses.dataclass(frozen=True)
class Given:
    documents: tuple[Document, ...]

    def __call__(self) -> object:
        return iter(self.documents)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that was built, by its name."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def decoded(source: ShardedTokens) -> list[str]:
    """The documents of a split of plain bytes."""
    starts = [*source.document_starts(0, source.num_tokens).tolist(), source.num_tokens]
    found = []
    for start, stop in itertools.pairwise(starts):
        ids = source.tokens(start, stop)
        assert (ids[0], ids[-1]) == (256, 257), "a document lies between its tokens"
        found.append(bytes(ids[1:-1].astype("uint8")).decode())
    return found


def texts(corpus: Corpus) -> list[str]:
    """As a worker process would read it."""
    parts = pickle.loads(pickle.dumps(corpus.parts))
    return [document for part in parts for document in part.documents()]


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}


BUILDER = """
import sys
import threading
from pathlib import Path
from colossus.data import build as building
from tests.data.building import request_for
building.SHARD_BYTES = 10_000
text, out, tokenizer, workers = sys.argv[1:]
building.build(request_for(text, workers=int(workers), tokenizer=tokenizer), Path(out))
"""


def start_build(text: Path, out: Path, tokenizer: str, workers: int) -> subprocess.Popen[bytes]:
    """A build in a process of its own, with many shards."""
    words = [sys.executable, "-c", BUILDER, str(text), str(out), tokenizer, str(workers)]
    return subprocess.Popen(words, stderr=subprocess.PIPE)
