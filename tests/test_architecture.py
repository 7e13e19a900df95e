"""The parameter table, against published counts."""

from __future__ import annotations

import pytest

from colossus.architecture import num_active, num_parameters, parameter_table
from colossus.errors import UserError
from colossus.job import load_job

# Computed from the published configurations tensor by tensor, apart from this code.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_models(name: str) -> None:
    arch = load_job(None, [f"model={name}"]).model
    assert num_parameters(arch) == PUBLISHED[name]
    embedding = arch.vocab_size * arch.hidden_size
    without = num_active(arch, input_embedding=False)
    assert without == PUBLISHED[name] - (0 if arch.tie_embeddings else embedding)


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
