"""Grok-2's published files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from colossus.errors import MachineError
from colossus.models.hf.grok2 import is_grok2, open_grok2
from tests.models.references import grok2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = grok2.config()
    grok2.write_checkpoint(config, grok2.random_weights(config, 1), tmp_path)
    return tmp_path


def test_every_tensor_is_what_was_written(folder: Path) -> None:
    config = grok2.config()
    read = grok2.write_checkpoint(config, grok2.random_weights(config, 1), folder)
    assert is_grok2(folder)
    source = open_grok2(folder)
    assert set(source) == set(read)
    for name, expected in read.items():
        assert torch.equal(source[name].read().double(), torch.from_numpy(expected)), name
    assert source.config["num_hidden_layers"] == config.num_hidden_layers


def test_a_missing_piece_is_named(folder: Path) -> None:
    next(folder.glob("*-00006-TP-003.safetensors")).unlink()
    with pytest.raises(MachineError, match=r"experts.\d+.w1.weight lacks the pieces 3 of 8"):
        open_grok2(folder)


def test_a_file_that_is_cut_short_is_named(folder: Path) -> None:
    file = next(folder.glob("*-00007-TP-002.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(MachineError, match=file.name):
        open_grok2(folder)
