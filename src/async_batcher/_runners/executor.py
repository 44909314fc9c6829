r"""Batches that run in a `concurrent.futures.Executor`: one trip for each, there and back.

::

    submit(batch) --> BatchCall --> executor.submit --> in this process:  BatchCall()    --> its outcome, as it is
                                           \-> pickled: RemoteCall() in the worker --> a reply --> read --> outcome
                                                              ^                         |
                                                              `---- what it lacks <-----'

Rules:

- What is submitted is one small callable. Called in this process it runs in place; pickled it crosses as bytes
  (`run_batch.RemoteCall`). So process pools, loky and interpreters need no case of their own.
- What an executor may block in (starting processes, waiting for its own lock while it breaks) happens in a thread of ours,
  never on the event loop. So does pickling, and reading a reply.
- A trip ends exactly once, on the loop's thread, in `_finish`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from async_batcher._runners.base import BatchNotStartedError
from async_batcher._runners.slots import Slots
from async_batcher._serialization.caller_exceptions import raise_first
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError, PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from contextvars import Context

    from async_batcher._pool.batch_request import BatchRequest, PickledFunction
    from async_batcher._runners.adapters import ExecutorAdapter
    from async_batcher._worker.results import Outcome
    from async_batcher._worker.user_function import UserFunction

# Seconds after which a submit that has not returned is looked into (starting processes takes tenths of a second), and that
# the workers of an idle pool get to end by themselves before they are killed.
_WATCHDOG_INTERVAL = 2.0
_LAST_WATCHDOG_INTERVAL = 10.0  # seconds after that, for an executor or a factory of the user's that does not return


class LocalOutcome:
    """What came of a call that ran in this process."""

    __slots__ = ("outcome",)

    def __init__(self, outcome: Outcome) -> None:
        self.outcome: Outcome | None = outcome

    def get(self) -> Outcome | None:
        """The outcome, once: the executor's future may live on in a reference cycle, and is not to keep it."""
        outcome, self.outcome = self.outcome, None
        return outcome


class BatchCall:
    """What is submitted for one batch.

    Args:
        program: Run in place, where the call is not pickled.
        cargo: Makes the program as it is sent; called where the call is pickled.
        context: Where it runs, if in place.
        batch: The items; None to get ready only.
        begins: Called where it begins to run, or is on its way to a worker that is free; in any thread.
        has_callers: Asked where it begins to run, if in place; False: it need not.
        slots: Where it runs, if in place and there is a set-up.
    """

    def __init__(
        self,
        program: UserFunction,
        cargo: Callable[[], PickledFunction],
        context: Context,
        batch: list[Any] | None,
        begins: Callable[[], object] | None = None,
        has_callers: Callable[[], bool] | None = None,
        slots: Slots | None = None,
    ) -> None:
        self._slots = slots
        self._program = program
        self._pickled_function = cargo
        self._context = context
        self._batch = batch
        self._on_start = begins
        self._has_callers = has_callers
        self._request: BatchRequest | None = None

    def __call__(self) -> LocalOutcome:
        """Run it here."""
        has_callers, self._has_callers = (
            self._has_callers,
            None,
        )  # it knows who waits, and so what is raised there, which leads here
        if has_callers is not None and not has_callers():
            return LocalOutcome(BatchNotStartedError())
        del has_callers
        return LocalOutcome(self._context.run(self._run))

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross as bytes."""
        crossing = self.request()
        if self._on_start is not None and crossing.carries_items:
            self._on_start()
        return crossing.job().__reduce__()

    def request(self) -> BatchRequest:
        """The batch as it crosses; pickled at the first call."""
        if self._request is None:
            from async_batcher._pool.batch_request import BatchRequest

            self._request = BatchRequest(self._pickled_function(), self._batch)
        return self._request

    def read(self, reply: Any) -> Outcome | None:
        """What came of the batch; None: submit the call again, the worker lacks something that is now packed."""
        if isinstance(reply, LocalOutcome):
            return reply.get()
        return self.request().decode_reply(reply)

    def _run(self) -> Outcome:
        if self._slots is not None:
            outcome = self._slots.run(self._batch, self._on_start)
            try:
                return BatchNotStartedError() if outcome is None else outcome
            finally:
                del outcome  # the traceback of an exception holds this frame
        if self._batch is None:
            return []
        if self._on_start is not None:
            self._on_start()
        return self._program.run(self._batch)


class _PendingCall:
    """One batch on its way. It belongs to the loop's thread; only ``submitted`` is set elsewhere."""

    __slots__ = ("call", "on_done", "on_timeout", "submitted", "timer")
    call: BatchCall

    def __init__(self, done: Callable[[Outcome], None], late: Callable[[BatchTimeoutError], None] | None) -> None:
        self.on_done = done
        self.on_timeout = late
        self.submitted = False  # the executor has taken it
        self.timer: asyncio.TimerHandle | None = None


class ExecutorRunner:
    """Runs batches in an executor.

    Args:
        loop: The loop on which ``on_done`` is called.
        program: The user's function and its set-up.
        context: A copy of it is made for each batch that runs in this process.
        place: The executor.
        batch_timeout: Seconds that a batch may run; None: as long as it likes.
    """

    runs_on_loop = False

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        program: UserFunction,
        context: Context,
        place: ExecutorAdapter,
        batch_timeout: float | None = None,
    ) -> None:
        self._loop = loop
        self._program = program
        self._context = context
        self._adapter = place
        self._timeout = batch_timeout
        self.spent: deque[float] = deque()
        self._pickled_function = functools.cache(self._pickle_function)
        self._slots: Slots | None = None
        if program.setup is not None and not place.pickles:
            self._slots = Slots(program, by_thread=place.has_threads)
        self._left: asyncio.Future[None] | None = None  # done when the slots have been torn down
        self._pending: set[_PendingCall] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._submit_thread = _SubmitThread()
        weakref.finalize(self, self._submit_thread.end)  # for a batcher that is dropped without a stop

    async def start(self) -> None:
        """Start the workers, if they are ours, and load the program in as many of them as answer; in one of what was given."""
        jobs = self._adapter.workers if self._adapter.owned else 1  # the standard pool starts a process for each job that waits
        meet: Callable[[], bool] | None = None
        if self._adapter.has_threads and jobs > 1 and self._slots is not None and not self._pending:
            meet = functools.partial(_meet, threading.Barrier(jobs))  # so that each thread gets one of them
        outcomes = await asyncio.gather(*(self._get_ready(meet) for _ in range(jobs)))
        raise_first(outcomes, self._program.setup)

    async def _get_ready(self, meet: Callable[[], bool] | None) -> Outcome:
        ready: asyncio.Future[Outcome] = self._loop.create_future()

        def done(outcome: Outcome) -> None:
            if not ready.done():
                ready.set_result(outcome)

        self._submit(None, done, has_callers=meet)
        return await ready

    def submit(
        self,
        batch: list[Any],
        done: Callable[[Outcome], None],
        late: Callable[[BatchTimeoutError], None],
        has_callers: Callable[[], bool],
    ) -> None:
        """Send one batch, which nothing ends before its time."""
        self._submit(batch, done, late if self._timeout is not None else None, has_callers)

    def owns_task(self, task: asyncio.Task[Any] | None) -> bool:  # noqa: ARG002 - batches run in no task
        """Never: batches run elsewhere."""
        return False

    def exclude_task(self, task: asyncio.Task[Any] | None) -> None:
        """No task is a batch of it."""

    @property
    def tears_down(self) -> bool:
        """Whether set-ups in this process have something to tear down."""
        return self._slots is not None and self._slots.tears_down

    async def run_tear_downs(self) -> None:
        """Have every slot run its tear-down, where its set-up has run."""
        if self._slots is None:
            return
        if self._slots.close(lambda: self._call_on_loop(functools.partial(_resolve, left))):
            left = self._left = self._loop.create_future()
            for _ in range(self._adapter.workers if self._adapter.has_threads else 1):
                if self._adapter.submit_may_block:
                    self._submit_thread.put(self._send_leave)
                else:
                    self._send_leave()
        if self._left is not None:
            await asyncio.wait([self._left])

    async def close(self, *, kill: bool) -> None:
        """End the executor if we made it; with ``kill``, and every trip that is under way."""
        if kill:
            for trip in list(self._pending):
                self._finish(trip, BatcherStoppedError("the batcher was stopped before the batch had ended"))
            if self._slots is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_WATCHDOG_INTERVAL):
                        await self.run_tear_downs()
            self._adapter.kill()
        if not self._adapter.owned or not self._adapter.submit_may_block:
            self._adapter.shut_down()
            self._submit_thread.end()
            return
        ended = self._loop.create_future()

        def shut_down() -> None:
            try:
                self._adapter.shut_down()
            finally:
                self._call_on_loop(functools.partial(_resolve, ended))

        self._submit_thread.put(shut_down)
        self._submit_thread.end()
        done, _ = await asyncio.wait([ended], timeout=_WATCHDOG_INTERVAL)
        if not done:  # a worker is stopped, or deaf to the pool
            self._adapter.kill()
            await asyncio.wait([ended], timeout=_LAST_WATCHDOG_INTERVAL)

    def workers(self) -> None:
        """None to see."""

    def close_without_loop(self) -> None:
        """End what can be ended without the loop."""
        self._pending.clear()
        self._adapter.kill()
        if self._adapter.submit_may_block:
            self._submit_thread.put(self._adapter.shut_down)
        else:
            self._adapter.shut_down()
        self._submit_thread.end()

    def _send_leave(self) -> None:
        """Have a thread of the executor tear down; where it takes no more calls, one of ours."""
        assert self._slots is not None  # noqa: S101 - `run_tear_downs` has looked
        leave = functools.partial(self._context.copy().run, self._slots.leave)
        try:
            self._adapter.submit(leave)
        except Exception:  # noqa: BLE001 - the user has shut it down, or the program ends
            threading.Thread(target=leave, name="async_batcher-tear-down", daemon=True).start()

    def _pickle_function(self) -> PickledFunction:
        from async_batcher._pool.batch_request import PickledFunction

        workers = 0 if self._timeout is None else self._adapter.workers
        return PickledFunction(self._program, runs_main=self._adapter.runs_main, workers=workers)

    def _submit(
        self,
        batch: list[Any] | None,
        done: Callable[[Outcome], None],
        late: Callable[[BatchTimeoutError], None] | None = None,
        has_callers: Callable[[], bool] | None = None,
    ) -> None:
        trip = _PendingCall(done, late)
        begins = None if late is None else lambda: self._call_on_loop(lambda: self._arm_timer(trip))
        trip.call = BatchCall(
            self._program, self._pickled_function, self._context.copy(), batch, begins, has_callers, self._slots
        )
        self._pending.add(trip)
        try:
            self._enqueue(trip)
        except BaseException:
            self._pending.discard(trip)
            raise

    def _enqueue(self, trip: _PendingCall) -> None:
        if not self._adapter.submit_may_block:
            self._submit_blocking(trip)
            return
        trip.submitted = False
        self._submit_thread.put(lambda: self._submit_blocking(trip))
        if self._watch is None:
            self._watch = self._loop.call_later(_WATCHDOG_INTERVAL, self._check_stuck)

    def _submit_blocking(self, trip: _PendingCall) -> None:
        try:
            if self._adapter.pickles:
                outcome = trip.call.request().outcome
                if outcome is not None:
                    self._call_on_loop(lambda: self._finish(trip, outcome))
                    return
            future, source = self._adapter.submit(trip.call)
        except BaseException as exc:  # noqa: BLE001 - whatever it is, it is this batch's
            error = exc
            self._call_on_loop(lambda: self._finish(trip, error))
            return
        trip.submitted = True
        if isinstance(future, asyncio.Future):  # its callbacks come from the loop
            future.add_done_callback(lambda future: self._on_outcome(trip, self._decode(trip, future, source)))
        else:
            future.add_done_callback(lambda future: self._on_future_done(trip, future, source))

    def _on_future_done(self, trip: _PendingCall, future: Future[Any], source: object) -> None:
        # In whichever thread, and under whichever of its locks, the executor likes: so nothing but reading is done here.
        outcome = self._decode(trip, future, source)
        self._call_on_loop(lambda: self._on_outcome(trip, outcome))

    def _decode(self, trip: _PendingCall, future: Future[Any] | asyncio.Future[Any], source: object) -> Outcome | None:
        try:
            try:
                reply = future.result()
            except BaseException as exc:  # noqa: BLE001 - the executor's own failure: user code raises inside the call
                return self._adapter.to_error(exc, source)
            return trip.call.read(reply)
        except BaseException as exc:  # noqa: BLE001 - nobody is to wait for ever because a reply or a death cannot be read
            return exc

    def _on_outcome(self, trip: _PendingCall, outcome: Outcome | None) -> None:
        if trip not in self._pending:
            return
        if outcome is None:
            if trip.timer is not None:  # the worker lacked something: the batch has not begun
                trip.timer.cancel()
                trip.timer = None
            self._enqueue(trip)
        else:
            self._finish(trip, outcome)

    def _finish(self, trip: _PendingCall, outcome: Outcome) -> None:
        if trip not in self._pending:
            return
        self._pending.discard(trip)
        if trip.timer is not None:
            trip.timer.cancel()
        if not self._pending:
            self._stop_watchdog()
        trip.on_done(outcome)

    def _arm_timer(self, trip: _PendingCall) -> None:
        if trip in self._pending and trip.timer is None and self._timeout is not None:
            trip.timer = self._loop.call_later(self._timeout, self._on_timeout, trip)

    def _on_timeout(self, trip: _PendingCall) -> None:
        if trip in self._pending and trip.on_timeout is not None:
            msg = (
                f"the batch ran for longer than batch_timeout={self._timeout} seconds. It cannot be ended where it runs, and "
                "keeps its slot until it returns; executor='process' ends a worker that hangs"
            )
            trip.on_timeout(BatchTimeoutError(msg))

    def _call_on_loop(self, what: Callable[[], object]) -> None:
        """Do something on the loop's thread, in a turn of its own."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
            self._loop.call_soon_threadsafe(what)

    def _check_stuck(self) -> None:
        # A submit of the standard pool waits for ever while the pool breaks and one of its workers will not end: see to it that
        # nobody waits with it. This runs only while batches are under way.
        self._watch = None
        stuck = [trip for trip in self._pending if not trip.submitted]
        if stuck and self._adapter.is_broken():
            msg = "the executor that was given as executor= is broken and takes no more batches; make a new one"
            for trip in stuck:
                self._finish(trip, PoolBrokenError(msg))
        if self._pending:
            self._watch = self._loop.call_later(_WATCHDOG_INTERVAL, self._check_stuck)

    def _stop_watchdog(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None


def _meet(barrier: threading.Barrier) -> bool:
    """Wait until each thread is here; not for ever, since there may not be as many threads as were wanted."""
    with contextlib.suppress(threading.BrokenBarrierError):
        barrier.wait(_WATCHDOG_INTERVAL)
    return True


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _SubmitThread:
    """A thread that does one thing after the other; it starts with the first. A daemon: it may be blocked for good."""

    def __init__(self) -> None:
        self._errands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, errand: Callable[[], None]) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="async_batcher-errands", daemon=True)
            thread.start()  # raises where the system has none left; the next errand tries anew
            self._thread = thread
        self._errands.put(errand)

    def end(self) -> None:
        """Let the thread end when it has done what was put before."""
        if self._thread is not None:
            self._errands.put(None)

    def _work(self) -> None:
        while (errand := self._errands.get()) is not None:
            errand()
            del errand  # or it would keep its batch until the next one comes
