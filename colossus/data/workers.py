"""The processes of a build. None of them loads torch, or runs the script that called for the build."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import connection
from types import ModuleType
from typing import Any

from colossus.data.encode import Task, encode_task, encoder_of
from colossus.errors import MachineError


def run_tasks(tasks: Sequence[Task], workers: int, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """The journals of all tasks, in order. progress: called with the bytes done.

    Raises:
        UserError: a part cannot be read. MachineError: storage failed, or a process was killed.
    """
    size = {task.index: sum(part.num_bytes for part in task.parts) for task in tasks}
    results: dict[int, dict[str, Any]] = {}
    done = 0

    def finish(task: Task, journal: dict[str, Any]) -> None:
        nonlocal done
        results[task.index] = journal
        progress(done := done + size[task.index])

    for task in tasks:
        if task.journal.is_file():
            finish(task, task.done())
    todo = [task for task in tasks if task.index not in results]
    if len(todo) > 1 and workers > 1:
        _in_parallel(todo, min(workers, len(todo)), finish)
    elif todo:
        encoder = encoder_of(todo[0].tokenizer, todo[0].quick)
        for task in todo:
            finish(task, encode_task(task, encoder))
    return [results[task.index] for task in tasks]


def _in_parallel(tasks: Sequence[Task], workers: int, finish: Callable[[Task, dict[str, Any]], None]) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin) as pool:
        try:
            with _nameless_main():
                futures: dict[Future[dict[str, Any]], Task] = {
                    pool.submit(encode_in_worker, t): t for t in tasks
                }
            for future in as_completed(futures):
                finish(futures[future], future.result())
        except BrokenProcessPool:
            raise MachineError(
                "a process of the build was killed (out of memory?); run it again to go on"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def encode_in_worker(task: Task) -> dict[str, Any]:
    """As `encode_task`, in a process that goes on to other tasks of the build."""
    return encode_task(task, _loaded(task.tokenizer, task.quick))


# Once a process, which serves one build: of a large vocabulary it takes as long as some megabytes of text.
_loaded = cache(encoder_of)


def _begin() -> None:
    """A worker ends with the process that started it, however that ends, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["USE_TORCH"] = "0"  # `datasets` would load it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has a core
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@contextlib.contextmanager
def _nameless_main() -> Iterator[None]:
    """Processes that start meanwhile do not run the caller's script again, which may not expect it.

    Without this, a script that calls `colossus.train` outside `if __name__ == "__main__"` would call it
    once more in every worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
