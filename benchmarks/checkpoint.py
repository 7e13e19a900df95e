"""What saving costs a run: a model of 100M parameters with AdamW's state, 1.2 GB.

Beside it, in the same process and in turns, PyTorch's distributed checkpoint (`async_save` with a stager that
keeps its memory), on the same tensors and the same disk. A step of training is stood in for by products of
matrices on all cores: `slowdown` is how much longer they took, in seconds a save, because a save was under
way. The peer verifies nothing when it loads.

    python -m benchmarks.checkpoint [--quick] [--out FILE] [--folder FOLDER] [--threads N]
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from colossus.architecture import Architecture, num_parameters, parameter_table
from colossus.checkpoints.format import Key
from colossus.checkpoints.load import open_checkpoint, verify
from colossus.checkpoints.save import Saver
from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt

State = dict[Key, torch.Tensor]


def architecture(quick: bool) -> Architecture:
    width, layers = (128, 2) if quick else (768, 10)
    return Architecture(
        vocab_size=32_000,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        intermediate_size=2048,
        max_seq_len=1024,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        qk_norm=False,
        initializer_range=0.02,
    )


def state_of(arch: Architecture) -> State:
    return {
        (parameter.name, kind): torch.randn(parameter.shape)
        for parameter in parameter_table(arch)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }


@dataclass
class Cost:
    """Of one save. Seconds."""

    blocked: float  # the call stood still
    slowdown: float  # that steps took longer, until it was whole
    total: float  # from the call to the last byte on storage


class Steps:
    """Stands in for training: products of matrices on all cores."""

    def __init__(self, size: int = 1536) -> None:
        self._left, self._right = torch.randn(size, size), torch.randn(size, size)
        self._step()
        self.usual = statistics.median(self._step() for _ in range(20))

    def _step(self) -> float:
        began = time.perf_counter()
        torch.mm(self._left, self._right)
        return time.perf_counter() - began

    def beside(self, save: Callable[[], Callable[[], bool]]) -> Cost:
        """Steps while a save goes on. `save` begins one and returns what tells whether it is done."""
        began = time.perf_counter()
        done = save()
        blocked = time.perf_counter() - began
        lost = 0.0
        while not done():
            lost += self._step() - self.usual
        return Cost(blocked, lost, time.perf_counter() - began)


def colossus_saves(run: Path, state: State, steps: Steps, num: int) -> tuple[list[Cost], float, float]:
    """The costs of saves; seconds to verify; seconds to load into tensors that exist."""
    costs = []
    with Saver(run, keep=1) as saver:
        saver.prepare(state)
        for _ in range(300):  # a run trains a while before its first save
            torch.mm(steps._left, steps._right)
        for step in range(num):

            def save(step: int = step) -> Callable[[], bool]:
                saver.save(step, state, {"step": step})
                return lambda: bool(saver.poll())

            costs.append(steps.beside(save))
    path = run / "checkpoints" / f"step-{num - 1:08d}"
    verify_seconds = min(timed(lambda: verify(path)) for _ in range(3))
    into = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    load_seconds = min(timed(lambda: open_checkpoint(path).load_into(into)) for _ in range(3))
    assert all(torch.equal(into[key], tensor) for key, tensor in state.items())
    return costs, verify_seconds, load_seconds


def peer_saves(folder: Path, state: State, steps: Steps, num: int) -> tuple[list[Cost], float]:
    """The same with torch.distributed.checkpoint; it can't verify."""
    named: dict[str, Any] = {f"{kind}/{name}": tensor for (name, kind), tensor in state.items()}
    stager = DefaultStager(  # keeps its memory; what else it offers needs CUDA
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    costs = []
    for step in range(num):

        def save(step: int = step) -> Callable[[], bool]:
            writer = FileSystemWriter(folder / str(step), thread_count=2)
            future = state_dict_saver.async_save(
                named, storage_writer=writer, async_stager=stager, no_dist=True
            )
            return future.done  # type: ignore[union-attr]

        costs.append(steps.beside(save))
        shutil.rmtree(folder / str(step - 1), ignore_errors=True)
    into = {name: torch.zeros_like(tensor) for name, tensor in named.items()}

    def load() -> None:
        state_dict_loader.load(into, checkpoint_id=folder / str(num - 1), no_dist=True)

    seconds = min(timed(load) for _ in range(3))
    assert all(torch.equal(into[name], tensor) for name, tensor in named.items())
    return costs, seconds


def timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def measure(quick: bool, folder: Path) -> list[Figure]:
    arch = architecture(quick)
    state = state_of(arch)
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    num = 3 if quick else 4
    steps = Steps()
    theirs, their_load = peer_saves(folder / "peer", state, steps, num)
    shutil.rmtree(folder / "peer")
    ours, our_verify, our_load = colossus_saves(folder / "run", state, steps, num)

    def against(name: str, unit: str, mine: float, peer: float, goal: str | None = None) -> Figure:
        return Figure(name, mine, unit, goal, peer, mine / peer)

    def median(costs: list[Cost], what: str) -> float:
        return statistics.median(getattr(cost, what) for cost in costs[1:])

    return [
        Figure("parameters", num_parameters(arch), "parameters"),
        Figure("state", num_bytes, "bytes"),
        against("first save blocks", "s", ours[0].blocked, theirs[0].blocked, "< 0.5"),
        against("a save blocks", "s", median(ours, "blocked"), median(theirs, "blocked"), "< 0.5"),
        against(
            "slowest save blocks", "s", max(c.blocked for c in ours), max(c.blocked for c in theirs), "< 0.5"
        ),
        against("slowdown a save", "s", median(ours, "slowdown"), median(theirs, "slowdown")),
        against("call to whole checkpoint", "s", median(ours, "total"), median(theirs, "total")),
        against(
            "write",
            "bytes/s",
            num_bytes / median(ours, "total"),
            num_bytes / median(theirs, "total"),
        ),
        Figure("verify", num_bytes / our_verify, "bytes/s"),
        against("load", "bytes/s", num_bytes / our_load, num_bytes / their_load),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--folder", default=".", help="where to write: its disk is what is measured")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".checkpoint-") as folder:
        figures = measure(arguments.quick, Path(folder))
    print_figures(figures)
    write_receipt("checkpoint", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
