"""What `process` awaits, a future or a `FastFuture`: each task gets its own outcome."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher
from async_batcher._batching.delivery import Delivery
from async_batcher._batching.records.recorder import StatsRecorder
from async_batcher._eventloop.future import (
    FastFuture,
    Waker,
    _wakers,
    future_factory,
    resolve,
    waker_of,
)
from tests.support.polling import turn
from tests.support.virtual_clock import VirtualLoop
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop


class Gated(AsyncBatcher[Any, Any]):
    """Runs batches of three when the gate is open; each item is its own result."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"max_batch_size": 3, "max_queue_time": 1000.0, **options})
        self.gate = asyncio.Event()
        self.at_the_end: Callable[[], object] = bool
        self.batches: list[list[Any]] = []

    async def process_batch(self, batch: list[Any]) -> list[Any]:
        """Wait at the gate; ``at_the_end`` is called before a caller is woken."""
        self.batches.append(batch)
        await self.gate.wait()
        asyncio.get_running_loop().call_soon(self.at_the_end)
        return batch

    def ask(self, *items: Any) -> list[asyncio.Task[Any]]:
        """Start a task for each item."""
        return [asyncio.create_task(self.process(item)) for item in items]


async def outcomes(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    """Return results and exceptions; a hang is a failure."""
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), DEADLINE)


# ---- a signal


class Interrupted(asyncio.Future[Any]):
    """A future that a signal handler cancels between `done` and `set_result`."""

    def done(self) -> bool:
        """Return False, then cancel."""
        is_done = super().done()
        self.cancel()
        return is_done


@pytest.mark.parametrize(
    "outcome", [["mine", "yours"], [KeyError("mine"), "yours"], KeyError("of all")]
)
async def test_future_cancelled_between_done_and_set_result(outcome: Any) -> None:
    """It stays cancelled, and the other caller of its batch gets a result."""
    recorder = StatsRecorder()
    mine, yours = Interrupted(), asyncio.get_running_loop().create_future()
    delivery = Delivery(recorder, lambda _: None)
    deliver: Any = delivery.deliver if isinstance(outcome, list) else delivery.fail
    failed = deliver([mine, yours], outcome)
    assert mine.cancelled()
    if isinstance(outcome, list):
        assert yours.result() == "yours"
        assert (failed, recorder.done) == (0, 1)
    else:
        assert str(yours.exception()) == str(outcome)
        assert (failed, recorder.done) == (1, 0)


async def test_pool_call_cancelled_between_done_and_set_result() -> None:
    """It stays cancelled, and the pool goes on."""
    future = Interrupted()
    resolve(future, "its result")
    assert future.cancelled()


# ---- which kind


async def test_future_factory_fits_the_loop() -> None:
    """`FastFuture` on asyncio's own loop, plain futures on others."""
    loop = asyncio.get_running_loop()
    own = isinstance(loop, asyncio.BaseEventLoop)
    assert type(future_factory(loop)()) is (FastFuture if own else asyncio.Future)
    loop.set_debug(True)
    assert type(future_factory(loop)()) is asyncio.Future


def test_loop_that_overrides_call_soon_gets_plain_futures() -> None:
    """A loop that overrides `call_soon` gets plain futures."""

    class Counting(asyncio.SelectorEventLoop):
        def call_soon(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().call_soon(*args, **kwargs)

    loop = Counting()
    assert type(future_factory(loop)()) is asyncio.Future
    loop.close()


@pytest.mark.virtual_clock
async def test_one_callback_wakes_a_batch() -> None:
    """One callback of the loop wakes all callers, in order, and leaves no handle."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    new_future = future_factory(loop)
    order: list[int] = []

    async def wait(future: Any) -> None:
        order.append(await future)

    pending = [new_future() for _ in range(100)]
    tasks = [asyncio.create_task(wait(future)) for future in pending]
    await turn(1)
    before = len(loop._ready)  # type: ignore[attr-defined]
    for number, future in enumerate(pending):
        future.set_result(number)
    assert len(loop._ready) == before + 1  # type: ignore[attr-defined]
    assert order == [], "no task goes on inside the call that resolves"
    await asyncio.gather(*tasks)
    assert order == list(range(100))
    await turn(1)
    assert [handle for handle in loop._ready if not handle.cancelled()] == []  # type: ignore[attr-defined]


@every_loop
async def test_tasks_resume_in_their_own_context() -> None:
    """A task's context variables survive its wait, and no other task sees them."""
    batcher = Gated()
    name: contextvars.ContextVar[int] = contextvars.ContextVar("name")

    async def client(item: int) -> list[int]:
        name.set(item)
        await batcher.process(item)
        before = name.get()
        name.set(item + 10)
        await turn(1)
        return [before, name.get()]

    batcher.gate.set()
    assert await outcomes([asyncio.create_task(client(item)) for item in range(3)]) == [
        [0, 10],
        [1, 11],
        [2, 12],
    ]
    await batcher.stop()


# ---- cancelled


@every_loop
async def test_cancelled_while_queued() -> None:
    """Its message arrives, its item is not run, and the other callers get results."""
    batcher = Gated()
    first, second = batcher.ask(0, 1)
    await turn(1)
    first.cancel("tired of waiting")
    with pytest.raises(asyncio.CancelledError, match="tired of waiting"):
        await first
    others = batcher.ask(2, 3)
    batcher.gate.set()
    assert await outcomes([second, *others]) == [1, 2, 3]
    assert batcher.batches == [[1, 2, 3]]
    await batcher.stop()


@every_loop
async def test_cancelled_while_running() -> None:
    """The other callers of the batch get their results."""
    batcher = Gated()
    tasks = batcher.ask(0, 1, 2)
    await turn(2)
    assert batcher.batches == [[0, 1, 2]]
    tasks[1].cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await tasks[1]
    batcher.gate.set()
    assert await outcomes([tasks[0], tasks[2]]) == [0, 2]
    await batcher.stop()


@every_loop
@pytest.mark.parametrize("item", [1, ValueError("not delivered")])
async def test_cancelled_after_its_batch_ended(item: Any) -> None:
    """A task that is cancelled after its batch ended, but before it went on, is cancelled."""
    batcher = Gated()
    tasks = batcher.ask(0, item, 2)
    batcher.at_the_end = lambda: tasks[1].cancel("at the last moment")
    await turn(2)
    batcher.gate.set()
    with pytest.raises(asyncio.CancelledError, match="at the last moment"):
        await tasks[1]
    assert await outcomes([tasks[0], tasks[2]]) == [0, 2]
    await batcher.stop()


@every_loop
async def test_cancelled_twice_and_uncancelled() -> None:
    """A task that catches its cancellation may call `process` again."""
    batcher = Gated()

    async def stubborn() -> Any:
        try:
            return await batcher.process("first")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            return await batcher.process("second")

    task = asyncio.create_task(stubborn())
    await turn(1)
    task.cancel()
    task.cancel()
    await turn(1)
    others = batcher.ask(1, 2)
    batcher.gate.set()
    assert await outcomes([task, *others]) == ["second", 1, 2]
    await batcher.stop()


@every_loop
async def test_asyncio_wait_primitives_around_process() -> None:
    """wait_for, timeout, shield, gather and TaskGroup work around `process`."""
    batcher = Gated(max_batch_size=4)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.process("wait_for"), 0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await batcher.process("timeout")
    inner = asyncio.create_task(batcher.process("shielded"))
    outer = asyncio.ensure_future(asyncio.shield(inner))
    await turn(1)
    outer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await outer
    batcher.gate.set()
    async with asyncio.TaskGroup() as group:
        grouped = group.create_task(batcher.process("grouped"))
        with pytest.raises(ValueError, match="no"):
            await asyncio.gather(batcher.process("gathered"), batcher.process(ValueError("no")))
        assert [await grouped, await inner] == ["grouped", "shielded"]
    await batcher.stop()


# ---- a task that does what it should not


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("debug", [False, True])
def test_task_that_raises_keyboard_interrupt(signal: type[BaseException], debug: bool) -> None:
    """The exception leaves the loop; the other callers go on when the loop does."""
    went_on = []

    async def client(batcher: Gated, item: int) -> None:
        went_on.append(await batcher.process(item))
        if item == 1:
            raise signal

    async def main() -> tuple[Gated, list[asyncio.Task[None]]]:
        batcher = Gated()
        batcher.gate.set()
        return batcher, [asyncio.create_task(client(batcher, item)) for item in range(3)]

    loop = asyncio.new_event_loop()
    loop.set_debug(debug)
    batcher, tasks = loop.run_until_complete(main())
    with pytest.raises(signal):
        loop.run_forever()
    assert went_on == [0, 1]
    loop.run_until_complete(asyncio.wait(tasks))
    assert went_on == [0, 1, 2]
    assert isinstance(tasks[1].exception(), signal)
    loop.run_until_complete(batcher.stop())
    loop.close()


async def test_task_that_runs_the_loop_inside_itself() -> None:
    """As in notebooks with a patched loop: the other callers go on meanwhile."""
    loop: Any = asyncio.get_running_loop()
    if not isinstance(loop, asyncio.BaseEventLoop):
        pytest.skip("a loop in C cannot be run inside itself")
    batcher = Gated()

    async def nesting() -> list[bool]:
        await batcher.process(0)
        task = asyncio.current_task()
        assert task is not None
        asyncio.tasks._leave_task(loop, task)
        while not all(other.done() for other in others):
            loop._run_once()  # type: ignore[attr-defined]
        asyncio.tasks._enter_task(loop, task)
        return [other.done() for other in others]

    task = asyncio.create_task(nesting())
    others = batcher.ask(1, 2)
    batcher.gate.set()
    assert await task == [True, True]
    assert await outcomes(others) == [1, 2]
    await batcher.stop()


@pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="asyncio.current_task does not support such a task"
)
async def test_pure_python_task() -> None:
    """A pure-Python task of asyncio gets results, exceptions and cancellations too."""
    loop = asyncio.get_running_loop()
    python_task: Any = asyncio.tasks._PyTask  # type: ignore[attr-defined]
    loop.set_task_factory(lambda loop, coro, **options: python_task(coro, loop=loop, **options))
    batcher = Gated()
    tasks = batcher.ask(0, ValueError("no"), 2)
    await turn(2)
    tasks[2].cancel()
    batcher.gate.set()
    result, error, cancelled = await outcomes(tasks)
    assert result == 0
    assert isinstance(error, ValueError)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert type(tasks[0]) is python_task
    await batcher.stop()
    loop.set_task_factory(None)


# ---- no task at all


@every_loop
async def test_closed_coroutine_leaves_the_queue() -> None:
    """Its item leaves the queue, as when a task is cancelled."""
    batcher = Gated()
    coro: Any = batcher.process("closed")
    assert asyncio.isfuture(coro.send(None))
    coro.close()
    batcher.gate.set()
    assert await outcomes(batcher.ask(0, 1, 2)) == [0, 1, 2]
    assert batcher.batches == [[0, 1, 2]]
    await batcher.stop()


@every_loop
async def test_coroutine_driven_on_too_early() -> None:
    """Driving the coroutine on without waiting is an error."""
    batcher = Gated()
    coro: Any = batcher.process("early")
    coro.send(None)
    with pytest.raises(RuntimeError):
        coro.send(None)
    await batcher.stop(force=True)


@every_loop
async def test_coroutine_driven_by_hand() -> None:
    """Callbacks of the driver and of its task are both called, in their contexts."""
    batcher = Gated()
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="default")
    called: list[str] = []

    class Driven:
        def __await__(self) -> Any:
            coro: Any = batcher.process("driven")
            future = coro.send(None)
            context = contextvars.copy_context()
            context.run(name.set, "the driver's")
            future.add_done_callback(lambda _: called.append(name.get()), context=context)
            future.add_done_callback(lambda _: called.append(name.get()))
            yield future
            assert future.done()
            with pytest.raises(StopIteration) as ended:
                coro.send(None)
            future.add_done_callback(lambda _: called.append("late"))
            return ended.value.value

    async def drive() -> Any:
        name.set("the task's")
        result = await Driven()
        assert name.get() == "the task's"
        return result

    task = asyncio.create_task(drive())
    others = batcher.ask(1, 2)
    batcher.gate.set()
    assert await outcomes([task, *others]) == ["driven", 1, 2]
    await turn(1)
    assert called == ["the driver's", "the task's", "late"]
    await batcher.stop()


async def test_callback_that_raises_stops_no_other() -> None:
    """The loop's exception handler is called, and so are the other callbacks."""
    loop = asyncio.get_running_loop()
    waker = Waker(loop)
    errors: list[Any] = []
    loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
    called: list[Any] = []
    error = ValueError("in a callback")

    def fail(_: FastFuture) -> None:
        raise error

    pending = [FastFuture(waker) for _ in range(3)]
    for future, callback in zip(pending, (called.append, fail, called.append), strict=True):
        future.add_done_callback(callback)
    pending[1].add_done_callback(called.append)
    for future in pending:
        future.set_result(None)
    await turn(2)
    assert errors == [error]
    assert called == pending


# ---- going on at once


def resolve_at_once(waker: Waker, future: Any) -> None:
    """Set a result, and wake the task before this returns."""
    waker.is_held = True
    future.set_result(None)
    waker.release()


async def test_release_wakes_at_once() -> None:
    """At once in a callback of the loop; otherwise in the next iteration."""
    loop = asyncio.get_running_loop()
    waker = Waker(loop)
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    order: list[Any] = []

    async def wait(future: Any, number: int) -> None:
        variable.set(number)
        order.append((await future, variable.get(), asyncio.current_task() is tasks[number]))

    pending: list[Any] = [FastFuture(waker) for _ in range(4)]
    tasks = [asyncio.create_task(wait(future, number)) for number, future in enumerate(pending)]
    await turn(1)
    waker.is_held = True
    pending[0].set_result("in a task")
    waker.release()
    assert order == []
    await turn(1)
    assert order == [("in a task", 0, True)]

    def resolve_two() -> None:
        waker.is_held = True
        for future in pending[1:3]:
            future.set_result("in a callback")
            future.set_result("once more")
        order.append("resolved")
        waker.release()
        order.append("released")

    loop.call_soon(resolve_two)
    await turn(1)
    woken = [("in a callback", number, True) for number in (1, 2)]
    assert order[1:] == ["resolved", *woken, "released"]
    early = FastFuture(waker)
    loop.call_soon(resolve, early, "before it waits")
    await turn(1)
    assert await early == "before it waits"
    tasks[3].cancel()
    assert isinstance((await outcomes(tasks))[3], asyncio.CancelledError)


async def test_what_was_resolved_before_is_woken_first() -> None:
    """What waits for the loop is woken with what `Waker.release` wakes, in order."""
    loop = asyncio.get_running_loop()
    waker = Waker(loop)
    order: list[int] = []

    async def wait(future: Any) -> None:
        order.append(await future)

    pending = [FastFuture(waker) for _ in range(3)]
    tasks = [asyncio.create_task(wait(future)) for future in pending]
    await turn(1)

    def resolve_all() -> None:
        pending[0].set_result(0)
        waker.is_held = True
        pending[1].set_result(1)
        pending[2].set_result(2)
        waker.release()
        assert order == [0, 1, 2]

    loop.call_soon(resolve_all)
    await asyncio.gather(*tasks)
    await turn(2)
    assert order == [0, 1, 2]


def test_a_waker_does_not_keep_its_loop() -> None:
    """A loop that nothing refers to is freed, with its waker."""
    loop = asyncio.new_event_loop()
    waker = waker_of(loop)
    assert waker is not None
    assert waker_of(loop) is waker
    loop.close()
    is_there = weakref.ref(loop)
    del loop
    gc.collect()
    assert is_there() is None
    assert waker not in _wakers.values()


async def test_future_cancelled_by_a_signal_stays_cancelled() -> None:
    """A signal handler may cancel the task between `done` and `set_result`."""
    waker = Waker(asyncio.get_running_loop())

    async def wait(future: Any) -> Any:
        return await future

    resolvers: list[Callable[[Any], object]] = [
        lambda future: future.set_result(1),
        lambda future: future.set_exception(ZeroDivisionError()),
        lambda future: asyncio.get_running_loop().call_soon(resolve_at_once, waker, future),
    ]
    for resolver in resolvers:
        future = FastFuture(waker)
        task = asyncio.create_task(wait(future))
        await turn(1)
        assert not future.done()
        task.cancel()
        resolver(future)
        assert [type(error) for error in await outcomes([task])] == [asyncio.CancelledError]
        assert future.cancelled()


async def test_failed_callers_are_freed_by_reference_counting() -> None:
    """A caller that failed or was cancelled is freed by reference counting."""
    waker = Waker(asyncio.get_running_loop())

    class Thing:
        pass

    async def wait(future: Any, thing: Thing) -> None:
        await future
        raise ZeroDivisionError(str(thing))

    gc.disable()
    try:
        for way in ("cancel", "resolve"):
            future, thing = FastFuture(waker), Thing()
            is_there = weakref.ref(thing)
            task = asyncio.create_task(wait(future, thing))
            await turn(1)
            if way == "cancel":
                task.cancel()
            else:
                asyncio.get_running_loop().call_soon(resolve_at_once, waker, future)
            await turn(2)
            assert task.done()
            assert task.cancelled() or task.exception() is not None
            del task, future, thing
            await turn(1)
            assert is_there() is None, way
    finally:
        gc.enable()


def test_loop_that_closes_while_tasks_wait() -> None:
    """Tasks and batcher are freed; only asyncio's own warning is logged."""
    errors: list[str] = []

    async def main() -> None:
        batcher = Gated()
        tasks.extend(batcher.ask(0, 1, 2, 3))
        await turn(2)

    tasks: list[asyncio.Task[Any]] = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: errors.append(context["message"]))
    loop.run_until_complete(main())
    loop.close()
    tasks.clear()
    gc.collect()
    assert set(errors) == {"Task was destroyed but it is pending!"}
