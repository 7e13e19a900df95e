"""A checkpoint of any size is copied in little memory: the kernel holds the process to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from colossus.models.hf.header import encode_header
from colossus.models.hf.tensors import Spec

MIB = 1 << 20
LIMIT_MIB = 64

# RLIMIT_DATA counts what is allocated privately, stacks of threads too; no mapped files, no cache.
# Trimmed first: what the imports freed is not to be had again under the limit.
PROGRAM = f"""
import ctypes, re, resource, sys
from pathlib import Path
import torch
from colossus.models.hf.reading import open_source
from colossus.models.hf.writing import write_checkpoint

def private(which):
    return int(re.search(which + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
ctypes.CDLL(None).malloc_trim(0)
before = private("VmData")
resource.setrlimit(resource.RLIMIT_DATA, (before + {LIMIT_MIB} * {MIB},) * 2)
try:
    bytearray({2 * LIMIT_MIB} * {MIB})  # twice: a thread may have ended since, and left its stack
except MemoryError:
    print("the limit holds")
source = open_source(sys.argv[1])
write_checkpoint(sys.argv[2], source.values(), shard_bytes=700 * {MIB})
print(f"{{(private('VmData') - before) / {MIB}:.0f}} MiB at the end")
"""


def publish_holes(folder: Path, specs: list[Spec], method: str | None) -> None:
    """A checkpoint of zeros that takes no space on the disk."""
    folder.mkdir()
    header, _ = encode_header(specs)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + sum(spec.num_bytes for spec in specs))
    quantisation = {"quant_method": method, "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantisation} if method else {}))


BIG = [
    Spec("large", (300, MIB), torch.bfloat16),
    *(Spec(f"t{i}", (8, MIB), torch.bfloat16) for i in range(26)),
]
FLOAT8 = [
    Spec("w", (10_000, 16_384), torch.float8_e4m3fn),
    Spec("w_scale_inv", (79, 128), torch.float32),
]
EXPERTS = [Spec("w_blocks", (8, 5760, 90, 16), torch.uint8), Spec("w_scales", (8, 5760, 90), torch.uint8)]


@pytest.mark.parametrize(
    ("specs", "method", "num_bytes"),
    [(BIG, None, 1016 * MIB), (FLOAT8, "fp8", 2 * 163_840_000), (EXPERTS, "mxfp4", 2 * 8 * 5760 * 2880)],
    ids=["1 GiB", "float8", "MXFP4"],
)
def test_copying_in_little_memory(
    tmp_path: Path, specs: list[Spec], method: str | None, num_bytes: int
) -> None:
    publish_holes(tmp_path / "a", specs, method)
    try:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "a"), str(tmp_path / "b")]
        root = Path(__file__).parents[3]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.startswith("the limit holds"), done.stdout
        written = sum(file.stat().st_size for file in (tmp_path / "b").glob("*.safetensors"))
        assert num_bytes < written < num_bytes + 10_000
    finally:
        for file in tmp_path.rglob("*.safetensors"):
            file.unlink()
