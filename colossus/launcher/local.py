"""Trains in this process, or starts the ranks of a job on this machine and waits for them."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from colossus.errors import GOES_ON
from colossus.events import EventLog, Listener, Tail
from colossus.job import Job
from colossus.launcher.protocol import Failure, Work
from colossus.launcher.ranks import HERE, LOOK_SECONDS, Ranks
from colossus.launcher.recovery import Decision, Fault, decide
from colossus.launcher.signals import Signals
from colossus.launcher.started import is_rank

if TYPE_CHECKING:
    from colossus.trainer.hooks import Hook
    from colossus.trainer.run import Run


def launch(job: Job, folder: Path, hooks: Sequence[Hook] = (), listeners: Iterable[Listener] = ()) -> None:
    """Trains `job` in `folder` on all its ranks, and returns when they have ended.

    Under torchrun (RANK is set) this process is one rank. With several ranks, each has copies of `hooks`, and
    `listeners` are called here, by a reader of the event log. Ranks are processes of ours: the caller's
    script is not run again. A signal is handed on to them, and they have as long as they need to save. Where
    one dies, the run goes on from what is saved (see `recovery`), unless `run.recover` is false.

    Raises:
        UserError, MachineError: what a rank raised first. RankFailed: of anything else.
    """
    if job.layout.num_ranks == 1 or is_rank():
        from colossus.trainer.loop import train

        train(job, folder, hooks, listeners)
        return
    with _Follower(folder, listeners):
        _launch_ranks(job, folder, hooks)


def _launch_ranks(job: Job, folder: Path, hooks: Sequence[Hook]) -> None:
    """Attempt after attempt, as long as a rank has died and the run can go on from what is saved."""
    from torch._C._distributed_c10d import TCPStore  # torch.distributed has it, unlisted

    from colossus.trainer.run import Run

    work, run = Work.of(job, folder, hooks), Run(folder)
    store = TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
    faults: list[Fault] = []
    with Signals() as signals, Ranks(job.layout.num_ranks, store.port) as ranks:
        while True:
            before = len(run.events("step"))
            ranks.attempt(work, signals)
            failure = ranks.failure()
            if failure is None or run.outcome != "unfinished":
                break
            faults.append(_fault(ranks, failure, run, before))
            decision = decide(faults)
            if signals.asked is not None or not job.run.recover:
                decision = Decision(False, "it was stopped" if signals.asked else "run.recover=false")
            _journal(folder, faults[-1], decision)
            if not decision.goes_on:
                if len(faults) > 1 and signals.asked is None:
                    failure = dataclasses.replace(failure, text=f"{decision.why}: {failure.text}")
                break
            if job.fleet.device == "cpu":
                ranks.keep_waiting()
            else:  # what a GPU's libraries hold after a failure is not to be built on
                ranks.end()
    if signals.asked is not None and (failure is None or failure.follows):
        if run.outcome == "unfinished":  # they had not begun, or were not let save
            signal.raise_signal(signals.asked)
    elif failure is not None:
        raise failure.as_error()


def _fault(ranks: Ranks, failure: Failure, run: Run, before: int) -> Fault:
    """before: steps that the attempts before this one have taken."""
    saved = max((event.get("saved_step", 0) for event in run.events("checkpoint")), default=0)
    return Fault(ranks.culprit(), failure.text, len(run.events("step")) - before, saved)


def _journal(folder: Path, fault: Fault, decision: Decision) -> None:
    """Between two attempts: no rank writes then."""
    if fault.culprit is None or not (folder / "events.jsonl").is_file():
        return
    log = EventLog(folder, new_attempt=False)
    log.write(
        "fault",
        synced=True,
        culprit=fault.culprit,
        text=fault.text.removesuffix(f"; {GOES_ON}"),
        goes_on=decision.goes_on,
        why=decision.why,
        saved_step=fault.saved_step,
    )
    log.close()


class _Follower:
    """Reads the event log while other processes write it, and hands on what is new."""

    def __init__(self, folder: Path, listeners: Iterable[Listener]) -> None:
        self._tail, self._listeners = Tail(folder), list(listeners)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="events", daemon=True)

    def __enter__(self) -> _Follower:
        if self._listeners:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._listeners:
            self._thread.join()

    def _follow(self) -> None:
        while True:
            ended = self._end.wait(LOOK_SECONDS)
            for event in self._tail.new():
                for listener in self._listeners:
                    listener(event)
            if ended:
                return
