from __future__ import annotations

import pytest

from colossus.data import build


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards of small corpora."""
    monkeypatch.setattr(build, "SHARD_BYTES", 10_000)
