"""Two real processes with FSDP2 save; the same in other layouts, and one process, load."""

from __future__ import annotations

from pathlib import Path

import torch

from colossus.checkpoints.load import latest, open_checkpoint
from tests.checkpoints.real_ranks import STEPS, build, pass_on_in_replicas, save_and_load, state, train
from tests.parallel.real_ranks import in_ranks


def test_fsdp_saves_and_any_layout_loads(tmp_path: Path) -> None:
    in_ranks(2, save_and_load, tmp_path)

    path = latest(tmp_path)
    assert path is not None
    assert len(list(path.glob("*.safetensors"))) == 2
    model = build()
    alone = state(model, train(model, STEPS))
    loaded = {key: torch.zeros_like(tensor) for key, tensor in alone.items()}
    open_checkpoint(path).load_into(loaded)
    for key, tensor in alone.items():
        torch.testing.assert_close(loaded[key], tensor.detach(), rtol=1e-4, atol=1e-5)


def test_what_several_hold_is_read_once(tmp_path: Path) -> None:
    """The others get it from those that read. All ranks learn of damage that one of them finds."""
    answers = in_ranks(4, pass_on_in_replicas, tmp_path)
    path = tmp_path / "checkpoints" / f"step-{STEPS:08d}"
    checkpoint = open_checkpoint(path)
    assert sum(read for read, _ in answers) == sum(e.num_bytes for e in checkpoint.manifest.tensors.values())
    assert all(read for read, _ in answers)
    assert [agreed for _, agreed in answers] == [False] * 4
