"""Where a chart's points lie: read from the drawing, worked out by hand."""

import re

import pytest

from colossus.monitor.charts import HEIGHT, MAX_POINTS, WIDTH, Chart, Line, draw


def points(html):
    """Of the first line that is drawn."""
    (found,) = re.findall(r'<polyline class="one" points="([^"]*)"', html)
    return [tuple(map(float, pair.split(","))) for pair in found.split()]


def test_points_lie_in_proportion_and_higher_values_higher():
    """The scale of 1 to 5 is labelled from 1 to 5, the steps from 0 to 20."""
    html = draw(Chart("Loss", [Line("loss", [0, 5, 20], [5.0, 2.0, 1.0])], x_max=20))
    assert points(html) == [(0, 0), (WIDTH / 4, HEIGHT * 3 / 4), (WIDTH, HEIGHT)]
    labels = dict(re.findall(r'<div class="y" style="top:([\d.]+)%">(\d)</div>', html))
    assert labels == {"100.00": "1", "75.00": "2", "50.00": "3", "25.00": "4", "0.00": "5"}


def test_levels_and_marks_lie_on_the_same_scale():
    chart = Chart(
        "x", [Line("x", [0, 10], [0.0, 4.0])], levels=[("gzip", 3.0)], marks=[(5, "resumed")], x_max=10
    )
    html = draw(chart)
    assert f'class="level" x1="0" x2="{WIDTH:g}" y1="{HEIGHT / 4:.1f}"' in html
    assert f'class="mark" x1="{WIDTH / 2:.1f}"' in html and 'style="left:50.00%">resumed' in html


def test_peaks_of_a_long_line_are_drawn():
    """One step of 50,000 that went up, and one that went down."""
    values = [2.0] * 50_000
    values[12_345], values[40_001] = 9.0, 0.5
    html = draw(Chart("Loss", [Line("loss", range(50_000), values)], x_max=50_000))
    found = points(html)
    assert len(found) <= MAX_POINTS + 2
    (high,) = [x for x, y in found if y == min(y for _, y in found)]
    (low,) = [x for x, y in found if y == max(y for _, y in found)]
    assert high == pytest.approx(WIDTH * 12_345 / 50_000, abs=0.1)
    assert low == pytest.approx(WIDTH * 40_001 / 50_000, abs=0.1)


def test_a_few_far_values_leave_the_scale_to_the_others():
    values = [1.0 + (i % 10) / 10 for i in range(1000)]
    values[3] = 1e6
    chart = Chart("Gradient norm", [Line("norm", range(1000), values)], x_max=1000, top_quantile=0.99)
    labels = re.findall(r'<div class="y"[^>]*>([^<]*)</div>', draw(chart))
    assert float(labels[-1]) <= 2
