"""The references themselves: against torch, against each other, by hand, and the files that they write."""

from __future__ import annotations

import io
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.models.references import grok1, grok2, parts

Array = np.ndarray
GELUS: tuple[parts.Gelu, ...] = ("tanh", "erf")


def random_tokens(vocab_size: int, seed: int = 0, num_sequences: int = 2, num_tokens: int = 9) -> Array:
    """Without token 0, which Grok-1 takes for padding."""
    return np.random.default_rng(seed).integers(1, vocab_size, (num_sequences, num_tokens))


# --- parts


def test_rotation_keeps_norms_and_depends_on_distances_alone() -> None:
    draw = np.random.default_rng(0)
    q, k = draw.standard_normal((2, 1, 6, 2, 8))
    turned_q, turned_k = parts.rotate(q, 100.0), parts.rotate(k, 100.0)
    np.testing.assert_allclose(np.linalg.norm(turned_q, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-13)
    later_q, later_k = parts.rotate(q, 100.0, first=11), parts.rotate(k, 100.0, first=11)
    scores = np.einsum("bthe,bshe->bhts", turned_q, turned_k)
    np.testing.assert_allclose(np.einsum("bthe,bshe->bhts", later_q, later_k), scores, atol=1e-12)
    moved = np.einsum("bthe,bshe->bhts", later_q, turned_k)
    assert np.max(np.abs(moved - scores)) > 0.1


def test_rotation_pairs_a_dimension_with_the_one_half_the_width_on() -> None:
    turned = parts.rotate(np.eye(4)[None, None], 100.0, first=3)[0, 0]  # every unit vector, at position 3
    fast, slow = 3.0, 3.0 * 100.0**-0.5
    expected = [
        [math.cos(fast), 0, math.sin(fast), 0],
        [0, math.cos(slow), 0, math.sin(slow)],
        [-math.sin(fast), 0, math.cos(fast), 0],
        [0, -math.sin(slow), 0, math.cos(slow)],
    ]
    np.testing.assert_allclose(turned, expected, atol=1e-15)


@pytest.mark.parametrize("form", GELUS)
def test_gelu_is_torchs(form: parts.Gelu) -> None:
    x = np.linspace(-6, 6, 101)
    expected = F.gelu(torch.from_numpy(x), approximate="tanh" if form == "tanh" else "none").numpy()
    np.testing.assert_allclose(parts.gelu(x, form), expected, atol=1e-14)


def test_the_chosen_experts_keep_their_probabilities() -> None:
    probabilities = np.array([[0.1, 0.5, 0.15, 0.25], [0.4, 0.4, 0.1, 0.1]])
    weights = parts.expert_weights(np.log(probabilities), 2)
    np.testing.assert_allclose(weights, [[0, 0.5, 0, 0.25], [0.4, 0.4, 0, 0]], rtol=1e-14)


def test_of_equal_experts_the_first_are_taken() -> None:
    np.testing.assert_allclose(parts.expert_weights(np.zeros((1, 4)), 2), [[0.25, 0.25, 0, 0]])


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
def test_bfloat16_is_torchs(numbers: list[float]) -> None:
    expected = torch.tensor(numbers, dtype=torch.float32).to(torch.bfloat16)
    bits = parts.bfloat16_bits(np.array(numbers))
    assert np.array_equal(bits, expected.view(torch.uint16).numpy())
    assert np.array_equal(parts.bfloat16_values(bits), expected.double().numpy())


def test_bfloat16_rounds_ties_to_even() -> None:
    step = 2.0**-7
    found = parts.bfloat16_values(parts.bfloat16_bits(1 + step * np.array([0.5, 1.5, 0.51, -0.25])))
    assert list(found) == [1, 1 + 2 * step, 1 + step, 1]


def test_attention_scales_then_caps_then_heats_then_masks() -> None:
    """Two query heads of width 1 on one key/value head, by hand."""
    q, k, v = np.array([[[[2.0], [-1.0]]] * 3]), np.array([[[[1.0]], [[3.0]], [[9.0]]]]), np.eye(3)
    heat = np.array([1.0, 1.0, 1.5])
    for column in range(3):
        out = parts.attend(q, k, v[:, column].reshape(1, 3, 1, 1), 0.5, 2.0, heat, parts.causal(3)[None])
        for head, query in enumerate((2.0, -1.0)):
            weights = [math.exp(1.5 * 2 * math.tanh(0.5 * query * key / 2)) for key in (1, 3, 9)]
            assert out[0, 2, head] == pytest.approx(weights[column] / sum(weights), rel=1e-14)
            two = [math.exp(2 * math.tanh(0.5 * query * key / 2)) for key in (1, 3)]
            expected = [*(weight / sum(two) for weight in two), 0.0]
            assert out[0, 1, head] == pytest.approx(expected[column], rel=1e-14)


# --- the forward passes


def in_torch(x_BTD: torch.Tensor, w: dict[str, torch.Tensor], width: int, base: float) -> torch.Tensor:
    """Plain grouped attention without a cap, the rotation as a product of complex numbers."""

    def heads(name: str) -> torch.Tensor:
        return (x_BTD @ w[name]).unflatten(-1, (-1, width)).transpose(1, 2)

    def turned(x: torch.Tensor) -> torch.Tensor:
        rates = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(x.shape[2], dtype=torch.float64), rates)
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    mixed = F.scaled_dot_product_attention(
        turned(heads("query")), turned(heads("key")), heads("value"), is_causal=True, enable_gqa=True
    )
    return mixed.transpose(1, 2).flatten(2) @ w["linear"]


def test_grok1_with_one_expert_and_no_cap_is_a_plain_transformer() -> None:
    config = grok1.config(
        num_layers=2,
        num_experts=1,
        num_chosen_experts=1,
        attention_cap=math.inf,
        attention_multiplier=8**-0.5,
    )
    weights = grok1.random_weights(config, 1)
    tokens_BT = random_tokens(config.vocab_size)
    w = {name: torch.from_numpy(value) for name, value in weights.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (config.hidden_size,), w[f"{name}/scale"], config.norm_eps)

    embedding = w["language_model/in_out_embed/embeddings"]
    h = embedding[torch.from_numpy(tokens_BT)] * config.embedding_multiplier
    for layer in range(config.num_layers):
        at = f"transformer/decoder_layer_{layer}"
        of_attention = {
            name: w[f"{at}/multi_head_attention/{name}/w"] for name in ("query", "key", "value", "linear")
        }
        branch = in_torch(norm(h, f"{at}/rms_norm"), of_attention, config.head_dim, config.rope_base)
        h = h + norm(branch, f"{at}/rms_norm_1")
        x = norm(h, f"{at}/rms_norm_2")
        gate, up, down = (w[f"{at}/moe/{name}/w"][0] for name in ("linear", "linear_v", "linear_1"))
        h = h + norm((F.gelu(x @ gate, approximate="tanh") * (x @ up)) @ down, f"{at}/rms_norm_3")
    expected = norm(h, "language_model/rms_norm") @ embedding.T * config.output_multiplier
    np.testing.assert_allclose(
        grok1.logits(config, weights, tokens_BT), expected.numpy(), rtol=1e-10, atol=1e-12
    )


def test_grok2_without_what_it_adds_is_grok1() -> None:
    old = grok1.config(num_layers=2, attention_multiplier=8**-0.5, pad_token=-1)
    new = grok2.config(
        num_hidden_layers=2,
        moe_intermediate_size=old.expert_size,
        embedding_multiplier_scale=old.embedding_multiplier,
        output_multiplier_scale=old.output_multiplier,
        rope_theta=old.rope_base,
        router_logit_softcapping=math.inf,
        final_logit_softcapping=math.inf,
        attn_temperature_len=0,
        residual_moe_scale=1.0,
    )
    weights = grok1.random_weights(old, 2)
    translated = as_grok2(old, weights) | no_dense_layer(new)
    assert {name: value.shape for name, value in translated.items()} == grok2.shapes(new)
    tokens_BT = random_tokens(old.vocab_size)
    expected = grok1.logits(old, weights, tokens_BT)
    np.testing.assert_allclose(grok2.logits(new, translated, tokens_BT), expected, rtol=1e-10, atol=1e-12)


def as_grok2(config: grok1.Config, weights: dict[str, Array]) -> dict[str, Array]:
    embedding = weights["language_model/in_out_embed/embeddings"]
    found = {"model.embed_tokens": embedding, "lm_head": embedding}
    found["model.norm"] = weights["language_model/rms_norm/scale"]
    norms = ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm")
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "linear": "o_proj"}
    for layer in range(config.num_layers):
        at, to = f"transformer/decoder_layer_{layer}", f"model.layers.{layer}"
        for name, suffix in zip(norms, ("", "_1", "_2", "_3"), strict=True):
            found[f"{to}.{name}"] = weights[f"{at}/rms_norm{suffix}/scale"]
        for theirs, name in projections.items():
            found[f"{to}.self_attn.{name}"] = weights[f"{at}/multi_head_attention/{theirs}/w"].T
        found[f"{to}.block_sparse_moe.gate"] = weights[f"{at}/router/w"].T
        for expert in range(config.num_experts):
            for theirs, name in (("linear", "w1"), ("linear_1", "w2"), ("linear_v", "w3")):
                matrix = weights[f"{at}/moe/{theirs}/w"][expert].T
                found[f"{to}.block_sparse_moe.experts.{expert}.{name}"] = matrix
    return {f"{name}.weight": value for name, value in found.items()}


def no_dense_layer(config: grok2.Config) -> dict[str, Array]:
    return {name: np.zeros(shape) for name, shape in grok2.shapes(config).items() if ".mlp." in name}


def test_grok1_sees_no_pad_token_and_nothing_later() -> None:
    config = grok1.config(num_layers=2)
    weights = grok1.random_weights(config, 3)
    tokens_BT = random_tokens(config.vocab_size)
    tokens_BT[:, 2] = 0
    before = grok1.logits(config, weights, tokens_BT)

    other_pad = {name: value.copy() for name, value in weights.items()}
    other_pad["language_model/in_out_embed/embeddings"][0] += 1.0
    after = grok1.logits(config, other_pad, tokens_BT)
    others = np.arange(tokens_BT.shape[1]) != 2
    assert np.array_equal(after[:, others, 1:], before[:, others, 1:])  # column 0 is the pad's own, tied
    no_pad = replace(config, pad_token=-1)
    assert np.max(np.abs(grok1.logits(no_pad, weights, tokens_BT) - before)[:, 3:]) > 1e-3

    tokens_BT[:, 6] = 5
    np.testing.assert_allclose(grok1.logits(config, weights, tokens_BT)[:, :6], before[:, :6], atol=1e-12)


def test_a_query_that_may_see_nothing_weighs_all_keys_alike() -> None:
    """Grok-1's sequence that begins with the pad token: all of −1e30, so all equal."""
    v = np.random.default_rng(0).standard_normal((1, 3, 1, 4))
    allowed = parts.causal(3)[None] & np.array([False, True, True])
    out = parts.attend(v, v, v, 1.0, 30.0, np.ones(3), allowed)
    np.testing.assert_allclose(out[0, 0], v[0, :, 0].mean(axis=0), rtol=1e-14)


def test_grok2_sees_token_0_but_nothing_later() -> None:
    config = grok2.config()
    weights = grok2.random_weights(config, 4)
    tokens_BT = random_tokens(config.vocab_size)
    before = grok2.logits(config, weights, tokens_BT)
    tokens_BT[:, 6] = 0
    after = grok2.logits(config, weights, tokens_BT)
    np.testing.assert_allclose(after[:, :6], before[:, :6], atol=1e-12)
    weights["model.embed_tokens.weight"][0] += 1.0
    assert np.max(np.abs(grok2.logits(config, weights, tokens_BT) - after)[:, 7:]) > 1e-3


def test_temperature_acts_from_beyond_its_length_on() -> None:
    config = grok2.config(attn_temperature_len=4)
    expected = [1, 1, 1, 1, 1, math.log(5, 4), math.log(6, 4), math.log(7, 4), 1.5]
    np.testing.assert_allclose(grok2.heat(config, 9), expected, rtol=1e-14)
    weights = grok2.random_weights(config, 5)
    tokens_BT = random_tokens(config.vocab_size)
    moved = grok2.logits(config, weights, tokens_BT) - grok2.logits(
        replace(config, attn_temperature_len=0), weights, tokens_BT
    )
    assert not np.any(moved[:, :5])
    assert np.min(np.max(np.abs(moved[:, 5:]), axis=-1)) > 1e-3


def test_grok2s_feed_forward_adds_the_chosen_experts_to_the_dense_layer() -> None:
    """With inputs and weights of one number, by hand."""
    config = grok2.config(
        hidden_size=1,
        intermediate_size=1,
        moe_intermediate_size=1,
        num_local_experts=3,
        router_logit_softcapping=2.0,
        gelu="erf",
    )
    at = "model.layers.0"
    w = {f"{at}.mlp.{name}.weight": np.array([[v]]) for name, v in (("gate_proj", 1.0), ("up_proj", 2.0))}
    w[f"{at}.mlp.down_proj.weight"] = np.array([[3.0]])
    w[f"{at}.block_sparse_moe.gate.weight"] = np.array([[0.0], [8.0], [1.0]])
    for expert in range(3):
        for name, value in (("w1", 1.0), ("w3", 5.0), ("w2", 10.0**expert)):
            w[f"{at}.block_sparse_moe.experts.{expert}.{name}.weight"] = np.array([[value]])
    routed = [math.exp(2 * math.tanh(r / 2)) for r in (0.0, 4.0, 0.5)]  # x = 0.5
    g = 0.25 * (1 + math.erf(0.5 / math.sqrt(2)))
    experts = sum(routed[e] / sum(routed) * g * 2.5 * 10.0**e for e in (1, 2))
    expected = (g * 1.0 * 3.0 + experts) / math.sqrt(2)
    assert grok2.feed_forward(config, w, at, np.array([[[0.5]]])).item() == pytest.approx(expected, rel=1e-14)


def test_every_option_of_grok2_shows_in_its_logits() -> None:
    config = grok2.config()
    weights = grok2.random_weights(config, 6)
    tokens_BT = random_tokens(config.vocab_size)
    usual = grok2.logits(config, weights, tokens_BT)
    assert np.max(np.abs(usual)) < config.final_logit_softcapping
    for field, value, least in (
        ("gelu", "erf", 1e-5),
        ("attn_logit_softcapping", math.inf, 1e-3),
        ("router_logit_softcapping", math.inf, 1e-4),
        ("final_logit_softcapping", math.inf, 1e-2),
        ("output_multiplier_scale", 1.0, 1e-1),
        ("embedding_multiplier_scale", 1.0, 1e-1),
        ("residual_moe_scale", 1.0, 1e-6),  # the norm behind it divides it out, up to eps
        ("num_experts_per_tok", 1, 1e-2),
    ):
        moved = np.max(np.abs(grok2.logits(replace(config, **{field: value}), weights, tokens_BT) - usual))
        assert moved > least, (field, moved)


# --- Grok-1's checkpoint


def test_grok1s_files_come_in_the_order_of_jaxs_flattening() -> None:
    of_layer = ["moe/linear/w", "moe/linear_1/w", "moe/linear_v/w"]
    of_layer += [f"multi_head_attention/{name}/w" for name in ("key", "linear", "query", "value")]
    of_layer += ["rms_norm/scale", "rms_norm_1/scale", "rms_norm_2/scale", "rms_norm_3/scale", "router/w"]
    expected = ["language_model/in_out_embed/embeddings", "language_model/rms_norm/scale"]
    for layer in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9):
        expected += [f"transformer/decoder_layer_{layer}/{name}" for name in of_layer]
    assert grok1.tensor_names(grok1.config(num_layers=12)) == expected
    assert len(grok1.tensor_names(grok1.config(num_layers=64))) == 770


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 8]), st.floats(-20, 20))
def test_quantisation_is_off_by_half_a_step_at_most(seed: int, row_blocks: int, size: float) -> None:
    matrix = 10.0**size * np.random.default_rng(seed).standard_normal((3, 16, 5))
    weight, scales = grok1.quantize(matrix, row_blocks)
    assert weight.dtype == np.int8 and weight.shape == matrix.shape and scales.shape == (3, row_blocks, 5)
    steps = np.repeat(parts.bfloat16_values(scales), 16 // row_blocks, axis=1)
    read = grok1.dequantize(weight, scales)
    assert np.array_equal(read, weight * steps)
    assert np.all(np.abs(matrix - read) <= steps / 2 * (1 + 1e-9))
    assert np.max(np.abs(weight)) == 127


class Standin:
    """Keeps what a pickle says of an object, and does nothing."""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class OnlyPublished(pickle.Unpickler):
    """Reads the published pickles without running anything of theirs."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.names: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> type[Standin]:
        self.names.add((module, name))
        return type(name, (Standin,), {})


def array_of(read: Standin) -> Array:
    """What the stand-in of an ndarray holds; bfloat16 as float64."""
    assert isinstance(read.state, tuple)
    version, shape, dtype, is_fortran, data = read.state
    assert (version, is_fortran) == (1, False) and type(read).__name__ == "_reconstruct"
    kind = dtype.args[0]
    if kind in ("i1", "f4"):
        return np.frombuffer(data, dtype=kind).reshape(shape)
    assert kind.__name__ == "bfloat16" and dtype.state == (3, "<", None, None, None, 2, 2, 64)
    return parts.bfloat16_values(np.frombuffer(data, dtype="<u2")).reshape(shape)


def test_grok1s_checkpoint_holds_what_its_writer_says(tmp_path: Path) -> None:
    config = grok1.config(num_layers=11)
    weights = grok1.random_weights(config, 7)
    expected = grok1.write_checkpoint(config, weights, tmp_path)
    names = grok1.tensor_names(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"tensor{number:05d}_000" for number in range(2 + 12 * 11)
    ]
    assert set(expected) == set(weights)
    for number, name in enumerate(names):
        reader = OnlyPublished((tmp_path / f"tensor{number:05d}_000").read_bytes())
        read = reader.load()
        if type(read).__name__ == "_reconstruct":
            assert name.endswith(("/embeddings", "/scale", "router/w"))
            assert read.state[2].args[0] == "f4"
            found = array_of(read)
        else:
            assert list(vars(read)) == ["state"] and list(read.state) == ["weight", "scales"]
            weight, scales = array_of(read.state["weight"]), array_of(read.state["scales"])
            cut_along_rows = "moe/linear_1" in name or "attention/linear" in name
            assert scales.shape == (*weight.shape[:-2], 8 if cut_along_rows else 1, weight.shape[-1])
            found = weight * np.repeat(scales, weight.shape[-2] // scales.shape[-2], axis=-2)
        assert found.shape == weights[name].shape
        assert np.array_equal(found, expected[name])
        np.testing.assert_allclose(found, weights[name], atol=np.max(np.abs(weights[name])) / 200)


def test_grok1s_pickles_are_as_long_as_the_published_ones() -> None:
    """Bytes around the numbers; sizes of rmems/xai-dissect, docs/observed-grok1-ckpt0.md, less the numbers.

    Experts' matrices (323) are made shorter here: the framing depends on their axes, not on their size.
    """

    def framing(held: grok1.PickledArray | grok1.QuantizedWeight8bit, num_bytes: int) -> int:
        file = io.BytesIO()
        grok1.dump(held, file)
        return len(file.getvalue()) - num_bytes

    def quantized(shape: tuple[int, ...], scales: tuple[int, ...]) -> int:
        held = grok1.QuantizedWeight8bit(
            grok1.PickledArray(np.zeros(shape, np.int8)),
            grok1.PickledArray(np.zeros(scales, np.uint16), is_bfloat16=True),
        )
        return framing(held, math.prod(shape) + 2 * math.prod(scales))

    def plain(*shape: int) -> int:
        return framing(grok1.PickledArray(np.zeros(shape, np.float32)), 4 * math.prod(shape))

    assert plain(6144) == 24_727 - 4 * 6144
    assert plain(6144, 8) == 196_770 - 4 * 6144 * 8
    assert plain(131072, 256) == 3_221_225_637 - 4 * 131072 * 6144
    assert quantized((6144, 1024), (1, 1024)) == 6_293_814 - 6144 * 1024 - 2 * 1024
    assert quantized((6144, 6144), (1, 6144)) == 37_761_334 - 6144 * 6144 - 2 * 6144
    assert quantized((6144, 6144), (8, 6144)) == 37_847_359 - 6144 * 6144 - 2 * 8 * 6144
    assert quantized((8, 300, 5000), (8, 1, 5000)) == 1_611_137_347 - 8 * 6144 * 32768 - 2 * 8 * 32768
    assert quantized((8, 5000, 300), (8, 8, 3000)) == 1_611_399_491 - 8 * 32768 * 6144 - 2 * 8 * 8 * 6144


def test_grok1s_pickles_name_only_the_published_globals(tmp_path: Path) -> None:
    config = grok1.config(num_layers=1)
    grok1.write_checkpoint(config, grok1.random_weights(config, 8), tmp_path)
    of_numpy = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
    for number, others in ((0, set()), (2, {("__main__", "QuantizedWeight8bit"), ("ml_dtypes", "bfloat16")})):
        data = (tmp_path / f"tensor{number:05d}_000").read_bytes()
        assert data[:2] == b"\x80\x04"
        reader = OnlyPublished(data)
        reader.load()
        assert reader.names == of_numpy | others


# --- Grok-2's checkpoint


def test_grok2s_checkpoint_holds_what_its_writer_says(tmp_path: Path) -> None:
    config = grok2.config()
    weights = grok2.random_weights(config, 9)
    expected = grok2.write_checkpoint(config, weights, tmp_path)
    common = [f"pytorch_model-{n:05d}-TP-common.safetensors" for n in (*range(6), *range(9, 18))]
    cut = [f"pytorch_model-{n:05d}-TP-{rank:03d}.safetensors" for n in (6, 7, 8) for rank in range(8)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*common, *cut, "config.json"])

    read: dict[str, torch.Tensor] = {}
    for name in common:
        tensors = load_file(tmp_path / name)
        assert len(tensors) == (1 if int(name[14:19]) < 3 else config.num_hidden_layers)
        assert not read.keys() & tensors.keys()
        read |= tensors
    for kind, axis in ((6, 0), (7, 1), (8, 0)):
        pieces = [
            load_file(tmp_path / f"pytorch_model-{kind:05d}-TP-{rank:03d}.safetensors") for rank in range(8)
        ]
        assert len(pieces[0]) == config.num_hidden_layers * config.num_local_experts
        read |= {name: torch.cat([piece[name] for piece in pieces], dim=axis) for name in pieces[0]}
    assert read.keys() == expected.keys() == weights.keys()
    for name, value in read.items():
        assert value.dtype == torch.bfloat16
        assert np.array_equal(value.double().numpy(), expected[name])
        assert np.array_equal(expected[name], torch.from_numpy(weights[name]).bfloat16().double().numpy())


def test_grok2s_kinds_of_files_hold_what_they_are_published_to_hold(tmp_path: Path) -> None:
    config = grok2.config(num_hidden_layers=1, num_local_experts=1, num_experts_per_tok=1)
    grok2.write_checkpoint(config, grok2.random_weights(config, 10), tmp_path)
    for number, name, shape in (
        (0, "model.embed_tokens", [37, 20]),
        (1, "lm_head", [37, 20]),
        (2, "model.norm", [20]),
        (4, "model.layers.0.mlp.down_proj", [20, 28]),
        (9, "model.layers.0.self_attn.k_proj", [16, 20]),
        (10, "model.layers.0.self_attn.o_proj", [20, 32]),
        (14, "model.layers.0.post_attn_norm", [20]),
        (17, "model.layers.0.block_sparse_moe.gate", [1, 20]),
    ):
        tensors = load_file(tmp_path / f"pytorch_model-{number:05d}-TP-common.safetensors")
        assert {key: list(value.shape) for key, value in tensors.items()} == {f"{name}.weight": shape}
    for number, name, shape in ((6, "w1", [2, 20]), (7, "w2", [20, 2]), (8, "w3", [2, 20])):
        tensors = load_file(tmp_path / f"pytorch_model-{number:05d}-TP-003.safetensors")
        expected = {f"model.layers.0.block_sparse_moe.experts.0.{name}.weight": shape}
        assert {key: list(value.shape) for key, value in tensors.items()} == expected


def test_grok2s_configuration_has_the_published_keys_and_our_sizes(tmp_path: Path) -> None:
    config = grok2.config(attn_temperature_len=7)
    grok2.write_checkpoint(config, grok2.random_weights(config, 11), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["Grok1ForCausalLM"] and written["rope_type"] == "original"
    assert written["attn_temperature_len"] == 7 and written["num_local_experts"] == 4
    assert {"residual_moe_scale", "gelu"} == set(vars(config)) - set(written)
