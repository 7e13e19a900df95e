"""The process that commits, with a fault in it, or watched. It imports no torch, as the real one.

python -m tests.checkpoints.outside die N           # kills itself before its N-th call of the system
python -m tests.checkpoints.outside sync NAME... N  # cannot sync what has such a name, so many times
python -m tests.checkpoints.outside record LOG      # writes down its calls
python -m tests.checkpoints.outside wait FILE       # commits once there is such a file
python -m tests.checkpoints.outside tidy KIND       # cannot delete older checkpoints
"""

from __future__ import annotations

import base64
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from colossus.checkpoints import commit

CALLS = ("mkdir", "open", "write", "fsync", "close", "unlink", "rmdir")
ERRORS = {
    "disk": lambda: OSError(errno.EIO, "broken"),
    "value": lambda: ValueError("a bug"),
    "key": lambda: KeyError("x"),
}


def with_fault(*arguments: object) -> Callable[[], list[str]]:
    """In place of `committer.command`."""
    words = [str(argument) for argument in arguments]
    return lambda: [sys.executable, "-S", "-P", "-m", "tests.checkpoints.outside", *words]


def die_at(call: int) -> None:
    """Makes this process kill itself before its `call`-th call of the system, or midway if it is a write."""
    count = 0

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == call:
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return original(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))


def break_sync(names: tuple[str, ...], times: int) -> Callable[[int], None]:
    """Makes syncing a file whose path holds one of `names` fail with EIO, so many times; returns what did it
    before."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal times
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if times and any(name in path for name in names):
            times -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    os.fsync = fsync
    return real


def record(log: Path, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Appends the calls of the system that change files to a log, a line each: what, path, data."""
    real: dict[str, Callable[..., Any]] = {
        name: getattr(os, name) for name in ("open", "write", "fsync", "mkdir", "unlink", "rmdir")
    }
    there = real["open"](log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: str, path: str, data: bytes = b"") -> None:
        line = json.dumps([what, path, base64.b64encode(data).decode()])
        real["write"](there, line.encode() + b"\n")

    def path_of(descriptor: int) -> str:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())

    def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        descriptor: int = real["open"](path, flags, *rest, **more)
        if flags & os.O_CREAT:
            note("make", str(path))
        return descriptor

    def written(descriptor: int, data: bytes) -> int:
        count: int = real["write"](descriptor, data)
        note("write", path_of(descriptor), bytes(data[:count]))
        return count

    def synced(descriptor: int) -> None:
        real["fsync"](descriptor)
        note("sync", path_of(descriptor))

    def changed(name: str) -> Callable[..., None]:
        def act(path: Any, *rest: Any, **more: Any) -> None:
            real[name](path, *rest, **more)
            note(name, str(path))

        return act

    put(os, "open", opened)
    put(os, "write", written)
    put(os, "fsync", synced)
    for name in ("mkdir", "unlink", "rmdir"):
        put(os, name, changed(name))


def wait_for(file: Path) -> None:
    real = commit.commit

    def slowly(*arguments: Any) -> None:
        while not file.exists():
            time.sleep(0.001)
        real(*arguments)

    commit.commit = slowly


def break_marker() -> None:
    sync, unlink = os.fsync, os.unlink

    def broken_sync(descriptor: int) -> None:
        if (Path(f"/proc/self/fd/{descriptor}").readlink() / "COMMITTED").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    def broken_unlink(path: Any, **options: Any) -> None:
        if Path(path).name == "COMMITTED":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        unlink(path, **options)

    os.fsync, os.unlink = broken_sync, broken_unlink


def break_tidying(kind: str) -> None:
    def broken(**_: object) -> None:
        raise ERRORS[kind]()

    commit.prune = broken  # type: ignore[assignment]


def main() -> None:
    what, *words = sys.argv[1:]
    if what == "die":
        die_at(int(words[0]))
    elif what == "sync":
        break_sync(tuple(words[:-1]), int(words[-1]))
    elif what == "record":
        record(Path(words[0]))
    elif what == "wait":
        wait_for(Path(words[0]))
    elif what == "marker":
        break_marker()
    else:
        break_tidying(words[0])
    commit.main()


if __name__ == "__main__":
    main()
