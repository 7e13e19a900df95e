"""Everything that a job leaves out is filled in, from the machine that is given, and what was asked stays."""

from __future__ import annotations

import dataclasses

import pytest

from colossus.derive import derive
from colossus.derive import machine as derive_machine_module
from colossus.derive.machine import zero_level
from colossus.errors import UserError
from colossus.hardware.machine import Gpu
from colossus.hardware.timings import Timing
from colossus.job import Job, load_job
from tests.derive.machines import machine

SLOW_BF16 = machine(fp32=60e9, bf16=0.45e9)
QUICK_BF16 = machine(fp32=100e9, bf16=400e9)


def derived(*words: str, on=QUICK_BF16) -> Job:
    return derive(load_job(None, words), on)


@pytest.mark.parametrize("length", ["run.steps=100", "run.tokens=1000000", "model=llama3.2-1b run.steps=2"])
def test_nothing_is_left_open_but_the_folders(length: str) -> None:
    job = derived(*length.split())
    assert set(job.missing()) == {"data.folder", "run.folder"}
    assert all(job.origins.get(name) for name in ("run.seed", "optimizer.lr", "model.hidden_size"))


def test_a_resolved_job_is_left_alone() -> None:
    job = derived("run.steps=100")
    assert derive(job, SLOW_BF16) == job


@pytest.mark.parametrize(("on", "kind"), [(SLOW_BF16, "fp32"), (QUICK_BF16, "bf16")])
def test_the_type_is_the_quicker_one(on, kind: str) -> None:
    assert derived("run.steps=100", on=on).precision.type == kind


def test_a_slow_type_is_used_only_where_it_is_asked_for() -> None:
    assert derived("run.steps=100", "precision.type=bf16", on=SLOW_BF16).precision.type == "bf16"


def test_threads_are_shared_by_the_ranks() -> None:
    assert derived("run.steps=9", "run.global_batch=2", "layout.dp_shard=2").run.threads == 1
    assert derived("run.steps=9").run.threads == 2


def test_compiling_needs_a_compiler_and_a_run_that_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ["model.hidden_size=384", "model.num_layers=6"]
    assert not derived(*shape, "run.tokens=1000000000").layout.compile  # its first steps will say
    seen = Timing("bf16", 2, 1e11, gain=1.2, compile_seconds=30.0)
    monkeypatch.setattr(derive_machine_module, "compiled_timings", lambda _: [(256, seen)])
    assert derived(*shape, "run.tokens=1000000000").layout.compile
    assert not derived(*shape, "run.tokens=10000").layout.compile
    assert not derived(*shape, "run.tokens=1000000000", on=machine(compiler=None)).layout.compile


def test_steps_tokens_and_expected_steps_agree() -> None:
    job = derived("run.tokens=2000000")
    per_step = job.run.global_batch * job.data.seq_len
    assert job.run.expected_steps == pytest.approx(2_000_000 / per_step, abs=1)
    assert derived("run.steps=77").run.expected_steps == 77


def test_longer_runs_get_larger_models_larger_batches_and_lower_rates() -> None:
    short, long = derived("run.tokens=1000000"), derived("run.tokens=1000000000")
    assert short.model.hidden_size < long.model.hidden_size
    assert short.run.global_batch < long.run.global_batch
    assert short.optimizer.lr > long.optimizer.lr


def test_minutes_give_what_this_machine_reaches_in_them() -> None:
    short, long = derived("run.minutes=0.2"), derived("run.minutes=60")
    assert short.model.hidden_size <= long.model.hidden_size
    assert short.run.expected_steps < long.run.expected_steps


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=llama3.1-405b", "run.steps=1"], "model=llama3.1-405b: 406B parameters need"),
        (["run.threads=4096"], "run.threads=4096: more than this machine's cores; at most 2"),
        (
            ["layout.tp=16", "model.num_heads=3", "model.hidden_size=192", "run.steps=1"],
            "layout.tp=16: must divide the 3 attention heads; 1",
        ),
        (
            ["layout.tp=2", "model.num_heads=3", "model.hidden_size=192", "run.steps=1"],
            "layout.tp=2: must divide the 3",
        ),
        (["data.weights=[1,2]"], "data.weights=[1.0, 2.0]: 2, and 1 in data.corpus"),
        (["model.max_seq_len=64", "data.seq_len=128", "run.steps=1"], "data.seq_len=128: longer than"),
        (["model.num_heads=4", "model.num_kv_heads=3", "model.hidden_size=64", "run.steps=1"], "must divide"),
        (["optimizer.schedule=cosine", "run.minutes=1"], "optimizer.schedule=cosine: needs to know its end"),
        (["run.global_batch=2", "layout.dp_shard=4", "run.steps=1"], "run.global_batch=2: fewer sequences"),
        (["model.num_kv_heads=7", "model.num_heads=4", "run.steps=1"], "must divide model.num_heads=4"),
        (
            ["run.global_batch=3", "run.batch_schedule=[[0,2],[5,4]]", "run.steps=9"],
            "run.global_batch=3: run.",
        ),
        (["data.phases=[{from_step=2, weights=[1.0, 2.0]}]", "run.steps=9"], "2, and 1 in data.corpus"),
        (["data.phases=[{from_step=2, seq_len=99}]", "model.max_seq_len=64", "run.steps=9"], "seq_len=99"),
        (["fleet.device=cuda"], "fleet.device=cuda: this machine has no GPU"),
    ],
)
def test_what_cannot_be_is_refused_by_name(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        derived(*words)
    assert said in str(error.value)


def test_compiling_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(UserError, match=r"layout.compile=true"):
        derived("run.steps=3", "layout.compile=true", on=machine(compiler=None))


def test_a_batch_schedule_alone_gives_the_batch() -> None:
    job = derived("run.batch_schedule=[[0,2],[5,8]]", "run.steps=9")
    assert job.run.global_batch == 2 and job.layout.micro_batch <= 2


def test_the_micro_batch_is_no_more_than_the_least_share_of_a_pool() -> None:
    """Of 8 sequences the first replica takes 2; the others say themselves how many they compute at once."""
    pools = "layout.pools=[{replicas=1,share=2},{replicas=2,share=3,micro_batch=3}]"
    job = derived("run.global_batch=8", "run.steps=9", "layout.dp_replicate=3", pools)
    assert job.layout.micro_batch == 2
    assert job.layout.fewest_rows(16) == 4
    measured = job.put({"layout.pools": [{"replicas": 1}, {"replicas": 2}]}, "argument")
    assert measured.layout.fewest_rows(8) == 2
    assert measured.put({"layout.pools": []}, "argument").layout.fewest_rows(8) == 3


PIPELINE = ["layout.pp=2", "layout.schedule=interleaved_1f1b", "model.num_layers=4", "layout.micro_batch=1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*PIPELINE, "run.batch_schedule=[[0,4],[3,5]]"], "from step 3 on: gives 5 micro batches a rank"),
        (
            [*PIPELINE, "run.batch_schedule=[[0,4],[3,5],[6,8]]"],
            "from step 3 on: gives 5 micro batches a rank",
        ),
        (
            ["layout.cp=2", "data.seq_len=64", "data.phases=[{from_step=2,seq_len=62}]"],
            "layout.cp=2: from step 2 on: the 62 tokens of a sequence are cut into 2 x cp equal parts; 1",
        ),
        (
            ["layout.cp=2", "data.seq_len=62", "data.phases=[{from_step=2,seq_len=64}]"],
            "layout.cp=2: the 62 tokens of a sequence are cut into 2 x cp equal parts; 1",
        ),
        (
            ["layout.dp_shard=4", "run.batch_schedule=[[0,8],[5,2]]"],
            "run.global_batch=2: from step 5 on: fewer",
        ),
    ],
)
def test_every_shape_of_a_run_must_be_legal(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        derived(*words, "run.steps=9")
    assert message in str(error.value)


def test_what_begins_after_the_last_step_is_no_hindrance() -> None:
    assert derived(*PIPELINE, "run.batch_schedule=[[0,4],[9,5]]", "run.steps=9").layout.pp == 2
    with pytest.raises(UserError, match="from step 9 on"):
        derived(*PIPELINE, "run.batch_schedule=[[0,4],[9,5]]", "run.steps=10")
    with pytest.raises(UserError, match="from step 9 on"):
        derived(*PIPELINE, "run.batch_schedule=[[0,4],[9,5]]", "run.tokens=1000000")


def test_the_micro_batch_suits_all_batches() -> None:
    """Two of 4 and 12 sequences at once are 2 and 6 micro batches, which rounds of 2 take; of 4 and 10, 2 and
    5, which they do not."""
    words = [word for word in PIPELINE if "micro_batch" not in word]
    for later in (12, 10):
        job = derived(*words, f"run.batch_schedule=[[0,4],[3,{later}]]", "run.steps=9")
        counts = [batch // job.layout.micro_batch for batch in (4, later)]
        assert all(count % max(1, count // 2) == 0 for count in counts)


def test_samples_of_all_phases_fit_the_model() -> None:
    job = derived("data.seq_len=32", "data.phases=[{from_step=2, seq_len=128}]", "run.steps=9")
    assert job.model.max_seq_len == 128


def test_heads_that_were_asked_for_choose_a_width_that_goes_with_them() -> None:
    arch = derived("model.num_kv_heads=2", "run.tokens=100000").model
    assert arch.num_kv_heads == 2 and arch.num_heads % 2 == 0


def test_a_run_is_saved_often_enough_for_its_length() -> None:
    assert derived("run.minutes=5").checkpoint.minutes == 1
    assert derived("run.steps=5").checkpoint.minutes == 10


@pytest.mark.parametrize(
    ("layout", "micro_batch"),
    [
        (["pp=2"], 6),
        (["pp=4", "dp_shard=2"], 1),
        (["pp=2", "schedule=interleaved_1f1b"], 3),
        (["pp=2", "schedule=gpipe"], 6),
        (["pp=4", "schedule=interleaved_1f1b", "stages_per_rank=3"], 1),
        (["tp=2"], 12),
    ],
)
def test_a_pipeline_has_work_for_its_stages(layout: list[str], micro_batch: int) -> None:
    words = ["run.steps=10", "run.global_batch=12", "model.num_layers=12", "model.hidden_size=64"]
    job = derived(*words, "model.num_kv_heads=2", "model.num_heads=2", *(f"layout.{word}" for word in layout))
    assert job.layout.micro_batch == micro_batch


@pytest.mark.parametrize(
    ("length", "every"),
    [
        ("steps=1", 0),
        ("steps=4", 0),
        ("steps=19", 0),
        ("steps=20", 2),
        ("steps=205", 20),
        ("tokens=1e15", 10**9),
    ],
)
def test_a_short_run_is_not_validated_after_every_step(length: str, every: int) -> None:
    job = derived("model.hidden_size=32", "run.global_batch=4", "data.seq_len=64", f"run.{length}")
    assert job.run.validate_every == every


@pytest.mark.parametrize("heads", [[], ["model.num_heads=6"]])
def test_what_is_left_out_beside_latent_attention_goes_with_it(heads: list[str]) -> None:
    sizes = ["kv_rank=32", "nope_dim=16", "rope_dim=8", "v_dim=16"]
    model = derived("model.hidden_size=96", *heads, *(f"model.latent.{size}" for size in sizes)).model
    expected = 6 if heads else 96 // 24
    assert (model.head_dim, model.num_heads, model.num_kv_heads) == (24, expected, expected)
    assert model.qk_norm is False


GPU = dataclasses.replace(machine(), gpus=2 * (Gpu("NVIDIA H100 80GB HBM3", 80 * 10**9, 7e14),))


@pytest.mark.parametrize(
    ("model", "layout", "zero"),
    [
        ("gpt3-125m", {"dp_shard": 2}, 1),
        ("llama3.1-8b", {"dp_shard": 2}, 3),
        ("llama3.1-8b", {"pp": 2}, 2),  # a pipeline would gather its weights too often
        ("llama3.1-8b", {"pp": 2, "schedule": "zbv_zero_bubble"}, 1),
    ],
)
def test_what_takes_little_memory_stays_whole_through_a_step(
    model: str, layout: dict[str, int | str], zero: int
) -> None:
    job = load_job(None, [f"model={model}", "precision.type=bf16", "fleet.device=cuda"])
    axes = dict.fromkeys(("dp_replicate", "dp_shard", "tp", "pp", "cp"), 1) | layout
    job = job.put({f"layout.{name}": value for name, value in axes.items()}, "argument")
    assert zero_level(job, GPU) == zero
