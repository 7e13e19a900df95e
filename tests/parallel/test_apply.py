"""A model made into this rank's part."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from colossus.parallel.apply import build
from colossus.parallel.world import World
from tests.ranks.cases import Case


def test_a_model_that_is_not_derived_gets_no_values() -> None:
    """Without `initializer_range` its weights would be NaN, and nothing would say so."""
    job = Case.of().job()
    arch = job.model.model_copy(update={"initializer_range": None})
    with pytest.raises(AssertionError, match="initializer_range is not derived"):
        build(dataclasses.replace(job, model=arch), World(0, 1, torch.device("cpu")))
