"""Workers of dry runs that stay for the tests of a session: each fresh one imports PyTorch for seconds. They
fork for every trace, so that nothing is left from one test to the next."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from unittest.mock import patch

from colossus.dryrun import worker


@contextmanager
def kept_workers() -> Iterator[None]:
    """Starts no worker where one is idle. One that has not answered is ended, as ever."""
    start, end, send, receive = worker._start, worker._end, worker._send, worker._receive
    idle: list[subprocess.Popen[bytes]] = []
    owners: dict[int, subprocess.Popen[bytes]] = {}  # of pipes
    busy: set[int] = set()

    def take() -> subprocess.Popen[bytes]:
        made = idle.pop() if idle else start()
        owners.update({id(made.stdin): made, id(made.stdout): made})
        return made

    def leave(made: subprocess.Popen[bytes]) -> None:
        if made.poll() is None and made.pid not in busy:
            idle.append(made)
        else:
            end(made)

    def ask(pipe: IO[bytes], value: Any) -> None:
        busy.add(owners[id(pipe)].pid)
        send(pipe, value)

    def hear(pipe: IO[bytes]) -> Any:
        answer = receive(pipe)
        busy.discard(owners[id(pipe)].pid)
        return answer

    with patch.multiple(worker, _start=take, _end=leave, _send=ask, _receive=hear):
        yield
    for made in idle:
        end(made)
