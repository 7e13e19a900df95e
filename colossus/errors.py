"""What can go wrong through no fault of the program: the user's input, and the machine.

Both are reported in one line without a traceback; anything else that is raised is a bug.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterable, Iterator

GOES_ON = "what is saved is whole, running again goes on"


class UserError(ValueError):
    """What the user gave is wrong. The command line ends with exit code 2.

    told: by another rank, on behalf of all.
    """

    told = False

    @classmethod
    def field(cls, field: str, value: object, allowed: str, options: Iterable[str] = ()) -> UserError:
        """`field=value: allowed`, and the nearest of `options` where one resembles the value."""
        guess = nearest(str(value), options)
        hint = f"; did you mean {guess!r}?" if guess is not None else ""
        return cls(f"{field}={_brief(value)}: {allowed}{hint}")


class MachineError(RuntimeError):
    """The machine or its storage failed; what is saved is whole. Exit code 3, running again goes on.

    told: see `UserError`.
    """

    told = False


@contextlib.contextmanager
def only_shown(what: str) -> Iterator[None]:
    """What is done within is shown to somebody, and is no part of the work: where it fails, a line says
    so, and the work and its outcome stand."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        logging.getLogger(__name__).warning("%s: %s", what, _brief(said, 400))


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option that most resembles `name`, or None where none does. One that goes on where `name` ends
    resembles it more than any that begins otherwise."""
    folded = {option.lower(): option for option in options}
    begun = [option for option in folded if name and option.startswith(name.lower())]
    found = difflib.get_close_matches(name.lower(), begun or folded, n=1, cutoff=0.0 if begun else 0.5)
    return folded[found[0]] if found else None


def _brief(value: object, limit: int = 120) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
