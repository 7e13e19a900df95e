"""One pool of ranks, and workers of dry runs, for all tests of this room in a process of pytest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dryrun.workers import kept_workers
from tests.ranks.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with Pool() as made:
        yield made


@pytest.fixture(scope="session", autouse=True)
def workers() -> Iterator[None]:
    with kept_workers():
        yield
