"""The charts of a report."""

from __future__ import annotations

from collections.abc import Callable

from colossus.events import number
from colossus.job import LENGTHS
from colossus.monitor.charts import Chart, Line, draw, smoothed
from colossus.monitor.view import RunView, compressors
from colossus.words import count, percent


def learning(view: RunView) -> str:
    """Loss, bits per byte, rate, speed, gradient and waiting over the steps of a run."""
    if not view.steps:
        return ""
    charts = [_loss(view), _bits_per_byte(view), _speed(view), _lr(view), _grad_norm(view), _data_wait(view)]
    charts.append(_expert_load(view))
    drawn = [html for html in (draw(chart) for chart in charts if chart is not None) if html]
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _loss(view: RunView) -> Chart:
    x, y = _series(view, "loss")
    lines = [Line("each step", x, y, "one faint quiet"), Line("training, smoothed", x, smoothed(y), "one")]
    lines += _held_out(view, "loss")
    marks = _marks(view)
    return Chart(
        "Loss",
        lines,
        "nats a token",
        _plain,
        marks=marks,
        x_max=_x_max(view),
        x_tokens=_tokens_at(view),
        top_quantile=0.97,
        wide=True,
    )


def _marks(view: RunView) -> list[tuple[float, str]]:
    """Where attempts began, and what was changed there."""
    names = {float(e.get("step") or 0): "resumed" for e in view.starts[1:]}
    for event in view.changes:
        lengths = any(name in LENGTHS for name in event["value"].get("after", ()))
        name = "branched" if event["name"] == "branch" else "another end" if lengths else "changed"
        names[float(event["first_step"])] = name
    return sorted(names.items())


def _bits_per_byte(view: RunView) -> Chart | None:
    if len(view.validations) < 2:
        return None
    levels = [(tool.split()[0], bits) for tool, bits in compressors(view.validations[-1])]
    return Chart(
        "Bits per byte",
        _held_out(view, "bits_per_byte"),
        "on held-out documents, less is better",
        lambda value: f"{value:.2f}",
        levels=levels,
        x_max=_x_max(view),
        x_tokens=_tokens_at(view),
        wide=True,
    )


def _held_out(view: RunView, name: str) -> list[Line]:
    """What a part of the documents gives is no point of the same curve as what all of them give."""
    kinds = (
        (False, "a part of the held-out documents", "two dots"),
        (True, "all held-out documents", "four dots loose"),
    )
    lines = []
    for whole, said, style in kinds:
        events = [e for e in view.validations if bool(e.get("whole")) == whole]
        values = [number(e[name]) for e in events]
        lines += [Line(said, [float(e["step"]) for e in events], values, style)] if events else []
    return lines


def _speed(view: RunView) -> Chart:
    x, y = _series(view, "tokens_per_second")
    mfu = view.mfu
    note = f"tokens/s; the median is {percent(mfu)} MFU" if mfu else "tokens/s"
    return Chart("Speed", [Line("tokens/s", x, y)], note, _thousands, x_max=_x_max(view), from_zero=True)


def _lr(view: RunView) -> Chart:
    x, y = _series(view, "lr")
    return Chart("Learning rate", [Line("lr", x, y, "three")], "", _plain, x_max=_x_max(view), from_zero=True)


def _grad_norm(view: RunView) -> Chart:
    x, y = _series(view, "grad_norm")
    return Chart(
        "Gradient norm",
        [Line("gradient norm", x, y, "four")],
        "before clipping",
        _plain,
        x_max=_x_max(view),
        from_zero=True,
        top_quantile=0.99,
    )


def _data_wait(view: RunView) -> Chart:
    x, y = _series(view, "data_wait_seconds")
    return Chart(
        "Waiting for data",
        [Line("wait", x, [1000 * value for value in y], "two")],
        "ms a step",
        _plain,
        x_max=_x_max(view),
        from_zero=True,
    )


def _expert_load(view: RunView) -> Chart | None:
    x, y = _series(view, "expert_load")
    if not x:
        return None
    return Chart(
        "Busiest expert",
        [Line("load", x, y, "three")],
        "visits over the mean, in the worst layer; 1: all alike",
        _plain,
        x_max=_x_max(view),
        from_zero=True,
    )


def _series(view: RunView, name: str) -> tuple[list[float], list[float]]:
    pairs = [(float(e["step"]), number(e[name])) for e in view.steps if e.get(name) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _x_max(view: RunView) -> float:
    return float(max(1, view.num_steps))


def _tokens_at(view: RunView) -> Callable[[float], str]:
    """Step -> tokens learned from by then, in words."""
    first = view.steps[0]["step"] if view.steps else 0  # a branch begins later
    sums, total = [0], 0
    for event in view.steps:
        total += event["tokens"]
        sums.append(total)
    return lambda step: f"{count(sums[max(0, min(len(sums) - 1, round(step) - first))])} tokens"


def _plain(value: float) -> str:
    return f"{value:.3g}" if value else "0"


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
