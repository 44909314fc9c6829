"""Errors that should not happen, injected into each step of a pool: no call and no stop hangs."""

from __future__ import annotations

import asyncio
import logging
import operator
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool
from async_batcher._eventloop.guarded_loop import GuardedLoop
from async_batcher._pool import driver
from async_batcher._pool.state.assignment import Assignment
from async_batcher._pool.state.pool_state import PoolState
from async_batcher._pool.state.supervisor import Supervisor
from async_batcher._pool.state.time_limits import TimeLimits
from async_batcher._pool.state.worker_events import WorkerEvents
from async_batcher._pool.worker_handle import WorkerHandle
from async_batcher._transport import framing
from async_batcher.exceptions import BatchTimeoutError, PoolBrokenError, WorkerDiedError
from tests.support.worker_pools import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="no event loop there watches sockets"
)

STEPS = [
    (WorkerEvents, "ready"),
    (WorkerEvents, "finished"),
    (WorkerEvents, "reply_came"),
    (WorkerEvents, "reply_read"),
    (WorkerEvents, "exited"),
    (WorkerEvents, "channel_ended"),
    (TimeLimits, "tick"),
    (TimeLimits, "checked"),
    (Assignment, "reconcile"),
    (Assignment, "free"),
    (Assignment, "assign"),
    (Supervisor, "kill"),
    (Supervisor, "on_exit"),
    (Supervisor, "start_missing"),
    (PoolState, "submitted"),
    (WorkerHandle, "send"),
    (WorkerHandle, "kill"),
    (WorkerHandle, "close"),
]


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, after: int) -> list[int]:
    """Have a method raise once, after some calls; return a list that is empty until it has."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0
    raised: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after and not raised:
            raised.append(calls)
            msg = "injected"
            raise RuntimeError(msg)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return raised


async def outcome_of(call: Any) -> Any:
    """Return what a call returns or raises."""
    try:
        return await call
    except Exception as exc:  # noqa: BLE001 - of any kind
        return exc


async def use(pool: WorkerPool) -> list[Any]:
    """Use a pool in many ways, and stop it; nothing takes forever."""
    large = b"x" * 3_000_000
    calls = [
        pool.run(operator.neg, 1),
        pool.run(os._exit, 3),
        pool.run(time.sleep, 600, timeout=0.2),
        pool.run(operator.truediv, 1, 0),
        pool.run(operator.add, large, large),
        *(pool.run(operator.neg, number) for number in range(2, 6)),
    ]
    async with asyncio.timeout(60):
        await outcome_of(pool.start())
        outcomes = await asyncio.gather(*map(outcome_of, calls))
        later = [await outcome_of(pool.run(operator.neg, 7)) for _ in range(2)]
        assert -7 in later, "at most one of them failed"
        await pool.stop()
    assert not pool.workers()
    expected = [-1, WorkerDiedError, BatchTimeoutError, ZeroDivisionError, 2 * large]
    for outcome, wanted in zip(outcomes, [*expected, -2, -3, -4, -5], strict=True):
        if isinstance(outcome, PoolBrokenError):
            assert "internal error" in str(outcome)
            assert str(outcome.__cause__) == "injected"
            assert "The last events" in outcome.__notes__[0]
        elif isinstance(wanted, type):
            assert isinstance(outcome, wanted) or str(outcome) == "injected"
        else:
            assert outcome == wanted or str(outcome) == "injected"
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[f"{o.__name__}.{n}" for o, n in STEPS])
async def test_an_error_in_any_step_ends_every_call(
    owner: type, name: str, after: int, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Calls get results or errors, a later call works, the stop ends, and the error is logged."""
    caplog.set_level(logging.CRITICAL, "async_batcher")
    raised = fail_once(monkeypatch, owner, name, after)
    outcomes = await use(WorkerPool(2))
    if raised:
        is_logged = "internal error, please report it" in caplog.text
        assert is_logged or "injected" in map(str, outcomes)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
@pytest.mark.parametrize("name", ["_message", "FrameReader.buffer_updated"])
async def test_a_reply_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception]
) -> None:
    """Its call gets an error, and the pool goes on with another worker."""
    errors = [error("once")]
    *path, attribute = name.split(".")
    owner: Any = getattr(framing, path[0]) if path else framing
    original = getattr(owner, attribute)

    def fail_at_first(*args: Any) -> Any:
        if errors:
            raise errors.pop()
        return original(*args)

    async with WorkerPool(1) as pool:
        await pool.run(abs, -1)
        monkeypatch.setattr(owner, attribute, fail_at_first)
        assert isinstance(await outcome_of(pool.run(abs, -2)), MemoryError | PoolBrokenError)
        assert errors == []
        assert await pool.run(abs, -3) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
async def test_an_error_in_any_callback_of_the_loop_ends_every_call(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """One callback raises instead of what it should do: each that the pool puts on the loop."""
    caplog.set_level(logging.CRITICAL, "async_batcher")
    monkeypatch.setattr(driver, "_CLOSE_TIMEOUT", 0.5)
    guard = GuardedLoop.guard
    calls, failing = 0, 0

    def fail_in_turn(self: GuardedLoop, callback: Callable[..., object]) -> Callable[..., None]:
        def instead(*args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                msg = "injected"
                raise RuntimeError(msg)
            callback(*args)

        return guard(self, instead)

    monkeypatch.setattr(GuardedLoop, "guard", fail_in_turn)
    while calls >= failing:  # until there is none left
        calls, failing = 0, failing + 1
        caplog.clear()
        await use(WorkerPool(2, mp_context=method))
        assert ("internal error" in caplog.text) == (calls >= failing)
    assert failing > 5
