"""Starts the ranks of a job on this machine: one in this process, several under torchelastic."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from colossus.errors import MachineError, UserError
from colossus.events import Listener, read_events
from colossus.job import Job

if TYPE_CHECKING:
    from colossus.trainer.hooks import Hook


def launch(job: Job, folder: Path, hooks: Sequence[Hook] = (), listeners: Iterable[Listener] = ()) -> None:
    """Trains `job` in `folder` on all its ranks, and returns when they have ended.

    Under torchrun (RANK is set) this process is one rank. With several ranks, `hooks` are pickled to
    each, and `listeners` are called here, by a reader of the event log.
    """
    from colossus.trainer.loop import train

    if job.layout.num_ranks == 1 or "RANK" in os.environ:
        train(job, folder, hooks, listeners)
        return
    with _Follower(folder, listeners):
        _launch_ranks(job, folder, hooks)


def _launch_ranks(job: Job, folder: Path, hooks: Sequence[Hook]) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.layout.num_ranks,
        run_id=f"colossus-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, _rank)(job, folder, list(hooks))
    except SignalException:
        return  # the ranks have saved; the event log says how they ended
    except ChildFailedError as failed:
        rank, failure = min(failed.failures.items(), key=lambda item: item[1].timestamp)
        text = failure.message if isinstance(failure.message, str) else str(failure.message)
        for kind in (UserError, MachineError):
            found = re.findall(rf"{kind.__name__}: (.*)", text)
            if found:
                raise kind(found[-1]) from None
        raise MachineError(f"rank {rank} ended with exit code {failure.exitcode}: {text}") from failed


def _rank(job: Job, folder: Path, hooks: list[Hook]) -> None:
    from colossus.trainer.loop import train

    train(job, folder, hooks)


class _Follower:
    """Reads the event log while other processes write it, and hands on what is new."""

    def __init__(self, folder: Path, listeners: Iterable[Listener], every_seconds: float = 0.2) -> None:
        self._folder, self._listeners, self._every = folder, list(listeners), every_seconds
        self._seen = len(read_events(folder))
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
            ended = self._end.is_set()
            events = read_events(self._folder)
            for event in events[self._seen :]:
                for listener in self._listeners:
                    listener(event)
            self._seen = len(events)
            if ended:
                return
            time.sleep(self._every)
