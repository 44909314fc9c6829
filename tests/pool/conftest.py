"""A pool for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from async_batcher import WorkerPool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    """Two workers, with the default start method."""
    async with WorkerPool(2) as two:
        yield two
