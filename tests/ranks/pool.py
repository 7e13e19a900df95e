"""A pool of processes that stays: a fresh one costs a second at its first use.

Each call makes a group of the first so many processes. One that hangs or fails kills the pool; the next call
starts another. One that has become crowded is replaced: DTensor's plans keep the meshes of earlier calls, and
gloo wakes a thread for each of their groups a hundred times a second, which took a third of the machine.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

SECONDS = 240.0  # until all ranks of a call have answered: compiling takes 100 on two slow cores
KEPT = 8  # processes that stay: more are ended after the call that needed them
CROWDED = 40  # threads of a process; three for each group that is left
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.pipelining",
        "torch.distributed.tensor.parallel",
        "colossus.api",
        "colossus.trainer.state",
        "tests.ranks.cases",
    ]
)


class Pool:
    """Runs functions in ranks whose environment is torchrun's."""

    def __init__(self) -> None:
        self._members: list[tuple[Any, Connection]] = []
        self._crowded: set[Connection] = set()
        atexit.register(self.close)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returned in each of `size` ranks.

        Raises:
            AssertionError: with the traceback of the first rank that failed, or which did not answer.
        """
        while len(self._members) < size:
            here, there = _processes.Pipe()
            process = _processes.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._members.append((process, here))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
        shared["PYTEST_CURRENT_TEST"] = os.environ.get("PYTEST_CURRENT_TEST", "")  # for tools/recording
        pipes = [pipe for _, pipe in self._members[:size]]
        for rank, pipe in enumerate(pipes):
            _send(pipe, (shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, function, arguments))
        try:
            answers = self._answers(pipes)
        except BaseException:
            self.close()
            raise
        self._end(member for member in self._members if member[1] in self._crowded)
        self.close(keep=KEPT)
        return answers

    def _answers(self, pipes: list[Connection]) -> list[Any]:
        end = time.monotonic() + SECONDS
        answers: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        while waiting:
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            assert ready, f"ranks {sorted(waiting.values())} did not answer in {SECONDS:g} s"
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    answers[rank], failure, num_threads = _receive(pipe)  # type: ignore[arg-type]
                    self._crowded |= {pipe} if num_threads > CROWDED else set()  # type: ignore[arg-type]
                except EOFError:
                    failure = "its process has ended"
                assert failure is None, f"rank {rank} failed:\n{failure}"
        return [answers[rank] for rank in range(len(pipes))]

    def close(self, keep: int = 0) -> None:
        """Ends the processes but for the first `keep`."""
        self._end(self._members[keep:])

    def _end(self, members: Iterable[tuple[Any, Connection]]) -> None:
        for member in list(members):
            process, pipe = member
            pipe.close()
            process.kill()
            process.join()
            self._members.remove(member)
            self._crowded.discard(pipe)


def _send(pipe: Connection, what: Any) -> None:
    """In bytes: `Connection.send` would open a file for each tensor."""
    pipe.send_bytes(pickle.dumps(what))


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            environment, function, arguments = _receive(pipe)
        except EOFError:
            return
        os.environ |= environment
        answer: tuple[Any, str | None]
        try:
            answer = (function(*arguments), None)
        except BaseException:
            answer = (None, traceback.format_exc())
        _forget_meshes()
        _send(pipe, (*answer, _num_threads()))


def _forget_meshes() -> None:
    """DTensor remembers placements by the ranks of a mesh; the groups of the next call have other names."""
    from torch.distributed.tensor import debug

    for name in ("_clear_sharding_prop_cache", "_clear_fast_path_sharding_prop_cache"):
        getattr(debug, name, lambda: None)()


def _num_threads() -> int:
    """Of this process, where the system tells."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/task"))  # noqa: PTH208
    return 0
