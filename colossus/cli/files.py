"""Files that an option asks for: looked at before the work, written after it."""

from __future__ import annotations

import os
from pathlib import Path

from colossus.errors import MachineError, UserError


def check_writable(option: str, path: Path | None) -> None:
    """That `write` can write there, before minutes of work; leaves nothing behind.

    Raises:
        UserError: it is a folder, its folder is missing, or the system forbids it.
    """
    if path is None:
        return
    said = f"{option}={path}"
    try:
        place = Path(os.path.realpath(path))  # where a link leads to
        if place.is_dir():
            raise UserError(f"{said}: is a folder; name a file in it")
        if not place.parent.is_dir():
            raise UserError(f"{said}: no such folder: {place.parent if path.is_symlink() else path.parent}")
        is_new = not place.exists()
        if is_new or place.is_file():
            place.open("a").close()
        elif not os.access(place, os.W_OK):  # to open a pipe would wait for its reader
            raise UserError(f"{said}: cannot be written")
        if is_new:
            place.unlink()
    except OSError as error:
        raise UserError(f"{said}: cannot be written ({error.strerror})") from error


def write(path: Path, text: str) -> None:
    """Raises `MachineError` where that fails after all, as on a full disk."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error.strerror})") from error
