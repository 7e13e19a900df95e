"""Whose memory it is, against the table of parameters and a program in which no layer stands for another."""

from __future__ import annotations

from collections import Counter

import pytest

from colossus.architecture import parameter_table
from colossus.dryrun.owners import owner_of
from colossus.dryrun.rank import Traced
from colossus.dryrun.tracer import Use, by_what, settled
from colossus.job import Job
from tests.dryrun.programs import dry
from tests.ranks.cases import Case
from tests.ranks.pool import Pool

LARGE = {"hidden_size": 256, "num_layers": 3, "vocab_size": 512, "intermediate_size": 512}


def in_full(job: Job, rank: int) -> Traced:
    return dry(job, rank, replay=False)


def of(traced: Traced, what: str) -> dict[str, int]:
    return {use.owner: size for use, size in traced.peak.by_owner.items() if use.what == what}


@pytest.mark.parametrize(
    "path, owner",
    [
        ("layers.12.mlp.w_up", "layers.*.mlp.w_up"),
        ("layers.3._checkpoint_wrapped_module.attention", "layers.*.attention"),
        ("layers.3._checkpoint_wrapped_module", "layers.*"),
        ("embedding", "embedding"),
        ("", ""),
    ],
)
def test_layers_have_no_number(path: str, owner: str) -> None:
    assert owner_of(path) == owner


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_and_what_an_optimizer_keeps_are_those_of_the_table(optimizer: str, pool: Pool) -> None:
    case = Case.of(LARGE, type="fp32", optimizer=optimizer)
    (traced,) = pool.run(1, dry, case.job(), 0)
    expected, states = Counter[str](), Counter[str]()
    for parameter in parameter_table(case.arch):
        owner = owner_of(parameter.name.rpartition(".")[0])
        expected[owner] += 4 * parameter.numel
        one = optimizer == "muon" and parameter.group == "matrix"
        states[owner] += (4 if one else 8) * parameter.numel
    assert of(traced, "weights") == expected
    found = of(traced, "optimizer")
    assert found.pop("") < 1000  # counts of steps
    assert found == states


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_are_of_the_modules_that_made_them(recompute: str, pool: Pool) -> None:
    """Without a layer that stands for another the same; an MLP's two first products keep as much each."""
    job = Case.of(LARGE, dp_shard=2, type="fp32", recompute=recompute, seq_len=256).job()
    (traced,), (whole,) = pool.run(1, dry, job, 0), pool.run(1, in_full, job, 0)
    for what in ("forward", "gathered weights", "weights"):
        assert of(traced, what) == pytest.approx(of(whole, what), rel=0.01, abs=64)
    kept = of(traced, "forward")
    assert ("layers.*.mlp.w_gate" in kept) == (recompute != "full")
    if recompute != "full":
        tokens = 256 * job.layout.micro_batch
        assert kept["layers.*.mlp.w_gate"] == kept["layers.*.mlp.w_up"] >= 3 * tokens * 512 * 4
    assert sum(traced.peak.by_owner.values()) == traced.peak.num_bytes


def test_what_is_below_nothing_is_taken_from_its_like() -> None:
    by_use = {Use("a", "x"): -3, Use("a", "y"): 10, Use("a", "z"): 2, Use("b", "x"): -1, Use("c"): 0}
    assert by_what(by_use) == {"a": 9}
    assert settled(by_use) == {Use("a", "z"): 2, Use("a", "y"): 7}
