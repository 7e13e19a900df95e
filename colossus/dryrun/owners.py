"""Whose memory it is: the modules of a program, said to the tracer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.nn.modules import module as hooks

from colossus.dryrun.tracer import Tracer, Use
from colossus.models.init import logical_name
from colossus.optim import Optimizer
from colossus.parallel.program import decoders

EVERY_LAYER = "layers.*"
ACTS = ("unshard", "wait_for_unshard", "post_backward")  # of FSDP, for the weights of one module


def owner_of(path: str) -> str:
    """A module's path as those of layers that are alike have it in common."""
    return re.sub(r"^layers\.\d+", EVERY_LAYER, logical_name(f"{path}.")[:-1])


def call_weights(tracer: Tracer, model: nn.Module) -> None:
    """Each weight is of its module."""
    for decoder in decoders(model):
        for name, weight in decoder.named_parameters():
            tracer.call([weight], Use("weights", owner_of(name.rpartition(".")[0])))


def call_state(tracer: Tracer, optimizer: Optimizer) -> None:
    """What an optimizer keeps of a weight is of that weight's module."""
    for (name, _), tensor in optimizer.named_state():
        tracer.call([tensor], Use("optimizer", owner_of(name.rpartition(".")[0])))


@contextmanager
def told(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Within this, modules say to the tracer when they are called, and FSDP for which it acts."""
    owners = {
        module: owner_of(path) for decoder in decoders(model) for path, module in decoder.named_modules()
    }
    before: list[str] = []

    def entered(module: nn.Module, _: Any) -> None:
        before.append(tracer.owner)
        tracer.owner = owners.get(module, tracer.owner)

    def left(*_: Any) -> None:
        tracer.owner = before.pop()

    with ExitStack() as stack:
        stack.callback(hooks.register_module_forward_pre_hook(entered).remove)
        stack.callback(hooks.register_module_forward_hook(left, always_call=True).remove)
        for name in ACTS:
            stack.enter_context(
                patch.object(FSDPParamGroup, name, _acts(tracer, getattr(FSDPParamGroup, name)))
            )
        yield


def _acts(tracer: Tracer, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def acts(group: Any, *args: Any, **kwargs: Any) -> Any:
        with tracer.owned(owner_of(group._module_fqn or "")):
            return method(group, *args, **kwargs)

    return acts
