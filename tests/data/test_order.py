"""The order of samples is a pure function of seed, sample and phases."""

from __future__ import annotations

import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from colossus.data.order import BatchSchedule, Mixture, Order, Permutation, Phase, num_windows
from colossus.errors import UserError

HUGE = 10**13

weights = (
    st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any).map(lambda w: [float(x) for x in w])
)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """One to four phases over one to three small corpora, with skips."""
    num = draw(st.integers(1, 3))
    tokens = draw(st.lists(st.integers(40, 900), min_size=num, max_size=num))
    firsts = [0, *sorted(draw(st.sets(st.integers(1, 300), max_size=3)))]
    names = tuple(f"corpus {i}" for i in range(num))
    phases = [
        Phase(
            first,
            draw(st.sampled_from([3, 8, 16])),
            tuple(draw(st.lists(st.floats(0.01, 5), min_size=num, max_size=num))),
            names,
        )
        for first in firsts
    ]
    skips = [
        (first, first + length)
        for first, length in draw(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=3))
    ]
    return Order(draw(st.integers(0, 2**40)), phases, tokens, skips)


@given(st.integers(1, 3000), st.text(max_size=8))
@example(1, "")
@example(2, "")
def test_a_permutation_is_a_bijection(size: int, name: str) -> None:
    permutation = Permutation(size, name)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


@given(st.integers(1, 2**62), st.data())
def test_a_permutation_is_one_function_by_itself_and_in_bulk(size: int, data: st.DataObject) -> None:
    permutation = Permutation(size, "name")
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50))
    images = permutation.many(np.array(indices, np.int64)).tolist()
    assert images == [permutation(i) for i in indices]
    assert all(0 <= image < size for image in images)
    assert len(set(images)) == len(set(indices))


def test_a_permutation_shuffles() -> None:
    """Neighbours end up anywhere, and each name gives another order."""
    size = 5000
    images = Permutation(size, "a").many(np.arange(size))
    steps = np.abs(np.diff(images))
    assert abs(steps.mean() - size / 3) < 0.03 * size  # of uniform draws
    assert np.corrcoef(images, np.arange(size))[0, 1] ** 2 < 0.01
    assert (images == Permutation(size, "b").many(np.arange(size))).mean() < 0.01


@given(weights, st.integers(0, 2000))
def test_counts_of_a_mixture_are_those_of_its_draws(shares: list[float], n: int) -> None:
    mixture = Mixture(shares)
    drawn = [mixture.draw(i) for i in range(n)]
    counts = Counter(corpus for corpus, _ in drawn)
    assert mixture.counts(n) == [counts[i] for i in range(len(shares))]
    seen: Counter[int] = Counter()
    for corpus, before in drawn:
        assert before == seen[corpus]
        seen[corpus] += 1


@given(weights, st.one_of(st.integers(0, 2**61), st.sampled_from([2**43 - 3, 2**44, HUGE, 10**18])))
def test_draws_of_a_mixture_are_the_same_in_bulk(shares: list[float], first: int) -> None:
    """Also where n x weight passes 64 bits."""
    mixture = Mixture(shares)
    corpora, counts = mixture.draw_many(np.arange(first, first + 20, dtype=np.int64))
    expected = [mixture.draw(i) for i in range(first, first + 20)]
    assert [*zip(corpora.tolist(), counts.tolist(), strict=True)] == expected


@given(weights, st.integers(0, 10**12))
def test_counts_never_stray_from_the_weights(shares: list[float], n: int) -> None:
    counts = Mixture(shares).counts(n)
    assert sum(counts) == n
    for count, share in zip(counts, shares, strict=True):
        exact = Fraction(n) * Fraction(share) / Fraction(sum(shares))
        assert abs(count - exact) <= len(shares) + Fraction(n, 2**20) * 2
        assert share or not count


@pytest.mark.parametrize("bad", [[], [0.0, 0.0], [1.0, -1.0]])
def test_weights_that_cannot_be(bad: list[float]) -> None:
    with pytest.raises(UserError, match=r"data\.weights"):
        Mixture(bad)


@settings(deadline=None)
@given(orders(), st.integers(0, 500), st.integers(1, 60))
def test_one_by_one_and_in_bulk_agree(order: Order, first: int, count: int) -> None:
    bulk = order.locate_many(first, first + count)
    assert bulk.tolist() == [list(order.locate(s)) for s in range(first, first + count)]


def test_one_by_one_and_in_bulk_agree_far_out() -> None:
    one = Order(3, [Phase(0, 8, (1.0,), ("a",))], [8 * HUGE + 1])
    two = Order(3, [Phase(0, 8, (2.0, 1.0), ("a", "b"))], [8 * HUGE + 1, 8 * HUGE + 1])
    for at in (one, two):
        for first in (2**43 - 5, 9 * 10**12, 123 * HUGE):
            expected = [list(at.locate(s)) for s in range(first, first + 10)]
            assert at.locate_many(first, first + 10).tolist() == expected


@settings(deadline=None)
@given(orders())
def test_no_epoch_visits_a_window_twice(order: Order) -> None:
    """Or not at all, where a phase of another length or a skip cut it short; never twice."""
    visits = Counter(map(tuple, order.locate_many(0, 1500).tolist()))
    assert max(visits.values()) == 1


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
def test_whole_epochs_are_complete(windows: int, epochs: int, seed: int) -> None:
    order = Order(seed, [Phase(0, 4, (1.0,), ("a",))], [4 * windows + 1])
    found = order.locate_many(0, windows * epochs).tolist()
    for epoch in range(epochs):
        part = found[epoch * windows : (epoch + 1) * windows]
        assert {e for _, e, _ in part} == {epoch}
        assert sorted(w for _, _, w in part) == list(range(windows))


def test_epochs_have_orders_of_their_own() -> None:
    order = Order(0, [Phase(0, 4, (1.0,), ("a",))], [4 * 500 + 1])
    first, second = order.locate_many(0, 500)[:, 2], order.locate_many(500, 1000)[:, 2]
    assert (first == second).mean() < 0.05
    other_seed = Order(1, [Phase(0, 4, (1.0,), ("a",))], [4 * 500 + 1]).locate_many(0, 500)[:, 2]
    assert (first == other_seed).mean() < 0.05


def test_a_corpus_goes_on_over_a_change_of_weights() -> None:
    """Its epoch is not begun again, and nothing in it is seen twice."""
    names = ("a", "b")
    phases = [
        Phase(0, 4, (1.0, 1.0), names),
        Phase(30, 4, (3.0, 1.0), names),
        Phase(70, 4, (1.0, 0.0), names),
    ]
    order = Order(0, phases, [401, 401])
    found = order.locate_many(0, 100).tolist()
    ours = [tuple(row[1:]) for row in found if row[0] == 0]
    assert len(ours) == 15 + 30 + 30
    assert len(set(ours)) == len(ours)
    assert {epoch for epoch, _ in ours} == {0}


def test_another_length_begins_the_next_epoch() -> None:
    phases = [Phase(0, 4, (1.0,), ("a",)), Phase(30, 8, (1.0,), ("a",)), Phase(40, 4, (1.0,), ("a",))]
    epochs = Order(0, phases, [401]).locate_many(0, 50)[:, 1]
    assert epochs.tolist() == [0] * 30 + [1] * 10 + [2] * 10


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5))
def test_skipped_positions_are_never_taken_and_all_others_are(pairs: list[tuple[int, int]]) -> None:
    skips = [(first, first + length) for first, length in pairs]
    phase = Phase(0, 4, (1.0, 2.0), ("a", "b"))
    plain = Order(7, [phase], [900, 900]).locate_many(0, 400).tolist()
    skipped = {i for first, stop in skips for i in range(first, stop)}
    expected = [place for i, place in enumerate(plain) if i not in skipped][:200]
    assert Order(7, [phase], [900, 900], skips).locate_many(0, 200).tolist() == expected


def test_the_first_samples_of_a_phase_can_be_skipped() -> None:
    phases = [Phase(0, 4, (1.0,), ("a",)), Phase(10, 4, (1.0,), ("b",))]
    plain = Order(0, phases, [900]).locate_many(0, 40).tolist()
    skipped = Order(0, phases, [900], [(10, 13)]).locate_many(0, 30).tolist()
    assert skipped == plain[:10] + plain[13:33]


@pytest.mark.parametrize("bad", [(-1, 3), (5, 5), (7, 2)])
def test_skips_that_cannot_be(bad: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"data\.skip"):
        Order(0, [Phase(0, 4, (1.0,), ("a",))], [100], [bad])


@settings(deadline=None)
@given(
    orders(),
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), max_size=3, unique_by=lambda c: c[0]),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_a_resume_anywhere_takes_the_same_samples(
    order: Order, changes: list[tuple[int, int]], first_batch: int, at: int
) -> None:
    """The batch changes mid-run; a resumed run knows the sample it stopped before, and no more."""
    schedule = BatchSchedule([(0, first_batch), *changes])
    whole = order.locate_many(0, schedule.first_sample(60)).tolist()
    taken = []
    for step in range(at):
        first = schedule.first_sample(step)
        taken += order.locate_many(first, first + schedule.batch(step)).tolist()
    sample = len(taken)
    step = schedule.step_of(sample)
    assert step == at
    while step < 60:
        first = schedule.first_sample(step)
        taken += order.locate_many(first, first + schedule.batch(step)).tolist()
        step += 1
    assert taken == whole


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 64)), max_size=4, unique_by=lambda c: c[0]))
def test_a_schedule_counts_samples(changes: list[tuple[int, int]]) -> None:
    schedule = BatchSchedule([(0, 8), *changes])
    samples = 0
    for step in range(80):
        assert schedule.first_sample(step) == samples
        batch = schedule.batch(step)
        assert batch == max((c for c in [(0, 8), *changes] if c[0] <= step), key=lambda c: c[0])[1]
        assert {schedule.step_of(s) for s in range(samples, samples + batch)} == {step}
        samples += batch


@pytest.mark.parametrize("bad", [[], [(1, 8)], [(0, 8), (0, 9)]])
def test_schedules_that_cannot_be(bad: list[tuple[int, int]]) -> None:
    with pytest.raises(UserError, match=r"run\.batch_schedule"):
        BatchSchedule(bad)


def test_phases_survive_plain_data() -> None:
    phase = Phase(3, 128, (0.5, 0.5), ("x", "y"))
    assert Phase.from_dict(phase.to_dict()) == phase


def test_a_corpus_shorter_than_a_window() -> None:
    assert num_windows(9, 8) == 1
    with pytest.raises(UserError, match=r"data\.seq_len=8: the corpus has only 8 tokens; at most 7"):
        num_windows(8, 8)


def test_random_access_takes_as_long_among_many_samples_as_among_few() -> None:
    """benchmarks/data_speed.py has the microseconds."""

    def seconds(num_samples: int) -> float:
        order = Order(0, [Phase(0, 8, (1.0, 2.0), ("a", "b"))], [8 * num_samples + 1, 8 * num_samples + 1])
        samples = np.random.default_rng(0).integers(0, num_samples, 1000).tolist()
        began = time.process_time()
        for sample in samples:
            order.locate(sample)
        return time.process_time() - began

    times = [(seconds(1000), seconds(HUGE)) for _ in range(5)]  # in turns: what else runs meets both
    assert min(huge for _, huge in times) < 4 * min(few for few, _ in times)


@pytest.mark.parametrize("weights", [(1e9, 1.0), (1.0, 1e-8, 3.0)])
def test_a_corpus_of_the_smallest_weight_is_drawn_now_and_then(weights: tuple[float, ...]) -> None:
    """A millionth at least: every 2^20 samples; one of none is never drawn."""
    mixture, rare = Mixture(weights), min(range(len(weights)), key=weights.__getitem__)
    assert [mixture.counts(n * 2**20)[rare] for n in (1, 2, 10)] == [1, 2, 10]
    assert Mixture((1e9, 0.0)).counts(10**9) == [10**9, 0]
