"""A published checkpoint as a model of ours, and back."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from colossus.architecture import Architecture, Parameter, check, parameter_table
from colossus.errors import UserError
from colossus.models.hf import grok1, grok2
from colossus.models.hf.config import description, keys
from colossus.models.hf.elsewhere import no_folder
from colossus.models.hf.families import FAMILIES, Published
from colossus.models.hf.mapping import Blank, Bound, bind
from colossus.models.hf.reading import Source, open_source
from colossus.models.hf.tensors import Readable, Spec, bands

Say = Callable[[str], None]
HEAD, EMBEDDING = "head.weight", "embedding.weight"

WITHOUT_EFFECT = (
    *("preset", "init_from", "family", "initializer_range", "init_scheme", "base_width"),
    *("experts.balance_loss", "experts.balance_over", "experts.bias_rate", "experts.z_loss"),
)
"""Fields that no computed logit depends on: they need not be equal where a model is exported."""


OF_THE_FILE = ("auto_map", "quantization_config", "torch_dtype", "dtype", "transformers_version")
"""Keys of config.json that tell how a checkpoint is stored or by which code it is read."""


@dataclass(frozen=True)
class Opened:
    """A published checkpoint: what model it is, and its tensors under our names, nothing of them read yet."""

    arch: Architecture
    tensors: dict[str, Readable]
    config: dict[str, Any] = field(default_factory=dict)


def warn(message: str) -> None:
    """The default of `say`: standard error, unless the program set up logging otherwise."""
    logging.getLogger(__name__).warning(message)


def open_published(path: str | Path, say: Say = warn) -> Opened:
    """Opens a Hugging Face folder, or one of xAI's of Grok-1 or Grok-2.

    Raises:
        UserError: the family is unknown, or `config.json` says what is not supported, or the tensors are not
            those of the model that it describes; with the name, and both shapes where they differ.
        MachineError: a file is missing, cut short or damaged.
    """
    if not os.path.isdir(path):  # noqa: PTH112 - False too for a name that no folder can have
        raise no_folder(Path(path), "a Hugging Face folder")
    if grok1.is_grok1(Path(path)):
        return _of_xai(grok1.open_grok1(Path(path)), grok1.as_ours)
    if grok2.is_grok2(Path(path)):
        return _of_xai(grok2.open_grok2(Path(path)), grok2.as_ours)
    source = open_source(path)
    if not source.config:
        raise UserError(f"{path} is no Hugging Face checkpoint: it has no config.json, which says what it is")
    try:
        family = family_of(source.config)
        arch = description(family.terms, family.name, source.config)
        check(arch)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None
    return Opened(arch, _taken(source, family, arch, say), source.config)


def _of_xai(source: Source, as_ours: Callable[[Source], tuple[Architecture, dict[str, Readable]]]) -> Opened:
    """One of Grok's checkpoints, each tensor of the shape that the architecture gives it."""
    arch, tensors = as_ours(source)
    for parameter in parameter_table(arch):
        tensor = tensors[parameter.name]
        if tensor.shape != parameter.shape:
            raise UserError(
                f"{source.path}: {parameter.name} is {list(tensor.shape)}; the others make it "
                f"{list(parameter.shape)}"
            )
    return Opened(arch, tensors)


def family_of(config: Mapping[str, Any]) -> Published:
    """The family that a `config.json` names. Raises UserError, with the nearest known one."""
    by_type = {name: f for f in FAMILIES.values() for name in (f.name, *f.aliases)}
    by_class = {f.architecture: f for f in FAMILIES.values()}
    classes = config.get("architectures") or []
    classes = [classes] if isinstance(classes, str) else classes
    known = next((by_class[name] for name in classes if name in by_class), None)
    model_type = config.get("model_type")
    if classes and known is None:
        shown = ", ".join(map(str, classes))
        raise UserError.field("architectures", shown, f"unknown; one of {', '.join(by_class)}", by_class)
    if model_type is not None and model_type not in by_type:
        raise UserError.field("model_type", model_type, f"unknown; one of {', '.join(by_type)}", by_type)
    family = known if model_type is None else by_type[model_type]
    if family is None:
        raise UserError("config.json has neither model_type nor architectures")
    if known is not None and known is not family:
        raise UserError(
            f"config.json: model_type={model_type} and architectures={known.architecture} disagree"
        )
    return family


def _taken(source: Source, family: Published, arch: Architecture, say: Say) -> dict[str, Readable]:
    """Our tensors, checked, as views of the published ones."""
    _check_counts(source, arch)
    table = {parameter.name: parameter for parameter in parameter_table(arch)}
    bound = list(bind(family.rules, arch, table))
    bare = not any(name.startswith(family.prefix) for name in source)
    expected = {
        name: Spec(_bare(name, family) if bare else name, spec.shape, spec.dtype)
        for name, spec in _published_specs(bound, table, arch).items()
    }
    _check_names(source, family, arch, {spec.name: spec.shape for spec in expected.values()}, say)
    for spec in expected.values():
        _check_tensor(source, spec)
    found: dict[str, Readable] = {}
    for item in bound:
        theirs = [source[expected[name].name] for name in item.theirs]
        types = {tensor.dtype for tensor in theirs}
        if len(types) > 1:
            raise UserError(
                f"{source.path}: {theirs[0].name} and its like are of {_types(types)}; one is needed"
            )
        specs = [Spec(name, table[name].shape, theirs[0].dtype) for name in item.ours]
        for spec, tensor in zip(specs, item.rule.take(specs, theirs, arch), strict=True):
            assert (tensor.name, tensor.shape) == (spec.name, spec.shape), f"{spec}: {tensor.shape}"
            found[tensor.name] = tensor
    assert found.keys() == table.keys(), (
        f"{family.name} has no rule for {sorted(table.keys() - found.keys())}"
    )
    if arch.tie_embeddings and _head(family) in source:
        _check_tied(source, _head(family), found[EMBEDDING])
    return {name: found[name] for name in table}


def _head(family: Published) -> str:
    return next(rule.theirs[0] for rule in family.rules if rule.ours == (HEAD,))


def _bare(name: str, family: Published) -> str:
    return name.removeprefix(family.prefix)


def _published_specs(
    bound: Iterable[Bound], table: Mapping[str, Parameter], arch: Architecture
) -> dict[str, Spec]:
    """What the published tensors of a model are called, and their shapes, by their names."""
    found: dict[str, Spec] = {}
    for item in bound:
        blanks = [Blank.of(name, table[name].shape) for name in item.ours]
        for tensor in item.rule.give(item.theirs, blanks, arch):
            found[tensor.name] = tensor
    return found


def _check_names(
    source: Source, family: Published, arch: Architecture, expected: Mapping[str, tuple[int, ...]], say: Say
) -> None:
    """Raises UserError where tensors are missing, or there are some that the model has not."""
    missing = [name for name in expected if name not in source]
    if missing:
        more = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(
            f"{source.path} holds no tensor {missing[0]} {list(expected[missing[0]])}{more}, which the "
            f"{family.name} of its config.json has"
        )
    skipped = re.compile("|".join(family.skipped))
    further, extra = set[int](), list[str]()
    for name in source:
        if name in expected or skipped.fullmatch(name) or (arch.tie_embeddings and name == _head(family)):
            continue
        layer = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
        if family.mtp and layer is not None and int(layer[1]) >= arch.num_layers:
            further.add(int(layer[1]))
        else:
            extra.append(name)
    if extra:
        more = f", and {len(extra) - 1} others" if len(extra) > 1 else ""
        raise UserError(
            f"{source.path} holds {extra[0]} {list(source[extra[0]].shape)}{more}, which the {family.name} "
            f"of its config.json has not"
        )
    if further:
        layers = ", ".join(map(str, sorted(further)))
        say(f"{source.path}: layer {layers}, which predicts further tokens, is left out")


def _check_counts(source: Source, arch: Architecture) -> None:
    """Raises UserError where there are fewer numbers than so many layers and experts have at least."""
    numbers = sum(math.prod(source[name].shape) for name in source)
    dense = arch.experts.dense_layers if arch.experts is not None else arch.num_layers
    experts = arch.experts.num_experts if arch.experts is not None else 0
    if max(arch.num_layers, (arch.num_layers - dense) * experts) * arch.hidden_size > numbers:
        more = f" of {experts} experts" if experts else ""
        raise UserError(
            f"{source.path} holds {numbers} numbers, too few for the {arch.num_layers} layers{more} of its "
            "config.json"
        )


def _check_tensor(source: Source, spec: Spec) -> None:
    tensor = source[spec.name]
    if tensor.shape != spec.shape:
        raise UserError(
            f"{source.path}: {spec.name} is {list(tensor.shape)}; config.json makes it {list(spec.shape)}"
        )
    if not tensor.dtype.is_floating_point:
        raise UserError(f"{source.path}: {spec.name} is of {_types([tensor.dtype])}, not floating-point")


def _check_tied(source: Source, head: str, embedding: Readable) -> None:
    """An output matrix beside tied embeddings must be the same; other values contradict config.json."""
    tensor = source[head]
    if tensor.shape != embedding.shape:
        raise UserError(
            f"{source.path}: {head} is {list(tensor.shape)}; tied to the embedding {list(embedding.shape)}"
        )
    for band in bands(tensor.shape, tensor.dtype.itemsize):
        if not torch.equal(tensor.read(band), embedding.read(band).to(tensor.dtype)):
            raise UserError(
                f"{source.path}: tie_word_embeddings=true, but {head} differs from the embedding; false?"
            )


def _types(types: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))


def fitting_family(arch: Architecture) -> Published:
    """The family that a model is exported as: its own if it has what the model has, else the first that has.

    Raises UserError where none has, naming what does not fit.
    """
    own = FAMILIES.get(arch.family)
    tried = [own] if own is not None else []
    tried += [family for family in FAMILIES.values() if family is not own]
    told = [(family, misfits(arch, family)) for family in tried]
    for family, missing in told:
        if not missing:
            return family
    family, missing = told[0] if own is not None else min(told, key=lambda pair: len(pair[1]))
    which = "its own" if own is not None else f"the nearest ({arch.family} has no published form here)"
    raise UserError(
        f"no published family has all parts of this model; {family.name} is {which}, but: "
        f"{'; '.join(missing)}"
    )


def misfits(arch: Architecture, family: Published) -> list[str]:
    """What of a model the family cannot have, as `model.field=value (family: value)`; empty: it fits."""
    try:
        again = description(family.terms, family.name, keys(family.terms, arch))
        check(again)
    except UserError as error:
        return [str(error)]
    mine, theirs = _essentials(arch), _essentials(again)
    missing = [
        f"model.{name}={_shown(mine.get(name))} ({family.name}: {_shown(theirs.get(name))})"
        for name in sorted(mine.keys() | theirs.keys())
        if not _equal(mine.get(name), theirs.get(name))
    ]
    if not missing:  # every tensor has its place
        table = {parameter.name: parameter for parameter in parameter_table(arch)}
        placed = {name for item in bind(family.rules, arch, table) for name in item.ours}
        missing = [f"{name} has no place in {family.name}" for name in table if name not in placed][:1]
    return missing


def _essentials(arch: Architecture) -> dict[str, Any]:
    """What the logits of a model depend on, by dotted names."""
    tree = arch.model_dump()
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{leaf}": v for leaf, v in value.items()}
        else:
            flat[name] = value
    flat = {name: value for name, value in flat.items() if name not in WITHOUT_EFFECT and value is not None}
    flat["attention_scale"] = arch.scale_of_scores
    flat["windows"] = "".join("fw"[arch.is_windowed(layer)] for layer in range(arch.num_layers))
    unused = {"full_attention_every", "pad_token" if arch.pad_token is None else ""}
    if "w" not in flat["windows"]:
        unused |= {"window"}
    if arch.mlp not in ("gelu", "geglu"):
        unused |= {"gelu"}
    if not arch.qk_norm:
        unused |= {"qk_norm_over"}
        flat["qk_norm"] = False
    if arch.position == "learned":
        unused |= {name for name in flat if name.startswith("rope_")} | {"rotary_dim"}
    if arch.rotary_dim == arch.head_dim:
        unused |= {"rotary_dim"}
    if arch.rope_scaling is not None:
        other = {
            "llama3": ("beta_fast", "beta_slow", "truncate"),
            "yarn": ("low_freq_factor", "high_freq_factor"),
        }
        unused |= {f"rope_scaling.{leaf}" for leaf in other[arch.rope_scaling.kind]}
    if arch.experts is not None:
        flat["experts.intermediate_size"] = arch.expert_size
        if not arch.experts.beside_mlp:
            unused |= {"experts.beside_scale"}
        if not any(arch.has_mlp(layer) for layer in range(arch.num_layers)):
            unused |= {"intermediate_size", "mlp_bias"}
    return {name: value for name, value in flat.items() if name not in unused}


def _equal(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, float) and isinstance(theirs, int | float):
        return math.isclose(mine, theirs, rel_tol=1e-12)
    return bool(mine == theirs)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def publish(
    arch: Architecture,
    family: Published,
    tensors: Mapping[str, Readable],
    kept: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[Readable]]:
    """(`config.json`, the published tensors) of a model that fits the family; nothing is read yet.

    kept: the `config.json` that the model was imported with; what ours says nothing of (ids of tokens, say)
        is given back as it was.
    """
    config = {name: value for name, value in (kept or {}).items() if name not in OF_THE_FILE}
    config |= {"architectures": [family.architecture], "model_type": family.name} | keys(family.terms, arch)
    found: list[Readable] = []
    for item in bind(family.rules, arch, tensors):
        found += item.rule.give(item.theirs, [tensors[name] for name in item.ours], arch)
    types = {tensor.dtype for tensor in found if tensor.name.endswith("weight")}
    if len(types) == 1:
        config["dtype"] = str(types.pop()).removeprefix("torch.")
    return config, found
