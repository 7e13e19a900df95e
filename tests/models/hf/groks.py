"""Our decoder with the weights of a published checkpoint of Grok, and how far it is from a reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from colossus.architecture import Architecture, parameter_table
from colossus.models import Decoder, build
from colossus.models.hf import grok1 as published1
from colossus.models.hf import grok2 as published2
from colossus.models.hf.tensors import Readable
from tests.models.references import grok1, grok2

PLAIN = ("/embeddings", "/scale", "router/w")  # of Grok-1: what is not quantised


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
    """The largest of a logit, in units of the root mean square of all: Grok-1's is a tenth by its multiplier,
    Grok-2's is ten, so that its cap acts."""
    with torch.no_grad():
        found_BTV = model(torch.from_numpy(tokens_BT)).double().numpy()
    learned = tokens_BT != 0  # what a pad says of the next token is not defined
    largest = np.abs(found_BTV - expected_BTV)[learned].max()
    return float(largest / np.sqrt(np.square(expected_BTV).mean()))


def grok1_difference(folder: Path, seed: int, dtype: torch.dtype, drawn_BT: np.ndarray) -> float:
    """Of the logits of a small Grok-1, by way of its published form. Quantised weights are rounded to bf16,
    as xAI's code rounds them."""
    config = grok1.config()
    read = grok1.write_checkpoint(config, grok1.random_weights(config, seed), folder)
    weights = {
        name: w if name.endswith(PLAIN) else torch.from_numpy(w).bfloat16().double().numpy()
        for name, w in read.items()
    }
    model = decoder(*published1.as_ours(published1.open_grok1(folder), config.head_dim), dtype)
    expected_BTV = grok1.logits(config, weights, drawn_BT)
    assert np.abs(expected_BTV).max() > 0.1, "logits that say nothing"
    return difference(model, drawn_BT, expected_BTV)


def grok2_difference(
    folder: Path, seed: int, dtype: torch.dtype, drawn_BT: np.ndarray, gelu: str = "tanh"
) -> float:
    """Of the logits of a small Grok-2, by way of its published form."""
    config = grok2.config(gelu=gelu)
    weights = grok2.write_checkpoint(config, grok2.random_weights(config, seed), folder)
    arch, tensors = published2.as_ours(published2.open_grok2(folder))
    model = decoder(arch.model_copy(update={"gelu": gelu}), tensors, dtype)
    expected_BTV = grok2.logits(config, weights, drawn_BT)
    assert np.abs(expected_BTV).max() > 0.1, "logits that say nothing"
    return difference(model, drawn_BT, expected_BTV)
