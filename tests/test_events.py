"""The event log: torn lines, attempts, numbers that are none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossus.events import EventLog, Tail, kept_and_lost, read_events


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


def test_what_is_to_be_synced_is_on_storage_before_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole line, and before listeners hear of it; other events wait for the system."""
    log = EventLog(tmp_path, listeners=[lambda event: order.append(str(event["kind"]))])
    order: list[object] = []
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        sync(descriptor)
        order.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", recorded)
    log.write("step", step=0)
    before = (tmp_path / "events.jsonl").stat().st_size
    log.write("decision", step=1, synced=True, name="decay")
    log.write("step", step=1)
    log.close()
    line = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)[1]
    assert order == ["step", before + len(line), "decision", "step"]


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


def test_a_listener_that_raises_is_told_no_more_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    def bad(event: dict[str, object]) -> None:
        seen.append("bad")
        raise ValueError("cannot\nshow")

    log = EventLog(tmp_path, listeners=[bad, lambda event: seen.append(str(event["kind"]))])
    log.write("start")
    log.write("end")
    log.close()
    assert seen == ["bad", "start", "end"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith("a listener raised at an event 'start', and hears no more: cannot show")
    assert [e["kind"] for e in read_events(tmp_path)] == ["start", "end"]


def line(attempt: int, run_seconds: float, kind: str, **fields: object) -> str:
    event = {"schema": 1, "time": 0.0, "run_seconds": run_seconds, "attempt": attempt, "rank": None}
    return json.dumps(event | {"step": None, "kind": kind} | fields) + "\n"


def test_logs_of_nodes_are_merged_by_attempt_and_then_by_time(tmp_path: Path) -> None:
    """The second attempt may begin at fewer seconds than the first one's nodes went on writing to; what comes
    at one time stays in the order of the files: the run's own first."""
    (tmp_path / "events").mkdir()
    (tmp_path / "events.jsonl").write_text(
        line(0, 1.0, "start") + line(0, 5.0, "step") + line(1, 5.0, "resume") + line(1, 9.0, "end")
    )
    (tmp_path / "events" / "node-1.jsonl").write_text(line(0, 4.0, "fault") + line(1, 9.0, "late"))
    (tmp_path / "events" / "node-2.jsonl").write_text(line(0, 7.0, "lost") + line(1, 6.0, "back"))
    (tmp_path / "events" / "other.jsonl").write_text(line(0, 2.0, "not a node's"))
    kinds = [event["kind"] for event in read_events(tmp_path)]
    assert kinds == ["start", "fault", "step", "lost", "resume", "back", "end", "late"]


@pytest.mark.parametrize(
    "bad",
    ["", "\n", "null\n", "[1]\n", "7\n", '"text"\n', "{}\n", "{torn\n", '{"attempt":0,"kind":"step"}\n'],
)
def test_what_is_no_event_is_passed_over_and_what_follows_is_read(tmp_path: Path, bad: str) -> None:
    whole = line(0, 1.0, "of a kind of tomorrow", fields={"new": [1]}, schema=99)
    (tmp_path / "events.jsonl").write_text(whole + bad + line(0, 2.0, "end"))
    first, last = read_events(tmp_path)
    assert (first["kind"], first["fields"], last["kind"]) == ("of a kind of tomorrow", {"new": [1]}, "end")
    log = EventLog(tmp_path)
    assert (log.attempt, log.run_seconds) == (1, 2.0)
    log.close()


@pytest.mark.parametrize(
    "torn", ['{"schema":1,"attempt":7,"run_seconds":900.0,"kind":"step"}', '{"sch', "\xff"]
)
def test_a_last_line_without_its_end_does_not_count(tmp_path: Path, torn: str) -> None:
    """Even where it could be read: a number at its end may be cut. What comes next has its own line."""
    (tmp_path / "events.jsonl").write_text(line(0, 1.5, "start") + torn)
    assert [event["kind"] for event in read_events(tmp_path)] == ["start"]
    tail = Tail(tmp_path)
    log = EventLog(tmp_path)
    assert (log.attempt, log.run_seconds) == (1, 1.5)
    log.write("resume")
    log.close()
    assert [event["kind"] for event in read_events(tmp_path)] == ["start", "resume"]
    assert [event["kind"] for event in tail.new()] == ["resume"] and tail.new() == []


def test_a_tail_reads_each_line_once_and_a_torn_one_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(tmp_path)
    assert tail.new() == []
    whole = line(0, 1.0, "start")
    path.write_text(whole + whole[:10])
    assert [event["kind"] for event in tail.new()] == ["start"]
    assert tail.new() == []
    path.write_text(whole + whole + line(0, 2.0, "end"))
    assert [event["kind"] for event in tail.new()] == ["start", "end"]
    assert Tail(tmp_path).new() == []  # what was there before


def test_steps_beyond_where_the_next_attempt_began_are_lost() -> None:
    """A step is kept where the weights that the next attempt begins with hold it, a validation where they
    were what was measured; what was decided or saved stays."""

    def of(kind: str, step: int | None, attempt: int) -> dict[str, object]:
        return {"kind": kind, "step": step, "attempt": attempt}

    first = [of("start", 0, 0), of("step", 0, 0), of("step", 1, 0), of("validation", 2, 0), of("eval", 2, 0)]
    first += [of("step", 2, 0), of("validation", 3, 0), of("eval", 3, 0), of("checkpoint", 3, 0)]
    second = [of("resume", 2, 1), of("step", 2, 1), of("validation", 3, 1)]
    kept, lost = kept_and_lost([*first, *second])
    assert kept == [*first[:5], first[8], *second]
    assert lost == first[5:8]
    again = kept_and_lost([*first, *second, of("start", None, 2), of("step", 0, 2)])
    assert [e["kind"] for e in again[0] if e["kind"] in ("step", "validation", "eval")] == ["step"]
