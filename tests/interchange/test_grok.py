"""xAI's published checkpoints as runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import colossus
from colossus.errors import UserError
from colossus.generation.load import open_weights
from colossus.models import build
from tests.models.references import grok1, grok2

TOKENS = np.array([[3, 7, 1, 30, 12, 5, 22], [9, 9, 2, 4, 1, 17, 36]])


def logits(run: Path) -> np.ndarray:
    weights = open_weights(run)
    model = build(weights.arch, seed=0)
    weights.load_into(model)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).numpy()


def test_grok1(tmp_path: Path) -> None:
    config = grok1.config(num_layers=11, num_heads=2, num_kv_heads=1, head_dim=128)
    read = grok1.write_checkpoint(config, grok1.random_weights(config, 1), tmp_path / "ckpt-0")
    plain = ("/embeddings", "/scale", "router/w")
    rounded = {
        name: w if name.endswith(plain) else torch.from_numpy(w).bfloat16().double().numpy()
        for name, w in read.items()
    }
    run = colossus.import_model(tmp_path / "ckpt-0", tmp_path / "grok")
    assert np.abs(logits(run) - grok1.logits(config, rounded, TOKENS)).max() < 1e-4


def test_grok2(tmp_path: Path) -> None:
    config = grok2.config()
    weights = grok2.write_checkpoint(config, grok2.random_weights(config, 1), tmp_path / "grok-2")
    run = colossus.import_model(tmp_path / "grok-2", tmp_path / "grok")
    assert np.abs(logits(run) - grok2.logits(config, weights, TOKENS)).max() < 1e-4
    with pytest.raises(UserError, match="no published family has all parts of this model"):
        colossus.export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
