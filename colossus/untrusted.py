"""Reads files of folders that somebody else may have made, goes on with them, and writes into them.

What is opened is a regular file that lies in its folder, links followed: nothing elsewhere is read, no pipe
or device is waited for. What is read whole has a limit: no file takes more memory than one of its kind may.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from colossus.errors import UserError

MIB = 1 << 20


def locate(path: Path, folder: Path | None = None) -> str:
    """Where a regular file really lies.

    folder: what it must lie in; the one that it is named in, where it is left out. Of a snapshot in the cache
        of Hugging Face's hub, files are links to `blobs` beside the snapshots.

    Raises:
        OSError: there is none, it is no regular file, or it lies elsewhere; `strerror` says which.
    """
    found = Path(os.path.realpath(path, strict=True))
    root = Path(os.path.realpath(path.parent if folder is None else folder))
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    roots = [root, snapshots.parent / "blobs"] if snapshots is not None else [root]
    if not any(found.is_relative_to(one) for one in roots):
        raise OSError(errno.ELOOP, f"leads out of {root}, as a link", str(path))
    if not stat.S_ISREG(found.lstat().st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return str(found)


def open_file(path: Path, folder: Path | None = None) -> io.FileIO:
    """Opens a file for reading, unbuffered. Raises OSError as `locate` does."""
    descriptor = os.open(locate(path, folder), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return io.FileIO(descriptor, "rb")


def open_to_append(path: Path) -> int:
    """The descriptor of a regular file, made where there is none, to be read and appended to. No link is
    followed: what is written lands in the folder.

    Raises:
        OSError: it is a link or no regular file, or cannot be written; `strerror` says which.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a link, and no file itself", str(path))
    descriptor = os.open(path, flags, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return descriptor


def make_folder(path: Path) -> None:
    """Makes a folder where there is none. Raises OSError where there is something else, or a link: what is
    written lands where it is named."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a link, and no folder itself", str(path))
    path.mkdir(exist_ok=True)


def clear(path: Path) -> None:
    """Removes what has this name: a folder with all that is in it, a file, or a link but not what it leads
    to. Raises OSError where that cannot be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_folder(path: Path, folder: Path) -> Path:
    """`path`, where it lies in `folder` once links are followed. Raises UserError where it does not."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{path}: leads out of {folder}, as a link; move what it leads to into the folder")
    return path


def num_bytes(path: Path, folder: Path | None = None) -> int:
    """The size of a file. Raises OSError as `locate` does."""
    return os.stat(locate(path, folder), follow_symlinks=False).st_size  # noqa: PTH116


def read_file(path: Path, limit: int, folder: Path | None = None) -> bytes:
    """A file's bytes. Raises OSError as `locate` does, and where there are more than `limit`."""
    with open_file(path, folder) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= limit:
            with io.BufferedReader(file) as stream:
                data = stream.read(size + 1)  # takes as much memory as is asked for
            if len(data) <= size:
                return data
    raise OSError(errno.EFBIG, f"longer than {limit} bytes, as no such file is", str(path))


def read_text(path: Path, limit: int, folder: Path | None = None) -> str:
    """As `read_file`, of UTF-8. Raises UnicodeDecodeError (a ValueError) where it is none."""
    return read_file(path, limit, folder).decode("utf-8")


def parse_json(data: bytes | str, **options: Any) -> Any:
    """As `json.loads`. Raises ValueError for whatever is wrong, also where it is nested too deeply."""
    try:
        return json.loads(data, **options)
    except RecursionError as error:
        raise ValueError(str(error)) from None
