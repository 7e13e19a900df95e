"""What is taken to fit into memory, of every family."""

from __future__ import annotations

from dataclasses import replace

import pytest

from colossus.architecture import parameter_table
from colossus.derive.machine import (
    memory_bytes,
    micro_batch,
    peak_flops_per_second,
    state_bytes,
    threads_of_rank,
)
from colossus.job import load_job
from colossus.optim.optimizer import MUON_GROUPS
from colossus.perf.flops import saved_bytes_per_token
from colossus.perf.parts import Kernel
from tests.derive.machines import machine
from tests.perf.tiny import tiny


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_counts_momenta_but_of_buffers(name: str) -> None:
    """fp32 weights and gradients, of AdamW two more, of Muon one; the biases of choice have no gradient."""
    arch = tiny("deepseek-v3")
    job = load_job(None, ["run.steps=1", f"optimizer.name={name}"])
    table = parameter_table(arch)
    momentum = sum(p.numel for p in table if name == "muon" and p.group in MUON_GROUPS)
    trained, fixed = (
        sum(p.numel for p in table if p.trainable is is_trained) for is_trained in (True, False)
    )
    assert fixed == 3 * 8
    assert state_bytes(job, arch) == 16 * trained - 4 * momentum + 4 * fixed


def test_a_micro_batch_keeps_its_activations_in_a_quarter_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arch = tiny("mixtral-8x7b")
    job = load_job(None, ["run.steps=1", "layout.dp_shard=1"])
    axes = {f"layout.{axis}": 1 for axis in ("dp_replicate", "tp", "pp", "cp", "ep")}
    job = job.derive(**axes, **{"data.seq_len": 300, "data.phases": [], "fleet.device": "cpu"})
    job = replace(job, model=arch)
    a_sample = 300 * saved_bytes_per_token(arch, 300, kernel=Kernel(rows=256))
    for free, rows in ((4 * 5.5 * a_sample, 4), (4 * 3.5 * a_sample, 3), (0, 1), (10**12, 12)):
        monkeypatch.setattr("colossus.derive.machine.free_memory_bytes", lambda free=free: int(free))
        assert micro_batch(job, 12, machine()) == rows


@pytest.mark.parametrize(
    ("here", "threads", "machines"), [(None, 1, 1), ("2", 4, 6), ("3", 2, 4), ("1", 8, 12), ("12", 1, 1)]
)
def test_ranks_share_what_their_own_machine_has(
    here: str | None, threads: int, machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twelve ranks, `here` on each machine of eight cores; all of them where no launcher says."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setattr("colossus.derive.machine.free_memory_bytes", lambda: 10**9)
    axes = [f"layout.{axis}=1" for axis in ("dp_replicate", "tp", "pp", "cp", "ep")]
    job = load_job(None, ["run.steps=1", "layout.dp_shard=12", "fleet.device=cpu", *axes])
    eight = machine(cores=8)
    assert threads_of_rank(job, eight) == threads
    assert memory_bytes(job, eight) == machines * 10**9
    assert peak_flops_per_second(job, eight) == machines * eight.peak_flops_per_second("cpu")
