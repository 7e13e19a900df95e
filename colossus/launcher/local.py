"""Trains in this process, or starts the ranks of a job on this machine and waits for them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from colossus.errors import GOES_ON, MachineError
from colossus.events import Listener, Tail
from colossus.job import Job
from colossus.launcher.protocol import Failure, Work
from colossus.launcher.started import is_rank

if TYPE_CHECKING:
    from colossus.trainer.hooks import Hook

HERE = "127.0.0.1"
LOOK_SECONDS = 0.2  # between two looks at the ranks, and at the event log
FOLLOW_SECONDS = 60.0  # that the other ranks have to end, when one has failed
LEAVE_SECONDS = 60.0  # that a rank may take for what its libraries do at its end
SAME_SECONDS = 1.0  # in which a second Ctrl-C is the same wish


def launch(job: Job, folder: Path, hooks: Sequence[Hook] = (), listeners: Iterable[Listener] = ()) -> None:
    """Trains `job` in `folder` on all its ranks, and returns when they have ended.

    Under torchrun (RANK is set) this process is one rank. With several ranks, each has copies of `hooks`, and
    `listeners` are called here, by a reader of the event log. Ranks are processes of ours: the caller's
    script is not run again. A signal is handed on to them, and they have as long as they need to save.

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
    from torch._C._distributed_c10d import TCPStore  # torch.distributed has it, unlisted

    from colossus.trainer.run import Run

    work = Work.of(job, folder, hooks)
    store = TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
    size = job.layout.num_ranks
    ranks: list[_Rank] = []
    with _Signals() as signals:
        try:
            for rank in range(size):
                ranks.append(_Rank(rank, size, store.port))
            for each in ranks:
                each.send(work)
            _wait(ranks, signals)
        finally:
            for each in ranks:
                each.end()
    failure = _what_failed(ranks)
    if signals.asked is not None and (failure is None or failure.follows):
        if Run(folder).outcome == "unfinished":  # they had not begun, or were not let save
            signal.raise_signal(signals.asked)
    elif failure is not None:
        raise failure.as_error()


class _Rank:
    """One rank in a process and a session of its own: a terminal's Ctrl-C reaches the parent alone, which
    hands it on once."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        self.rank = rank
        self.answered = False
        self.failure: Failure | None = None
        places = {"MASTER_ADDR": HERE, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        # Where this process finds modules, so does the rank; -P: and nowhere else.
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        variables = places | {name: str(number) for name, number in numbers.items()} | {"PYTHONPATH": path}
        self.pipe, theirs = Pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "colossus.launcher.rank", str(theirs.fileno())],
                env=os.environ | variables,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise MachineError(f"rank {rank} cannot be started ({error.strerror})") from error
        finally:
            theirs.close()

    def send(self, message: Work | int) -> None:
        with contextlib.suppress(OSError):  # it has ended, which is seen elsewhere
            self.pipe.send(message)

    def listen(self) -> None:
        """Takes what it says at its end: nothing, or why it failed."""
        try:
            self.failure = self.pipe.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            name = f" ({signal.Signals(-code).name})" if code < 0 else ""
            text = f"rank {self.rank} ended with exit code {code}{name}"
            self.failure = Failure(MachineError.__name__, text, died=True)
        self.answered = True

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.pipe.close()


def _wait(ranks: Sequence[_Rank], signals: _Signals) -> None:
    """Until all have ended. Of a rank that fails, the others learn by themselves, and end."""
    told: int | None = None
    end = float("inf")
    while any(each.process.poll() is None for each in ranks) or not all(each.answered for each in ranks):
        silent = {each.pipe: each for each in ranks if not each.answered}
        for pipe in wait(list(silent), LOOK_SECONDS) if silent else []:
            assert isinstance(pipe, Connection)
            silent[pipe].listen()
        if not silent:
            time.sleep(LOOK_SECONDS / 4)
        if signals.asked is not None and told is None:
            told = signals.asked
            for each in ranks:
                each.send(told)
        if all(each.answered for each in ranks):
            end = min(end, time.monotonic() + LEAVE_SECONDS)
        elif any(each.failure is not None for each in ranks):
            end = min(end, time.monotonic() + FOLLOW_SECONDS)
        if signals.insisted or time.monotonic() > end:
            return


def _what_failed(ranks: Sequence[_Rank]) -> Failure | None:
    """Why the first rank failed that could say it, else which one could not; and how many ended with it."""
    failures = [each.failure for each in ranks if each.failure is not None]
    first = min(
        (failure for failure in failures if failure.text),
        key=lambda failure: (failure.follows, failure.died),
        default=None,
    )
    if first is None or first.follows:
        return first
    others = sum(failure.follows for failure in failures)
    because = f"; {others} other{'s' * (others != 1)} ended with it" if others else ""
    return dataclasses.replace(first, text=f"{first.text}{because}" + (f"; {GOES_ON}" if first.died else ""))


class _Signals:
    """SIGINT and SIGTERM, while ranks run: handed on once. A second Ctrl-C ends the ranks at once; a second
    SIGTERM changes nothing, since schedulers send it again while a run still saves."""

    asked: int | None = None
    insisted = False

    def __enter__(self) -> _Signals:
        self._restore = contextlib.ExitStack()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, self._take)
                self._restore.callback(signal.signal, number, before or signal.SIG_DFL)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._asked_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._asked_at > SAME_SECONDS:
            self.insisted = True


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
