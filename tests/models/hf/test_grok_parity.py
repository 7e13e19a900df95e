"""Our decoder with Grok's weights, against references in float64 that were written apart from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from colossus.models.hf import grok2 as published2
from tests.models.hf.groks import decoder, grok1_difference, grok2_difference, tokens
from tests.models.references import grok1, grok2

EXACT = 1e-9  # in float64, beside the fp32 in which frequencies are computed


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("batch", "length", "pads"), [(1, 1, False), (2, 17, False), (3, 40, True)])
def test_grok1(
    tmp_path: Path, dtype: torch.dtype, allowed: float, batch: int, length: int, pads: bool
) -> None:
    drawn = tokens(batch, length, grok1.config().vocab_size, 2, pads)
    assert grok1_difference(tmp_path, 1, dtype, drawn) < allowed


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 17), (3, 40)])
def test_grok2(
    tmp_path: Path, dtype: torch.dtype, allowed: float, gelu: str, batch: int, length: int
) -> None:
    drawn = tokens(batch, length, grok2.config().vocab_size, 2)
    assert grok2_difference(tmp_path, 1, dtype, drawn, gelu) < allowed


def test_grok2s_mlp_and_experts_are_summed_as_the_reference_sums_them(tmp_path: Path) -> None:
    """The norm behind them hides a wrong factor from the logits."""
    config = grok2.config()
    weights = grok2.write_checkpoint(config, grok2.random_weights(config, 1), tmp_path)
    model = decoder(*published2.as_ours(published2.open_grok2(tmp_path)), torch.float64)
    x_BTD = np.random.default_rng(3).standard_normal((2, 9, config.hidden_size))
    expected = grok2.feed_forward(config, weights, "model.layers.1", x_BTD)
    found, _ = model.layers[1]._feed_forward(torch.from_numpy(x_BTD), None)
    assert np.abs(found.detach().numpy() - expected).max() < EXACT
