"""Masks by blocks against masks of all pairs. On a processor PyTorch's kernel has no backward pass, but its
reference has one that PyTorch refuses to take: here it is let do so. The kernel itself: see `test_on_gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from colossus.architecture import Architecture
from colossus.models import build
from colossus.models import sight as sight_module
from colossus.models.attend import Scores, attend
from colossus.models.block_mask import BLOCK, block_mask
from colossus.models.sight import sight
from colossus.parallel.context import METHODS, Gathered
from tests.models.reference import architecture, random_tokens
from tests.perf.tiny import PRESETS, tiny

ROWS = 2


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield


def draw(length: int) -> torch.Generator:
    return torch.Generator().manual_seed(length)


def packed(length: int) -> torch.Tensor:
    """Documents of 1 to 200 tokens, one after another."""
    ends = torch.randint(1, 200, (ROWS, length), generator=draw(length)).cumsum(-1)
    return torch.searchsorted(ends, torch.arange(length).expand(ROWS, -1).contiguous(), right=True)


def pairs(
    positions: torch.Tensor,
    length: int,
    window: int | None,
    documents: torch.Tensor | None,
    visible: torch.Tensor | None,
) -> torch.Tensor:
    """[B, T, S], as it is defined."""
    behind = (positions[:, None] - torch.arange(length)).expand(ROWS, -1, -1)
    may = behind >= 0
    if window is not None:
        may = may & (behind < window)
    if documents is not None:
        may = may & (documents[:, positions].unsqueeze(2) == documents.unsqueeze(1))
    if visible is not None:
        may = may & (visible.unsqueeze(1) | (behind == 0))
    return may


def in_blocks(may_BTS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks have any pair, and which have all."""
    short = [-may_BTS.shape[dim] % BLOCK for dim in (2, 1)]
    padded = torch.nn.functional.pad(may_BTS, (0, short[0], 0, short[1]))
    blocks = padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    return blocks.any(dim=(2, 4)), blocks.all(dim=(2, 4))


def listed(number: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """The blocks of a list, as a table of all."""
    places = torch.arange(which.shape[-1]) < number.unsqueeze(-1)
    return torch.zeros_like(which).scatter(-1, which.long(), places.int())[:, 0].bool()


RULES = ("", "window", "documents", "pads", "window documents", "window documents pads", "mixed documents")


def given(rule: str, length: int) -> dict[str, Any]:
    documents = packed(length) if "documents" in rule else None
    if "mixed" in rule:  # no document in one piece
        documents = torch.randint(3, (ROWS, length), generator=draw(1))
    visible = torch.rand(ROWS, length, generator=draw(2)) > 0.1 if "pads" in rule else None
    if visible is not None:
        visible[0, :300] = False
        visible[1, 128:] = True
    return {"window": 70 if "window" in rule else None, "documents": documents, "visible": visible}


@pytest.mark.parametrize(
    ("length", "shared"), [(1, False), (127, False), (128, True), (500, False), (1000, True), (1024, False)]
)
@pytest.mark.parametrize("rule", RULES)
def test_blocks_have_the_pairs_that_look(rule: str, length: int, shared: bool) -> None:
    """shared: of the second of four ranks."""
    rules, positions = given(rule, length), torch.arange(length)
    if shared:
        positions = torch.cat([positions.chunk(8)[1], positions.chunk(8)[6]])
    want = pairs(positions, length, **rules)
    mask = block_mask(positions, length, rules["window"], rules["documents"], rules["visible"])
    found = flex.create_mask(mask.mask_mod, ROWS, 1, len(positions), length, device="cpu")
    assert torch.equal(found[:, 0], want)
    any_BQK, all_BQK = in_blocks(want)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices).expand_as(all_BQK)  # type: ignore[arg-type]
    partly = listed(mask.kv_num_blocks, mask.kv_indices).expand_as(all_BQK)
    assert not (whole & ~all_BQK).any() and not (whole & partly).any()
    assert not (any_BQK & ~(whole | partly)).any()
    if "mixed" not in rule and "pads" not in rule and not shared:  # and no more than these
        assert torch.equal(whole, all_BQK) and torch.equal(partly, any_BQK & ~all_BQK)
        theirs = flex.create_block_mask(mask.mask_mod, ROWS, 1, length, length, device="cpu")
        assert torch.equal(theirs.to_dense(), mask.to_dense().expand(ROWS, -1, -1, -1))


def test_blocks_of_long_sequences_are_few_and_small() -> None:
    """What is built for 32,768 tokens never has all pairs, and of a window keeps its blocks alone."""
    length = 32_768
    mask = block_mask(torch.arange(length), length, window=1024, documents_BS=packed(length))
    assert max(tensor.numel() for tensor in mask.as_tuple() if isinstance(tensor, torch.Tensor)) <= (
        ROWS * (length // BLOCK) ** 2
    )
    assert int((mask.kv_num_blocks + mask.full_kv_num_blocks).max()) <= 3


SCORES = {
    "plain": {},
    "cap": {"cap": 3.0},
    "temperature": {"heat": torch.linspace(0.5, 2.0, 300)},
    "sinks": {"sinks": torch.tensor([-1.0, 0.0, 2.0, 5.0])},
    "all": {"cap": 3.0, "heat": torch.linspace(2.0, 0.5, 300), "sinks": torch.tensor([0.5, 0.0, 2.0, -5.0])},
}


@pytest.mark.parametrize("which", SCORES)
@pytest.mark.parametrize("v_width", [16, 24])
def test_attention_by_blocks_is_attention(which: str, v_width: int) -> None:
    length, special = 300, SCORES[which]
    q = torch.randn(ROWS, 4, length, 16, generator=draw(0))
    k, v = (torch.randn(ROWS, 2, length, width, generator=draw(width)) for width in (16, v_width))
    scores, documents = Scores(0.7, special.get("cap")), packed(length)  # type: ignore[arg-type]
    more = (scores, special.get("heat"), special.get("sinks"))
    dense = pairs(torch.arange(length), length, 40, documents, None).unsqueeze(1)
    want = attend(q.double(), k.double(), v.double(), dense, *more)  # type: ignore[arg-type]
    found = attend(q, k, v, block_mask(torch.arange(length), length, 40, documents), *more)  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5)


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(sight_module, "_takes_blocks", lambda *_: True)
    return monkeypatch


def passes(arch: Architecture, documents: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The loss, and all gradients."""
    tokens, targets = (random_tokens(arch, ROWS, 300, seed=seed) for seed in (0, 1))
    model = build(arch, seed=0)
    loss, count = model(tokens, targets, documents)
    (loss / count).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach() / count} | found


def assert_same_passes(arch: Architecture, documents: torch.Tensor | None, patch: pytest.MonkeyPatch) -> None:
    found = passes(arch, documents)
    patch.setattr(sight_module, "_takes_blocks", lambda *_: False)
    for name, want in passes(arch, documents).items():
        torch.testing.assert_close(found[name], want, rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("preset", "documents"), [(p, True) for p in PRESETS] + [("gpt-oss-20b", False), ("grok-2", False)]
)
def test_every_family_has_the_same_loss_and_gradients(
    preset: str, documents: bool, by_blocks: pytest.MonkeyPatch
) -> None:
    assert_same_passes(tiny(preset, num_layers=3), packed(300) if documents else None, by_blocks)


def test_pads_are_looked_at_by_none(by_blocks: pytest.MonkeyPatch) -> None:
    arch = architecture(pad_token=3, window=20, full_attention_every=2, max_seq_len=512)
    assert_same_passes(arch, None, by_blocks)


def test_other_documents_compile_nothing_anew() -> None:
    """Each step has a mask of its own, whose rule is a function of its own."""
    q = torch.randn(ROWS, 2, 300, 16, generator=draw(0))
    compiled = torch.compile(attend, dynamic=False, backend="eager")
    with torch.compiler.set_stance("default"), torch.no_grad():
        for step in range(3):
            documents = packed(300) // (step + 1)
            mask = block_mask(torch.arange(300), 300, 40, documents)
            dense = pairs(torch.arange(300), 300, 40, documents, None).unsqueeze(1)
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                torch.testing.assert_close(compiled(q, q, q, mask), attend(q, q, q, dense))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_share_tokens_see_the_same(method: str, rank: int, by_blocks: pytest.MonkeyPatch) -> None:
    """The masks of a rank's queries, and for blocks from head and tail what these see."""
    arch = tiny("gpt-oss-20b", window=40)
    tokens, documents = random_tokens(arch, ROWS, 320), packed(320)
    context = METHODS[method](SimpleNamespace(rank=rank, size=2))  # type: ignore[arg-type]
    found = context.sight(arch, tokens, documents, torch.float32)
    by_blocks.setattr(sight_module, "_takes_blocks", lambda *_: False)
    want = context.sight(arch, tokens, documents, torch.float32)
    for ours, dense in ((found.mask, want.mask), (found.windowed_mask, want.windowed_mask)):
        assert isinstance(dense, torch.Tensor) and ours is not None and not isinstance(ours, torch.Tensor)
        shape = (ROWS, 1, dense.shape[-2], dense.shape[-1])
        assert torch.equal(flex.create_mask(ours.mask_mod, *shape, device="cpu"), dense.expand(shape))
        if isinstance(context, Gathered):
            q = torch.randn(ROWS, 4, shape[2], 8, generator=draw(0))
            k, v = (torch.randn(ROWS, 2, 320, 8, generator=draw(seed)) for seed in (1, 2))
            more = (Scores(0.5), None, torch.tensor([0.0, 1.0, 2.0, 3.0]))
            torch.testing.assert_close(
                context.attend(q, k, v, ours, *more), context.attend(q, k, v, dense, *more)
            )


def test_only_gpus_and_long_sequences_take_blocks() -> None:
    arch = tiny("mistral-7b-v0.1", head_dim=16)
    taken = sight_module._takes_blocks
    cuda, cpu = "cuda", "cpu"
    assert taken(arch, 1025, cuda, None, torch.float32)
    assert not taken(arch, 1025, cpu, None, torch.float32)
    assert not taken(arch, 1024, cuda, None, torch.float32)
    assert not taken(arch, 1025, cuda, None, torch.float64)
    assert not taken(tiny("mistral-7b-v0.1"), 1025, cuda, None, torch.float32)
    seen = sight(arch, random_tokens(arch, 1, 1030), None, None, torch.float32)
    assert isinstance(seen.windowed_mask, torch.Tensor)
