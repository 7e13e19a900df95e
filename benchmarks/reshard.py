"""Saving and loading under 2 and 4 ranks: a model of 300M parameters with AdamW's state, 3.6 GB.

Each of them saves, loads what it saved and what the other number of ranks saved, in turns with PyTorch's
distributed checkpoint on the same tensors, sharded by rows, and the same disk. Every value is compared. Both
sync what they write; ours verifies what it reads, the peer reads without checksums. "resume" is what a run
does: it looks for its newest whole checkpoint, which reads every byte once more, and loads it. Figures are
medians over the turns, of the slowest rank; files are read from the page cache.

    python -m benchmarks.reshard [--quick] [--out FILE] [--folder FOLDER] [--turns N]
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.tensor import DTensor, Shard

from benchmarks.ranks import Ranks
from colossus.architecture import Architecture, num_parameters, parameter_table
from colossus.checkpoints.format import Key
from colossus.checkpoints.load import newest_whole, open_checkpoint
from colossus.checkpoints.save import Saver
from colossus.layout import Layout
from colossus.measure.machine import this_machine
from colossus.parallel.world import World
from colossus.perf.receipts import Figure, print_figures, write_receipt

SIZES = (2, 4)
KINDS = ("weight", "exp_avg", "exp_avg_sq")
State = dict[Key, torch.Tensor]


def architecture(quick: bool) -> Architecture:
    width, layers = (128, 2) if quick else (1024, 21)
    return Architecture(
        vocab_size=32_000,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        intermediate_size=8 * width // 3 // 64 * 64,
        max_seq_len=1024,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        qk_norm=False,
        base_width=width,
    )


def state_of(arch: Architecture, world: World) -> State:
    """Rows of every tensor; each value tells where it belongs."""
    assert world.meshes is not None
    state: State = {}
    for parameter in parameter_table(arch):
        rows, width = parameter.shape[0], parameter.numel // parameter.shape[0]
        first = min(rows, -(-rows // world.size) * world.rank)
        count = min(rows - first, -(-rows // world.size))
        shape = torch.Size(parameter.shape)
        for number, kind in enumerate(KINDS):
            begin = first * width + 17 * number
            local = torch.arange(begin, begin + count * width).remainder_(65_521).float()
            state[parameter.name, kind] = DTensor.from_local(
                local.view(count, *shape[1:]),
                world.meshes.dense["fsdp"],
                [Shard(0)],
                run_check=False,
                shape=shape,
                stride=torch.empty(shape, device="meta").stride(),
            )
    return state


@contextlib.contextmanager
def rank(arch: Architecture, size: int) -> Iterator[Callable[[str, Path], float]]:
    """In a process: gives what saves or loads, and answers the seconds that it took."""
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    with World.join(Layout(dp_shard=size).filled(), "cpu") as world:
        state = state_of(arch, world)
        into = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
        named, named_into = ({f"{k[1]}/{k[0]}": v for k, v in s.items()} for s in (state, into))

        def save(folder: Path) -> None:
            with Saver(folder, world) as saver:
                saver.save(1, state, {}, asynchronous=False)
            world.sum([0.0])  # it is whole when rank 0 has committed

        def load(folder: Path) -> None:
            open_checkpoint(folder / "checkpoints" / "step-00000001").load_into(into)

        def resume(folder: Path) -> None:
            checkpoint = newest_whole(folder, world)
            assert checkpoint is not None
            checkpoint.load_into(into)

        acts: dict[str, Callable[[Path], Any]] = {
            "save": save,
            "load": load,
            "resume": resume,
            "peer save": lambda folder: state_dict_saver.save(named, checkpoint_id=folder),
            "peer load": lambda folder: state_dict_loader.load(named_into, checkpoint_id=folder),
        }

        def act(what: str, folder: Path) -> float:
            for tensor in into.values():
                tensor.zero_()
            world.sum([0.0])  # all begin together
            began = time.perf_counter()
            acts[what](folder)
            seconds = time.perf_counter() - began
            if "save" not in what:
                for key, tensor in into.items():
                    assert torch.equal(tensor.to_local(), state[key].to_local()), key  # type: ignore[attr-defined]
            return seconds

        yield act


def measure(quick: bool, folder: Path, turns: int) -> list[Figure]:
    arch = architecture(quick)
    num_bytes = 4 * len(KINDS) * num_parameters(arch)
    seconds: dict[str, list[float]] = {}

    def timed(ranks: Ranks, title: str, what: str, place: Path) -> None:
        seconds.setdefault(title, []).append(max(ranks.all(what, place)))

    with contextlib.ExitStack() as stack:
        groups = {size: stack.enter_context(Ranks(size, rank, arch, size)) for size in SIZES}
        for _ in range(turns):
            for prefix in ("", "peer "):
                for size, ranks in groups.items():
                    place = folder / f"{prefix}{size}"
                    shutil.rmtree(place, ignore_errors=True)
                    timed(ranks, f"{prefix}save on {size}", f"{prefix}save", place)
                for here in SIZES:
                    for there in SIZES:
                        title = f"load on {here} what {there} saved"
                        place = folder / f"{prefix}{there}"
                        timed(groups[here], f"{prefix}{title}", f"{prefix}load", place)
                        if not prefix:
                            timed(groups[here], f"resume on {here} what {there} saved", "resume", place)
    figures = [
        Figure("parameters", num_parameters(arch), "parameters"),
        Figure("state", num_bytes, "bytes"),
    ]
    for title, times in seconds.items():
        if title.startswith("peer "):
            continue
        ours = num_bytes / statistics.median(times)
        beside = seconds.get(f"peer {title}")
        peer = num_bytes / statistics.median(beside) if beside else None
        figures.append(Figure(title, ours, "bytes/s", None, peer, ours / peer if peer else None))
        figures.append(Figure(f"{title}, time", statistics.median(times), "s"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a small model, one turn")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--folder", default=".", help="where to write: its disk is what is measured")
    parser.add_argument("--turns", type=int, help="by default 3, quick 1")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".reshard-") as folder:
        turns = arguments.turns or (1 if arguments.quick else 3)
        figures = measure(arguments.quick, Path(folder).resolve(), turns)
    print_figures(figures)
    write_receipt("reshard", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
