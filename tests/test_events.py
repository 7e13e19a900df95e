"""The event log: torn lines, attempts, numbers that are none."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from colossus.events import EventLog, read_events


def test_what_is_written_is_read(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("step", step=1, loss=float("nan"), grad_norm=float("-inf"), values=[1, 2.5])
    log.write("decision", step=2, synced=True, name="decay", value={"begin_step": 2})
    log.close()
    first, second = read_events(tmp_path)
    assert first["loss"] == "nan" and first["grad_norm"] == "-inf" and first["values"] == [1, 2.5]
    assert second["value"] == {"begin_step": 2} and second["attempt"] == 0 and second["rank"] is None


@given(cut=st.integers(1, 200))
def test_a_torn_last_line_is_dropped_and_cut_off(tmp_path_factory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("run")
    log = EventLog(folder)
    for step in range(3):
        log.write("step", step=step, loss=float(step))
    log.close()
    path = folder / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: -min(cut, len(whole.splitlines()[-1]))])
    assert [e["step"] for e in read_events(folder)] == [0, 1]
    again = EventLog(folder)
    again.write("resume", step=2)
    again.close()
    assert [e["kind"] for e in read_events(folder)] == ["step", "step", "resume"]
    assert [e["attempt"] for e in read_events(folder)] == [0, 0, 1]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_run_seconds_go_on_over_attempts_without_the_downtime(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.start_clock()
    first = log.write("step", step=0)["run_seconds"]
    log.close()
    again = EventLog(tmp_path)
    assert again.run_seconds == first
    again.start_clock()
    assert again.write("step", step=1)["run_seconds"] >= first
    again.close()


def test_listeners_see_every_event(tmp_path: Path) -> None:
    seen: list[str] = []
    log = EventLog(tmp_path, listeners=[lambda event: seen.append(event["kind"])])
    log.write("start")
    log.write("end")
    log.close()
    assert seen == ["start", "end"]


def test_nodes_logs_are_merged(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    log = EventLog(tmp_path)
    log.write("start")
    log.close()
    line = {
        "schema": 1,
        "time": 0,
        "run_seconds": 9.0,
        "attempt": 0,
        "rank": 3,
        "step": None,
        "kind": "fault",
    }
    (tmp_path / "events" / "node-1.jsonl").write_text(json.dumps(line) + "\n{torn")
    assert [e["kind"] for e in read_events(tmp_path)] == ["start", "fault"]
