"""Keys and values of earlier tokens: where they lie, how long they stay, what they take."""

from __future__ import annotations

import pytest
import torch

from colossus.models.cache import KVCache, row_bytes
from tests.models.reference import architecture
from tests.perf.tiny import tiny

ARCHS = {"heads": architecture(), "latent": tiny("deepseek-v3")}


def keys(cache: KVCache) -> list[torch.Tensor]:
    return [buffer for buffers in cache._layers for buffer in buffers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS.keys())
def test_a_full_cache_takes_what_was_foretold(arch, dtype: torch.dtype) -> None:
    cache = KVCache(arch, 3, 64, dtype)
    cache.reserve(64)
    assert sum(buffer.nbytes for buffer in keys(cache)) == 3 * row_bytes(arch, 64, dtype)


def test_what_it_holds_stays_as_it_grows_and_rows_of_other_lengths_go_on_at_their_ends() -> None:
    """Rows of 40 and 3 tokens; two tokens come, then 50, which need more room."""
    arch = architecture()
    shape = (2, arch.num_kv_heads, arch.head_dim)
    cache = KVCache(arch, 2, 200)
    expected: list[list[torch.Tensor]] = [[], []]

    def put(num_new: int, seed: int) -> None:
        cache.reserve(num_new)
        for layer in range(arch.num_layers):
            draw = torch.Generator().manual_seed(100 * seed + layer)
            new = torch.randn(shape[0], shape[1], num_new, shape[2], generator=draw)
            cache.append(layer, new, new + 1)
            if layer == 1:
                for row in range(2):
                    expected[row] += list(new[row].unbind(1))
        cache.advance(num_new)

    put(40, 0)
    cache.lengths[1] = 3
    del expected[1][3:]
    put(2, 1)
    put(50, 2)
    assert cache.lengths == [92, 55] and cache.capacity >= 92
    held, plus_one = cache._layers[1]
    for row, length in enumerate(cache.lengths):
        assert torch.equal(held[row, :, :length], torch.stack(expected[row], 1))
        assert torch.equal(plus_one[row, :, :length], torch.stack(expected[row], 1) + 1)


def test_a_part_of_the_rows_has_their_lengths() -> None:
    cache = KVCache(architecture(), 3, 64)
    cache.reserve(20)
    cache.lengths = [5, 9, 20]
    assert cache.kept([2, 0]).lengths == [20, 5]
    assert cache.rows(1, 3, 20).lengths == [0, 0]
    with pytest.raises(AssertionError, match="cannot hold 65"):
        cache.reserve(45)
