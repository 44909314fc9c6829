"""A pool for tests, and the check that every deadline of a pool has a timer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool
from async_batcher._pool.driver import WorkerDriver
from async_batcher._pool.state.assignment import Assignment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    """Two workers, with the default start method."""
    async with WorkerPool(2) as two:
        yield two


@pytest.fixture(autouse=True)
def _deadlines_have_timers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check, after each event that sets a deadline, that the loop's timer is set."""
    drivers: dict[Assignment, WorkerDriver] = {}
    late: list[str] = []
    make = WorkerDriver.__init__

    def make_known(driver: WorkerDriver, *args: Any) -> None:
        make(driver, *args)
        drivers[driver._assignment] = driver

    def check(assignment: Assignment) -> None:
        driver, due_at = drivers[assignment], assignment.wake_at
        deadlines = [worker.deadline for worker in driver._state.supervisor.workers]
        if not driver._state.supervisor.closing and driver._timer.due_at > min(
            due_at, *deadlines, driver._state.supervisor.retry_at
        ):
            late.append(repr(list(assignment.log)[-5:]))

    def checked(name: str) -> Callable[..., None]:
        original = getattr(Assignment, name)

        def instead(assignment: Assignment, *args: Any) -> None:
            original(assignment, *args)
            # Not in a model, nor where the loop has ended.
            if assignment in drivers and asyncio._get_running_loop() is not None:
                asyncio.get_running_loop().call_soon(check, assignment)  # when the event has ended

        return instead

    monkeypatch.setattr(WorkerDriver, "__init__", make_known)
    for name in ("limit", "update_wake_up"):
        monkeypatch.setattr(Assignment, name, checked(name))
    yield
    assert late == []
