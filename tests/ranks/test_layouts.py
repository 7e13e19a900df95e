"""Layout changes nothing but speed: each trains as one rank does. `benchmarks.parity` has all of them."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh

from colossus.layout import violations
from tests.ranks import matrix
from tests.ranks.cases import Case, compare, noise, reference
from tests.ranks.matrix import axes_above_one, random_case
from tests.ranks.pool import Pool

HERE = {
    "alone": matrix.ALONE,
    "pairs": matrix.PAIRS,
    "schedules": matrix.PIPELINES[::2],
    "among others": matrix.PIPELINES_AMONG_OTHERS[5::3],
    "many": matrix.MANY[2:4],
    "five axes": [matrix.FIVE_AXES],
    "families": [*matrix.FAMILIES[::3]],  # with a norm over all heads
    "options": matrix.OPTIONS,
    "contexts": list(matrix.CONTEXTS.values())[1::4],
    "fp32": matrix.IN_FP32[1::2],
    "bf16": matrix.IN_BF16[2:4],
    # each rank compiles for itself: two of them
    "compiled": [Case.of(tp=2, compile=True, recompute="selective"), matrix.COMPILED[1]],
}


def brief(case: Case) -> Case:
    """Fewer steps, and fewer samples where neither a pipeline nor a micro batch asks for them."""
    if case.type != "fp64":
        return case
    asks = {"pp", "micro_batch"} & set(dict(case.layout))
    return replace(case, steps=2, batch=case.batch if asks else min(case.batch, 4))


CASES = {f"{name}: {case}": brief(case) for name, cases in HERE.items() for case in cases}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_layout_trains_as_one_rank(case: Case, pool: Pool) -> None:
    found = compare(pool, case)
    assert all(value <= allowed for value, allowed in found.values()), found
    assert len(found) >= 3  # losses, gradients and their norms at least


def test_the_matrix_is_legal_and_has_at_least_sixty_layouts() -> None:
    cases = [case for of_section in matrix.SECTIONS.values() for case in of_section]
    for case in [*cases, *CASES.values()]:
        job = case.job()
        broken = violations(job.layout, case.arch, global_batch=case.batch, seq_len=case.seq_len)
        assert not broken, f"{case}: {broken}"
    assert len({case.layout for case in cases}) >= 60
    pairs = {pair for case in cases for pair in combinations(axes_above_one(case), 2)}
    assert len(pairs) == 15


def test_one_rank_differs_from_itself_in_bf16_and_hardly_in_fp64() -> None:
    """What comparisons in bf16 are measured by is there."""
    assert max(noise(Case()).values()) < 1e-13
    assert 1e-6 < noise(Case(type="bf16"))["loss"] < 1e-2


def test_references_are_of_models_that_learn() -> None:
    """Losses that never moved would be equal in any layout."""
    for case in (Case(), Case.of(**matrix.EXPERTS), Case.of(**matrix.OF_MANY, optimizer="muon")):
        found = reference(case)
        assert abs(found.losses[0] - found.losses[-1]) > 1e-2
        assert min(found.grad_norms) > case.job().optimizer.grad_clip  # clipping is seen, too
        moved = [name for name, (_, _, w) in found.weights.items() if not bool((w == w.flatten()[0]).all())]
        assert len(moved) == len(found.weights)


COVERED: set[tuple[str, str]] = set()


@settings(
    max_examples=4,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 2**40))
def test_whatever_is_legal_trains_as_one_rank(seed: int, pool: Pool) -> None:
    case = random_case(seed)
    found = compare(pool, case)
    assert all(value <= allowed for value, allowed in found.values()), (str(case), found)
    COVERED.update(combinations(axes_above_one(case), 2))
    print(f"seed {seed}: {case}; pairs covered so far: {sorted(map(' x '.join, COVERED))}")


def test_half_of_the_layouts_drawn_have_an_axis_above_one() -> None:
    drawn = [axes_above_one(random_case(seed)) for seed in range(300)]
    for axis in ("dp_replicate", "dp_shard", "pp", "cp", "tp"):
        assert 0.25 < sum(axis in axes for axes in drawn) / len(drawn) < 0.75, axis
    assert len({pair for axes in drawn for pair in combinations(axes, 2)}) == 15


def test_a_pipeline_that_is_over_leaves_no_group() -> None:
    """Its last graph would keep its mesh, whose groups each have a thread that gloo wakes all the time."""
    with Pool() as fresh:
        compare(fresh, brief(Case.of(pp=2)))
        assert fresh.run(2, num_meshes) == [0, 0]


def num_meshes() -> int:
    gc.collect()
    return sum(type(thing) is DeviceMesh for thing in gc.get_objects())
