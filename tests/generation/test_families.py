"""In every family: a cache, a batch and its unequal lengths change nothing."""

from __future__ import annotations

import sys

import pytest
import torch

from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.generation import generate
from colossus.generation.ready import make_ready
from colossus.models import Decoder, KVCache, build
from colossus.models.linear import Linear
from tests.generation.families import NAMES, WINDOW, seen, tiny

TOKENIZER = BytesTokenizer()
PROMPTS = ["", "a b", "def f(x):", "x  y" * 9, "0123456789 0123456789"]
NOISE = 1.5  # times what bf16 alone changes, without a cache; at most 1.2 by norm where it was measured


def model_of(name: str) -> Decoder:
    torch.set_num_threads(1)
    model = build(tiny(name, TOKENIZER.vocab_size), seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim == 1 and key.rpartition(".")[2] in ("bias", "sinks", "selection_bias"):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))  # else 0: unseen
    return model.eval()


def without_cache(model: Decoder, prompt: str, max_tokens: int) -> str:
    """Greedy, one prompt alone, the whole window read again for every token."""
    tokens = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt)]
    length = len(tokens)
    while len(tokens) < length + max_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([seen(tokens, WINDOW)]))[0, -1].argmax())
        if token == TOKENIZER.eos_id:
            break
        tokens.append(token)
    return TOKENIZER.decode(tokens[length:])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_together_and_cached_equals_alone_without_a_cache(
    name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the window too, and with rows that wait for the end of others."""
    monkeypatch.setattr(sys.modules["colossus.generation.generate"], "MAX_ROWS", 3)  # else the function
    model = model_of(name)
    expected = [without_cache(model, prompt, 30) for prompt in PROMPTS]
    if packed:
        monkeypatch.setattr("colossus.generation.ready._packs", lambda model, dtype: True)
        make_ready(model, torch.float32)
        assert model.copies is not None
        linears = [module for module in model.modules() if isinstance(module, Linear)]
        with model.copies.serving():
            copies = [
                copy for linear in linears for copy in (linear.packed, linear.fused) if copy is not None
            ]
        assert sum(len(copy.widths) for copy in copies) == len(linears)
    assert generate(model, TOKENIZER, PROMPTS, max_tokens=30) == expected
    assert len(set(expected)) == len(expected)  # or equality would say little


def alone(model: Decoder, tokens_BT: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits of three tokens behind so many of each row, each by itself and without a cache: [B, 3, V]."""
    rows = [model(tokens_BT[row : row + 1, : length + 3])[:, -3:] for row, length in enumerate(lengths)]
    return torch.cat(rows).float()


def cached(
    model: Decoder, tokens_BT: torch.Tensor, lengths: list[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The same, all rows together: read at once, shorter ones filled up, and then token by token."""
    cache = KVCache(model.arch, len(lengths), WINDOW, dtype)
    model(tokens_BT[:, : max(lengths)], cache=cache.rows(0, len(lengths), max(lengths)))
    cache.lengths = list(lengths)
    steps = []
    for step in range(3):
        now = [tokens_BT[row, length + step] for row, length in enumerate(lengths)]
        steps.append(model(torch.stack(now)[:, None], cache=cache).float())
    assert cache.lengths == [length + 3 for length in lengths]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_unequal_lengths_have_the_logits_of_each_alone(name: str) -> None:
    """In fp32 to rounding. In bf16 the cache adds nothing to what the type itself costs: by the median over
    tokens, since a token that rounding sends to another expert is off by far, with a cache or without."""
    model, lengths = model_of(name), [3, 11, 7]
    tokens_BT = torch.randint(40, 250, (3, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = alone(model, tokens_BT, lengths)
        assert (cached(model, tokens_BT, lengths) - exact).abs().max() <= 1e-5 * exact.abs().max()
        make_ready(model, torch.bfloat16)
        assert model(tokens_BT).dtype == torch.bfloat16
        noise = alone(model, tokens_BT, lengths) - exact
        for dtype in (torch.float32, torch.bfloat16):  # of the cache
            found = cached(model, tokens_BT, lengths, dtype) - exact
            assert 0 < found.norm(dim=-1).median() <= NOISE * noise.norm(dim=-1).median()
    assert (
        noise.norm(dim=-1).median() <= 0.1 * exact.norm(dim=-1).median()
    )  # a yardstick that means something
