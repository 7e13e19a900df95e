"""Two real processes with FSDP2 save; the same in other layouts, and one process, load."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from colossus.checkpoints.load import latest, open_checkpoint
from tests.checkpoints.real_ranks import STEPS, build, state, train


def test_fsdp_saves_and_any_layout_loads(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoints.real_ranks", str(tmp_path)],
            cwd=Path(__file__).parents[2],
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors

    path = latest(tmp_path)
    assert path is not None
    assert len(list(path.glob("*.safetensors"))) == 2
    model = build()
    alone = state(model, train(model, STEPS))
    loaded = {key: torch.zeros_like(tensor) for key, tensor in alone.items()}
    open_checkpoint(path).load_into(loaded)
    for key, tensor in alone.items():
        torch.testing.assert_close(loaded[key], tensor.detach(), rtol=1e-4, atol=1e-5)
