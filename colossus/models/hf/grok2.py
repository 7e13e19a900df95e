"""Opens Grok-2 as xAI published it: safetensors without an index, the experts cut for eight devices.

`pytorch_model-000NN-TP-common.safetensors` hold whole tensors; `pytorch_model-000NN-TP-00R.safetensors` hold
piece R of each expert's matrices under one name: w1 and w3 are joined along their rows, w2 along its columns
(the patterns of sgl-project/sglang, `python/sglang/srt/models/grok.py`, and llama.cpp's pull request 15539).
"""

from __future__ import annotations

import re
from pathlib import Path

from colossus.architecture import Architecture
from colossus.errors import MachineError
from colossus.job import load_job
from colossus.models.hf.reading import CONFIG, Source, read_json, stored_in
from colossus.models.hf.tensors import Readable
from colossus.models.hf.views import Joined, Stacked

PIECE = re.compile(r"pytorch_model-\d+-TP-(common|\d+)\.safetensors")
OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
IN_LAYER = {
    "attention_norm.weight": "pre_attn_norm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_post_norm.weight": "post_attn_norm.weight",
    "mlp_norm.weight": "pre_moe_norm.weight",
    "mlp.w_gate.weight": "mlp.gate_proj.weight",
    "mlp.w_up.weight": "mlp.up_proj.weight",
    "mlp.w_down.weight": "mlp.down_proj.weight",
    "moe.router.weight": "block_sparse_moe.gate.weight",
    "mlp_post_norm.weight": "post_moe_norm.weight",
}
OF_EXPERTS = {"w_gate": "w1", "w_up": "w3", "w_down": "w2"}
FIELDS = {  # of config.json, and ours
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_seq_len",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "attn_logit_softcapping": "attention_soft_cap",
    "attn_temperature_len": "attention_temperature_len",
    "embedding_multiplier_scale": "embedding_scale",
    "output_multiplier_scale": "logit_scale",
    "final_logit_softcapping": "logit_soft_cap",
}
EXPERT_FIELDS = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "per_token",
    "moe_intermediate_size": "intermediate_size",
    "router_logit_softcapping": "soft_cap",
}


def is_grok2(path: Path) -> bool:
    """Whether `path` holds files of that form."""
    return any(PIECE.fullmatch(file.name) for file in path.glob("pytorch_model-*.safetensors"))


def open_grok2(path: Path) -> Source:
    """The tensors under their published names, the experts' whole.

    Raises:
        MachineError: a file is damaged, a piece is missing, or pieces do not fit.
    """
    whole: dict[str, Readable] = {}
    pieces: dict[str, dict[int, Readable]] = {}
    for file in sorted(path.glob("pytorch_model-*.safetensors")):
        kind = PIECE.fullmatch(file.name)
        if kind is None:
            continue
        for name, tensor in stored_in(file).items():
            if kind[1] == "common":
                whole[name] = tensor
            else:
                pieces.setdefault(name, {})[int(kind[1])] = tensor
    devices = range(1 + max((max(found) for found in pieces.values()), default=0))
    for name, found in pieces.items():
        missing = [str(device) for device in devices if device not in found]
        if missing:
            raise MachineError(f"{path}: {name} lacks the pieces {', '.join(missing)} of {len(devices)}")
        shapes = {tensor.shape for tensor in found.values()}
        if len(shapes) > 1 or len(next(iter(shapes))) != 2:
            raise MachineError(f"{path}: {name} is cut into pieces of {', '.join(map(str, sorted(shapes)))}")
        axis = 1 if name.endswith(".w2.weight") else 0
        whole[name] = Joined.of(name, [found[device] for device in devices], axis)
    config = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    return Source(path, config, whole)


def as_ours(source: Source) -> tuple[Architecture, dict[str, Readable]]:
    """The architecture that Grok-2's config.json gives, and our tensors made of the published ones."""
    preset, config = load_job(None, ["model=grok-2"]).model, source.config
    assert preset.experts is not None
    experts = {ours: config[theirs] for theirs, ours in EXPERT_FIELDS.items() if theirs in config}
    given = {ours: config[theirs] for theirs, ours in FIELDS.items() if theirs in config}
    given["experts"] = preset.experts.model_dump(exclude_unset=True) | experts
    arch = Architecture.model_validate(preset.model_dump(exclude_unset=True) | given)
    assert arch.experts is not None
    tensors = {ours: source[theirs] for ours, theirs in OUTSIDE.items()}
    for layer in range(arch.num_layers):
        theirs = f"model.layers.{layer}"
        tensors |= {f"layers.{layer}.{ours}": source[f"{theirs}.{name}"] for ours, name in IN_LAYER.items()}
        for ours, name in OF_EXPERTS.items():
            of_each = [
                source[f"{theirs}.block_sparse_moe.experts.{expert}.{name}.weight"]
                for expert in range(arch.experts.num_experts)
            ]
            stacked = f"layers.{layer}.moe.experts.{ours}"
            tensors[stacked] = Stacked.of(stacked, of_each)
    return arch, tensors
