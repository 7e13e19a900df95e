"""Copies for generation are made where they are quicker and memory has room for them."""

import pytest
import torch

from colossus.generation import ready
from colossus.generation.ready import make_ready
from colossus.measure.vectors import VectorProduct
from colossus.models.copies import owners_of
from tests.generation.test_generate import untrained


@pytest.mark.parametrize(
    ("more", "packed", "copies"),
    [(1, True, True), (0, True, False), (-1, True, False), (10**9, False, False)],
)
def test_there_must_be_room_for_twice_the_matrices(more, packed, copies, monkeypatch):
    model = untrained(258)
    size = sum(owner.weight.nbytes for owners in owners_of(model) for owner in owners)
    assert size > 258 * 32 * 4
    monkeypatch.setattr(ready, "free_memory_bytes", lambda: 2 * size + more)
    monkeypatch.setattr(
        ready, "quickest_vector_product", lambda dtype=None: VectorProduct("fp32", packed, 1e-3)
    )
    make_ready(model, torch.float32)
    assert (model.copies is not None) is copies
