"""What can go wrong through no fault of the program: the user's input, and the machine.

Both are reported in one line without a traceback; anything else that is raised is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option that most resembles `name`, or None where none does."""
    options = list(options)
    folded = {option.lower(): option for option in options}
    found = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return folded[found[0]] if found else None


def _brief(value: object, limit: int = 120) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
