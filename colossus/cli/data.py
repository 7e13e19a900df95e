"""`colossus data build` and `colossus data show`."""

from __future__ import annotations

import typer


def app() -> typer.Typer:
    return typer.Typer()
