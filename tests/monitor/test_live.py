import io

import pytest
from made_run import write_run

from colossus.events import read_events
from colossus.monitor.live import LiveView


def shown(folder, monkeypatch, *, terminal, columns=100):
    """What a person saw, with the clock of the events."""
    monkeypatch.setenv("COLUMNS", str(columns))
    out, clock = io.StringIO(), [0.0]
    view = LiveView(out, terminal=terminal, now=lambda: clock[0])
    for event in read_events(folder):
        clock[0] = event["run_seconds"]
        view.show(event)
    return out.getvalue()


def test_plain_lines_come_ten_seconds_apart(tmp_path, monkeypatch):
    text = shown(write_run(tmp_path, steps=1800), monkeypatch, terminal=False)
    assert "\r" not in text and "\x1b" not in text
    steps = [line for line in text.splitlines() if line.startswith("step ") and "tokens/s" in line]
    assert 20 <= len(steps) <= 35
    assert "bits/byte" in steps[-1] and "MFU 5" in steps[-1] and "left" in steps[-1]
    assert steps[-1].startswith("step 1,7") and "/1,800" in steps[-1]
    for said in (
        "training on AMD EPYC",
        "bits per byte on the first 14 held-out documents (gzip -9 1.602",
        "on all 33 held-out",
        "saved checkpoints/step-00000450, 15.8 MB",
        "decided: the learning rate falls",
        "finished after 1,800 steps and 5 min",
    ):
        assert said in text, said


def test_in_a_terminal_one_line_changes_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(write_run(tmp_path, steps=300), monkeypatch, terminal=True, columns=80)
    drawn = [part.split("\n")[0] for part in text.split("\r\x1b[2K")[1:]]
    assert len(drawn) > 100
    progress = [line for line in drawn if "█" in line or "░" in line]
    assert all(len(line) < 80 for line in progress) and all(" left" in line for line in progress[5:])
    assert text.endswith("\n") and "finished" in text.splitlines()[-1]


def test_a_narrow_terminal_keeps_what_matters(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(write_run(tmp_path, steps=300), monkeypatch, terminal=True, columns=40)
    assert all(len(part.split("\n")[0]) < 40 for part in text.split("\r\x1b[2K")[1:] if "░" in part)


def test_an_event_of_another_version_breaks_nothing():
    out = io.StringIO()
    view = LiveView(out, terminal=False)
    common = {"run_seconds": 0.0, "attempt": 0, "step": 0}
    for kind in ("start", "validation", "checkpoint", "decision", "unheard-of", "step", "end"):
        view.show(common | {"kind": kind})


class Full(io.StringIO):
    """A stream that holds `room` characters, and then fails as a closed pipe or a closed file does."""

    def __init__(self, room, error):
        super().__init__()
        self.room, self.error, self.refused = room, error, 0

    def write(self, text):
        if self.tell() + len(text) > self.room:
            self.refused += 1
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("closed")]
)
def test_a_view_that_nobody_reads_goes_silent(tmp_path, terminal, error):
    out = Full(200, error)
    view = LiveView(out, terminal=terminal)
    for event in read_events(write_run(tmp_path, steps=100)):
        view.show(event)
    view.close()
    assert "training on" in out.getvalue() and out.refused == 1


def test_a_run_of_steps_tells_the_time_left_from_their_pace():
    out = io.StringIO()
    view = LiveView(out, terminal=False, now=iter(range(0, 1000, 11)).__next__)
    view.show(
        {"kind": "start", "run_seconds": 0.0, "attempt": 0, "step": 0, "total_steps": 100, "processor": "x"}
    )
    for step in range(10):
        figures = {"loss": 2.0, "tokens": 10, "step_seconds": 2.0, "data_wait_seconds": 0.5, "mfu": 0.5}
        view.show({"kind": "step", "run_seconds": 2.5 * step, "attempt": 0, "step": step} | figures)
    last = out.getvalue().splitlines()[-1]
    assert last == "step 10/100  loss 2.000  4 tokens/s  MFU 50%  waiting for data 20%  3:45 left"


def of_steps(folder_events, **start):
    """What the view of a run says after these steps: (run_seconds, step)."""
    out = io.StringIO()
    view = LiveView(out, terminal=True, now=iter(range(0, 1000, 11)).__next__)
    figures = {"loss": 2.0, "tokens": 10, "step_seconds": 2.0, "data_wait_seconds": 0.5, "mfu": 0.5}
    common = {"attempt": 0, "processor": "x"}
    view.show({"kind": "start", "run_seconds": 0.0, "step": 0} | common | start)
    for kind, run_seconds, step, more in folder_events:
        view.show({"kind": kind, "run_seconds": run_seconds, "step": step} | common | figures | more)
    return out.getvalue().rpartition("\x1b[2K")[2]


def test_the_bar_shows_the_share_of_the_steps(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    said = of_steps([("step", 2.5 * step, step, {}) for step in range(25)], total_steps=100)
    assert "█" * 4 + "░" * 12 + " 25%" in said
    assert said.startswith("step 25/100 ")


def test_the_bar_shows_the_share_of_the_minutes(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    said = of_steps([("step", 15.0 * step, step, {}) for step in range(4)], minutes=1)
    assert "█" * 12 + "░" * 4 + " 75%" in said and "0:15 left" in said


def test_what_is_averaged_begins_anew_with_an_attempt(monkeypatch):
    """The lost steps were of a loss of 2, those after the resume are of 5."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    before = [("step", float(step), step, {}) for step in range(9)]
    after = [("resume", 8.0, 4, {}), ("step", 9.0, 4, {"loss": 5.0, "data_wait_seconds": 0.0})]
    said = of_steps([*before, *after], total_steps=100)
    assert said.startswith("step 5/100 ") and "loss 5.000" in said and "5 tokens/s" in said
    assert "waiting for data" not in said
