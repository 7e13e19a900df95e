"""From text to tokens, and from tokens to batches.

Beside the build, in turns, the encoder of `tokenizers` (`encode_batch_fast`, on all cores, the text in
memory) with the same tokenizer; its ids must be ours, on a sample of each corpus. A tokenizer that tiktoken
cannot stand in for is measured too. Memory is the peak private memory of the process tree of `colossus data
build`, on text that is repeated with changes.

    python -m benchmarks.data_speed [--quick] [--out FILE] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from benchmarks.tree_memory import TreeMemory
from colossus.data.build import Request, build, open_split
from colossus.data.corpus import Corpus, text_of
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.loader import Batches
from colossus.data.open import open_corpus
from colossus.data.order import BatchSchedule, Order, Phase
from colossus.data.shards import ShardedTokens
from colossus.data.split import divide, sizes_of
from colossus.data.tokenizer import load_tokenizer
from colossus.hardware.machine import available_cores
from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt

HELD_OUT = 0.02
VOCABULARY = 4096
PEER_BYTES = 2**23  # of text that the peer encodes each time
SAMPLE_DOCUMENTS = 200
HUGE = 10**13


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def processor_seconds(act: Callable[[], object]) -> float:
    """Of this process and of those that it starts: what else runs on the machine does not count."""
    before = sum(os.times()[:4])
    act()
    return sum(os.times()[:4]) - before


def texts_of(corpus: Corpus, num_bytes: int) -> list[str]:
    """Documents spread over a corpus, of about so many bytes."""
    every = max(1, corpus.num_bytes // num_bytes) if len(corpus.parts) > 100 else 1
    texts: list[str] = []
    held = 0
    for part in corpus.parts[::every]:
        for document in part.documents():
            texts.append(text_of(document))
            held += len(texts[-1])
            if held >= num_bytes:
                return texts
    return texts


def library_of(folder: Path) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    library.encode_special_tokens = True
    return library


def different(folder: Path, corpus: Corpus) -> float:
    """Of documents spread over the corpus, how many our encoder gives other ids than the library."""
    ours = load_tokenizer(folder / "tokenizer")
    assert isinstance(ours, JsonTokenizer)
    every = max(1, len(corpus.parts) // SAMPLE_DOCUMENTS)
    parts = corpus.parts[::every]
    sample = [
        text_of(d) for part in parts for d in list(part.documents())[: SAMPLE_DOCUMENTS // len(parts) + 1]
    ]
    ours.quicken()
    expected = library_of(folder).encode_batch_fast(sample, add_special_tokens=False)
    found = ours.encode_many(sample)
    return sum(not np.array_equal(a, b.ids) for a, b in zip(found, expected, strict=True))


def rates(
    corpus: Corpus, tokenizer: str, folder: Path, repeats: int
) -> tuple[list[float], list[float], float]:
    """Bytes/s from text to shards; the peer's on text in memory, in turns; seconds of the first build.

    The shards are built again beside a tokenizer that is there, as of the second corpus of a job.
    """
    request = Request((corpus,), (1.0,), tokenizer, VOCABULARY, HELD_OUT, available_cores())
    first = seconds(lambda: build(request, folder))
    library, texts = library_of(folder), texts_of(corpus, PEER_BYTES)
    num_bytes = sum(len(text.encode()) for text in texts)
    given = replace(request, tokenizer=str(folder / "tokenizer" / "tokenizer.json"))
    ours, theirs = [], []
    for turn in range(repeats):
        theirs.append(num_bytes / seconds(lambda: library.encode_batch_fast(texts, add_special_tokens=False)))
        target = folder.with_name(f"{folder.name}-{turn}")
        ours.append(corpus.num_bytes / seconds(lambda target=target: build(given, target)))  # type: ignore[misc]
    return ours, theirs, first


def by_processor(corpus: Corpus, folder: Path) -> tuple[list[float], list[float]]:
    """Bytes a processor second from text to shards, imports of the workers included; and the peer's."""
    given = str(folder / "tokenizer" / "tokenizer.json")
    request = Request((corpus,), (1.0,), given, VOCABULARY, HELD_OUT, available_cores())
    target = folder.with_name(f"{folder.name}-by-processor")
    ours = corpus.num_bytes / processor_seconds(lambda: build(request, target))
    library, texts = library_of(folder), texts_of(corpus, PEER_BYTES)
    num_bytes = sum(len(text.encode()) for text in texts)
    theirs = num_bytes / processor_seconds(lambda: library.encode_batch_fast(texts, add_special_tokens=False))
    return [ours], [theirs]


def of_digits(corpus: Corpus, folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """A tokenizer that splits digits, which tiktoken's pattern does not."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    digits, byte_level = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts_of(corpus, 2**21), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_repeated(corpus: Corpus, path: Path, num_bytes: int) -> None:
    """One file of the corpus again and again, documents in another order each time, a number in each."""
    texts = [text_of(document) for document in corpus.documents()]
    draw = random.Random(0)
    written = 0
    with path.open("w") as file:
        while written < num_bytes:
            text = f"# {written}\n{draw.choice(texts)}"
            file.write(text)
            written += len(text)


def large_build(text: Path, folder: Path) -> tuple[float, float, int]:
    """Seconds and peak bytes of a build of one large file by the command, and bytes after the imports."""
    code = "from colossus.data.prepare import prepare_data; from colossus.derive import derive_data; input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as idle:
        with TreeMemory(idle.pid) as imports:
            time.sleep(8)
        idle.kill()
    words = ["data", "build", f"data.corpus={text}", f"data.folder={folder}"]
    began = time.perf_counter()
    with (
        subprocess.Popen([sys.executable, "-m", "colossus", *words], stdout=subprocess.DEVNULL) as process,
        TreeMemory(process.pid) as memory,
    ):
        assert process.wait() == 0
    return time.perf_counter() - began, memory.peak, imports.peak


def reading(source: ShardedTokens, seq_len: int, repeats: int) -> tuple[float, float]:
    """Tokens/s by `read`, and as the thread hands them out."""
    order = Order(0, [Phase(0, seq_len, (1.0,), (source.fingerprint,))], [source.num_tokens])
    batch, steps = 2**15 // seq_len, 200
    schedule = BatchSchedule([(0, batch)])
    read, handed = [], []
    for _ in range(repeats):
        with Batches([source], order, schedule) as batches:
            batches.next(0)
            handed.append(seconds(lambda: [batches.next(step) for step in range(1, steps)]))
        read.append(seconds(lambda: [batches.read(step) for step in range(steps)]))
    tokens = batch * seq_len
    return steps * tokens / statistics.median(read), (steps - 1) * tokens / statistics.median(handed)


def random_access(weights: Sequence[float], repeats: int) -> float:
    """Seconds of one look-up among HUGE samples."""
    names = tuple(map(str, range(len(weights))))
    order = Order(0, [Phase(0, 512, tuple(weights), names)], [512 * HUGE + 1] * len(weights))
    samples = np.random.default_rng(0).integers(0, HUGE, 20_000).tolist()
    return min(seconds(lambda: [order.locate(s) for s in samples]) for _ in range(repeats)) / len(samples)


def measure(quick: bool, folder: Path) -> list[Figure]:
    repeats = 2 if quick else 5
    opening = seconds(lambda: open_corpus("python"))
    corpus = open_corpus("python")
    ours, theirs, first = rates(corpus, "bpe", folder / "bpe", repeats)
    train, held_out = open_split(folder / "bpe", 0, "train"), open_split(folder / "bpe", 0, "validation")
    divided, split = divide(corpus, HELD_OUT)
    documents = [text_of(d).encode() for d in divided.documents() if split.holds_out(d)]
    sizing = seconds(lambda: [sizes_of(data) for data in documents])
    part = replace(corpus, parts=corpus.parts[:: 4 if quick else 1])
    slow_ours, slow_theirs, _ = rates(
        part, str(of_digits(corpus, folder)), folder / "digits", 1 if quick else 3
    )
    text = folder / "repeated.txt"
    write_repeated(corpus, text, 2**26 if quick else 10**9)
    took, peak, imports = large_build(text, folder / "repeated")
    large = open_corpus(str(text))
    by_read, by_thread = reading(train, 512, repeats)

    def against(name: str, mine: list[float], peer: list[float], goal: str) -> Figure:
        value, other = statistics.median(mine), statistics.median(peer)
        return Figure(name, value, "bytes/s", goal, other, value / other)

    return [
        Figure("text of the default corpus", corpus.num_bytes, "bytes"),
        Figure("open it, near-duplicates removed", opening, "s"),
        Figure("build it from nothing, tokenizer included", first, "s", "< 20"),
        Figure("share of it for compressed sizes", sizing / (first * available_cores()), "", "< 0.05"),
        Figure("bytes a token", train.num_bytes / train.num_tokens, "bytes"),
        Figure("held out", held_out.num_bytes, "bytes"),
        against("text to shards, tiktoken agrees", ours, theirs, ">= 10e6 on 2 cores"),
        against("the same a processor second", *by_processor(corpus, folder / "bpe"), ">= 5e6"),
        Figure("documents with other ids, default corpus", different(folder / "bpe", corpus), "", "0"),
        against("text to shards, tiktoken does not", slow_ours, slow_theirs, "ratio >= 0.9"),
        Figure("documents with other ids, digits apart", different(folder / "digits", part), "", "0"),
        Figure("repeated text", large.num_bytes, "bytes"),
        Figure("build it by the command", large.num_bytes / took, "bytes/s", ">= 10e6 on 2 cores"),
        Figure("peak private memory of that", peak, "bytes", "< 2**30"),
        Figure("private memory after the imports", imports, "bytes"),
        Figure("documents with other ids, repeated text", different(folder / "repeated", large), "", "0"),
        Figure("read batches of 64 x 512", by_read, "tokens/s", "> 50e6"),
        Figure("the same through the thread", by_thread, "tokens/s"),
        Figure("random access among 10^13 samples", 1e6 * random_access([1.0], repeats), "us", "< 10"),
        Figure("the same, five corpora", 1e6 * random_access([5, 4, 3, 2, 1], repeats), "us", "< 10"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="64 MB of repeated text, fewer turns")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--folder", default=".", help="where to write: its disk is measured too")
    arguments = parser.parse_args()
    hardware = this_machine().to_dict()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".data-speed-") as folder:
        figures = measure(arguments.quick, Path(folder).resolve())
    load = os.getloadavg()[0]
    print_figures([*figures, Figure("load of the machine at the end", load, "")])
    write_receipt("data_speed", figures, arguments.out, hardware)


if __name__ == "__main__":
    main()
