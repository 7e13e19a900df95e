"""A program that does not run on tensors without numbers: which module asked which operator for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from colossus.errors import UserError

WHY = {
    DataDependentOutputException: "gives a number that depends on values",
    DynamicOutputShapeException: "gives a shape that depends on values",
    UnsupportedOperatorException: "has no rule for shapes alone (torch.library.register_fake)",
}


Refusal = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


@contextmanager
def refusals(model: nn.Module) -> Iterator[None]:
    """Raises UserError, naming module and operator, where something within needs numbers."""
    try:
        yield
    except Refusal as error:
        where = _where(error.__traceback__, model)
        if isinstance(error, UnsupportedFakeTensorException):
            what = error.reason
        else:
            what = f"{error.func} {WHY[type(error)]}"
        raise UserError(
            f"dryrun: {where} cannot run on tensors without numbers: {what}; a dry run needs every shape to "
            "follow from shapes alone"
        ) from error


def _where(traceback: TracebackType | None, model: nn.Module) -> str:
    """The innermost module that was at work, by its name in the model and its type."""
    names, found = {id(module): name for name, module in model.named_modules()}, None
    while traceback is not None:
        this = traceback.tb_frame.f_locals.get("self")
        if isinstance(this, nn.Module) and id(this) in names:
            found = this
        traceback = traceback.tb_next
    if found is None:
        return "the backward pass or the update"
    return f"{names[id(found)] or 'the model'} ({type(found).__name__})"
