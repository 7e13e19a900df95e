"""Traces in processes of their own: PyTorch remembers the groups of a world, so each process sees one world.

A worker imports PyTorch once and forks for each trace, before it has done anything else: nothing is left from
one to the next, and several workers use several cores. They start as `python -m colossus.dryrun.worker`,
never by the caller's script.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from typing import IO, Any, TypeVar

from colossus.dryrun.rank import Traced, trace
from colossus.errors import MachineError
from colossus.measure.machine import free_memory_bytes

Answer = TypeVar("Answer")
POLL_SECONDS = 0.02
WORKER_BYTES = 700 * 2**20  # at most: PyTorch, and what is known of a world of 200,000 ranks


def traces(
    wanted: Iterable[tuple[Any, ...]], begun: Callable[[int], None] = lambda index: None
) -> list[Traced]:
    """`trace(*arguments)` for each. See `answers`."""
    return answers(trace, wanted, begun)


def answers(
    function: Callable[..., Answer],
    wanted: Iterable[tuple[Any, ...]],
    begun: Callable[[int], None] = lambda index: None,
) -> list[Answer]:
    """`function(*arguments)` for each, in their order, several at a time. begun: is told the index of each.

    Raises: what the first that failed has raised.
    """
    wanted = list(wanted)
    most = min(len(wanted), os.cpu_count() or 1, int(free_memory_bytes() // WORKER_BYTES))
    idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def one(index: int, arguments: tuple[Any, ...]) -> Answer:
        worker = idle.get()
        try:
            begun(index)
            assert worker.stdin is not None and worker.stdout is not None
            _send(worker.stdin, (function, arguments))
            answer = _receive(worker.stdout)
        finally:
            idle.put(worker)
        if isinstance(answer, Exception):
            raise answer
        found: Answer = answer
        return found

    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(max(1, most)))
        for _ in range(max(1, most)):
            idle.put(worker := _start())
            stack.callback(_end, worker)  # before the threads, which wait for them
        asked = [threads.submit(one, index, arguments) for index, arguments in enumerate(wanted)]
        return [future.result() for future in asked]


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "colossus.dryrun.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is for whoever asked
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def _end(worker: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)  # and what it has forked
    worker.wait()


def _send(pipe: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    """What was sent. Between our own processes alone, over a pipe that nobody else has."""
    size = pipe.read(8)
    if len(size) < 8:
        return MachineError("dryrun: a process has ended; what it said stands above")
    return pickle.loads(pipe.read(int.from_bytes(size, "little")))


def main() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints is no answer
    while len(size := sys.stdin.buffer.read(8)) == 8:
        request = sys.stdin.buffer.read(int.from_bytes(size, "little"))
        child = os.fork()
        if child:
            status = _wait(child)
            if status:
                ended = os.waitstatus_to_exitcode(status)
                _send(answers, MachineError(f"dryrun: a process ended with {ended}; is there memory for it?"))
            continue
        status = 1
        try:
            _send(answers, _answer(request))
            status = 0
        finally:
            os._exit(status)


def _wait(child: int) -> int:
    """Its status. Where whoever asked has ended, so do we."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if select.select([sys.stdin.buffer], [], [], POLL_SECONDS)[0]:
            if not sys.stdin.buffer.peek(1):  # type: ignore[union-attr]
                os.killpg(0, signal.SIGKILL)
            return os.waitpid(child, 0)[1]  # the next request: it has answered


def _answer(request: bytes) -> Any:
    import torch

    torch.set_num_threads(1)
    try:
        function, arguments = pickle.loads(request)
        return function(*arguments)
    except Exception as error:
        return _that_can_be_sent(error)


def _that_can_be_sent(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    main()
