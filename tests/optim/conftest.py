"""One pool of ranks for all tests of this room in a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with Pool() as made:
        yield made
