"""The parameter table, against published counts."""

from __future__ import annotations

import math
import tomllib
from importlib import resources

import pytest
import torch

from colossus.architecture import Architecture, check, num_active, num_parameters, parameter_table
from colossus.errors import UserError
from colossus.job import load_job, preset_names
from colossus.models import Decoder

PRESETS = resources.files("colossus") / "presets" / "model"

FACTS = {
    name: tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))["facts"]
    for name in preset_names("model")
}


@pytest.mark.parametrize("name", FACTS)
def test_counts_equal_those_of_the_published_configuration(name: str) -> None:
    """The facts were computed tensor by tensor, apart from this code; see their sources in the presets."""
    arch, facts = load_job(None, [f"model={name}"]).model, FACTS[name]
    assert num_parameters(arch) == facts["num_parameters"]
    assert num_active(arch) == facts.get("num_active", facts["num_parameters"])
    embedding = 0 if arch.tie_embeddings else arch.vocab_size * arch.hidden_size
    embedding += arch.max_seq_len * arch.hidden_size if arch.position == "learned" else 0
    assert num_active(arch, input_embedding=False) == num_active(arch) - embedding


@pytest.mark.parametrize("name", FACTS)
def test_the_decoder_is_built_exactly_as_the_table_says(name: str) -> None:
    arch = load_job(None, [f"model={name}"]).model
    with torch.device("meta"):
        model = Decoder(arch)
    table = parameter_table(arch)
    built = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert built == [(p.name, p.shape) for p in table if p.trainable]
    held = {p.name: p.shape for p in table if not p.trainable}
    buffers = {name: tuple(b.shape) for name, b in model.named_buffers() if not name.endswith(".shares")}
    assert buffers == held
    assert sum(p.numel for p in table) == FACTS[name]["num_parameters"]


def test_names_are_unique_and_axes_fit_the_shapes() -> None:
    table = parameter_table(load_job(None, ["model=llama3.2-1b"]).model)
    assert len({p.name for p in table}) == len(table)
    assert all(len(p.axes) == len(p.shape) for p in table)
    sizes: dict[str, set[int]] = {}
    for parameter in table:
        for axis, size in zip(parameter.axes, parameter.shape, strict=True):
            sizes.setdefault(axis, set()).add(size)
    assert all(len(seen) == 1 for seen in sizes.values())


def test_heads_that_do_not_share_evenly_are_refused_with_what_would() -> None:
    arch = load_job(None, ["model=llama3.2-1b", "model.num_kv_heads=5"]).model
    with pytest.raises(UserError, match=r"num_kv_heads=5: must divide model.num_heads=32; one of 1, 2, 4, 8"):
        parameter_table(arch)


def tiny(**changed: object) -> Architecture:
    sizes: dict[str, object] = {"vocab_size": 64, "hidden_size": 32, "num_layers": 6, "num_heads": 4}
    sizes |= {"num_kv_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_seq_len": 16, "norm_eps": 1e-5}
    sizes |= {"rope_theta": 1e4, "qk_norm": False, "tie_embeddings": True, "initializer_range": 0.02}
    return Architecture.model_validate(sizes | changed)


@pytest.mark.parametrize(("every", "full"), [(0, ""), (1, "012345"), (2, "135"), (3, "25"), (6, "5")])
def test_every_so_many_th_layer_has_no_window(every: int, full: str) -> None:
    arch = tiny(window=4, full_attention_every=every)
    assert "".join(str(layer) for layer in range(6) if not arch.is_windowed(layer)) == full
    assert not any(tiny(full_attention_every=every).is_windowed(layer) for layer in range(6))


@pytest.mark.parametrize(
    ("scheme", "smaller"), [("gpt2", {"wo", "w_down"}), ("llama", {"wo", "w_down", "w_up"}), ("plain", set())]
)
def test_what_writes_into_the_stream_begins_smaller(scheme: str, smaller: set[str]) -> None:
    """By the root of twice the layers, or of twice the layers up to it."""
    for parameter in parameter_table(tiny(init_scheme=scheme)):
        if parameter.init == "normal":
            name = parameter.name.split(".")[-2]
            depth = {"gpt2": 6, "llama": (parameter.layer or 0) + 1}.get(scheme, 0.5)
            expected = 0.02 / math.sqrt(2 * depth) if name in smaller else 0.02
            assert parameter.std == pytest.approx(expected), parameter.name


def test_shapes_of_experts_and_of_latent_attention() -> None:
    """Two shared experts are one MLP of twice the width; the rotary key comes beside the latent."""
    experts = {"num_experts": 8, "per_token": 2, "intermediate_size": 24, "num_shared": 2, "dense_layers": 1}
    latent = {"q_rank": 12, "kv_rank": 20, "nope_dim": 6, "rope_dim": 4, "v_dim": 5}
    arch = tiny(experts=experts, latent=latent, head_dim=10, num_kv_heads=4)
    shapes = {parameter.name: parameter.shape for parameter in parameter_table(arch)}
    assert "layers.0.moe.router.weight" not in shapes and shapes["layers.0.mlp.w_up.weight"] == (48, 32)
    layer = {name: shape for name, shape in shapes.items() if name.startswith("layers.1.")}
    assert {name.removeprefix("layers.1."): shape for name, shape in layer.items() if len(shape) > 1} == {
        "attention.wq_down.weight": (12, 32),
        "attention.wq_up.weight": (40, 12),
        "attention.wkv_down.weight": (24, 32),
        "attention.wkv_up.weight": (44, 20),
        "attention.wo.weight": (32, 20),
        "moe.router.weight": (8, 32),
        "moe.experts.w_gate": (8, 24, 32),
        "moe.experts.w_up": (8, 24, 32),
        "moe.experts.w_down": (8, 32, 24),
        "moe.shared.w_gate.weight": (48, 32),
        "moe.shared.w_up.weight": (48, 32),
        "moe.shared.w_down.weight": (32, 48),
    }


def test_latent_attention_whose_queries_come_straight() -> None:
    latent = {"kv_rank": 20, "nope_dim": 6, "rope_dim": 4, "v_dim": 5}
    table = parameter_table(tiny(latent=latent, head_dim=10, num_kv_heads=4))
    shapes = {
        p.name.removeprefix("layers.1.attention."): p.shape
        for p in table
        if p.name.startswith("layers.1.attention.")
    }
    assert shapes == {
        "wq.weight": (40, 32),
        "wkv_down.weight": (24, 32),
        "kv_norm.weight": (20,),
        "wkv_up.weight": (44, 20),
        "wo.weight": (32, 20),
    }


@pytest.mark.parametrize(("per_token", "legal"), [(4, True), (5, False)])
def test_groups_hold_what_a_token_visits(per_token: int, legal: bool) -> None:
    """Two of four groups of two experts."""
    experts = {"num_experts": 8, "per_token": per_token, "num_groups": 4, "groups_per_token": 2}
    if legal:
        check(tiny(experts=experts))
    else:
        with pytest.raises(UserError, match=r"2 of 4 groups hold 4 experts; at most 4"):
            check(tiny(experts=experts))
