"""A priced step in time: as a trace, and as a page."""

from __future__ import annotations

import json
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from colossus.architecture import num_parameters
from colossus.cli import main
from colossus.job import load_job
from colossus.perf.chrome import MICRO, Trace

SMALL = ["model=llama3.2-1b", "model.num_layers=4", "model.vocab_size=4096", "fleet=dgx-h100-1"]
WORDS = [*SMALL, "layout.pp=4", "layout.dp_shard=2", "layout.micro_batch=1", "run.global_batch=12"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """(what is printed as JSON, the events of the trace, the page) of a pipeline of four."""
    folder = tmp_path_factory.mktemp("made")
    files = [f"--timeline={folder / 'step.json'}", f"--html={folder / 'page.html'}"]
    with pytest.MonkeyPatch.context() as patch, (folder / "said").open("w") as said:
        patch.setattr("sys.stdout", said)
        assert main(["dryrun", *WORDS, "data.seq_len=2048", "--json", *files]) == 0
    facts = json.loads((folder / "said").read_text())
    trace = json.loads((folder / "step.json").read_text())
    return facts, trace["traceEvents"], (folder / "page.html").read_text()


def spans(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """By process and lane, in the order of their begins, the longest first."""
    found = defaultdict(list)
    for event in sorted(events, key=lambda e: (e.get("ts", 0.0), -e.get("dur", 0.0))):
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append(event)
    return found


def test_the_spans_of_a_lane_nest_and_sum_to_the_step(made: Any) -> None:
    facts, events, _ = made
    step = facts["price"]["step_seconds"] * MICRO
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert list(names.values()) == [f"rank {2 * stage} (stage {stage})" for stage in range(4)]
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    for lane, found in spans(events).items():
        ends: list[float] = []
        outer = inner = 0.0
        for span in found:
            begin, end = span["ts"], span["ts"] + span["dur"]
            while ends and ends[-1] <= begin + 1e-3:
                ends.pop()
            assert not ends or end <= ends[-1] + 1e-3, f"{span} in {lanes[lane]}"
            ends.append(end)
            outer += span["dur"] if len(ends) == 1 else 0.0
            inner += span["dur"] if len(ends) == 2 else 0.0
        if lanes[lane] == "work":
            assert outer == pytest.approx(step)
            waits = sum(span["dur"] for span in found if span["name"].startswith("waits"))
            assert inner == pytest.approx(step - waits)
            bubble = facts["price"]["stages"][lane[0]]["causes"]["bubble"] * MICRO
            assert waits == pytest.approx(bubble, rel=1e-6)
            passes = [span["name"] for span in found if span["name"].startswith(("forward", "backward"))]
            assert len(passes) == len(set(passes)) == 2 * 6  # of six micro batches


def test_memory_reaches_what_was_traced(made: Any) -> None:
    facts, events, _ = made
    for pid, rank in enumerate(facts["ranks"]):
        levels = [e["args"]["bytes"] for e in events if e["ph"] == "C" and e["pid"] == pid]
        assert max(levels) == rank["peak_bytes"]
        assert levels[-2] < 0.95 * max(levels)  # the update: no activations live any more
        assert levels[0] == levels[-1] == pytest.approx(rank["at_rest_bytes"], rel=0.01)


def test_a_node_and_its_checkpoints(made: Any) -> None:
    """By hand: fp32 weights and AdamW's two moments are 12 bytes a weight; the first and the last stage have
    the embedding, which is one parameter, each."""
    facts, _, _ = made
    arch = load_job(None, SMALL).model
    weights = num_parameters(arch) + arch.vocab_size * arch.hidden_size
    assert facts["node"]["checkpoint_bytes"] == pytest.approx(12 * weights, rel=1e-3)
    largest = max(sum(r["at_rest_by_use"][use] for use in ("weights", "optimizer")) for r in facts["ranks"])
    assert facts["node"]["checkpoint_bytes_of_rank"] == largest
    staged = facts["node"]["host_memory_by_use"]["copies of a checkpoint while it is written"]
    assert facts["node"]["ranks"] == 8 and staged == 8 * largest
    assert facts["node"]["restart_seconds"] == 600 and facts["node"]["checkpoint_interval_seconds"] > 0


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: defaultdict[str, int] = defaultdict(int)
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "rect", "line", "polygon"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and tag == self.open[-1]:
            self.open.pop()
        elif tag not in ("rect", "line", "polygon"):
            raise AssertionError(f"{tag} closes {self.open}")


def test_the_page_is_whole_and_needs_nothing_from_outside(made: Any) -> None:
    _, _, text = made
    page = _Page()
    page.feed(text)
    assert not page.open and not page.links
    assert page.seen["polygon"] == 4 and page.seen["rect"] > 4 * 2 * 6
    assert "The pipeline" in text and "waits for another stage" in text


def test_one_stage_of_several_has_no_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dryrun", *WORDS, "data.seq_len=2048", "--rank=2", f"--timeline={tmp_path / 'step.json'}"]
    assert main(words) == 2
    assert "needs every stage of the pipeline" in capsys.readouterr().err


def test_processes_and_lanes_are_named_once() -> None:
    trace = Trace()
    for start in (0.0, 1.0):
        trace.span("a", "one", "x", start, 0.5, why="because")
        trace.span("b", "two", "y", start, 0.5)
    trace.counter("a", "bytes", 2.0, {"here": 3.0})
    events = json.loads(trace.to_json())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == ["one", "two"]
    assert [(e["pid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [
        (0, 0.0, 0.5 * MICRO), (1, 0.0, 0.5 * MICRO), (0, MICRO, 0.5 * MICRO), (1, MICRO, 0.5 * MICRO)
    ]  # fmt: skip
    assert events[-1] == {"ph": "C", "pid": 0, "name": "bytes", "ts": 2 * MICRO, "args": {"here": 3.0}}
