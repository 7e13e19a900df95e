"""Checkpoints written: as the safetensors library and transformers read them; all of one or nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from colossus.errors import MachineError, UserError
from colossus.models.hf.header import DTYPES
from colossus.models.hf.reading import open_source
from colossus.models.hf.tensors import Box, InMemory, Readable, Spec
from colossus.models.hf.writing import Writer, write_checkpoint
from tests.models.hf.samples import equal, of_every_type, random

ROOT = Path(__file__).parents[3]


def in_memory(tensors: dict[str, torch.Tensor]) -> list[InMemory]:
    return [InMemory.of(name, tensor) for name, tensor in tensors.items()]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@dataclass(frozen=True, slots=True)
class Failing(Readable):
    """A tensor of two bands whose second cannot be read."""

    error: BaseException

    @classmethod
    def with_(cls, error: BaseException) -> Failing:
        return cls("failing", (2, 1 << 20), torch.float64, error)

    def fill(self, out: torch.Tensor, box: Box) -> None:
        if box[0].start:
            raise self.error


def test_one_file_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = of_every_type()
    tensors["transposed"] = torch.randn(7, 9).T
    write_checkpoint(tmp_path / "a", in_memory(tensors), {"config.json": b"{}"})
    assert names_in(tmp_path) == ["a"]
    assert names_in(tmp_path / "a") == ["config.json", "model.safetensors"]
    found = load_file(tmp_path / "a/model.safetensors")
    assert set(found) == set(tensors)
    assert all(equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "a/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_several_files_and_their_index(tmp_path: Path) -> None:
    """A file is full when the next tensor would be too much; a larger tensor has one of its own."""
    sizes = {"a": 30, "b": 10, "c": 10, "huge": 100, "d": 40, "e": 1}
    tensors = {name: random((size,), torch.uint8) for name, size in sizes.items()}
    write_checkpoint(tmp_path / "a", in_memory(tensors), shard_bytes=40, band_bytes=7)
    files = [f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6)]
    assert names_in(tmp_path / "a") == [*files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    where = dict(zip(sizes, (files[i] for i in (0, 0, 1, 2, 3, 4)), strict=True))
    assert index == {"metadata": {"total_size": 191}, "weight_map": where}
    for name, file in where.items():
        assert equal(load_file(tmp_path / "a" / file)[name], tensors[name])
    assert all(equal(tensor.read(), tensors[name]) for name, tensor in open_source(tmp_path / "a").items())


def test_nothing_at_all(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", [])
    assert load_file(tmp_path / "a/model.safetensors") == {}
    assert len(open_source(tmp_path / "a")) == 0


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.sampled_from(list(DTYPES))), max_size=6),
    st.integers(1, 200),
    st.integers(8, 64),
)
@settings(max_examples=40, deadline=None)
def test_copies_are_equal(
    sizes: list[tuple[int, int, torch.dtype]], shard_bytes: int, band_bytes: int
) -> None:
    tensors = {f"t{i}": random((a, b), dtype, i) for i, (a, b, dtype) in enumerate(sizes)}
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        write_checkpoint(first, in_memory(tensors), shard_bytes=shard_bytes, band_bytes=band_bytes)
        write_checkpoint(second, open_source(first).values(), shard_bytes=band_bytes)
        found: dict[str, torch.Tensor] = {}
        for file in second.glob("*.safetensors"):
            found |= load_file(file)
        assert set(found) == set(tensors)
        assert all(equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_model_of_transformers_comes_through(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs")
    source = open_source(tmp_path / "theirs")
    files = {"config.json": (tmp_path / "theirs/config.json").read_bytes()}
    write_checkpoint(tmp_path / "ours", source.values(), files, shard_bytes=5000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    for name, tensor in model.state_dict().items():
        assert equal(again.state_dict()[name], tensor), name


def test_bands_in_turns(tmp_path: Path) -> None:
    """One pass over a fused tensor can write its parts."""
    fused = random((8, 6))
    plan = [Spec("q", (8, 2), torch.float32), Spec("k", (8, 4), torch.float32)]
    with Writer(tmp_path / "a", plan) as writer:
        for rows in fused.split(3):
            writer.append("q", rows[:, :2])
            writer.append("k", rows[:, 2:])
    found = load_file(tmp_path / "a/model.safetensors")
    assert equal(found["q"], fused[:, :2])
    assert equal(found["k"], fused[:, 2:])


@pytest.mark.parametrize("error", [MachineError("cut short"), KeyboardInterrupt(), ZeroDivisionError()])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    tensors = [InMemory.of("a", torch.ones(3)), Failing.with_(error)]
    (tmp_path / "a").mkdir()
    with pytest.raises(type(error)):
        write_checkpoint(tmp_path / "a", tensors, {"config.json": b"{}"}, shard_bytes=16)
    assert names_in(tmp_path) == ["a"]
    assert names_in(tmp_path / "a") == []
    write_checkpoint(tmp_path / "a", tensors[:1])  # and can be tried again
    assert names_in(tmp_path / "a") == ["model.safetensors"]


def test_programmers_faults(tmp_path: Path) -> None:
    plan = [Spec("a", (4,), torch.float32)]
    for values, message in (
        (torch.ones(4).double(), "a is torch.float32, not torch.float64"),
        (torch.ones(5), "a is longer than planned"),
        (torch.ones(3), "4 bytes of a were never given"),
    ):
        with pytest.raises(AssertionError, match=message), Writer(tmp_path / "a", plan) as writer:
            writer.append("a", values)
    with pytest.raises(AssertionError, match="planned twice"):
        Writer(tmp_path / "a", plan * 2)
    with pytest.raises(AssertionError, match=r"'../b' is no name"), Writer(tmp_path / "a", plan) as writer:
        writer.add_file("../b", b"")
    assert names_in(tmp_path) == []


def test_kill_9_leaves_nothing_at_the_destination(tmp_path: Path) -> None:
    program = f"""
import os, signal, torch
from colossus.models.hf.tensors import Spec
from colossus.models.hf.writing import Writer
with Writer({str(tmp_path / "a")!r}, [Spec("a", (4,), torch.float32)]) as writer:
    writer.append("a", torch.ones(4))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [name[:11] for name in names_in(tmp_path)] == [".a.partial-"]
    write_checkpoint(tmp_path / "a", in_memory({"a": torch.ones(4)}))
    assert names_in(tmp_path / "a") == ["model.safetensors"]


def test_where_it_may_not_go(tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "x").touch()
    file.touch()
    for path, message in (
        (full, r"full exists and is not empty: name a new folder"),
        (file, r"file exists and is no folder: name a new folder"),
        (Path("/proc"), r"/proc exists and is not empty"),
    ):
        with pytest.raises(UserError, match=message):
            write_checkpoint(path, [])
    with pytest.raises(MachineError, match=r"cannot write .*file/a: (File exists|Not a directory)"):
        write_checkpoint(file / "a", [])
    (tmp_path / "dangling").symlink_to(tmp_path / "real")
    write_checkpoint(tmp_path / "dangling", [])  # a link's target is made
    write_checkpoint(tmp_path / "new/deep/a", [])
    assert names_in(tmp_path) == ["dangling", "file", "full", "new", "real"]


def test_a_destination_taken_meanwhile(tmp_path: Path) -> None:
    message = r"cannot write .*a: Directory not empty; nothing is left of it"
    with pytest.raises(MachineError, match=message), Writer(tmp_path / "a", []):
        (tmp_path / "a").mkdir()
        (tmp_path / "a/theirs").touch()
    assert names_in(tmp_path) == ["a"]
    assert names_in(tmp_path / "a") == ["theirs"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk(small_disk: Path) -> None:
    with pytest.raises(UserError, match=r"disk is the root of a file system: name a new folder in it"):
        write_checkpoint(small_disk, [])
    large = [Spec("a", (9 << 20,), torch.uint8)]
    with pytest.raises(MachineError, match=r"disk has 0.0 GB free; the checkpoint takes 0.0 GB"):
        Writer(small_disk / "a", large)
    plan = [Spec("a", (5 << 20,), torch.uint8)]
    with (
        pytest.raises(
            MachineError, match=r"cannot write .*a: No space left on device; nothing is left of it"
        ),
        Writer(small_disk / "a", plan) as writer,
    ):  # another program fills the disk meanwhile
        (small_disk / "other").write_bytes(bytes(4 << 20))
        for _ in range(5):
            writer.append("a", torch.zeros(1 << 20, dtype=torch.uint8))
    assert names_in(small_disk) == ["other"]


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """As a full disk, where none can be mounted."""
    program = f"""
import resource, signal, torch
from colossus.models.hf.tensors import InMemory
from colossus.models.hf.writing import write_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
write_checkpoint({str(tmp_path / "a")!r}, [InMemory.of("a", torch.ones(1_000_000))])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "MachineError: cannot write" in done.stderr
    assert "File too large; nothing is left of it" in done.stderr
    assert names_in(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1_000_000


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the names of open files")
def test_every_file_is_on_storage_whole_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        sync(descriptor)
        folder = (tmp_path / "a").exists()
        name = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
        synced.append((Path(name).name, os.fstat(descriptor).st_size if not folder else -1))

    monkeypatch.setattr(os, "fsync", recorded)
    tensors = {f"of.{n}": torch.full((300, 7), float(n)) for n in range(4)}
    write_checkpoint(tmp_path / "a", in_memory(tensors), {"config.json": b"{}"}, 20_000, 4096)
    written = {path.name: path.stat().st_size for path in (tmp_path / "a").iterdir()}
    assert len(written) == 4  # two of tensors, the index, the configuration
    before = dict(row for row in synced if row[1] >= 0)
    assert {name: before.get(name) for name in written} == written
    assert any(name.startswith(".a.partial-") for name in before)  # its names
    assert synced[-1] == (tmp_path.name, -1)  # and its own
