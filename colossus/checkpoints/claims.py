"""Which checkpoints a run claims to have. Nothing here imports torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from colossus.checkpoints.format import (
    DamagedCheckpoint,
    checkpoints_folder,
    is_committed,
    read_serial,
    step_of,
)
from colossus.errors import UserError

Say = Callable[[str], None]


def warn(message: str) -> None:
    """The default of `say`: standard error, unless the program set up logging otherwise."""
    logging.getLogger(__name__).warning(message)


def committed(run_folder: str | Path, say: Say = warn) -> list[Path]:
    """All that claim to be checkpoints of a run, the newest first.

    Raises:
        UserError: they lie elsewhere, where a link leads.
    """
    folder = checkpoints_folder(run_folder)
    there = Path(os.path.realpath(folder))  # unlike Path.resolve also of a link that leads to itself
    if folder.is_symlink() and not there.is_relative_to(os.path.realpath(run_folder)):
        raise UserError(f"{folder}: a link that leads out of the run; move the whole run, and link that")
    if folder.is_symlink() and not folder.is_dir():
        raise UserError(f"{folder}: a link that leads to no folder; remove it, and begin the run anew")
    return [path for _, path in sorted(_claims(folder, say), reverse=True)]


def _claims(folder: Path, say: Say) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if step_of(path.name) is None:  # a copy, an export: nothing that a save made
            continue
        if path.is_symlink():
            say(f"passed over {path}: a link, and no checkpoint itself")
            continue
        try:
            if is_committed(path):
                yield read_serial(path), path
        except DamagedCheckpoint as error:
            if is_committed(path):  # else it was deleted meanwhile
                say(f"skipped a damaged checkpoint: {error}")
