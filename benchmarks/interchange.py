"""What it takes to import a published checkpoint of the shape of Llama 2 7B, 13.5 GB in bf16.

Beside it, in turns, a plain copy of the same files: the operating system's own (`cp`), synced. Before each,
what the page cache holds of all files is dropped (`posix_fadvise`), so that every byte is read from the disk.
Bytes a second are those read and written. Memory is the peak of the importing process' private memory, above
that after its imports. The time of a copy differs much from turn to turn where a disk is shared: the ratio is
of medians.

    python -m benchmarks.interchange [--quick] [--out FILE] [--folder FOLDER] [--turns N]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.tree_memory import TreeMemory
from colossus.architecture import Architecture, num_parameters, parameter_table
from colossus.job import load_job
from colossus.measure.machine import this_machine
from colossus.models.hf.families import FAMILIES
from colossus.models.hf.published import publish
from colossus.models.hf.tensors import Box, Readable
from colossus.models.hf.writing import write_checkpoint
from colossus.perf.receipts import Figure, print_figures, write_receipt

NUMBERS = 1 << 22  # random ones, written over and over: files that no disk can compress or leave out

IMPORT = """
import resource, sys, time
import colossus, colossus.interchange, torch
def private():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
before = private()
print("ready", before, flush=True)
sys.stdin.readline()
began = time.perf_counter()
colossus.import_model(sys.argv[1], sys.argv[2], say=lambda message: None)
print(time.perf_counter() - began, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Noise(Readable):
    """A tensor of random numbers, the same in every 8 MiB."""

    numbers: torch.Tensor

    def fill(self, out: torch.Tensor, box: Box) -> None:
        flat = torch.empty(out.numel(), dtype=self.dtype)
        for begin in range(0, len(flat), NUMBERS):
            part = flat[begin : begin + NUMBERS]
            part.copy_(self.numbers[: len(part)])
        out.copy_(flat.view(out.shape))


def architecture(quick: bool) -> Architecture:
    arch = load_job(None, ["model=llama2-7b"]).model
    return arch.model_copy(update={"num_layers": 2}) if quick else arch


def write_published(folder: Path, arch: Architecture) -> None:
    numbers = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors: dict[str, Readable] = {
        p.name: Noise(p.name, p.shape, torch.bfloat16, numbers) for p in parameter_table(arch)
    }
    config, published = publish(arch, FAMILIES["llama"], tensors)
    write_checkpoint(folder, published, {"config.json": json.dumps(config).encode()})


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def drop(folder: Path) -> None:
    """Takes what the page cache holds of the files of a folder from it."""
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy_seconds(source: Path, target: Path) -> float:
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in files(target):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - began


def import_seconds(source: Path, target: Path) -> tuple[float, int]:
    """(seconds, private bytes above those after the imports)."""
    command = [sys.executable, "-c", IMPORT, str(source), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        before = int(process.stdout.readline().split()[1])
        with TreeMemory(process.pid) as memory:
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds = float(process.stdout.readline())
    return seconds, memory.peak - before


def measure(quick: bool, folder: Path, turns: int) -> list[Figure]:
    arch = architecture(quick)
    source = folder / "published"
    write_published(source, arch)
    num_bytes = sum(path.stat().st_size for path in files(source))
    copies, imports, memories = [], [], []
    for turn in range(turns):
        for what in ("copy", "import") if turn % 2 == 0 else ("import", "copy"):
            target = folder / what
            drop(folder)
            if what == "copy":
                copies.append(copy_seconds(source, target))
                print(f"copy: {2 * num_bytes / copies[-1] / 1e9:.2f} GB/s", flush=True)
            else:
                seconds, memory = import_seconds(source, target)
                imports.append(seconds)
                memories.append(memory)
                print(
                    f"import: {2 * num_bytes / seconds / 1e9:.2f} GB/s, {memory / 2**20:.0f} MiB", flush=True
                )
            shutil.rmtree(target)
    ours, theirs = (2 * num_bytes / statistics.median(times) for times in (imports, copies))
    return [
        Figure("parameters", num_parameters(arch), "parameters"),
        Figure("checkpoint", num_bytes, "bytes"),
        Figure("turns", turns, "turns"),
        Figure(
            "import, read and written", ours, "bytes/s", "at least 0.6 of the copy", theirs, ours / theirs
        ),
        Figure("import, fastest", 2 * num_bytes / min(imports), "bytes/s", None, 2 * num_bytes / min(copies)),
        Figure("private memory of the import", max(memories), "bytes", f"< {256 * 2**20}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two layers of it")
    parser.add_argument("--turns", type=int, default=3, help="copies and imports")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; needs 3 times the checkpoint")
    parser.add_argument("--out", type=Path, help="where the receipt goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = measure(arguments.quick, Path(folder), arguments.turns)
    print_figures(figures)
    write_receipt("interchange", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
