"""The parameter table, against published counts."""

from __future__ import annotations

import tomllib
from importlib import resources

import pytest
import torch

from colossus.architecture import num_active, num_parameters, parameter_table
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
