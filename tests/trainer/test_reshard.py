"""A run that changes its layout at every step is the run that never changed, and so is what it saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from colossus.checkpoints.load import Checkpoint, newest_whole, open_checkpoint
from tests.checkpoints.samples import equal
from tests.ranks.cases import Case
from tests.ranks.pool import Pool
from tests.trainer.resharding import go_on

ALONE: dict[str, Any] = {}
DENSE = [
    {"tp": 2},
    {"pp": 2},
    {"dp_shard": 3},
    {"pp": 2, "schedule": "zbv_zero_bubble", "stages_per_rank": 2},
    {"dp_shard": 2, "tp": 2},
    {"pp": 2, "schedule": "interleaved_1f1b", "stages_per_rank": 2},
    {"cp": 2},
    {"dp_replicate": 2, "dp_shard": 2},
    {"pp": 2, "schedule": "dualpipe_v", "stages_per_rank": 2, "dp_shard": 2},
    {"pp": 2, "tp": 2},
    {"cp": 2, "tp": 2},
    {"dp_shard": 4, "recompute": "full"},
]
EXPERTS = [
    {"dp_shard": 2, "ep": 2},
    {"tp": 2, "ep": 2},
    {"pp": 2, "schedule": "interleaved_zero_bubble", "stages_per_rank": 2},
    {"tp": 2, "etp": 2},
    {"cp": 2, "ep": 2},
    {"pp": 2, "dp_shard": 2, "ep": 2},
    {"dp_shard": 2, "tp": 2, "ep": 2, "etp": 2},
    {"dp_shard": 4, "ep": 2, "recompute": "full"},
    {"tp": 2},
    {"pp": 2, "dp_replicate": 2},
]
CHAINS = {
    # A bias of keys has no gradient but rounding, which AdamW would blow up.
    "tied, AdamW": (Case((), "gpt2-124m", (("attention_bias", False),)), [*DENSE[::2], ALONE]),
    "untied, Muon": (Case((), "qwen3-8b", optimizer="muon"), [*DENSE[1::2], ALONE]),
    "experts with a bias, Muon": (Case((), "deepseek-v3", optimizer="muon"), [*EXPERTS[::2], ALONE]),
    "experts with shares, AdamW": (Case((), "mixtral-8x7b"), [*EXPERTS[1::2], ALONE]),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.mark.parametrize("name", CHAINS)
def test_a_layout_for_every_step(name: str, pool: Pool, tmp_path: Path) -> None:
    plain, layouts = CHAINS[name]
    alone = dataclasses.replace(plain, layout=(("micro_batch", plain.batch),))
    steps = len(layouts) + 1
    ((losses, norms),) = pool.run(1, go_on, alone, None, tmp_path / "alone", steps)
    pool.run(1, go_on, alone, None, tmp_path / "0", 1)
    for turn, layout in enumerate(layouts):
        case = dataclasses.replace(plain, layout=tuple(layout.items()))
        before, folder = tmp_path / str(turn), tmp_path / str(turn + 1)
        results = pool.run(case.job().layout.num_ranks, go_on, case, before, folder, 1)
        for (loss,), (norm,) in results:
            assert loss == pytest.approx(losses[turn + 1], rel=1e-9), layout
            assert norm == pytest.approx(norms[turn + 1], rel=1e-9), layout
        last = newest_whole(before)
        assert last is not None
        assert_same_bits(last, at(folder, turn + 1), layout)
        assert_near(at(folder, turn + 2), at(tmp_path / "alone", turn + 2), layout)


def at(folder: Path, step: int) -> Checkpoint:
    return open_checkpoint(folder / "checkpoints" / f"step-{step:08d}")


def data_bytes(path: Path) -> int:
    """Of the files of pieces, without their headers."""
    total = 0
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream:
            total += file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
    return total


def assert_same_bits(left: Checkpoint, right: Checkpoint, layout: Any) -> None:
    assert set(left.names()) == set(right.names()), layout
    for key in left.names():
        assert equal(left.read(*key), right.read(*key)), (layout, key)
    stored = [data_bytes(checkpoint.path) for checkpoint in (left, right)]
    assert stored[0] == stored[1], f"{layout}: something is written twice"


def assert_near(left: Checkpoint, right: Checkpoint, layout: Any) -> None:
    """By norm and tensor; one that is 0 but for rounding, in units of all of its kind."""
    assert set(left.names()) == set(right.names()), layout
    for kind in {kind for _, kind in right.names()}:
        pairs = {key: (left.read(*key).double(), right.read(*key).double()) for key in right.names(kind)}
        total = torch.stack([expected.norm() for _, expected in pairs.values()]).norm()
        for key, (found, expected) in pairs.items():
            size = max(float(expected.norm()), 1e-6 * float(total), 1e-300)
            assert float((found - expected).norm()) / size < 1e-9, (layout, key)


def test_a_checkpoint_of_another_model_is_refused_by_every_rank(pool: Pool, tmp_path: Path) -> None:
    plain = Case((), "deepseek-v3")
    pool.run(1, go_on, dataclasses.replace(plain, layout=(("micro_batch", 8),)), None, tmp_path / "one", 1)
    other = Case((("pp", 2),), "deepseek-v3", (("num_layers", 6),))
    with pytest.raises(AssertionError) as failed:
        pool.run(2, go_on, other, tmp_path / "one", tmp_path / "two", 1)
    said = "step-00000001: of another model; differing in model (there, here): num_layers: 5, 6"
    assert said in str(failed.value) and "UserError" in str(failed.value)
