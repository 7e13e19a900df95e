"""What is taken for a model and what is not: names, shapes and settings of published checkpoints."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from colossus.architecture import Architecture, parameter_table
from colossus.errors import UserError
from colossus.job import load_job, preset_names
from colossus.models.hf.config import description, keys
from colossus.models.hf.families import FAMILIES
from colossus.models.hf.mapping import Blank, bind
from colossus.models.hf.published import family_of, fitting_family, misfits, open_published, publish
from tests.models.hf import tiny
from tests.models.hf.samples import publish as save_checkpoint

Tensors = dict[str, torch.Tensor]


def changed(
    tmp_path: Path, name: str, change: Callable[[Tensors, dict[str, Any]], object], seed: int = 0
) -> Path:
    """A tiny published model, with its tensors and its config.json changed."""
    folder = tiny.save(tiny.make(name, seed), tmp_path / "published")
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    return save_checkpoint(tmp_path / "changed", tensors, config)


def arch_of(config: dict[str, Any]) -> Architecture:
    family = family_of(config)
    return description(family.terms, family.name, config)


# What does not belong together


def test_a_missing_tensor(tmp_path: Path) -> None:
    folder = changed(tmp_path, "llama", lambda t, c: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"holds no tensor model.layers.1.mlp.up_proj.weight \[\d+, \d+\]"):
        open_published(folder)


def test_an_extra_tensor(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = changed(tmp_path, "mistral", lambda t, c: t.update({name: torch.ones(16)}))
    with pytest.raises(
        UserError, match=rf"holds {name} \[16\], which the mistral of its config.json has not"
    ):
        open_published(folder)


def test_more_layers_than_config_says_are_no_mtp_layers_in_other_families(tmp_path: Path) -> None:
    folder = changed(tmp_path, "llama", lambda t, c: c.update(num_hidden_layers=1))
    with pytest.raises(UserError, match=r"holds model.layers.1.\S+ \[.*, and \d+ others, which the llama"):
        open_published(folder)


def test_a_tensor_of_another_shape(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.1.down_proj.weight"

    def cut(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name] = tensors[name][:, :3].contiguous()

    folder = changed(tmp_path, "deepseek_v3", cut)
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    with pytest.raises(UserError, match=rf"{name} is \[{width}, 3\]; config.json makes it \[{width}, 8\]"):
        open_published(folder)


def test_a_config_that_contradicts_the_weights(tmp_path: Path) -> None:
    folder = changed(tmp_path, "gpt_oss", lambda t, c: c.update(intermediate_size=c["intermediate_size"] + 1))
    with pytest.raises(UserError, match=r"experts\.\S+ is \[.*\]; config.json makes it \["):
        open_published(folder)


def test_experts_of_two_types(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    folder = changed(tmp_path, "mixtral", lambda t, c: t.update({name: t[name].bfloat16()}))
    with pytest.raises(UserError, match="and its like are of bfloat16 and float32"):
        open_published(folder)


def test_weights_in_whole_numbers(tmp_path: Path) -> None:
    folder = changed(
        tmp_path, "llama", lambda t, c: t.update({"model.norm.weight": t["model.norm.weight"].long()})
    )
    with pytest.raises(UserError, match=r"model.norm.weight is of int64, not floating-point"):
        open_published(folder)


# The output matrix, tied


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_tied_output_matrix_may_be_there_and_equal(tmp_path: Path, name: str) -> None:
    def add(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = next(
            t for n, t in tensors.items() if "embed_tokens" in n or "wte" in n
        ).clone()

    opened = open_published(changed(tmp_path, name, add))
    assert opened.arch.tie_embeddings and "head.weight" not in opened.tensors


def test_a_tied_output_matrix_that_differs(tmp_path: Path) -> None:
    def add(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(UserError, match=r"tie_word_embeddings=true, but lm_head.weight differs"):
        open_published(changed(tmp_path, "qwen3", add))


# What checkpoints hold besides


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    said: list[str] = []

    def add(tensors: Tensors, config: dict[str, Any]) -> None:
        last = config["num_hidden_layers"]
        for name, tensor in list(tensors.items()):
            if name.startswith("model.layers.1."):
                tensors[name.replace("layers.1", f"layers.{last}")] = tensor.clone()
        tensors[f"model.layers.{last}.eh_proj.weight"] = torch.ones(2, 2)

    folder = changed(tmp_path, "deepseek_v3", add)
    opened = open_published(folder, said.append)
    last = opened.arch.num_layers
    assert said == [f"{folder}: layer {last}, which predicts further tokens, is left out"]


def test_buffers_that_are_computed_are_left_out(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    opened = open_published(changed(tmp_path, "llama", lambda t, c: t.update({name: torch.ones(4)})))
    assert len(opened.tensors) == len(parameter_table(opened.arch))


def test_gpt2_as_it_was_published(tmp_path: Path) -> None:
    """Names without a prefix, the causal mask of each layer, and few settings."""

    def older(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        kept = ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size", "n_inner", "activation_function")
        kept = {key: config[key] for key in kept}
        config.clear()
        config.update(kept | {"architectures": ["GPT2LMHeadModel"], "n_ctx": 64})

    ours = tiny.load(changed(tmp_path, "gpt2", older))
    before = tiny.load(tmp_path / "published")
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])


def test_float8_blocks_and_mxfp4_are_read_through_the_mapping(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_b_proj.weight"
    scale = torch.tensor([[2.0]])

    def quantise(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}

    opened = open_published(changed(tmp_path, "deepseek_v3", quantise))
    found = opened.tensors["layers.1.attention.wq_up.weight"].read()
    stored = load_file(tmp_path / "changed" / "model.safetensors")[name].float() * 2
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.sort(0).values, stored.bfloat16().sort(0).values)
    rows = [*range(opened.arch.latent.nope_dim)] if opened.arch.latent else []
    assert torch.equal(found[rows], stored.bfloat16()[rows])


# Names of families


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, r"model_type=lama: unknown; one of .*; did you mean 'llama'\?"),
        ({"model_type": "qwen3_next"}, r"model_type=qwen3_next: unknown; .* did you mean 'qwen3"),
        (
            {"architectures": ["LlamaForCausal"]},
            r"unknown; .*did you mean 'LlamaForCausalLM'\?",
        ),
        ({"model_type": "llama", "architectures": ["Qwen3ForCausalLM"]}, "disagree"),
        ({}, "neither model_type nor architectures"),
    ],
)
def test_unknown_families(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        family_of(config)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has no config.json, which says what it is"):
        open_published(tmp_path)


def test_kimi_k2_is_a_deepseek_v3() -> None:
    config = tiny.MODELS["deepseek_v3"](random.Random(1)).to_dict()
    kimi = config | {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    assert arch_of(kimi) == arch_of(config)


# Settings that would change what is computed


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu: not supported; 'silu' is"),
        ("gpt2", {"activation_function": "relu"}, "activation_function=relu: not supported; one of gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True: not supp"),
        ("gpt2", {"n_head": 7, "n_embd": 15}, "the width 15 over 7 heads"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type=dynamic: not supported",
        ),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "no complete llama3 scaling"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: not supported in this family"),
        ("llama", {"hidden_size": None}, "config.json has no hidden_size"),
        ("llama", {"hidden_size": "wide"}, "as model.hidden_size='wide': Input should be a valid integer"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2: not supported; 1 is"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=.1.: not supported; the first layers"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False: not supported; True is"),
        (
            "deepseek_v3",
            {"q_lora_rank": "wide"},
            "as model.latent.q_rank='wide': Input should be a valid int",
        ),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func=softmax: not supported; 'sigmoid' is"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True: not supported; False is"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit=5.0: not supported; 7.0 is"),
        (
            "gpt_oss",
            {"layer_types": ["chunked_attention"] * 3},
            "layer_types=chunked_attention: not supported",
        ),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types: 1 of them for num_hidden_layers="),
    ],
)
def test_settings_that_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    config = tiny.MODELS[name](random.Random(0)).to_dict() | change
    with pytest.raises(UserError, match=message):
        arch_of(config)


def test_windows_after_the_first_layers_are_refused() -> None:
    config = tiny.MODELS["qwen3 with windows"](random.Random(0)).to_dict()
    config |= {"num_hidden_layers": 3, "max_window_layers": 1, "layer_types": None}
    with pytest.raises(UserError, match=r"layer_types=fww: .* windows in all layers but every n-th"):
        arch_of(config)
    assert arch_of(config | {"use_sliding_window": False}).window is None
    assert arch_of(config | {"max_window_layers": 0}).window == config["sliding_window"]


@given(every=st.integers(0, 7), num_layers=st.integers(1, 6), window=st.one_of(st.none(), st.integers(1, 99)))
def test_every_pattern_of_windows_comes_back(every: int, num_layers: int, window: int | None) -> None:
    arch = load_job(None, ["model=gpt-oss-20b"]).model
    arch = arch.model_copy(update={"num_layers": num_layers, "window": window, "full_attention_every": every})
    assert not misfits(arch, FAMILIES["gpt_oss"])
    qwen = load_job(None, ["model=qwen3-0.6b"]).model
    qwen = qwen.model_copy(update={"num_layers": num_layers, "window": window, "full_attention_every": every})
    assert not misfits(qwen, FAMILIES["qwen3"])


# Rotary positions


def test_older_and_newer_settings_of_rotary_positions_say_the_same() -> None:
    newer = tiny.MODELS["deepseek_v3"](random.Random(1)).to_dict()
    rope = newer["rope_parameters"]
    older = {key: value for key, value in newer.items() if key != "rope_parameters"}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    older |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling | {"type": "yarn"}}
    assert arch_of(older) == arch_of(newer)
    scaling = arch_of(newer).rope_scaling
    assert scaling is not None
    ratio = (0.1 * 0.7 * math.log(4) + 1) / (0.1 * rope["mscale_all_dim"] * math.log(4) + 1)
    assert scaling.magnitude == pytest.approx(ratio, rel=1e-12)


@given(
    factor=st.floats(1, 100),
    magnitude=st.floats(0.1, 3),
    m=st.floats(0.05, 2),
    truncate=st.booleans(),
    betas=st.tuples(st.floats(1, 64), st.floats(0.5, 2)),
)
def test_every_yarn_comes_back(
    factor: float, magnitude: float, m: float, truncate: bool, betas: tuple[float, float]
) -> None:
    yarn = {"kind": "yarn", "factor": factor, "original_max_seq_len": 4096, "magnitude": magnitude}
    yarn |= {"truncate": truncate, "beta_fast": betas[0], "beta_slow": betas[1]}
    for name in ("llama3-8b", "deepseek-v3"):
        arch = load_job(None, [f"model={name}"]).model
        scale = arch.head_dim**-0.5 * (0.1 * m * math.log(factor) + 1) ** 2
        tree = arch.model_dump(exclude_none=True) | {"rope_scaling": yarn}
        tree["attention_scale"] = scale if arch.latent is not None else None
        assert not misfits(Architecture.model_validate(tree), FAMILIES[arch.family])


# Presets


@pytest.mark.parametrize("name", preset_names("model"))
def test_every_preset_is_exported_as_its_own_family(name: str) -> None:
    arch = load_job(None, [f"model={name}"]).model
    if arch.family.startswith("grok") or name in (
        "gpt3-1.3b",
        "gpt3-13b",
    ):  # heads that are no part of the width
        with pytest.raises(UserError, match="no published family has all parts of this model"):
            fitting_family(arch)
    else:
        assert fitting_family(arch).name == arch.family


@pytest.mark.parametrize("name", preset_names("model"))
def test_every_preset_is_what_transformers_builds(name: str) -> None:
    """Names and shapes of a model of two layers of `transformers`, made on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    arch = load_job(None, [f"model={name}"]).model
    try:
        family = fitting_family(arch)
    except UserError:
        return
    experts = arch.experts and arch.experts.model_copy(
        update={"dense_layers": min(arch.experts.dense_layers, 1)}
    )
    arch = arch.model_copy(update={"num_layers": 2, "experts": experts})
    table = {p.name: p for p in parameter_table(arch)}
    config, tensors = publish(arch, family, {n: Blank.of(n, p.shape) for n, p in table.items()})
    theirs = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    ours = sum(math.prod(tensor.shape) for tensor in tensors)
    buffers = sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    assert ours == sum(p.numel() for p in model.parameters()) + buffers
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert all(tensor.shape == shapes.get(tensor.name, tensor.shape) for tensor in tensors)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
@given(data=st.data())
def test_every_mapping_is_undone_by_its_inverse(data: st.DataObject) -> None:
    """Of any sizes: published -> ours -> published changes no name, shape or place of an element."""
    family = FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]
    arch = tiny_arch(data, family.name)
    table = {p.name: p for p in parameter_table(arch)}
    for item in bind(family.rules, arch, table):
        shapes = item.rule.give(item.theirs, [Blank.of(n, table[n].shape) for n in item.ours], arch)
        theirs = [Counted.of(t.name, t.shape, 10_000 * index) for index, t in enumerate(shapes)]
        ours = item.rule.take([Blank.of(n, table[n].shape) for n in item.ours], theirs, arch)
        assert [o.shape for o in ours] == [table[n].shape for n in item.ours]
        again = item.rule.give(item.theirs, ours, arch)
        for before, after in zip(theirs, again, strict=True):
            assert before.name == after.name and torch.equal(before.read(), after.read())


class Counted(Blank):
    """Each element is its own number."""

    first: int

    @classmethod
    def of(cls, name: str, shape: Any, first: int = 0) -> Any:
        from colossus.models.hf.tensors import InMemory

        return InMemory.of(name, torch.arange(first, first + math.prod(shape)).float().view(tuple(shape)))


def tiny_arch(data: st.DataObject, family: str) -> Architecture:
    name = next(n for n in tiny.MODELS if n.startswith(family) and " " not in n)
    seed = data.draw(st.integers(0, 10**6))
    config = tiny.MODELS[name](random.Random(seed)).to_dict() | {"architectures": None}
    return arch_of(config)


def test_a_rank_of_queries_that_is_missing_is_not_one_that_is_null() -> None:
    """As `transformers` has it: 1,536 where the key is missing, no such vector where it is null."""
    from transformers import DeepseekV3Config

    config = tiny.MODELS["deepseek_v3"](random.Random(0)).to_dict() | {"q_lora_rank": None}
    straight = arch_of(config)
    assert straight.latent is not None and straight.latent.q_rank is None
    family = FAMILIES["deepseek_v3"]
    assert keys(family.terms, straight)["q_lora_rank"] is None
    del config["q_lora_rank"]
    usual = arch_of(config)
    assert usual.latent is not None and usual.latent.q_rank == DeepseekV3Config().q_lora_rank == 1536


def test_what_a_folder_does_not_say_of_its_norms_is_what_transformers_takes() -> None:
    for name, family in FAMILIES.items():
        config = tiny.MODELS[name](random.Random(0))
        said = config.to_dict()
        key = next(key for key in ("rms_norm_eps", "layer_norm_epsilon") if key in said)
        del said[key]
        usual = getattr(type(config)(), key)
        assert description(family.terms, name, said).norm_eps == usual, name


def test_keys_of_a_family_are_its_own() -> None:
    """No two terms say the same key or field, so their order says nothing."""
    for family in FAMILIES.values():
        config = tiny.MODELS[family.name](random.Random(0)).to_dict()
        fields = [field for term in family.terms for field in term.read(config)]
        assert len(fields) == len(set(fields)), family.name
        arch = description(family.terms, family.name, config)
        written = [key for term in family.terms for key in term.write(arch)]
        assert len(written) == len(set(written)), family.name
        assert description(family.terms, family.name, keys(family.terms, arch)) == arch
