"""What a parent and the ranks that it started say to each other, over a private pipe to each.

The parent sends work and numbers of signals; a rank answers work with one `Failure` or None, and ends, unless
it failed because of others alone: then it waits for work anew. A pipe that closes says that the other one is
gone.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colossus.errors import MachineError, UserError
from colossus.job import Job

if TYPE_CHECKING:
    from colossus.trainer.hooks import Hook

KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (UserError, MachineError)}


class RankFailed(RuntimeError):
    """A rank raised what is neither the user's nor the machine's: a bug, with its traceback."""


@dataclass(frozen=True)
class Work:
    """What a rank is to do. pickled: job, folder and hooks; it is read when modules are found as the parent
    finds them. python_path: the variable of that name that the user has set."""

    pickled: bytes
    python_path: str | None

    @classmethod
    def of(cls, job: Job, folder: Path, hooks: Sequence[Hook]) -> Work:
        """Hooks go by value where their code is in a script or a notebook, else by the name of their module.

        Raises:
            UserError: a hook cannot be sent; it and what of it cannot are named.
        """
        return cls(_pickled((job, folder, list(hooks)), hooks), os.environ.get("PYTHONPATH"))


def check_hooks(hooks: Sequence[Hook]) -> None:
    """Raises `UserError` where one of them cannot be sent to a rank."""
    _pickled(hooks, hooks)


def _pickled(value: object, hooks: Sequence[Hook]) -> bytes:
    import cloudpickle

    try:
        return cloudpickle.dumps(value)
    except Exception as error:  # of any kind: what is pickled may have code of its own for that
        raise UserError(
            f"hooks: {_culprit(hooks)} cannot be sent to other processes ({_first_line(error)}); make it in "
            "on_start, or name the hook in run.hooks as package.module:Name"
        ) from error


def _culprit(hooks: Sequence[Hook]) -> str:
    import cloudpickle

    def goes(value: object) -> bool:
        with contextlib.suppress(Exception):
            cloudpickle.dumps(value)
            return True
        return False

    for hook in hooks:
        if not goes(hook):
            parts = (name for name, value in getattr(hook, "__dict__", {}).items() if not goes(value))
            return ".".join([type(hook).__name__, *list(parts)[:1]])
    return "what they share"


@dataclass(frozen=True)
class Failure:
    """Why a rank has failed. text: empty where another rank tells. follows: because others had gone, or it
    was told to end. died: it could say nothing itself."""

    kind: str
    text: str
    follows: bool = False
    died: bool = False

    @classmethod
    def of(cls, error: Exception, rank: int) -> Failure:
        from colossus.parallel.ending import LostPeer

        for name, kind in KINDS.items():
            if isinstance(error, kind):
                text = "" if getattr(error, "told", False) else str(error)
                return cls(name, text, follows=isinstance(error, LostPeer))
        return cls(RankFailed.__name__, f"rank {rank} failed:\n{traceback.format_exc()}")

    def as_error(self) -> Exception:
        return KINDS.get(self.kind, RankFailed)(self.text)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
