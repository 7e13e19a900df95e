"""Text from a model: key/value cache, sampling that repeats, streaming."""

from __future__ import annotations

from colossus.generation.generate import generate, stream
from colossus.generation.load import load_model

__all__ = ["generate", "load_model", "stream"]
