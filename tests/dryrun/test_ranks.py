"""Kinds of ranks, many micro batches, and whether it fits."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
from collections import Counter

import pytest

from colossus import api
from colossus.cli import main
from colossus.dryrun import worker
from colossus.dryrun.mend import mended
from colossus.dryrun.rank import trace
from colossus.dryrun.ranks import DryRun, Kind, dry_run, extended, kinds_of, rows_of
from colossus.dryrun.worker import traces
from colossus.errors import UserError
from colossus.hardware.fleets import hardware_of
from colossus.job import Job, load_job
from colossus.layout import Layout, Pool
from colossus.parallel.mesh import Place
from tests.ranks.cases import Case
from tests.ranks.pool import Pool as Ranks

H100 = load_job(None, ["fleet.accelerator=h100-sxm", "fleet.count=64"]).fleet


def of(case: Case) -> Job:
    return dataclasses.replace(case.job(), fleet=H100.model_copy(update={"device": "cuda"}))


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(dp_shard=2, tp=2), Layout(dp_replicate=2, dp_shard=3, pp=4, tp=2)],
    ids=lambda layout: f"{layout.filled().num_ranks} ranks",
)
def test_every_rank_is_of_one_kind(layout: Layout) -> None:
    layout = layout.filled()
    job = dataclasses.replace(of(Case.of()), layout=layout)
    kinds = list(kinds_of(job, hardware_of(job.fleet), batch=12))
    stages = Counter(Place.of(layout, rank).pp for rank in range(layout.num_ranks))
    assert {kind.stage: kind.count for kind in kinds} == stages
    for kind in kinds:
        place = Place.of(layout, kind.rank)
        assert (place.pp, place.dp_shard, place.cp, place.tp) == (kind.stage, 0, 0, 0)
        assert kind.num_rows == 12 // layout.dp


def test_each_pool_has_kinds_of_its_own() -> None:
    pools = [Pool(replicas=3, share=2, recompute="full"), Pool(replicas=1, share=6, micro_batch=2)]
    layout = Layout(dp_replicate=4, pp=2, tp=2, pools=pools).filled()
    fleet = load_job(None, ["fleet=colossus-200k"]).fleet
    job = dataclasses.replace(of(Case.of()), layout=layout)
    found = list(kinds_of(job, hardware_of(fleet), batch=12))
    assert [(kind.replica, kind.stage, kind.count, kind.num_rows) for kind in found] == [
        (0, 0, 6, 2), (0, 1, 6, 2), (3, 0, 2, 6), (3, 1, 2, 6)
    ]  # fmt: skip
    assert [kind.accelerator.name for kind in found] == ["h100-sxm", "h100-sxm", "h200-sxm", "h200-sxm"]
    assert [kind.rank for kind in found] == [0, 2, 12, 14]
    assert [kind.rank for kind in kinds_of(job, hardware_of(fleet), 12, rank=15)] == [15]


MANY = [
    Case.of(pp=2, batch=22, type="fp32"),
    Case.of(pp=4, batch=33, changed={"num_layers": 4}, type="fp32"),
    Case.of(
        pp=2, schedule="interleaved_1f1b", stages_per_rank=2, changed={"num_layers": 4}, batch=20, type="fp32"
    ),
    Case.of(dp_shard=2, recompute="full", batch=22, type="bf16"),
]


def whole_and_extended(job: Job) -> object:
    kind = Kind(0, 1, 0, 0, job.run.global_batch // job.layout.dp, hardware_of(job.fleet).accelerator)
    length = job.data.seq_len
    short, longer = (trace(job, 0, rows, length) for rows in rows_of(job, kind))
    micro_batches = kind.num_rows // job.layout.micro_batch
    return trace(job, 0, kind.num_rows, length), extended(short, longer, micro_batches)


@pytest.mark.parametrize("case", MANY, ids=str)
def test_of_many_micro_batches_two_shorter_steps_tell_all(case: Case, pool: Ranks) -> None:
    ((whole, longer),) = pool.run(1, whole_and_extended, of(case))
    assert longer.num_operators < whole.num_operators
    assert longer.num_micro_batches == whole.num_micro_batches
    assert longer.flops == whole.flops and longer.said() == whole.said()
    assert longer.at_rest == whole.at_rest
    assert longer.peak.num_bytes == pytest.approx(whole.peak.num_bytes, rel=0.01)


def judged(job: Job) -> DryRun:
    hardware = hardware_of(job.fleet)
    little = dataclasses.replace(hardware.accelerator, memory=2.3e9)  # by hand: 2.56, 2.03 and 1.54 GB
    pools = (dataclasses.replace(hardware.pools[0], accelerator=little),)
    return mended(dry_run(job, dataclasses.replace(hardware, pools=pools)))


def test_what_does_not_fit_fits_with_the_smallest_change() -> None:
    """Without recomputation 2.56 GB, with it of some or all 2.03 and 1.54; the former is cheaper in time."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
    case = Case.of(wide, dp_shard=2, seq_len=2048, micro_batch=4, batch=8, type="bf16")
    found = judged(of(case))
    assert not found.fits and found.worst.margin < 0
    assert found.mend is not None
    words, after = found.mend
    assert words == "layout.recompute=selective" and after.fits
    assert after.job.layout.recompute == "selective" and after.job.layout.micro_batch == 4
    said = found.to_dict()
    assert said["fits"] is False and said["mend"]["words"] == words and said["mend"]["fits"] is True
    json.dumps(said)


def test_the_program_is_that_of_the_fleets_device() -> None:
    """Not of this machine's: a GPU's kernel of attention keeps no scores, products on a processor do."""
    job = dataclasses.replace(Case.of(seq_len=512, type="bf16").job(), fleet=H100)
    assert job.fleet.device is None
    (on_gpu,) = dry_run(job, hardware_of(H100)).ranks
    (here,) = traces([(job, 0, 8, 512)])
    assert on_gpu.traced.peak.num_bytes < 0.5 * here.peak.num_bytes


def longer(case: Case) -> list[int]:
    """The most that lives on a GPU, at twice the tokens each time."""
    cases = (dataclasses.replace(case, seq_len=length) for length in (2048, 4096))
    return [trace(of(each), 0, 1, each.seq_len).peak.num_bytes for each in cases]


OTHER_WIDTHS = {"latent.nope_dim": 32, "head_dim": 36, "latent.v_dim": 24}
KERNELS = [
    Case.of(OTHER_WIDTHS, preset="deepseek-v3", batch=1, type="bf16"),
    Case.of({"head_dim": 32, "window": 256}, preset="gpt-oss-20b", batch=1, type="bf16", tp=2),  # and sinks
    Case.of({"head_dim": 32}, preset="grok-2", batch=1, type="bf16", recompute="selective"),  # a cap
    Case.of({"head_dim": 32}, cp=2, batch=1, type="bf16"),  # the last rows of a square
]


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_a_gpu_writes_no_scores(case: Case, pool: Ranks) -> None:
    """Not a byte for each pair of tokens: twice the tokens take no more than twice the memory."""
    ((few, many),) = pool.run(1, longer, case)
    assert many < 2 * few


def test_mistakes() -> None:
    job, hardware = of(Case.of(dp_shard=2, tp=2)), hardware_of(H100)
    with pytest.raises(UserError, match=r"--rank 4: the layout has 4 ranks; 0 to 3"):
        dry_run(job, hardware, 4)
    with pytest.raises(UserError, match=r"--rank -1"):
        dry_run(job, hardware, -1)
    few = dataclasses.replace(hardware, pools=(dataclasses.replace(hardware.pools[0], count=2),))
    with pytest.raises(UserError, match=r"layout: 4 ranks; .* has 2; at most layout.dp_shard=1"):
        dry_run(job, few)
    with pytest.raises(UserError, match=r"layout.tp=3: must divide"):
        api.dry_run(load_job(None, ["model=llama3.1-8b", "fleet=dgx-h100-1", "layout.tp=3"]))


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a layout that the planner fills in; exit code 1 where it does not fit."""
    small = ["model.hidden_size=64", "model.num_layers=2", "model.vocab_size=256", "run.global_batch=8"]
    words = ["dryrun", *small, "data.seq_len=64", "fleet.accelerator=h100-sxm", "fleet.count=1"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "fits: " in said and "of 79.2 GiB" in said and "products of" in said
    large = ["model.hidden_size=8192", "model.num_layers=12", "layout.dp_shard=1"]
    tightest = ["layout.zero=3", "layout.recompute=full", "layout.micro_batch=1"]  # no change is left to try
    assert main([*words, *large, *tightest]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_experts_of_several_stages(capsys: pytest.CaptureFixture[str]) -> None:
    """Each step in a process of its own: PyTorch remembers the groups of the one before."""
    words = ["model=mixtral-8x7b", "model.hidden_size=64", "model.num_layers=2", "model.intermediate_size=64"]
    words += ["model.num_heads=8", "model.head_dim=8", "model.vocab_size=256", "run.global_batch=16"]
    words += ["data.seq_len=32", "layout.ep=2", "layout.pp=2", "layout.dp_shard=2", "layout.dp_replicate=1"]
    assert main(["dryrun", *words, "fleet=dgx-h100-1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rank["place"]["pp"] for rank in found["ranks"]] == [0, 1]
    assert all(rank["peak_bytes"] == sum(rank["peak_by_use"].values()) for rank in found["ranks"])
    streams = {(m["axis"], m["operation"]): m["stream"] for m in found["ranks"][0]["messages"]}
    assert {streams[key] for key in streams if "all_to_all" in key[1]} == {"fsdp"}  # the same ranks as ep
    assert streams["fsdp", "_allgather_base_"] == "fsdp.all_gather"
    assert streams["fsdp", "_reduce_scatter_base_"] == "fsdp.reduce_scatter"
    assert streams["pp", "send"] == "pp"
    owned = found["ranks"][0]["peak_by_module"]
    assert sum(each["bytes"] for each in owned) == found["ranks"][0]["peak_bytes"]
    assert "layers.*.moe.router" in {each["module"] for each in owned}


def test_a_process_ends_with_whoever_asked() -> None:
    """In the middle of a trace of minutes."""
    asked = worker._start()
    assert asked.stdin is not None
    worker._send(asked.stdin, (trace, (of(Case.of(dp_shard=2, micro_batch=1)), 0, 20_000, 16)))
    with pytest.raises(subprocess.TimeoutExpired):
        asked.wait(3)
    asked.stdin.close()
    assert asked.wait(20) == -signal.SIGKILL


def test_what_a_process_raises_is_told() -> None:
    job = of(Case.of(dp_shard=2))
    with pytest.raises(AssertionError, match="no such rank"):
        traces([(job, 7, 4, 16)])
