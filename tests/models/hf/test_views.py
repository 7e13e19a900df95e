"""Views give what indexing the assembled tensor gives, into any tensor, and read nothing twice."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.models.hf import reading
from colossus.models.hf.reading import open_source
from colossus.models.hf.tensors import InMemory, Readable
from colossus.models.hf.views import Joined, Part, Renamed, Reordered, Stacked, Transposed, _runs
from tests.models.hf.samples import equal, publish

Pair = tuple[Readable, torch.Tensor]


@st.composite
def slices_in(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[slice, ...]:
    bounds = st.none() | st.integers(0, 8)
    return tuple(draw(st.builds(slice, bounds, bounds, st.none() | st.integers(1, 3))) for _ in shape)


@st.composite
def views(draw: st.DrawFn, leaf: st.SearchStrategy[Pair], depth: int = 3) -> Pair:
    """A view of views, and the same tensor assembled in memory."""
    if depth == 0:
        return draw(leaf)
    source, tensor = draw(views(leaf, depth - 1))
    kind = draw(st.sampled_from(["renamed", "transposed", "part", "stacked", "joined", "reordered"]))
    axis = draw(st.integers(0, tensor.ndim - 1))
    if kind == "renamed":
        return Renamed.of("view", source), tensor
    if kind == "transposed":
        return Transposed.of("view", source), tensor.transpose(-1, -2)
    if kind == "part":
        slices = draw(slices_in(tuple(tensor.shape)))
        return Part.of("view", source, slices), tensor[slices]
    if kind == "stacked":
        return Stacked.of("view", [source] * 3), torch.stack([tensor] * 3)
    if kind == "joined":
        part = draw(slices_in(tuple(tensor.shape)))[axis]
        inner = (*(slice(None),) * axis, part)
        sources = [source, Part.of("part", source, inner), source]
        return Joined.of("view", sources, axis), torch.cat([tensor, tensor[inner], tensor], axis)
    order = draw(
        st.lists(st.integers(0, max(tensor.shape[axis] - 1, 0)), max_size=9 if tensor.shape[axis] else 0)
    )
    return Reordered.of("view", source, order, axis), tensor.index_select(
        axis, torch.tensor(order, dtype=torch.long)
    )


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_box_of_any_view(data: st.DataObject) -> None:
    tensor = torch.arange(5 * 4 * 6.0).reshape(5, 4, 6)[: data.draw(st.integers(1, 5))]
    tensor = tensor if data.draw(st.booleans()) else tensor[0].clone()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "GAP_BYTES", data.draw(st.integers(0, 64)))
        source = open_source(publish(Path(folder), {"t": tensor}))["t"]
        view, expected = data.draw(views(st.just((source, tensor))))
        assert (view.shape, view.dtype) == (tuple(expected.shape), expected.dtype)
        slices = data.draw(slices_in(view.shape))
        assert equal(view.read(slices), expected[slices])
        wider = torch.full((*expected[slices].shape, 2), -1, dtype=torch.int64)
        view.read_into(wider[..., 1], slices)
        assert torch.equal(wider[..., 1], expected[slices].long())
        assert bool((wider[..., 0] == -1).all())


def test_heads_interleaved_and_parted_are_one_box_a_half() -> None:
    rows = torch.arange(3 * 8)
    interleaved = rows.view(3, 2, 4).transpose(1, 2).reshape(-1)
    parted = rows.view(3, 4, 2).transpose(1, 2).reshape(-1)
    source = InMemory.of("w", torch.randn(24, 5))
    for order in (interleaved, parted):
        assert equal(Reordered.of("w", source, order.tolist()).read(), source.values[order])
        by_source = order.argsort()
        runs = min(
            _runs(order.numpy(), rows.numpy()), _runs(order[by_source].numpy(), by_source.numpy()), key=len
        )
        assert len(runs) == 6


def test_what_does_not_fit() -> None:
    a, b = InMemory.of("a", torch.ones(2, 3)), InMemory.of("b", torch.ones(2, 4))
    with pytest.raises(AssertionError, match="cannot be stacked"):
        Stacked.of("c", [a, b])
    with pytest.raises(AssertionError, match="does not fit"):
        Joined.of("c", [a, b])
    with pytest.raises(AssertionError, match="an index beyond the 2 of a"):
        Reordered.of("c", a, [0, 2])
    assert Joined.of("c", [a, b], axis=1).shape == (2, 7)


def test_a_fused_gate_of_experts(tmp_path: Path) -> None:
    """gpt-oss: gate and up take turns in the columns of [X, D, 2F]; ours are [X, F, D] each."""
    fused = torch.randn(4, 16, 12)
    source = open_source(publish(tmp_path, {"gate_up_proj": fused}))["gate_up_proj"]
    for first in (0, 1):
        ours = Transposed.of(
            "ours", Part.of("part", source, (slice(None), slice(None), slice(first, None, 2)))
        )
        assert equal(ours.read(), fused[:, :, first::2].transpose(1, 2))
        assert equal(ours.read((slice(1, 3), slice(2, 5))), fused[:, :, first::2].transpose(1, 2)[1:3, 2:5])
