"""One rank of a job: `python -m colossus.launcher.rank PIPE`, as `colossus.launcher.local` starts it."""

from __future__ import annotations

import gc
import os
import pickle
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from types import FrameType
from typing import TYPE_CHECKING

from colossus.errors import UserError
from colossus.launcher.protocol import Failure, Work

if TYPE_CHECKING:
    from colossus.trainer.training import Training


def main(descriptor: int) -> int:
    pipe = Connection(descriptor)
    begun = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        if not begun.is_set():  # then training takes signals for a wish to save; and after it, all is done
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    given, at_work = queue.SimpleQueue[Work | None](), threading.Event()
    threading.Thread(target=_listen, args=(pipe, given, at_work), name="parent", daemon=True).start()
    try:
        while (work := given.get()) is not None:
            failure = _attempt(work, begun)
            at_work.clear()
            pipe.send(failure)
            if failure is None or not failure.follows:
                return 0 if failure is None else 3
            begun.clear()
            gc.unfreeze()
            gc.collect()  # what the attempt has left
    except (KeyboardInterrupt, OSError):  # while it waited; the parent has ended
        pass
    return 3


def _attempt(work: Work, begun: threading.Event) -> Failure | None:
    rank = int(os.environ["RANK"])
    try:
        _train(work, begun)
    except KeyboardInterrupt:
        said = f"rank {rank}: stopped by a signal before it could save"
        return Failure("MachineError", said, follows=True)
    except Exception as error:
        return Failure.of(error, rank)
    return None


def _train(work: Work, begun: threading.Event) -> None:
    if work.python_path is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = work.python_path
    from colossus.trainer.hooks import Hook
    from colossus.trainer.loop import train

    class Begin(Hook):
        def on_start(self, training: Training) -> None:
            begun.set()

    try:
        job, folder, hooks = pickle.loads(work.pickled)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"hooks: cannot be made again in another process ({reason})") from error
    train(job, folder, [*hooks, Begin()])


def _listen(pipe: Connection, given: queue.SimpleQueue[Work | None], at_work: threading.Event) -> None:
    """Takes work and signals from the parent. Where it was killed, the run is saved, as nobody else would end
    it. Who only waits for work leaves."""
    said: Work | int
    while True:
        try:
            said = pipe.recv()
        except (EOFError, OSError):
            said = signal.SIGTERM
        if isinstance(said, Work):
            at_work.set()
            given.put(said)
            continue
        given.put(None)
        if at_work.is_set():
            os.kill(os.getpid(), said)
        if said == signal.SIGTERM:
            return


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
