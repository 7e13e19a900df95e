"""One decoder for every family, its parts, and its initial values."""

from __future__ import annotations

from colossus.models.build import build
from colossus.models.cache import KVCache
from colossus.models.decoder import Decoder
from colossus.models.init import initialise

__all__ = ["Decoder", "KVCache", "build", "initialise"]
