"""Errors that should not happen, injected into each step of a pool: no call and no stop hangs."""

from __future__ import annotations

import asyncio
import logging
import operator
import os
import sys
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._eventloop.guarded_loop import GuardedLoop
from async_batcher._pool import driver
from async_batcher._pool.state import worker_events
from async_batcher._pool.state.assignment import Assignment
from async_batcher._pool.state.pool_state import PoolState
from async_batcher._pool.state.supervisor import Supervisor
from async_batcher._pool.state.time_limits import TimeLimits
from async_batcher._pool.state.worker_events import WorkerEvents
from async_batcher._pool.worker_handle import WorkerHandle
from async_batcher._transport import channel, framing
from async_batcher.exceptions import (
    BatcherStoppedError,
    BatchTimeoutError,
    PoolBrokenError,
    WorkerDiedError,
)
from tests.support import worker_functions as work
from tests.support import yielding_functions as functions
from tests.support.polling import wait_until
from tests.support.worker_pools import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from async_batcher.decorator import BatchedFunction

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="no event loop there watches sockets"
)

ITEMS = 10  # of each batch whose results are yielded
MAX_ROUNDS = 8  # more than any step needs to be taken four times

# The modules with callbacks that are the same with each start method.
OF_ANY_METHOD = ("_eventloop.changes", "_pool.replies", "_transport")

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


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less for the exit of a worker whose channel has ended, and longer for more results."""
    monkeypatch.setattr(worker_events, "_EOF_TO_EXIT_TIMEOUT", 0.05)
    monkeypatch.setattr(channel, "PAUSE_SECONDS", 0.01)  # so that slow workers cause pauses


STOP_STEPS = [
    (WorkerEvents, "exited", (False, True)),
    (Assignment, "reconcile", (False, True)),
    (Supervisor, "stop", (False,)),
    (Supervisor, "kill", (True,)),
    (Supervisor, "on_exit", (False, True)),
    (PoolState, "shut_down", (False, True)),
    (WorkerHandle, "stop", (False,)),
    (WorkerHandle, "kill", (True,)),
    (WorkerHandle, "close", (False, True)),
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


async def use(pool: WorkerPool, raised: Sequence[int] = (1,)) -> list[Any]:
    """Use a pool in many ways, again until an error was raised, and stop it.

    Nothing takes forever, and every call gets its result, its own error, or the injected one.
    """
    outcomes: list[Any] = []
    batcher = batched(functions.slowly, executor=pool, max_batch_size=ITEMS, max_queue_time=0)
    async with asyncio.timeout(60):
        await outcome_of(pool.start())
        for _ in range(MAX_ROUNDS):
            outcomes += await a_round(pool, batcher)
            if raised:
                break
        later = [await outcome_of(pool.run(operator.neg, 7)) for _ in range(2)]
        assert -7 in later, "at most one of them failed"
        await batcher.stop()
        await pool.stop()
    assert not pool.workers()
    return [*outcomes, *later]


async def a_round(pool: WorkerPool, batcher: BatchedFunction[int, int]) -> list[Any]:
    """Make calls that end in all ways, and check what each gets."""
    large = b"x" * 3_000_000
    calls = [
        (pool.run(operator.neg, 1), -1),
        (pool.run(os._exit, 3), WorkerDiedError),
        (pool.run(work.close_channel), WorkerDiedError),
        (pool.run(time.sleep, 600, timeout=0.05), BatchTimeoutError),
        (pool.run(operator.truediv, 1, 0), ZeroDivisionError),
        (pool.run(operator.add, large, large), 2 * large),
        *((pool.run(operator.neg, number), -number) for number in range(2, 6)),
        *((batcher(item), item) for item in range(ITEMS)),  # whose results are yielded
    ]
    outcomes = await asyncio.gather(*(outcome_of(call) for call, _ in calls))
    for outcome, (_, expected) in zip(outcomes, calls, strict=True):
        if isinstance(outcome, PoolBrokenError):
            assert "internal error" in str(outcome)
            assert str(outcome.__cause__) == "injected"
            assert "The last events" in outcome.__notes__[0]
        elif isinstance(expected, type):
            assert isinstance(outcome, expected) or str(outcome) == "injected"
        else:
            assert outcome == expected or str(outcome) == "injected"
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
    outcomes = await use(WorkerPool(2), raised)
    assert raised
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


class Callbacks:
    """The callbacks that pools put on the loop, by their names; one may raise in its turn.

    Attributes:
        counts: How often each has been called.
        failing: The name of the one that is to raise once; empty: any of them.
        after: How often it is called before.
        raised: A list that is empty until it has raised.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arm(None)
        guard = GuardedLoop.guard

        def guard_counted(loop: GuardedLoop, callback: Callable[..., Any]) -> Callable[..., None]:
            name = f"{callback.__module__}.{getattr(callback, '__qualname__', '')}"

            def instead(*args: Any) -> None:
                count = self.counts.total() if self.failing == "" else self.counts[name]
                self.counts[name] += 1
                if self.failing in ("", name) and count >= self.after and not self.raised:
                    self.raised.append(count)
                    msg = "injected"
                    raise RuntimeError(msg)
                callback(*args)

            return guard(loop, instead)

        monkeypatch.setattr(GuardedLoop, "guard", guard_counted)

    def arm(self, failing: str | None, after: int = 0) -> None:
        """Have the callbacks of a name raise once, after some calls; None: nothing raises."""
        self.counts: Counter[str] = Counter()
        self.failing = failing
        self.after = after
        self.raised: list[int] = []


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
async def test_an_error_in_any_callback_of_the_loop_ends_every_call(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """One callback raises instead of what it should do: each that the pool puts on the loop."""
    caplog.set_level(logging.CRITICAL, "async_batcher")
    monkeypatch.setattr(driver, "_CLOSE_TIMEOUT", 0.5)
    callbacks = Callbacks(monkeypatch)
    counts: Counter[str] = Counter()
    needed = {"_watch", "_pass_on", "_check"}  # the first one only if results come close together
    for _ in range(MAX_ROUNDS):
        callbacks.arm(None)
        await use(WorkerPool(2, mp_context=method))
        counts |= callbacks.counts
        if needed <= {name.rpartition(".")[2] for name in counts}:
            break
    assert needed <= {name.rpartition(".")[2] for name in counts}
    assert "internal error" not in caplog.text
    counts = Counter({name.removeprefix("async_batcher."): n for name, n in counts.items()})
    is_first = method == METHODS[0]
    for after in (0, 2) if is_first else (0,):
        for name in [name for name, count in counts.items() if count > after]:
            if is_first or not name.startswith(OF_ANY_METHOD):
                callbacks.arm(f"async_batcher.{name}", after)
                await use(WorkerPool(2, mp_context=method), callbacks.raised)
                assert callbacks.raised, name
                assert "internal error" in caplog.text
                caplog.clear()  # a traceback may hold a block of shared memory


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("method", METHODS)
async def test_an_error_in_any_callback_of_a_stop(
    method: str,
    force: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The stop ends, and the call that has not ended gets an outcome."""
    caplog.set_level(logging.CRITICAL, "async_batcher")
    monkeypatch.setattr(driver, "_CLOSE_TIMEOUT", 0.5)
    callbacks = Callbacks(monkeypatch)
    after = 0
    while after == 0 or callbacks.raised:  # until there is none left
        caplog.clear()
        callbacks.arm(None)
        arm = partial(callbacks.arm, "", after)
        folder = tmp_path_factory.mktemp("calls")
        await stop_while_it_runs(folder, arm, force=force, method=method)
        assert ("internal error" in caplog.text) == bool(callbacks.raised)
        after += 1
    assert after > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "force"),
    [(owner, name, force) for owner, name, forces in STOP_STEPS for force in forces],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
async def test_an_error_in_any_step_of_a_stop(
    owner: type,
    name: str,
    force: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
    tmp_path: Path,
) -> None:
    """The stop ends, and the call that has not ended gets an outcome."""
    caplog.set_level(logging.CRITICAL, "async_batcher")
    raised: list[int] = []

    def arm() -> None:
        nonlocal raised
        raised = fail_once(monkeypatch, owner, name, 0)

    await stop_while_it_runs(tmp_path, arm, force=force)
    assert raised
    assert "internal error" in caplog.text


async def stop_while_it_runs(
    folder: Path, arm: Callable[[], None], *, force: bool, method: str | None = None
) -> None:
    """Stop a pool of two workers, one of which is idle, after ``arm``."""
    pool = WorkerPool(2, mp_context=method)
    async with asyncio.timeout(60):
        await pool.start()
        call = asyncio.ensure_future(outcome_of(pool.run(work.note_pid_and_wait, folder, [0])))
        await wait_until(lambda: work.noted(folder, "pid"))
        arm()
        if not force:
            (folder / "go").touch()
        await pool.stop(force=force)
        outcome = await call
    assert not pool.workers()
    if not isinstance(outcome, PoolBrokenError):
        assert isinstance(outcome, BatcherStoppedError) if force else outcome == [0]
