"""`colossus data build` of JSON lines beside `datasets` and `tokenizers`, in turns, by the processor.

Both sides are processes of their own, on all cores, and get the same ready tokenizer: one that tiktoken can
stand in for, and one that it cannot. The peer is what one would write: `load_dataset("json")`, then `map`
with `encode_batch_fast` on so many processes as there are cores, its ids in an Arrow file. Ours does more,
and all of it counts: it holds documents out and writes what compressors make of them, says what the
tokenizer loses of them, and keeps checksums and where documents begin. Neither looks for near-duplicates in
files.

Processor time is that of the whole process tree, imports too; memory the most private memory of the tree. The
text is the default corpus, repeated with changes.

    python -m benchmarks.data_build [--quick] [--out FILE] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.data_speed import of_digits, texts_of
from benchmarks.tree_memory import TreeMemory
from colossus.data.bpe import train_bpe
from colossus.data.build import open_split
from colossus.data.corpus import Corpus, text_of
from colossus.data.open import open_corpus
from colossus.data.tokenizer import load_tokenizer
from colossus.hardware.machine import available_cores
from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt

NUM_BYTES = 200 * 10**6
VOCABULARY = 2**15
SAMPLE_DOCUMENTS = 1000

PEER = """
import sys
from datasets import load_dataset
from tokenizers import Tokenizer

text, tokenizer, cache, output, num_proc = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer)

def encode(rows):
    return {"ids": [e.ids for e in tokenizer.encode_batch_fast(rows["text"], add_special_tokens=False)]}

rows = load_dataset("json", data_files=text, split="train", cache_dir=cache)
rows.map(encode, batched=True, num_proc=int(num_proc), remove_columns=["text"], cache_file_name=output)
"""


@dataclass(frozen=True)
class Cost:
    """Of one process with all that it starts: processor seconds, and bytes of private memory at its peak."""

    seconds: float
    peak: int


def cost(words: Sequence[str]) -> Cost:
    """Of a command of Python."""
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        with TreeMemory(run.pid) as memory:
            assert run.stderr is not None
            said = run.stderr.read()  # ends with the process
            _, status, used = os.wait4(run.pid, 0)  # of its children too, which it waited for
        run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode:
        raise RuntimeError(f"{words[:3]} ended with {run.returncode}:\n{said.decode()[-2000:]}")
    return Cost(used.ru_utime + used.ru_stime, memory.peak)


def write_lines(corpus: Corpus, path: Path, num_bytes: int) -> int:
    """The corpus again and again as JSON lines, in another order each time, a number in each document.
    Returns the bytes of text."""
    texts = [text_of(document) for document in corpus.documents()]
    draw = random.Random(0)
    written = 0
    with path.open("w") as file:
        while written < num_bytes:
            text = f"# {written}\n{draw.choice(texts)}"
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
    return written


def tokenizers_in(folder: Path, corpus: Corpus) -> dict[str, Path]:
    """By what is said of them: the folders of the two tokenizers."""
    agrees, others = folder / "agrees", folder / "others"
    train_bpe(texts_of(corpus, 2**21), VOCABULARY).save(agrees)
    others.mkdir()
    of_digits(corpus, others, VOCABULARY)
    return {"tiktoken agrees": agrees, "tiktoken does not": others}


def ours(text: Path, tokenizer: Path, folder: Path) -> Cost:
    words = [f"data.corpus={text}", f"data.tokenizer={tokenizer}", f"data.folder={folder}"]
    return cost(["-m", "colossus", "data", "build", *words])


def theirs(text: Path, tokenizer: Path, folder: Path) -> Cost:
    folder.mkdir()
    paths = [str(text), str(tokenizer / "tokenizer.json"), str(folder / "cache"), str(folder / "ids.arrow")]
    return cost(["-c", PEER, *paths, str(available_cores())])


def different(built: Path, arrow: Path, tokenizer: Path) -> int:
    """How many of the first documents that we learn have other ids than the peer's, whose rows have held-out
    ones between."""
    from datasets import Dataset

    special = [*load_tokenizer(tokenizer).special_tokens.values()]
    split = open_split(built, 0, "train")
    starts = split.document_starts(0, split.num_tokens)[: SAMPLE_DOCUMENTS + 1].tolist()
    documents = (split.tokens(a, b) for a, b in pairwise(starts))
    tables = (Dataset.from_file(str(file)) for file in sorted(arrow.glob("ids*.arrow")))
    rows: Iterator[np.ndarray] = (np.array(row["ids"]) for table in tables for row in table)
    ids = (document[~np.isin(document, special)] for document in documents)
    return sum(not any(np.array_equal(one, row) for row in rows) for one in ids)


def compare(name: str, text: Path, tokenizer: Path, folder: Path, turns: int) -> list[Figure]:
    pairs: list[tuple[Cost, Cost]] = []
    others = 0
    built, arrow = folder / "ours", folder / "theirs"
    for turn in range(turns):
        first, second = (ours, theirs) if turn % 2 else (theirs, ours)
        costs = {side: side(text, tokenizer, arrow if side is theirs else built) for side in (first, second)}
        pairs.append((costs[ours], costs[theirs]))
        print(f"{name}, turn {turn + 1}: {costs[ours]}, the peer {costs[theirs]}", flush=True)
        others = max(others, different(built, arrow, tokenizer))
        shutil.rmtree(built)
        shutil.rmtree(arrow)

    def against(what: str, unit: str, cost_of: Callable[[Cost], float], goal: str) -> Figure:
        mine, peer = (statistics.median(cost_of(pair[side]) for pair in pairs) for side in (0, 1))
        ratio = statistics.median(cost_of(mine) / cost_of(peer) for mine, peer in pairs)
        return Figure(f"{what}, {name}", mine, unit, goal, peer, ratio)

    return [
        against("processor time", "s", lambda one: one.seconds, "ratio <= 1.0"),
        against("peak private memory", "bytes", lambda one: one.peak, "ratio <= 0.33"),
        Figure(f"documents with other ids, {name}", others, "", "0"),
    ]


def measure(quick: bool, folder: Path) -> list[Figure]:
    corpus, text = open_corpus("python"), folder / "text.jsonl"
    num_bytes = write_lines(corpus, text, NUM_BYTES // 8 if quick else NUM_BYTES)
    figures = [Figure("text in JSON lines", num_bytes, "bytes"), Figure("processes", available_cores(), "")]
    for name, tokenizer in tokenizers_in(folder, corpus).items():
        figures += compare(name, text, tokenizer, folder, 1 if quick else 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="25 MB, one turn")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--folder", default=".", help="where to write")
    arguments = parser.parse_args()
    hardware = this_machine().to_dict()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".data-build-") as folder:
        figures = measure(arguments.quick, Path(folder).resolve())
    print_figures(figures)
    write_receipt("data_build", figures, arguments.out, hardware)


if __name__ == "__main__":
    main()
