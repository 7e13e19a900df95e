"""What passes between a parent and the ranks that it starts, and who follows their events."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colossus.checkpoints.format import DamagedCheckpoint
from colossus.errors import MachineError, UserError
from colossus.events import EventLog
from colossus.job import Job
from colossus.launcher import local
from colossus.launcher.protocol import Failure, RankFailed, Work, check_hooks
from colossus.launcher.ranks import Ranks
from colossus.parallel.ending import LostPeer
from colossus.trainer.hooks import Hook
from tests.cli.commands import ROOT
from tests.cli.test_train import small_words
from tests.trainer.running import kept_machine

SCRIPT = """
import os

import colossus
from colossus.trainer.hooks import Hook

print("the script runs", flush=True)
KIND = "note"


class Note(Hook):
    def __init__(self, text):
        self.text = text

    def on_finish(self, training):
        training.event(KIND, text=f"{self.text} of {training.world.size}", process=os.getpid())


job = colossus.load_job(None, WORDS)
run = colossus.train(job, hooks=[Note("mine"), type("Made", (Note,), {})("made")])
print(run.outcome, *[event["text"] for event in run.events("note")], flush=True)
assert os.getpid() not in {event["process"] for event in run.events("note")}
"""


@pytest.mark.parametrize("where", ["file", "input"])
def test_a_script_without_a_guard_is_not_started_again(where: str, tmp_path: Path) -> None:
    """Hooks of a script go by value; one that is typed in, as in a notebook, has no file."""
    words = [*small_words(tmp_path)[1:], "run.steps=2", "run.validate_every=0", "layout.dp_shard=2"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("WORDS", repr(words)))
    done = subprocess.run(
        [sys.executable, str(script) if where == "file" else "-"],
        input=script.read_text() if where == "input" else None,
        env=os.environ | {"COLOSSUS_CACHE": kept_machine(), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the script runs", "finished made of 2 mine of 2"]


class Locked(Hook):
    def __init__(self) -> None:
        self.name, self.lock = "a name", threading.Lock()


class Refuses(Hook):
    def __reduce__(self) -> str:
        raise RuntimeError("not this one")


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (
            Locked(),
            r"Locked\.lock cannot be sent to other processes \(cannot pickle '_thread\.lock' object\); ",
        ),
        (Refuses(), r"Refuses cannot be sent to other processes \(not this one\); make it in on_start, or"),
    ],
)
def test_what_cannot_be_sent_is_named(hook: Hook, message: str) -> None:
    for check in (check_hooks, lambda hooks: Work.of(Job(), Path("run"), hooks)):
        with pytest.raises(UserError, match=f"^hooks: {message}"):
            check([Hook(), hook])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("two lines\nand 'quotes'"), UserError),
        (DamagedCheckpoint("step-3: truncated:\n  a\n  b"), MachineError),
    ],
)
def test_what_a_rank_raises_is_raised_here_whole(error: Exception, kind: type[Exception]) -> None:
    raised = Failure.of(error, 1).as_error()
    assert type(raised) is kind and str(raised) == str(error)


def test_a_bug_of_a_rank_is_no_error_of_the_machine() -> None:
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError as error:
        raised = Failure.of(error, 3).as_error()
    assert type(raised) is RankFailed
    assert str(raised).startswith("rank 3 failed:\nTraceback") and "ZeroDivisionError: a bug" in str(raised)


def told(text: str) -> Failure:
    error = MachineError(text)
    error.told = not text
    return Failure.of(error, 0)


FOLLOWS = Failure.of(LostPeer("lost rank 1"), 0)


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ([None, None], None),
        ([FOLLOWS, told("the disk"), told("")], "the disk; 1 other ended with it"),
        ([Failure("MachineError", "rank 0 ended", died=True), told("the disk")], "the disk"),
        (
            [FOLLOWS, Failure("MachineError", "rank 1 ended", died=True), told("")],
            "rank 1 ended; 1 other ended with it; what is saved is whole, running again goes on",
        ),
        ([FOLLOWS, told("")], "lost rank 1"),
    ],
)
def test_the_cause_is_told_in_one_line(ends: list[Failure | None], text: str | None) -> None:
    ranks = Ranks(len(ends), 0)
    ranks._ranks = [SimpleNamespace(rank=rank, failure=end) for rank, end in enumerate(ends)]  # type: ignore[misc]
    failure = ranks.failure()
    assert (failure.text if failure else None) == text
    assert ranks.culprit() == (1 if text is not None and text.startswith("rank 1 ended") else None)


def test_a_follower_hands_on_what_is_new_once_and_in_order(tmp_path: Path) -> None:
    """Earlier attempts' events are not told again; the last one is told before it ends."""
    EventLog(tmp_path).write("start")
    heard: list[Any] = []
    with local._Follower(tmp_path, [heard.append, lambda event: heard.append(event["step"])]):
        log = EventLog(tmp_path)
        for step in range(5):
            log.write("step", step, loss=0.5)
            time.sleep(local.LOOK_SECONDS / 3)
        log.write("end", 5)
    log.close()
    events = heard[::2]
    assert [event["kind"] for event in events] == ["step"] * 5 + ["end"]
    assert [event["step"] for event in events] == heard[1::2] == [0, 1, 2, 3, 4, 5]
    assert all(event["attempt"] == 1 for event in events)


def test_without_listeners_nothing_is_followed(tmp_path: Path) -> None:
    before = threading.active_count()
    with local._Follower(tmp_path, []):
        assert threading.active_count() == before
