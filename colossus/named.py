"""What a user's own code gives a job, by the name `package.module:Name`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from colossus.errors import UserError


def find(field: str, name: str) -> Callable[[], Any]:
    """The callable that `field` of a job names as `package.module:Name`. Its module is imported.

    Raises:
        UserError: the name has another form, the module cannot be imported or has no such callable.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"{field}={name}: must be package.module:Name")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` would have it, also for the installed command
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:  # ValueError: an empty part of a dotted name
        raise UserError(f"{field}={name}: cannot be imported ({error})") from None
    if not callable(getattr(module, attribute, None)):
        names = [f"{module_name}:{known}" for known in vars(module) if not known.startswith("_")]
        raise UserError.field(field, name, f"{module_name} has no such callable", names)
    return getattr(module, attribute)
