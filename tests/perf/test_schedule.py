"""Schedules against PyTorch's own orders, and their bubbles against the published formulas."""

import pytest

from colossus.layout import RULES
from colossus.perf.schedule import (
    HALF,
    _held,
    bubble,
    fullest,
    orders,
    pipeline_seconds,
    stages_of,
    timeline,
)

SCHEDULES = {
    "gpipe": (1, [(2, 4), (4, 4)]),
    "1f1b": (1, [(2, 4), (4, 8), (4, 6)]),
    "interleaved_1f1b": (2, [(2, 4), (4, 8), (4, 16)]),
    "interleaved_zero_bubble": (2, [(2, 4), (4, 8), (4, 16)]),
    "zbv_zero_bubble": (2, [(2, 2), (2, 4), (4, 4), (4, 6), (4, 8), (4, 12)]),
    "dualpipe_v": (2, [(2, 4), (4, 8), (4, 12)]),
}
CASES = [(name, per, pp, m) for name, (per, sizes) in SCHEDULES.items() for pp, m in sizes]
LETTERS = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}


def torch_order(name, pp, per_rank, micro_batches, rank):
    """What PyTorch's schedule of that name has a rank do, without its communication."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    kind = {
        "interleaved_1f1b": "ScheduleInterleaved1F1B",
        "interleaved_zero_bubble": "ScheduleInterleavedZeroBubble",
        "zbv_zero_bubble": "ScheduleZBVZeroBubble",
        "dualpipe_v": "ScheduleDualPipeV",
    }[name]
    schedule = object.__new__(getattr(schedules, kind))
    schedule.pp_group_size, schedule.n_local_stages, schedule._n_microbatches = pp, per_rank, micro_batches
    schedule._num_stages = schedule.num_stages = pp * per_rank
    schedule.number_of_rounds = max(1, micro_batches // pp)
    schedule.microbatches_per_round = micro_batches // schedule.number_of_rounds
    found = []
    for action in schedule._calculate_single_rank_operations(rank):
        parts = [] if action is None else [action] if action.sub_actions is None else action.sub_actions
        found += [
            (LETTERS[part.computation_type.name], part.stage_index, part.microbatch_index) for part in parts
        ]
    return found


@pytest.mark.parametrize(("name", "per_rank", "pp", "micro_batches"), CASES)
def test_orders_are_pytorchs(name, per_rank, pp, micro_batches):
    if name in ("gpipe", "1f1b"):
        pytest.skip("PyTorch writes down no order of schedules with one stage")
    for rank, order in enumerate(orders(name, pp, per_rank, micro_batches)):
        assert [tuple(action) for action in order] == torch_order(name, pp, per_rank, micro_batches, rank)


@pytest.mark.parametrize(("name", "per_rank", "pp", "micro_batches"), CASES)
def test_every_micro_batch_passes_every_stage_once(name, per_rank, pp, micro_batches):
    for rank, order in enumerate(orders(name, pp, per_rank, micro_batches)):
        wanted = {(s, i) for s in stages_of(name, rank, pp, per_rank) for i in range(micro_batches)}
        for works in ("F", "BI", "BW"):
            found = [(a.stage, a.micro_batch) for a in order if a.work in works]
            assert len(found) == len(set(found)) and set(found) == wanted


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 8), (8, 32)])
def test_bubbles_are_the_published_ones(pp, micro_batches):
    f, i, w = 1.0, 1.2, 0.9
    assert bubble("gpipe", pp, 1, micro_batches, f, i, w) == pytest.approx((pp - 1) * (f + i + w))
    assert bubble("1f1b", pp, 1, micro_batches, f, i, w) == pytest.approx((pp - 1) * (f + i + w))
    # Narayanan et al. 2021: a stage takes 1/v of the time, and so does the bubble.
    for v in (2, 4):
        exact = bubble("interleaved_1f1b", pp, v, micro_batches, f, i, w)
        assert exact == pytest.approx((pp - 1) * (f + i + w))
    # Qi et al. 2024: zero bubble fills the bubble with the gradients of weights, as far as they go.
    exact = bubble("interleaved_zero_bubble", pp, 2, micro_batches, f, i, w)
    assert exact == pytest.approx((pp - 1) * max(f + i - w, f, i))
    # Qi et al. 2024 (ZB-V): none where the three passes take the same.
    assert bubble("zbv_zero_bubble", pp, 2, max(micro_batches, 2 * pp), 1.0, 1.0, 1.0) <= pp - 1
    assert bubble("interleaved_zero_bubble", pp, 2, micro_batches, 1, 1, 1) < bubble(
        "interleaved_1f1b", pp, 2, micro_batches, 1, 1, 1
    )


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_long_step_waits_as_long_as_a_few_rounds(name):
    per_rank, pp, m = SCHEDULES[name][0], 4, 64
    stages = pp * per_rank
    whole = timeline(name, pp, per_rank, m, [1.0] * stages, [1.1] * stages, [0.8] * stages)
    exact = whole.seconds - whole.busy.max()
    assert bubble(name, pp, per_rank, m, 1.0, 1.1, 0.8) == pytest.approx(exact, rel=0.02, abs=0.11)


def legal(name, pp, per_rank, micro_batches):
    """Whether the rules of layouts allow so many micro-batches."""
    row = {
        "pp": pp, "schedule": name, "stages_per_rank": per_rank, "micro_batch": 1,
        "dp_replicate": 1, "dp_shard": 1, "global_batch": micro_batches,
    }  # fmt: skip
    return all(rule.holds(row) for rule in RULES if rule.name in ("pp-micro-batches", "pp-rounds"))


@pytest.mark.parametrize("pp", range(2, 10))
@pytest.mark.parametrize(
    ("name", "per_rank"),
    [
        (n, per)
        for n, (least, _) in SCHEDULES.items()
        for per in ((2, 3, 4) if n[:5] == "inter" else (least,))
    ],
)
def test_a_few_rounds_stand_for_every_legal_number_of_micro_batches(name, per_rank, pp):
    stages, found = pp * per_rank, 0
    for m in (m for m in range(1, 61) if legal(name, pp, per_rank, m)):
        if m % 6 and m > 36:  # the longest take longest
            continue
        found += 1
        seconds = [[1.0] * stages, [1.3] * stages, [0.8] * stages]
        whole = timeline(name, pp, per_rank, m, *seconds)
        assert pipeline_seconds(name, pp, per_rank, m, *seconds) == pytest.approx(whole.seconds, rel=1e-9)
        waits = whole.seconds - whole.busy.max()
        assert bubble(name, pp, per_rank, m, 1.0, 1.3, 0.8) == pytest.approx(waits, abs=1e-6)
        found_in = tuple(tuple(map(tuple, moment)) for moment in fullest(name, pp, per_rank, m))
        assert found_in == _held(name, pp, per_rank, m, None)
    assert found > 10


def test_activations_in_flight():
    # 1F1B: stage i holds pp - i; GPipe all.
    assert list(fullest("1f1b", 4, 1, 16)[0, 0]) == [4, 3, 2, 1]
    assert list(fullest("gpipe", 4, 1, 16)[0, 0]) == [16] * 4
    # Korthikanti et al. 2022: interleaving holds 1 + (p-1)/(pv) times as much on the first rank.
    held = fullest("interleaved_1f1b", 4, 2, 16)[0, 0]
    assert (held[0] + held[4]) / 2 == pytest.approx(4 * (1 + 3 / 8), abs=0.5)
    # Qi et al. 2024: ZB-V holds as much on every rank as 1F1B does on the first.
    held, half, _ = fullest("zbv_zero_bubble", 4, 2, 16)[0]
    together = held + HALF * half  # of some, the gradients of inputs wait beside
    assert [together[r] + together[7 - r] >= 8 for r in range(4)] == [True] * 4
    assert [held[r] + held[7 - r] <= 8 for r in range(4)] == [True] * 4
    # Of unequal stages those with more layers count: two of three layers rather than three of one.
    held = fullest("interleaved_zero_bubble", 2, 2, 8, (2.0, 3.0, 2.0, 1.0))[0, 0]
    assert list(held[[1, 3]]) == [4, 0]


def test_what_is_held_when_gradients_are_there():
    """Of one round the most is held before a rank's first stage has any; of many, after that too."""
    before, after, *_ = fullest("1f1b", 4, 1, 4)
    assert list(before[0]) == [4, 3, 2, 1] and before[2][0] == 0
    assert after[0][0] == 3 and list(after[2]) == [1] * 4
    for schedule, chunks in (("1f1b", 1), ("interleaved_1f1b", 2)):
        before, after, *_ = fullest(schedule, 4, chunks, 16)
        assert list(before[0]) == list(after[0]) and list(after[2]) == [1] * (4 * chunks)
    before, after, *_ = fullest("gpipe", 4, 1, 16)
    assert list(before[0]) == [16] * 4 and list(before[2]) == [0] * 4 and list(after[0]) == [15] * 4


def test_what_is_held_at_a_loss():
    """Only the rank that has the last stage has one; of others nothing is said."""
    assert fullest("1f1b", 4, 1, 16)[2, 0].tolist() == [0, 0, 0, 1]
    # Two rounds of the first stage are on their way when the last stage's first micro-batch has its loss;
    # of the second stage's no more than that one is held, since its backward pass follows.
    first = fullest("interleaved_1f1b", 2, 2, 8)[2, 0]
    assert first.tolist() == [0, 2, 0, 1]
    held, half, _ = fullest("interleaved_zero_bubble", 2, 2, 8)[2]
    assert held[3] == 2 and half[3] == 1  # the other's gradients of inputs are there, of weights not
    assert fullest("gpipe", 4, 1, 16)[2, 0].tolist() == [16] * 4


def test_a_slow_stage_and_slow_messages_count():
    equal = timeline("1f1b", 4, 1, 8, [1.0] * 4, [1.0] * 4, [1.0] * 4)
    slow = timeline("1f1b", 4, 1, 8, [1.0, 1.0, 1.0, 1.5], [1.0] * 4, [1.0] * 4)
    assert slow.seconds == pytest.approx(equal.seconds + 8 * 0.5)
    late = timeline("1f1b", 4, 1, 8, [1.0] * 4, [1.0] * 4, [1.0] * 4, send=0.1)
    assert late.seconds > equal.seconds + 6 * 0.1 - 1e-9
