"""What a call of `process` waits on, a future or a `FastFuture`: whatever happens to one task, each gets what is its own."""

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
from async_batcher._batching.recorder import StatsRecorder
from async_batcher._eventloop.future import FastFuture, Waker, future_factory, resolve, resolve_and_resume
from tests.support.virtual_clock import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop


class Gated(AsyncBatcher[Any, Any]):
    """Takes three items at a time, and answers when the gate is open: each with itself, an exception as such."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"max_batch_size": 3, "max_queue_time": 1000.0, **options})
        self.gate = asyncio.Event()
        self.at_the_end: Callable[[], object] = bool
        self.batches: list[list[Any]] = []

    async def process_batch(self, batch: list[Any]) -> list[Any]:
        """Wait at the gate; what is called at the end comes before any caller is woken."""
        self.batches.append(batch)
        await self.gate.wait()
        asyncio.get_running_loop().call_soon(self.at_the_end)
        return batch

    def ask(self, *items: Any) -> list[asyncio.Task[Any]]:
        """A task for each item."""
        return [asyncio.create_task(self.process(item)) for item in items]


async def turn(count: int = 1) -> None:
    """Let the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


async def outcomes(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    """What became of them, exceptions among the results; a hang is a failure."""
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5.0)


# ---- a signal


class Interrupted(asyncio.Future[Any]):
    """A future that a signal's handler cancels between the question whether it is done and its result."""

    def done(self) -> bool:
        """It was not, when it was asked."""
        is_done = super().done()
        self.cancel()
        return is_done


@pytest.mark.parametrize("outcome", [["mine", "yours"], [KeyError("mine"), "yours"], KeyError("of all")])
async def test_a_future_that_is_cancelled_while_it_is_told(outcome: Any) -> None:
    """It stays cancelled, and its neighbour gets its own."""
    recorder = StatsRecorder()
    mine, yours = Interrupted(), asyncio.get_running_loop().create_future()
    failed = Delivery(recorder, lambda _: None).deliver_and_count([mine, yours], outcome)
    assert mine.cancelled()
    if isinstance(outcome, list):
        assert yours.result() == "yours"
        assert (failed, recorder.done) == (0, 1)
    else:
        assert str(yours.exception()) == str(outcome)
        assert (failed, recorder.done) == (1, 0)


async def test_a_call_of_a_pool_that_is_cancelled_while_it_is_told() -> None:
    """The same."""
    for tell in (resolve, resolve_and_resume):
        waiter = Interrupted()
        tell(waiter, "its result")
        assert waiter.cancelled()


# ---- which kind


async def test_the_kind_that_costs_least() -> None:
    """On asyncio's own loop waiters are woken together; where the loop's `call_soon` is not asyncio's, they are plain futures."""
    loop = asyncio.get_running_loop()
    own = isinstance(loop, asyncio.BaseEventLoop)
    assert type(future_factory(loop)()) is (FastFuture if own else asyncio.Future)
    loop.set_debug(True)
    assert type(future_factory(loop)()) is asyncio.Future


def test_a_loop_with_a_call_soon_of_its_own_gets_futures() -> None:
    """A subclass that has written `call_soon` anew may have made it cheap, or counts on it."""

    class Counting(asyncio.SelectorEventLoop):
        def call_soon(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().call_soon(*args, **kwargs)

    loop = Counting()
    assert type(future_factory(loop)()) is asyncio.Future
    loop.close()


@pytest.mark.virtual_clock
async def test_a_batch_is_woken_with_one_call_of_the_loop() -> None:
    """However many are in it, and though several end in one turn; they go on in order, and nothing is left in the loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    new_waiter = future_factory(loop)
    order: list[int] = []

    async def wait(waiter: Any) -> None:
        order.append(await waiter)

    pending = [new_waiter() for _ in range(100)]
    tasks = [asyncio.create_task(wait(waiter)) for waiter in pending]
    await turn()
    before = len(loop._ready)  # type: ignore[attr-defined]
    for number, waiter in enumerate(pending):
        waiter.set_result(number)
    assert len(loop._ready) == before + 1  # type: ignore[attr-defined]
    assert order == [], "nobody goes on inside the call that settles"
    await asyncio.gather(*tasks)
    assert order == list(range(100))
    await turn()
    assert [handle for handle in loop._ready if not handle.cancelled()] == []  # type: ignore[attr-defined]


@every_loop
async def test_each_goes_on_in_its_own_context() -> None:
    """What a task has set before it waited is set when it goes on, and the others do not see it."""
    batcher = Gated()
    name: contextvars.ContextVar[int] = contextvars.ContextVar("name")

    async def client(item: int) -> list[int]:
        name.set(item)
        await batcher.process(item)
        before = name.get()
        name.set(item + 10)
        await turn()
        return [before, name.get()]

    batcher.gate.set()
    assert await outcomes([asyncio.create_task(client(item)) for item in range(3)]) == [[0, 10], [1, 11], [2, 12]]
    await batcher.stop()


# ---- cancelled


@every_loop
async def test_cancelled_while_queued() -> None:
    """Its message arrives, its item is not run, and the others are not touched."""
    batcher = Gated()
    first, second = batcher.ask(0, 1)
    await turn()
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
    """The others get their answers; that it has left is not held against the batch."""
    batcher = Gated()
    tasks = batcher.ask(0, 1, 2)
    await turn(2)
    assert batcher.batches == [[0, 1, 2]]
    tasks[1].cancel("too late")
    with pytest.raises(asyncio.CancelledError, match="too late"):
        await tasks[1]
    batcher.gate.set()
    assert await outcomes([tasks[0], tasks[2]]) == [0, 2]
    await batcher.stop()


@every_loop
@pytest.mark.parametrize("answer", [1, ValueError("lost")])
async def test_cancelled_when_the_answer_is_there(answer: Any) -> None:
    """Between the end of its batch and its next step a task can still be cancelled; then the answer is lost with it."""
    batcher = Gated()
    tasks = batcher.ask(0, answer, 2)
    batcher.at_the_end = lambda: tasks[1].cancel("at the last moment")
    await turn(2)
    batcher.gate.set()
    with pytest.raises(asyncio.CancelledError, match="at the last moment"):
        await tasks[1]
    assert await outcomes([tasks[0], tasks[2]]) == [0, 2]
    await batcher.stop()


@every_loop
async def test_cancelled_twice_and_uncancelled() -> None:
    """A task that catches its cancellation may wait again, with another waiter."""
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
    await turn()
    task.cancel()
    task.cancel()
    await turn()
    others = batcher.ask(1, 2)
    batcher.gate.set()
    assert await outcomes([task, *others]) == ["second", 1, 2]
    await batcher.stop()


@every_loop
async def test_all_that_waits_in_asyncio() -> None:
    """wait_for, timeout, shield, gather and TaskGroup around `process` do what they do around any coroutine."""
    batcher = Gated(max_batch_size=4)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.process("wait_for"), 0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await batcher.process("timeout")
    inner = asyncio.create_task(batcher.process("shielded"))
    outer = asyncio.ensure_future(asyncio.shield(inner))
    await turn()
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
def test_a_task_that_ends_the_program(signal: type[BaseException], debug: bool) -> None:  # noqa: FBT001
    """It comes out of the loop as ever; the others of the batch go on as soon as the loop does."""
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


async def test_a_task_that_runs_the_loop_inside_itself() -> None:
    """As patched loops let it (notebooks have such): the others of the batch go on meanwhile."""
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


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="asyncio.current_task does not know of such a task any more")
async def test_a_task_in_python() -> None:
    """The twin of asyncio's task in pure Python, which patched loops use, gets answers, exceptions and cancellations too."""
    loop = asyncio.get_running_loop()
    python_task: Any = asyncio.tasks._PyTask  # type: ignore[attr-defined]
    loop.set_task_factory(lambda loop, coro, **options: python_task(coro, loop=loop, **options))
    batcher = Gated()
    tasks = batcher.ask(0, ValueError("no"), 2)
    await turn(2)
    tasks[2].cancel()
    batcher.gate.set()
    answer, error, cancelled = await outcomes(tasks)
    assert answer == 0
    assert isinstance(error, ValueError)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert type(tasks[0]) is python_task
    await batcher.stop()
    loop.set_task_factory(None)


# ---- no task at all


@every_loop
async def test_a_coroutine_that_is_closed_by_hand() -> None:
    """Its item leaves the queue, as when a task is cancelled; what it waited on is a future to asyncio."""
    batcher = Gated()
    coro: Any = batcher.process("closed")
    assert asyncio.isfuture(coro.send(None))
    coro.close()
    batcher.gate.set()
    assert await outcomes(batcher.ask(0, 1, 2)) == [0, 1, 2]
    assert batcher.batches == [[0, 1, 2]]
    await batcher.stop()


@every_loop
async def test_a_coroutine_that_is_sent_on_too_early() -> None:
    """What drives it without waiting gets an error, not an answer that is not there."""
    batcher = Gated()
    coro: Any = batcher.process("early")
    coro.send(None)
    with pytest.raises(RuntimeError):
        coro.send(None)
    await batcher.stop(force=True)


@every_loop
async def test_a_coroutine_that_is_driven_by_hand() -> None:
    """What drives it may watch what it yields, and let a task wait for it: both hear of it, in the contexts they asked for."""
    batcher = Gated()
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody's")
    heard: list[str] = []

    class Driven:
        def __await__(self) -> Any:
            coro: Any = batcher.process("driven")
            future = coro.send(None)
            context = contextvars.copy_context()
            context.run(name.set, "the driver's")
            future.add_done_callback(lambda _: heard.append(name.get()), context=context)
            future.add_done_callback(lambda _: heard.append(name.get()))
            yield future
            assert future.done()
            with pytest.raises(StopIteration) as ended:
                coro.send(None)
            future.add_done_callback(lambda _: heard.append("late"))
            return ended.value.value

    async def drive() -> Any:
        name.set("the task's")
        answer = await Driven()
        assert name.get() == "the task's"
        return answer

    task = asyncio.create_task(drive())
    others = batcher.ask(1, 2)
    batcher.gate.set()
    assert await outcomes([task, *others]) == ["driven", 1, 2]
    await turn()
    assert heard == ["the driver's", "the task's", "late"]
    await batcher.stop()


async def test_a_callback_that_raises() -> None:
    """The loop's exception handler hears of it, and the rest are called."""
    loop = asyncio.get_running_loop()
    bell = Waker(loop)
    errors: list[Any] = []
    loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
    heard: list[Any] = []
    error = ValueError("in a callback")

    def fail(_: FastFuture) -> None:
        raise error

    pending = [FastFuture(bell) for _ in range(3)]
    for waiter, callback in zip(pending, (heard.append, fail, heard.append), strict=True):
        waiter.add_done_callback(callback)
    pending[1].add_done_callback(heard.append)
    for waiter in pending:
        waiter.set_result(None)
    await turn(2)
    assert errors == [error]
    assert heard == pending


# ---- going on at once


@every_loop
async def test_a_task_goes_on_where_it_is_answered() -> None:
    """In a callback of asyncio's own loop; where a task runs, and with a plain future, when the loop comes to it."""
    loop = asyncio.get_running_loop()
    new_waiter = future_factory(loop)
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    order: list[Any] = []

    async def wait(waiter: Any, number: int) -> None:
        variable.set(number)
        order.append((await waiter, variable.get(), asyncio.current_task() is tasks[number]))

    pending: list[Any] = [new_waiter() for _ in range(3)]
    tasks = [asyncio.create_task(wait(waiter, number)) for number, waiter in enumerate(pending)]
    await turn()
    resolve_and_resume(pending[0], "in a task")
    assert order == []
    await turn(2)
    assert order == [("in a task", 0, True)]

    def answer() -> None:
        resolve_and_resume(pending[1], "in a callback")
        resolve_and_resume(pending[1], "once more")
        resolve(pending[1], "once more")
        order.append("answered")
        resolve_and_resume(pending[2], "before it waits")

    pending[2] = new_waiter()
    loop.call_soon(answer)
    await turn(2)
    answered = [("in a callback", 1, True), "answered"]
    assert order[1:] == (answered if type(pending[1]) is FastFuture else answered[::-1])
    assert await pending[2] == "before it waits"
    tasks[2].cancel()
    assert [type(error) for error in await outcomes(tasks)] == [type(None), type(None), asyncio.CancelledError]


async def test_what_a_signal_has_cancelled_stays_cancelled() -> None:
    """A handler may cancel the task between any two lines, also between the question whether it is done and the answer."""
    bell = Waker(asyncio.get_running_loop())

    async def wait(waiter: Any) -> Any:
        return await waiter

    answers: list[Callable[[Any], object]] = [
        lambda waiter: waiter.set_result(1),
        lambda waiter: waiter.set_exception(ZeroDivisionError()),
        lambda waiter: asyncio.get_running_loop().call_soon(FastFuture.resolve_and_resume, waiter, 1),
    ]
    for answer in answers:
        waiter = FastFuture(bell)
        task = asyncio.create_task(wait(waiter))
        await turn()
        assert not waiter.done()
        task.cancel()
        answer(waiter)
        assert [type(error) for error in await outcomes([task])] == [asyncio.CancelledError]
        assert waiter.cancelled()


async def test_who_left_is_not_kept() -> None:
    """Neither by what was raised in his task, nor by what woke him: all is gone without the garbage collector."""
    new_waiter = future_factory(asyncio.get_running_loop())

    class Thing:
        pass

    async def wait(waiter: Any, thing: Thing) -> None:
        await waiter
        raise ZeroDivisionError(str(thing))

    gc.disable()
    try:
        for way in ("cancel", "answer"):
            waiter, thing = new_waiter(), Thing()
            is_there = weakref.ref(thing)
            task = asyncio.create_task(wait(waiter, thing))
            await turn()
            if way == "cancel":
                task.cancel()
            else:
                asyncio.get_running_loop().call_soon(resolve_and_resume, waiter, None)
            await turn(2)
            assert task.done()
            assert task.cancelled() or task.exception() is not None
            del task, waiter, thing
            await turn()
            assert is_there() is None, way
    finally:
        gc.enable()


def test_a_loop_that_closes_while_tasks_wait() -> None:
    """They are let go without a word, but for asyncio's own about a task that was destroyed; and so is the batcher."""
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
