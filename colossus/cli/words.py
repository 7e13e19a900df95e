"""The grammar that every verb with a job shares: a path, and `section.field=value`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from colossus.errors import UserError

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="JOB|section.field=value",
        help="A job file or the folder of a run, and values that are stronger than its own; section=NAME "
        "takes a preset. Sections: model, data, optimizer, layout, precision, checkpoint, fleet, run.",
        show_default=False,
    ),
]


def split(words: list[str] | None) -> tuple[Path | None, list[str]]:
    """The path among `words`, if there is one, and the overrides.

    Raises:
        UserError: there are two paths.
    """
    paths = [word for word in words or () if not _is_value(word)]
    if len(paths) > 1:
        raise UserError(f"{' and '.join(paths)}: one job at a time; values are written section.field=value")
    return (Path(paths[0]) if paths else None), [word for word in words or () if word not in paths]


def _is_value(word: str) -> bool:
    """Whether it sets something: a section or a field of one, else what no file is called."""
    from colossus.job import SECTIONS, fields

    name, equals, _ = word.partition("=")
    # os.path.exists is False for a name that no file can have, where Path.exists raises
    return bool(equals) and (name in (*SECTIONS, *fields()) or not os.path.exists(word))  # noqa: PTH110
