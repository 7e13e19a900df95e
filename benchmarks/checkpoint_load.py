"""Four ranks save and load a checkpoint of 1.1 GB, beside an earlier version of the program, in turns.

In layouts of shards, of replicas, and of both. A save lasts until the checkpoint is whole; a load is what a
run that goes on does: it looks for the newest checkpoint, each rank reads and verifies what is its own to
read, all agree that it is whole, and what several hold is passed on. Loads are from the page cache, and with
an empty one (`cold`), for which each file is dropped from it first. Of each the median of the turns, of the
slowest rank; `processor` is what all ranks together compute to load, which neighbours disturb less.

    python -m benchmarks.checkpoint_load [--quick] [--out FILE] [--folder DIR] [--baseline DIR] [--turns N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RANKS = 4
LAYOUTS = {"shards": (1, 4), "replicas": (4, 1), "both": (2, 2)}
"""dp_replicate and dp_shard."""
NUM_TENSORS, SHAPE = 66, (2048, 2048)  # 1.1 GB


def rank(replicate: int, shard: int, folder: Path, size: int) -> None:
    """One rank, in a process of its own, of whichever version is imported: prints its seconds as JSON."""
    import torch
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from colossus.checkpoints.load import candidates, load_agreed
    from colossus.checkpoints.save import Saver
    from colossus.layout import Layout
    from colossus.parallel.world import World

    torch.set_num_threads(1)
    layout = Layout(dp_replicate=replicate, dp_shard=shard).filled()
    with World.join(layout, "cpu") as world, torch.no_grad():
        assert world.meshes is not None
        mesh = world.meshes.dense["dp_replicate", "fsdp"]
        rows = size // shard

        def tensor(fill: int) -> torch.Tensor:
            local = torch.full((rows, size), float(fill))
            whole = torch.Size((size, size))
            placed = [Replicate(), Shard(0)]
            return DTensor.from_local(local, mesh, placed, run_check=False, shape=whole, stride=(size, 1))

        tensors = {(f"layers.{n}", "weight"): tensor(n + 1) for n in range(NUM_TENSORS)}
        for each in tensors.values():
            each.to_local().add_(world.place.dp_shard)  # type: ignore[attr-defined]

        def together(act: Callable[[], object]) -> float:
            world.sum([0.0])
            began = time.perf_counter()
            act()
            return time.perf_counter() - began

        def save() -> None:
            saver.save(2, tensors, {}, asynchronous=False)
            world.sum([0.0])

        def load() -> None:
            for checkpoint in candidates(folder, world):
                assert load_agreed(checkpoint, _reads_share(checkpoint, tensors), world)
                break
            with contextlib.suppress(ImportError):
                from colossus.checkpoints.passing import pass_on

                pass_on(tensors.items())

        def emptied(act: Callable[[], object]) -> tuple[float, float]:
            """Seconds, and those that this rank computed."""
            for each in tensors.values():
                each.to_local().zero_()  # type: ignore[attr-defined]
            spent = time.process_time()
            seconds = together(act)
            spent = time.process_time() - spent
            for n, each in enumerate(tensors.values()):
                local = each.to_local()  # type: ignore[attr-defined]
                assert (local == n + 1 + world.place.dp_shard).all(), f"rank {world.rank}: layers.{n}"
            return seconds, spent

        def drop() -> None:
            for path in folder.glob("checkpoints/*/*"):
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

        with Saver(folder, world) as saver:
            saver.save(1, dict([*tensors.items()][:1]), {}, asynchronous=False)  # as runs have saved before
            seconds = {"save": together(save)}
        seconds["load"], seconds["load, processor"] = emptied(load)
        world.sum([0.0])
        drop()
        seconds["cold load"], _ = emptied(load)
        if world.rank == 0:
            seconds["bytes"] = sum(
                p.stat().st_size for p in folder.glob("checkpoints/step-00000002/pieces-*")
            )
        print(json.dumps(seconds))


def _reads_share(checkpoint: Any, tensors: Any) -> Callable[[Any], None]:
    """An earlier version has each rank read all that it holds."""
    import inspect

    shares = "share" in inspect.signature(checkpoint.load_into).parameters
    return lambda found: found.load_into(tensors, share=True) if shares else found.load_into(tensors)


def ranks(code: Path, layout: tuple[int, int], folder: Path, size: int) -> dict[str, float]:
    """The seconds of the slowest rank; `bytes` are those of the checkpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", __file__, "rank", *map(str, layout), str(folder), str(size)],
            env=os.environ | place | {"PYTHONPATH": str(code), "WORLD_SIZE": str(RANKS), "RANK": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(RANKS)
    ]
    answers = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "a rank failed"
    found = [json.loads(answer) for answer in answers]
    return {
        name: (sum if "processor" in name else max)(each.get(name, 0.0) for each in found)
        for name in found[0]
    }


def measure(
    code: dict[str, Path], folder: Path, size: int, turns: int
) -> Iterator[tuple[str, str, float, float | None]]:
    """(name, unit, ours, theirs)"""
    seconds: dict[tuple[str, str, str], list[float]] = {}
    for turn in range(turns):
        for name, layout in LAYOUTS.items():
            for who, place in code.items():
                with tempfile.TemporaryDirectory(dir=folder) as run:
                    for what, value in ranks(place, layout, Path(run), size).items():
                        seconds.setdefault((name, what, who), []).append(value)
        print(f"turn {turn + 1} of {turns}", file=sys.stderr)
    for (name, what, who), values in seconds.items():
        if who == "ours":
            theirs = seconds.get((name, what, "theirs"))
            peer = statistics.median(theirs) if theirs else None
            yield f"{name}: {what}", "bytes" if what == "bytes" else "s", statistics.median(values), peer


def main() -> None:
    if sys.argv[1:2] == ["rank"]:
        replicate, shard, run, side = sys.argv[2:]
        rank(int(replicate), int(shard), Path(run), int(side))
        return
    from colossus.measure.machine import this_machine
    from colossus.perf.receipts import Figure, print_figures, write_receipt

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of it, one turn")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--folder", default=".", help="where to write: its disk is what is measured")
    parser.add_argument("--baseline", help="a checkout of an earlier version")
    parser.add_argument("--turns", type=int, help="by default 3, quick 1")
    arguments = parser.parse_args()
    code = {"ours": Path(__file__).resolve().parents[1]}
    if arguments.baseline:
        code["theirs"] = Path(arguments.baseline).resolve()
    size = SHAPE[0] // 4 if arguments.quick else SHAPE[0]
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".checkpoint-load-") as folder:
        turns = arguments.turns or (1 if arguments.quick else 3)
        found = list(measure(code, Path(folder).resolve(), size, turns))
    figures = [
        Figure(name, ours, unit, None, peer, peer / ours if peer and unit == "s" else None)
        for name, unit, ours, peer in found
    ]
    print_figures(figures)
    write_receipt("checkpoint_load", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
