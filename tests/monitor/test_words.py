import math
import random

import pytest

from colossus import words
from colossus.monitor import phrases
from colossus.monitor.charts import nice_ticks, smoothed


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0123, "0.012 s"),
        (1.25, "1.2 s"),
        (12.4, "12 s"),
        (59.7, "1 min"),
        (312, "5 min 12 s"),
        (3600, "1 h"),
        (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
        (float("nan"), "nan"),
    ],
)
def test_durations(seconds, said):
    assert words.duration(seconds) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0"),
        (1234, "1,234"),
        (12_340, "12.3k"),
        (999_999, "1M"),
        (1_312_896, "1.31M"),
        (405e9, "405B"),
        (1.5e13, "15T"),
    ],
)
def test_counts(number, said):
    assert words.count(number) == said


def test_sizes_rates_and_shares():
    assert words.size(999) == "999 bytes" and words.size(15_754_752) == "15.8 MB"
    assert words.rate(183e9) == "183 GFLOP/s"
    assert [words.percent(x) for x in (0, 0.0001, 0.042, 0.54, 1)] == ["0%", "<0.1%", "4.2%", "54%", "100%"]
    assert words.clock(151) == "2:31" and words.clock(3751) == "1:02:31"
    assert words.plural(1, "step") == "1 step" and words.plural(2, "step") == "2 steps"


def test_documents_of_a_validation():
    said = "each validation takes the first held-out document"
    assert phrases.decision("validation_documents", 1) == said
    assert (
        phrases.decision("final_documents", 1_000)
        == "the last validation takes the first 1,000 held-out documents"
    )
    assert [phrases.held_out(n, whole=True) for n in (1, 2)] == [
        "the only held-out document",
        "all 2 held-out documents",
    ]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.4, 8.1), (0, 3e-5), (-2, 1e9), (5, 5 + 1e-6)])
def test_ticks_enclose_in_a_few_round_numbers(low, high):
    ticks = nice_ticks(low, high, 4)
    assert ticks[0] <= low + 1e-9 * abs(low) and ticks[-1] >= high * (1 - 1e-9) and 2 <= len(ticks) <= 7


def test_smoothing_keeps_a_straight_line_and_skips_what_is_not_finite():
    line = [2.0 * i for i in range(100)]
    assert smoothed(line) == pytest.approx(line)
    assert smoothed([1.0, float("nan"), 1.0, float("inf"), 1.0], share=0.3)[2] == 1.0


@pytest.mark.parametrize("count", [30, 400, 5000])
def test_smoothing_does_not_jump_to_the_last_value(count):
    """Noise around a level: the curve's ends are means of many values too, and its last point is not the raw
    one; on a slope they stay on the line."""
    rng = random.Random(count)
    noise = [rng.gauss(0, 1) for _ in range(count)]
    for slope in (0.0, -0.01):
        means = smoothed([5 + slope * i + e for i, e in enumerate(noise)])
        reach = max(3, int(0.02 * count))
        most = 3 * 2 / (2 * reach + 1) ** 0.5  # three deviations: the line's end has 4 times the variance
        assert abs(means[-1] - (5 + slope * (count - 1))) < most
        assert abs(means[0] - 5) < most
    spiked = [5.0] * count
    spiked[-1] = 50.0
    window = 2 * max(3, int(0.02 * count)) + 1
    share = 1 / window + (window - 1) ** 2 / 4 / (window * (window**2 - 1) / 12)
    assert smoothed(spiked)[-1] == pytest.approx(5 + 45 * share)
    assert smoothed(spiked)[-2] < smoothed(spiked)[-1] < 27


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([2.0], [2.0]),
        ([2.0, 3.0], [2.0, 3.0]),
        ([math.nan, 4.0], [4.0, 4.0]),
        ([1.0, 2, 6], [0.5, 3, 5.5]),
    ],
)
def test_smoothing_of_a_run_that_has_hardly_begun(values, expected):
    """The line through all there is."""
    assert smoothed(values) == pytest.approx(expected)
    assert all(math.isnan(mean) for mean in smoothed([math.nan] * 3))
