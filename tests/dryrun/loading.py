"""What the ranks of `test_reads` do in their processes: each loads its part, and is watched."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from colossus.checkpoints import find, passing, reading
from colossus.checkpoints.load import candidates, load_agreed
from colossus.parallel.world import World
from colossus.trainer.state import TrainState
from tests.ranks.cases import Case


def watched(case: Case, folder: Path) -> dict[str, Any]:
    """As a run goes on from what is in `folder`. Bytes that are read of files of tensors, and beside these;
    files that are opened; files of metadata that are opened twice; bytes that others pass on."""
    torch.set_num_threads(1)
    job, opened, data, received = case.job(), Counter[str](), 0, 0
    real_open, real_read, real_broadcast = os.open, find.read_exactly, passing.dist.broadcast

    def open_(path: Any, *arguments: Any, **named: Any) -> int:
        if str(path).startswith(str(folder)) and Path(path).is_file():
            opened[str(path)] += 1
        return real_open(path, *arguments, **named)

    def read(real: Any, stream: Any, out: memoryview, begin: int) -> int:
        nonlocal data
        data += len(out)
        return real(stream, out, begin)  # type: ignore[no-any-return]

    def broadcast(tensor: torch.Tensor, *, group: Any, group_src: int, **named: Any) -> Any:
        nonlocal received
        received += tensor.nbytes if passing.dist.get_rank(group) != group_src else 0
        return real_broadcast(tensor, group=group, group_src=group_src, **named)

    with World.join(job.layout, "cpu", experts=job.model.experts is not None) as world, ExitStack() as stack:
        state = TrainState.build(job, world)
        stack.enter_context(patch.object(os, "open", open_))
        for owner in (find, reading):
            stack.enter_context(patch.object(owner, "read_exactly", partial(read, real_read)))
        stack.enter_context(patch.object(passing.dist, "broadcast", broadcast))
        for checkpoint in candidates(folder, world):
            assert load_agreed(checkpoint, partial(state.restore, share=True), world)
            state.pass_on()
            break
    beside = [path for path in opened if not path.endswith(".safetensors")]
    return {
        "storage_bytes": data + sum(Path(path).stat().st_size for path in beside),
        "files": len(opened),
        "received_bytes": received,
        "twice": [path for path in beside if opened[path] > 1 and not path.endswith("COMMITTED")],
    }
