"""Groups of ranks on this machine that wait for commands, so that benchmarks let them act in turns."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

Act = Callable[..., Any]
_processes = multiprocessing.get_context("spawn")


class Ranks:
    """`size` processes that have joined a world. `make(*arguments)` is entered in each, and gives what
    `all` calls there.

    Raises:
        EOFError: from any call, where a process has failed; what happened is on its standard error.
    """

    def __init__(self, size: int, make: Callable[..., AbstractContextManager[Act]], *arguments: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        self._members = []
        for rank in range(size):
            here, there = _processes.Pipe()
            names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)} | shared
            process = _processes.Process(target=_serve, args=(names, there, make, arguments), daemon=True)
            process.start()
            there.close()
            self._members.append((process, here))
        for _, pipe in self._members:
            pipe.recv()

    def all(self, *command: Any) -> list[Any]:
        """What each rank answers, all at once."""
        for _, pipe in self._members:
            pipe.send(command)
        return [pipe.recv() for _, pipe in self._members]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, pipe in self._members:
            if error is None:
                pipe.send(None)
            else:
                process.kill()
            process.join()


def _serve(
    names: dict[str, str],
    pipe: Any,
    make: Callable[..., AbstractContextManager[Act]],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= names
    with make(*arguments) as act:
        pipe.send(None)
        while (command := pipe.recv()) is not None:
            pipe.send(act(*command))
