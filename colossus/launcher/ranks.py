"""The ranks that this process has started, each in a process that outlives an attempt which others end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from colossus.errors import GOES_ON, MachineError
from colossus.launcher.protocol import Failure, Work
from colossus.launcher.signals import Signals

HERE = "127.0.0.1"
LOOK_SECONDS = 0.2  # between two looks at the ranks
FOLLOW_SECONDS = 60.0  # that the other ranks have to end, when one has failed: together they may still save
LOST_SECONDS = 20.0  # the same where one has died, and they can save nothing new
END_SECONDS = 5.0  # that one has which only waits
LEAVE_SECONDS = 60.0  # that a rank may take for what its libraries do at its end


class Ranks:
    """Of a job, which meet at `port` of this machine."""

    def __init__(self, size: int, port: int) -> None:
        self._size, self._port = size, port
        self._ranks: list[Rank] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        ended, self._ranks = self._ranks, []
        for each in ended:
            each.end()

    def attempt(self, work: Work, signals: Signals) -> None:
        """Has all ranks do it, those of an attempt before that still wait and new ones, until they have
        answered or are given up."""
        there = {each.rank for each in self._ranks}
        for rank in range(self._size):
            if rank not in there:
                self._ranks.append(Rank(rank, self._size, self._port))
        for each in self._ranks:
            each.begin(work)
        _wait(self._ranks, signals)

    def keep_waiting(self) -> None:
        """Ends all but those that wait for other work: in them nothing has failed."""
        ended = [each for each in self._ranks if not each.waits]
        self._ranks = [each for each in self._ranks if each.waits]
        for each in ended:
            each.end()

    def culprit(self) -> int | None:
        """The first rank that died, where none says that it failed by itself."""
        failures = {each.rank: each.failure for each in self._ranks if each.failure is not None}
        if any(failure.text and not failure.died and not failure.follows for failure in failures.values()):
            return None
        return next((rank for rank, failure in failures.items() if failure.died), None)

    def failure(self) -> Failure | None:
        """Why the first rank failed that could say it, else which one could not; and how many ended with
        it."""
        failures = [each.failure for each in self._ranks if each.failure is not None]
        first = min(
            (failure for failure in failures if failure.text),
            key=lambda failure: (failure.follows, failure.died),
            default=None,
        )
        if first is None or first.follows:
            return first
        others = sum(failure.follows for failure in failures)
        because = f"; {others} other{'s' * (others != 1)} ended with it" if others else ""
        return dataclasses.replace(
            first, text=f"{first.text}{because}" + (f"; {GOES_ON}" if first.died else "")
        )


class Rank:
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
        # PyTorch's warnings of who is waited for, which our own words name.
        variables["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
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

    def begin(self, work: Work) -> None:
        self.answered, self.failure = False, None
        self.send(work)

    def send(self, message: Work | int) -> None:
        with contextlib.suppress(OSError):  # it has ended, which is seen elsewhere
            self.pipe.send(message)

    @property
    def waits(self) -> bool:
        """Whether it has ended an attempt because of others, and could begin another."""
        failure = self.failure
        return failure is not None and failure.follows and not failure.died and self.process.poll() is None

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
        self.pipe.close()  # which one that waits takes for the end
        if self.waits:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _wait(ranks: Sequence[Rank], signals: Signals) -> None:
    """Until all have ended, or wait. Of a rank that fails, the others learn by themselves."""
    told: int | None = None
    end = float("inf")
    while not all(each.answered and (each.waits or each.process.poll() is not None) for each in ranks):
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
        elif failures := [each.failure for each in ranks if each.failure is not None]:
            died = any(failure.died for failure in failures)
            end = min(end, time.monotonic() + (LOST_SECONDS if died else FOLLOW_SECONDS))
        if signals.insisted or time.monotonic() > end:
            return
