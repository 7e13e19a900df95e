"""Our decoder with Grok's weights, against references in float64 that were written apart from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from colossus.architecture import Architecture, parameter_table
from colossus.models import Decoder, build
from colossus.models.hf import grok1 as published1
from colossus.models.hf import grok2 as published2
from colossus.models.hf.tensors import Readable
from tests.models.references import grok1, grok2

EXACT = 1e-9  # in float64, beside the fp32 in which frequencies are computed


def decoder(arch: Architecture, tensors: dict[str, Readable], dtype: torch.dtype) -> Decoder:
    model = build(arch, seed=0, dtype=dtype)
    assert set(tensors) == {parameter.name for parameter in parameter_table(arch)}
    for name, parameter in model.named_parameters():
        assert tensors[name].shape == tuple(parameter.shape), name
        tensors[name].read_into(parameter.data)
    return model


def tokens(batch: int, length: int, vocab_size: int, seed: int, pads: bool = False) -> np.ndarray:
    drawn = np.random.default_rng(seed).integers(1, vocab_size, (batch, length))
    if pads:
        drawn[0, 2] = drawn[-1, 5] = 0
    return drawn


def difference(model: Decoder, tokens_BT: np.ndarray, expected_BTV: np.ndarray) -> float:
    with torch.no_grad():
        found_BTV = model(torch.from_numpy(tokens_BT)).double().numpy()
    learned = tokens_BT != 0  # what a pad says of the next token is not defined
    return float(np.abs(found_BTV - expected_BTV)[learned].max())


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("batch", "length", "pads"), [(1, 1, False), (2, 17, False), (3, 40, True)])
def test_grok1(
    tmp_path: Path, dtype: torch.dtype, allowed: float, batch: int, length: int, pads: bool
) -> None:
    config = grok1.config()
    read = grok1.write_checkpoint(config, grok1.random_weights(config, 1), tmp_path)
    rounded = {name: torch.from_numpy(w).bfloat16().double().numpy() for name, w in read.items()}
    plain = ("/embeddings", "/scale", "router/w")
    weights = {name: read[name] if name.endswith(plain) else rounded[name] for name in read}
    model = decoder(*published1.as_ours(published1.open_grok1(tmp_path), config.head_dim), dtype)
    drawn = tokens(batch, length, config.vocab_size, 2, pads)
    expected = grok1.logits(config, weights, drawn)
    assert np.abs(expected).max() > 0.1
    assert difference(model, drawn, expected) < allowed


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 17), (3, 40)])
def test_grok2(
    tmp_path: Path, dtype: torch.dtype, allowed: float, gelu: str, batch: int, length: int
) -> None:
    config = grok2.config(gelu=gelu)
    weights = grok2.write_checkpoint(config, grok2.random_weights(config, 1), tmp_path)
    arch, tensors = published2.as_ours(published2.open_grok2(tmp_path))
    model = decoder(arch.model_copy(update={"gelu": gelu}), tensors, dtype)
    drawn = tokens(batch, length, config.vocab_size, 2)
    expected = grok2.logits(config, weights, drawn)
    assert np.abs(expected).max() > 1
    assert difference(model, drawn, expected) < allowed


def test_grok2s_mlp_and_experts_are_summed_as_the_reference_sums_them(tmp_path: Path) -> None:
    """The norm behind them hides a wrong factor from the logits."""
    config = grok2.config()
    weights = grok2.write_checkpoint(config, grok2.random_weights(config, 1), tmp_path)
    model = decoder(*published2.as_ours(published2.open_grok2(tmp_path)), torch.float64)
    x_BTD = np.random.default_rng(3).standard_normal((2, 9, config.hidden_size))
    expected = grok2.feed_forward(config, weights, "model.layers.1", x_BTD)
    found, _ = model.layers[1]._feed_forward(torch.from_numpy(x_BTD), None)
    assert np.abs(found.detach().numpy() - expected).max() < EXACT
