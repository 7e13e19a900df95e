"""Calls a function in real processes, one a rank, forked from a server that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from typing import Any

import torch

import tests.trainer.running  # noqa: F401  # what the server of processes imports

SECONDS = 180.0  # a machine that runs other tests beside may take a minute to import
_processes = multiprocessing.get_context("forkserver")


def in_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, lost: Collection[int] = ()
) -> list[Any]:
    """What `function(*arguments)` returned in each of `size` ranks, whose environment is torchrun's.

    lost: ranks that are killed within, and return None.

    Raises:
        AssertionError: with the traceback of the first rank that failed; none of them stays behind.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    address["PYTEST_CURRENT_TEST"] = os.environ.get("PYTEST_CURRENT_TEST", "")  # for tools/recording
    pipes, started = [], []
    try:
        for rank in range(size):
            here, there = _processes.Pipe(duplex=False)
            ours = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)} | address
            started.append(_processes.Process(target=_rank, args=(ours, there, function, arguments)))
            started[-1].start()
            there.close()
            pipes.append(here)
        return _answers(pipes, lost)
    finally:
        for process in started:
            process.kill()
            process.join()


def _answers(pipes: list[Connection], lost: Collection[int]) -> list[Any]:
    end = time.monotonic() + SECONDS
    answers: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = multiprocessing.connection.wait(waiting.values(), max(0.0, end - time.monotonic()))
        assert ready, f"ranks {[*waiting]} did not answer in {SECONDS:g} s"
        for rank, pipe in [(r, p) for r, p in waiting.items() if p in ready]:
            try:
                answers[rank], failure = pipe.recv()
            except EOFError:
                answers[rank], failure = None, None if rank in lost else "it has ended"
            assert failure is None, f"rank {rank} failed:\n{failure}"
            del waiting[rank]
    return [answers[rank] for rank in range(len(pipes))]


def _rank(
    environment: dict[str, str], pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    try:
        answer = (function(*arguments), None)
    except BaseException:
        answer = (None, traceback.format_exc())
    _send(pipe, answer)


def _send(pipe: Connection, answer: tuple[Any, str | None]) -> None:
    """Where tools/recording writes down what this process did, which is killed next."""
    pipe.send(answer)
