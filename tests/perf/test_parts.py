"""The table of parts: its sums, keys of windows and blocks by counting, saved bytes against real passes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.architecture import num_active, parameter_table
from colossus.derive.dial import shape
from colossus.measure.machine import this_machine
from colossus.models import Decoder, build
from colossus.models.block_mask import block_mask
from colossus.models.rope import rotations
from colossus.models.sight import sight
from colossus.parallel.binaries import choose_cache
from colossus.perf.flops import saved_bytes_per_token
from colossus.perf.parts import (
    BLOCK,
    BY_BLOCKS,
    FUSED,
    ROWS,
    Kernel,
    computed_keys,
    executed_keys,
    kernel_of,
    layer_kinds,
    model_keys,
    parts,
)
from tests.models.reference import architecture, random_tokens
from tests.perf.tiny import PRESETS, tiny


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 320))
def test_a_window_counts_the_keys_inside_it(seq_len: int, window: int) -> None:
    """At most half of the square, which is what a layer without a window counts."""
    by_hand = sum(min(position, window) for position in range(1, seq_len + 1)) / seq_len
    assert model_keys(seq_len, window) == pytest.approx(min(by_hand, seq_len / 2), rel=1e-12)
    assert model_keys(seq_len) == seq_len / 2


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 320))
def test_a_block_of_queries_meets_the_keys_up_to_its_end(seq_len: int, rows: int) -> None:
    by_hand = sum(min((query // rows + 1) * rows, seq_len) for query in range(seq_len)) / seq_len
    assert executed_keys(seq_len, Kernel(rows=rows)) == pytest.approx(by_hand, rel=1e-12)
    assert executed_keys(seq_len) == executed_keys(seq_len, FUSED) == seq_len


@pytest.mark.parametrize("seq_len", [1, 128, 1000, 1025, 2048])
@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, 130, 512, 999])
def test_a_window_takes_the_time_of_the_blocks_that_it_touches(seq_len: int, window: int) -> None:
    """As many as the program's own mask has for a GPU's kernel."""
    mask = block_mask(torch.arange(seq_len), seq_len, window)
    assert mask.full_kv_num_blocks is not None
    touched = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    found = computed_keys(seq_len, window, BY_BLOCKS)
    assert found == (seq_len / 2 if window >= seq_len else touched * BLOCK**2 / seq_len)


def test_what_skips_nothing_takes_the_time_of_all_that_it_computes() -> None:
    """A mask of all pairs that of the square, a processor's products by rows that of the causal half."""
    assert computed_keys(1024, 128, FUSED) == 1024
    assert computed_keys(1024, 128, Kernel(rows=ROWS)) == 512
    assert computed_keys(1024, None, FUSED) == computed_keys(1024, 1024, BY_BLOCKS) == 512


def test_windows_count_in_their_layers_alone() -> None:
    """gpt-oss: of 5 layers those with even numbers have a window of 5 tokens."""
    arch, seq_len = tiny("gpt-oss-20b"), 64
    assert {kind.windowed: layers for kind, layers in layer_kinds(arch).items()} == {
        True: [0, 2, 4],
        False: [1, 3],
    }
    scores = {p.kind.windowed: p for p in parts(arch, seq_len) if p.kind and p.name == "attention.scores"}
    inside = 2 * 4 * 8 * (1 + 2 + 3 + 4 + 60 * 5) / 64
    sinks = 2 * 4
    assert scores[True].model == pytest.approx(inside + sinks) and scores[True].repeat == 3
    assert scores[False].model == 2 * 4 * 8 * 32 + sinks
    assert scores[True].executed == scores[False].executed == 2 * 4 * 8 * 64


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_belongs_to_a_part(preset: str) -> None:
    """Weights are read once a token: active ones, of embeddings one row, a tied output matrix as the head."""
    arch = tiny(preset)
    read = sum(part.repeat * part.weight_bytes for part in parts(arch, 16, type_bytes=2))
    rows = sum(p.shape[1] for p in parameter_table(arch) if p.group == "embedding")
    assert read == 2 * (num_active(arch, input_embedding=False) + rows)
    for part in parts(arch, 16):
        assert 0 <= part.saved_bytes <= part.written_bytes, part


def test_parts_come_in_the_order_of_the_forward_pass() -> None:
    arch = tiny("deepseek-v3")
    found = [part.name for part in parts(arch, 16) if part.kind is None or part.kind.experts]
    assert found == [
        "embedding", "attention_norm", "attention.wq_down", "attention.q_norm", "attention.wq_up",
        "attention.wkv_down", "attention.kv_norm", "attention.wkv_up", "attention.rotary",
        "attention.scores", "attention.values", "attention.wo", "attention_residual", "mlp_norm",
        "moe.router", "moe.experts.rows", "moe.experts.w_gate", "moe.experts.w_up", "moe.experts.gated",
        "moe.experts.w_down", "moe.experts.sum", "moe.shared.w_gate", "moe.shared.w_up", "moe.shared.gated",
        "moe.shared.w_down", "mlp_residual", "norm", "head",
    ]  # fmt: skip
    for preset in PRESETS:
        repeats = Counter((p.name, p.kind) for p in parts(tiny(preset), 16))
        assert max(repeats.values()) == 1


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("length", "type"), [(17, "float32"), (300, "float32"), (17, "bfloat16")])
def test_saved_bytes_are_those_that_autograd_keeps(preset: str, length: int, type: str) -> None:
    """All but what a batch keeps once for all layers: ids, positions or angles. What casts weights keeps
    them too, which is no activation."""
    arch = tiny(preset)
    model, tokens_BT = build(arch, seed=0), random_tokens(arch, 2, length)
    model.compute_dtype = getattr(torch, type)
    table = parts(
        arch, length, kernel=kernel_of(arch, length, "cpu"), type_bytes=model.compute_dtype.itemsize
    )
    ours = sum(part.repeat * part.saved_bytes for part in table if part.name != "head")
    place = torch.arange(length)
    angles = rotations(arch, place, torch.float32) if arch.position == "rope" else place
    once = (tokens_BT.nbytes + angles.nbytes) / tokens_BT.numel()
    tolerance = 0.001 if type == "float32" else 0.04
    assert kept_bytes(model, tokens_BT) / tokens_BT.numel() - once == pytest.approx(ours, rel=tolerance)


def test_a_z_loss_of_routers_keeps_what_autograd_keeps_for_it() -> None:
    """The logits of each token, and their sum of exponentials: 5 layers, 8 experts, fp32."""
    settings = tiny("mixtral-8x7b").experts
    assert settings is not None
    ours, theirs = [], []
    for z_loss in (0.0, 1e-3):
        experts = settings.model_copy(update={"z_loss": z_loss, "balance_loss": 0.0})
        arch = tiny("mixtral-8x7b").model_copy(update={"experts": experts})
        tokens_BT = random_tokens(arch, 2, 17)
        ours.append(sum(part.repeat * part.saved_bytes for part in parts(arch, 17)))
        theirs.append(kept_bytes(build(arch, seed=0), tokens_BT, torch.full((2,), 1 / 34)) / 34)
    assert ours[1] - ours[0] == 5 * 4 * (8 + 1)
    assert theirs[1] - theirs[0] == pytest.approx(5 * 4 * (8 + 1), rel=0.01)


def kept_bytes(model: Decoder, tokens_BT: torch.Tensor, token_share: torch.Tensor | None = None) -> int:
    """Of all storages that the backward pass waits for, but for weights and their casts."""
    tensors = [*model.parameters(), *model.buffers()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    shapes = {tuple(t.shape) for t in tensors} | {tuple(t.mT.shape) for t in tensors if t.ndim > 1}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(tokens_BT, token_share=token_share)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("width", [192, 256, 512, 1024])
def test_the_default_model_keeps_about_what_korthikanti_et_al_count(width: int) -> None:
    """Korthikanti et al. 2022 (arXiv 2205.05198, section 4): 16 widths of fp32 a layer where attention
    keeps no scores, and the three products of SwiGLU; here heads are normalised and 256 scores kept."""
    sizes = shape(width, 4096, 256)
    heads = width // sizes["head_dim"]
    arch = architecture(**sizes, num_heads=heads, num_kv_heads=heads // 2 or 1, qk_norm=True)
    published = 4 * arch.num_layers * (16 * width + 4 * arch.intermediate_size)
    found = saved_bytes_per_token(arch, 256, kernel=Kernel(rows=256))
    assert found == pytest.approx(published, rel=0.12)


@pytest.mark.skipif(this_machine().compiler is None, reason="needs a C++ compiler")
def test_what_the_compiler_saves_of_a_layer() -> None:
    """Counted on a compiled layer, by the storages that wait for its backward pass."""
    tokens = 1152  # beyond those whose attention is made of plain products
    arch = tiny("llama3.1-8b", hidden_size=64, head_dim=16, intermediate_size=160, num_layers=1, qk_norm=True)
    layer = build(arch, seed=0).layers[0]
    choose_cache()
    layer.compile(dynamic=False)
    seen = sight(arch, torch.zeros(1, tokens, dtype=torch.long), None, None, torch.float32)
    x_BTD = torch.randn(1, tokens, arch.hidden_size).bfloat16().requires_grad_()
    saved: dict[int, int] = {}
    weights = {tuple(weight.shape) for weight in layer.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        angles = tensor.shape[-1] == arch.head_dim // 2  # of positions: one tensor for all layers
        if tuple(tensor.shape) not in weights and not angles:  # nor the weights' copies in bf16
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x_BTD, seen)
    want = sum(
        part.saved_bytes * tokens
        for part in parts(arch, tokens, kernel=kernel_of(arch, tokens, "cpu"), type_bytes=2, compiled=True)
        if part.kind is not None
    )
    assert sum(saved.values()) == want


@pytest.mark.parametrize("preset", ["gpt-oss-20b", "grok-2", "mistral-7b-v0.1"])
def test_on_a_gpu_long_sequences_keep_no_shares_whatever_their_scores(preset: str) -> None:
    """Of few tokens special scores are plain products; so they are of heads that no kernel takes."""
    arch = tiny(preset, head_dim=16)
    special = preset != "mistral-7b-v0.1"
    assert kernel_of(arch, 1025, "cuda") == BY_BLOCKS
    for length, device, model in ((1024, "cuda", arch), (1025, "cpu", arch), (1025, "cuda", tiny(preset))):
        assert kernel_of(model, length, device) == (Kernel(rows=ROWS) if special else FUSED)


def test_sinks_keep_what_they_leave_of_each_head() -> None:
    """Beside a fused kernel's output and sums in fp32: the output that is left, and what share of it in fp32
    and in bf16."""
    with_sinks, without = tiny("gpt-oss-20b"), tiny("gpt-oss-20b", attention_sinks=False)
    values = [
        next(p for p in parts(arch, 2048, kernel=FUSED, type_bytes=2) if p.name == "attention.values")
        for arch in (with_sinks, without)
    ]
    assert values[1].saved_bytes == 4 * (8 * 2 + 4)
    assert values[0].saved_bytes - values[1].saved_bytes == 4 * (8 * 2 + 4 + 2)


def test_what_a_layer_and_the_head_write_of_a_token() -> None:
    """Llama in bf16: width 32, 4 heads of 8, 2 of keys and values, 48 in the middle, 61 tokens; 16 keys."""
    written = {p.name: p.written_bytes for p in parts(tiny("llama3.1-8b"), 16, type_bytes=2)}
    norm = 4 * (32 + 32 + 1) + 2 * 32  # in fp32: what comes in, what is scaled, the root; and the output
    scores = 2 * (3 * 32 + 4 * 16 + 4 * 16)  # copies of queries, keys, values for 4 heads; scores; shares
    assert written == {
        "embedding": 2 * 32,
        "attention_norm": norm,
        "attention.wq": 2 * 32,
        "attention.wk": 2 * 16,
        "attention.wv": 2 * 16,
        "attention.rotary": 2 * (32 + 16),
        "attention.scores": scores,
        "attention.values": 2 * 32,
        "attention.wo": 2 * 32,
        "attention_residual": 2 * 32,
        "mlp_norm": norm,
        "mlp.w_gate": 2 * 48,
        "mlp.w_up": 2 * 48,
        "mlp.gated": 2 * (48 + 48),
        "mlp.w_down": 2 * 32,
        "mlp_residual": 2 * 32,
        "norm": norm,
        "head": 2 * (61 + 32),  # logits, and the gradient of its input, which the chunked loss makes at once
    }
