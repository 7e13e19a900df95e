"""The hooks of every run, in their order: they start in it, act in it, and finish in the reverse."""

from __future__ import annotations

from colossus.trainer.hooks import Hook
from colossus.trainer.hooks.guard import Guard
from colossus.trainer.hooks.log import Log
from colossus.trainer.hooks.sample import Sample
from colossus.trainer.hooks.save import Save
from colossus.trainer.hooks.stop import StopOnSignal
from colossus.trainer.hooks.validate import Validate


def default_hooks() -> list[Hook]:
    """At the end: save, validate, write a sample and the end of the log, give the signals back."""
    return [StopOnSignal(), Log(), Guard(), Sample(), Validate(), Save()]
