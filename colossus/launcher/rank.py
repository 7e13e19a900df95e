"""One rank of a job: `python -m colossus.launcher.rank PIPE`, as `colossus.launcher.local` starts it."""

from __future__ import annotations

import os
import pickle
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
    failure: Failure | None = None
    rank = int(os.environ["RANK"])
    try:
        work: Work = pipe.recv()
        threading.Thread(target=_listen, args=(pipe,), name="parent", daemon=True).start()
        _train(work, begun)
    except EOFError:  # the parent has ended
        return 3
    except KeyboardInterrupt:
        said = f"rank {rank}: stopped by a signal before it could save"
        failure = Failure("MachineError", said, follows=True)
    except Exception as error:
        failure = Failure.of(error, rank)
    try:
        pipe.send(failure)
    except OSError:
        return 3
    return 0 if failure is None else 3


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


def _listen(pipe: Connection) -> None:
    """Takes signals from the parent. Where it was killed, the run is saved, as nobody else would end it."""
    try:
        while True:
            os.kill(os.getpid(), pipe.recv())
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
