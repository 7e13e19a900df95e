"""Starts the ranks of a job on this machine: one in this process, several under torchelastic."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from colossus.errors import MachineError, UserError
from colossus.events import Listener, Tail
from colossus.job import Job

if TYPE_CHECKING:
    from colossus.trainer.hooks import Hook

Prepared = TypeVar("Prepared")
PREPARING = timedelta(days=1)  # that building the data may take
TELLING = timedelta(seconds=10)  # that the others have to hear why there is none
STOP_SECONDS = 0.2  # between two looks at the ranks, and at the event log
FAREWELL_SECONDS = 5.0  # that a parent has to read the result of a rank that a signal ended
TOLD = {kind.__name__: kind for kind in (UserError, MachineError)}


def is_first_rank() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def first_rank_prepares(prepare: Callable[[], Prepared]) -> Iterator[Prepared]:
    """What `prepare` returns; where torchrun started several processes, the first one alone calls it.

    The place where they meet for that stays open until this is left: a process group that is made within
    meets there too. What the first rank raises is raised on all, and told by the first.

    Raises:
        MachineError: not all came, or the first rank ended.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield prepare()
        return
    from torch.distributed import DistError

    from colossus.parallel.meeting import meet

    store, rank, size = meet("preparing")
    store.set_timeout(PREPARING)
    if rank != 0:
        try:
            prepared = pickle.loads(store.get("colossus/prepared"))
            store.set(f"colossus/told-{rank}", "")
        except DistError:
            prepared = MachineError("rank 0 has ended before it was ready")
        if isinstance(prepared, (UserError, MachineError)):
            prepared.told = True
    else:
        try:
            prepared = prepare()
        except (UserError, MachineError) as error:
            prepared = error
        store.set("colossus/prepared", pickle.dumps(prepared))
    if isinstance(prepared, Exception):
        if rank == 0:  # the store may end with this process
            with contextlib.suppress(DistError):
                store.wait([f"colossus/told-{other}" for other in range(1, size)], TELLING)
        raise prepared
    yield prepared


def launch(job: Job, folder: Path, hooks: Sequence[Hook] = (), listeners: Iterable[Listener] = ()) -> None:
    """Trains `job` in `folder` on all its ranks, and returns when they have ended.

    Under torchrun (RANK is set) this process is one rank. With several ranks, `hooks` are pickled to
    each, and `listeners` are called here, by a reader of the event log.
    """
    from colossus.trainer.loop import train

    if job.layout.num_ranks == 1 or "RANK" in os.environ:
        train(job, folder, hooks, listeners)
        return
    with _Follower(folder, listeners), TemporaryDirectory(prefix="colossus-ranks-") as errors:
        _launch_ranks(job, folder, hooks, Path(errors))


def _launch_ranks(job: Job, folder: Path, hooks: Sequence[Hook], errors: Path) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from colossus.trainer.run import Run

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.layout.num_ranks,
        run_id=f"colossus-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=STOP_SECONDS,
    )
    try:
        with _signals_given_back():
            elastic_launch(config, _rank)(job, folder, list(hooks), errors)
    except SignalException as stopped:
        if Run(folder).outcome == "unfinished":  # the ranks had not begun, so there was nothing to save
            raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as failed:
        rank, failure = min(failed.failures.items(), key=lambda item: item[1].timestamp)
        if failure.exitcode >= 0 and (told := _first_told(errors)) is not None:
            raise told from None
        said: Any = failure.message
        text = said["extraInfo"]["py_callstack"] if isinstance(said, dict) else said
        raise MachineError(f"rank {rank} ended with exit code {failure.exitcode}: {text}") from failed


@contextlib.contextmanager
def _signals_given_back() -> Iterator[None]:
    """torchelastic takes the signals that end a process, and keeps them; a script or a notebook goes on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(errors: Path, error: UserError | MachineError) -> None:
    """Leaves what a rank raised for the parent, to which torchelastic hands on a part of its text alone."""
    kind = next(name for name, kind in TOLD.items() if isinstance(error, kind))
    with contextlib.suppress(OSError):
        (errors / f"{time.time_ns()}-{os.getpid()}").write_text(
            json.dumps({"kind": kind, "text": str(error)}), encoding="utf-8"
        )


def _first_told(errors: Path) -> UserError | MachineError | None:
    """The error that came first: the others may be of waiting for that rank in vain."""
    first = min(errors.iterdir(), default=None)
    if first is None:
        return None
    told = json.loads(first.read_text(encoding="utf-8"))
    return TOLD[told["kind"]](told["text"])


def _rank(job: Job, folder: Path, hooks: list[Hook], errors: Path) -> None:
    # Ctrl-C in a terminal reaches every process of its group, and two signals end a rank without saving; it
    # gets one from its parent. (Where the parent is killed, PyTorch has the kernel send SIGINT, on Linux.)
    os.setsid()
    from colossus.trainer.hooks.stop import Signalled
    from colossus.trainer.loop import train

    signalled = Signalled()
    try:
        train(job, folder, [*hooks, signalled])
    except Exception as error:
        atexit.register(_leave_late)
        if isinstance(error, (UserError, MachineError)):
            _tell(errors, error)
        raise
    # torchelastic lets a rank wait until all results were read, and then waits for each rank that waits: one
    # that was gone by then would keep it for ever. Only a parent that is told to stop, or killed, reads none.
    if signalled.was:
        leave = threading.Timer(FAREWELL_SECONDS, os._exit, (0,))
        leave.daemon = True
        leave.start()


def _leave_late() -> None:
    """Ends a rank that failed. Others fail when it is gone: the parent looks before they are gone, too.

    Python is not taken down: PyTorch's threads may abort a process then, rarely, and the parent would see a
    signal in place of the error.
    """
    time.sleep(3 * STOP_SECONDS)
    os._exit(1)


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
            ended = self._end.wait(STOP_SECONDS)
            for event in self._tail.new():
                for listener in self._listeners:
                    listener(event)
            if ended:
                return
