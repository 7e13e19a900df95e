"""What a user's own code gives a job, by the name `package.module:Name`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from colossus.errors import UserError


def is_code(corpus: str) -> bool:
    """Whether a corpus of this name is what a user's own code gives."""
    if corpus.startswith("hf:") or ":" not in corpus or "/" in corpus:
        return False
    return not os.path.exists(corpus)  # noqa: PTH110  # Path.exists raises for a name that no file can have


def code_of(hooks: Iterable[str] | None, corpora: Iterable[str] | None) -> list[str]:
    """The `run.hooks` and `data.corpus` of a job that are code, as `field=name`."""
    return [
        *(f"run.hooks={name}" for name in hooks or ()),
        *(f"data.corpus={name}" for name in corpora or () if is_code(name)),
    ]


def check_trusted(folder: Path, code: Iterable[str], own: Iterable[str]) -> None:
    """Raises UserError where the job in a folder names code that the user's own words do not name."""
    own = set(own)
    foreign = next((name for name in code if name not in own), None)
    if foreign is not None:
        raise UserError(
            f"{folder}: its job would run code, {foreign}; where you trust that, name it yourself or add "
            "--trust-code"
        )


def check(field: str, name: str) -> None:
    """Raises of a name what `find` would, as far as that can be told without running any code of its own:
    it has another form, or there is no such module or package to begin with."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"{field}={name}: must be package.module:Name")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` would have it, also for the installed command
        sys.path.append(here)
    outermost = module_name.partition(".")[0]
    if outermost and outermost not in sys.modules and find_spec(outermost) is None:
        raise UserError(f"{field}={name}: cannot be imported (No module named {outermost!r})")


def find(field: str, name: str) -> Callable[[], Any]:
    """The callable that `field` of a job names as `package.module:Name`. Its module is imported.

    Raises:
        UserError: the name has another form, the module cannot be imported or has no such callable.
    """
    check(field, name)
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:  # ValueError: an empty part of a dotted name
        raise UserError(f"{field}={name}: cannot be imported ({error})") from None
    if not callable(getattr(module, attribute, None)):
        names = [f"{module_name}:{known}" for known in vars(module) if not known.startswith("_")]
        raise UserError.field(field, name, f"{module_name} has no such callable", names)
    return getattr(module, attribute)
