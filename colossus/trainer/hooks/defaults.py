"""The hooks of every run, in their order: they start in it, act in it, and finish in the reverse."""

from __future__ import annotations

from collections.abc import Sequence

from colossus import named
from colossus.errors import UserError
from colossus.job import Job
from colossus.trainer.hooks import Hook
from colossus.trainer.hooks.collect import Collect
from colossus.trainer.hooks.compile import Compile
from colossus.trainer.hooks.guard import Guard
from colossus.trainer.hooks.log import Log
from colossus.trainer.hooks.sample import Sample
from colossus.trainer.hooks.save import Save
from colossus.trainer.hooks.stop import StopOnSignal
from colossus.trainer.hooks.validate import Validate


def with_defaults(job: Job, hooks: Sequence[Hook]) -> list[Hook]:
    """The user's hooks among those of every run. At the end: save, validate, write a sample; then the user's
    hooks, which find all of that done; then the end of the log."""
    named_hooks = [_made(name) for name in job.run.hooks]
    own = [StopOnSignal(), Collect(), Compile(), Log(), Guard()]
    return [*own, *named_hooks, *hooks, Sample(), Validate(), Save()]


def _made(name: str) -> Hook:
    """The hook that a job names: what `name` gives when it is called without arguments."""
    hook = named.find("run.hooks", name)()
    if not isinstance(hook, Hook):
        kind = type(hook).__name__
        raise UserError(f"run.hooks={name}: gives a {kind}; must give a colossus.trainer.hooks.Hook")
    return hook
