"""Forward passes outside training, without compiling."""

from __future__ import annotations

import contextlib
import sys
from contextlib import AbstractContextManager

import torch


def eagerly() -> AbstractContextManager[object]:
    """Runs compiled blocks as they were written: a graph without gradients would be compiled for every new
    shape, which costs more than a few forward passes win back. Free where nothing was ever compiled
    (merely loading the compiler takes a second)."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
