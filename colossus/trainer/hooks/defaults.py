"""The hooks of every run, in their order: they start in it, act in it, and finish in the reverse."""

from __future__ import annotations

from collections.abc import Sequence

from colossus.trainer.hooks import Hook
from colossus.trainer.hooks.guard import Guard
from colossus.trainer.hooks.log import Log
from colossus.trainer.hooks.sample import Sample
from colossus.trainer.hooks.save import Save
from colossus.trainer.hooks.stop import StopOnSignal
from colossus.trainer.hooks.validate import Validate


def with_defaults(hooks: Sequence[Hook]) -> list[Hook]:
    """The user's hooks among those of every run. At the end: save, validate, write a sample; then the user's
    hooks, which find all of that done; then the end of the log."""
    return [StopOnSignal(), Log(), Guard(), *hooks, Sample(), Validate(), Save()]
