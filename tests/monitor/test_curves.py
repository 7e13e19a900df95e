"""The series of a run's report, against its events."""

import json

import pytest
from made_run import write_run

from colossus.monitor import curves
from colossus.monitor.view import RunView


@pytest.fixture
def view(tmp_path):
    """Steps of other numbers of tokens, as batches that grow have them."""
    folder = write_run(tmp_path / "run", steps=40)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for event in events:
        if event["kind"] == "step":
            event["tokens"] = 1000 * (event["step"] + 1)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return RunView.read(folder)


def test_the_tokens_below_a_step_are_those_of_all_steps_before_it(view):
    """1,000 + 2,000 + ... before step 3; all of them at the end, and beyond."""
    said = curves._tokens_at(view)
    assert [said(step) for step in (0, 1, 3, 40, 50)] == [
        "0 tokens",
        "1,000 tokens",
        "6,000 tokens",
        "820k tokens",
        "820k tokens",
    ]


def test_waiting_is_drawn_in_milliseconds(view):
    (line,) = curves._data_wait(view).lines
    assert list(line.y) == pytest.approx([1000 * event["data_wait_seconds"] for event in view.steps])
    assert list(line.x) == list(range(40))


def test_parts_and_all_of_the_held_out_documents_are_two_lines(view):
    part, whole = curves._held_out(view, "bits_per_byte")
    assert [len(part.x), len(whole.x)] == [7, 1] and whole.x == [40.0]
    assert whole.y == [view.final["bits_per_byte"]]
