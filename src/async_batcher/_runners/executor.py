r"""Batches that run in a `concurrent.futures.Executor`: one call for each.

::

    submit(batch) --> BatchCall --> executor.submit --> in this process: BatchCall() --> its outcome
                                           \-> pickled: RemoteCall() in the worker --> reply
                                                              ^                         |
                                                              `--- what it lacks <------'

Rules:

- What is submitted is one small callable: called in this process it runs the batch, pickled it
  becomes bytes. So process pools, loky and interpreters are not special cases.
- What may block in an executor (starting processes, its own lock while it breaks) runs in a thread
  of the runner, never on the event loop. So do pickling and unpickling.
- A call ends exactly once, on the loop's thread, in `_finish`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
import weakref
from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.future import resolve
from async_batcher._eventloop.halts import LimitTimer
from async_batcher._runners.base import Runner
from async_batcher._runners.batch_call import BatchCall
from async_batcher._runners.slots import Slots
from async_batcher._serialization.caller_exceptions import raise_first
from async_batcher._serialization.exception_text import counted
from async_batcher.current import running_batch
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError, PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._runners.adapters import AnyFuture, ExecutorAdapter
    from async_batcher._runners.base import HasCallers, OnDone, OnResults, OnTimeout
    from async_batcher._worker.results import Outcome
    from async_batcher._worker.user_function import UserFunction
    from async_batcher.current import BatchFacts

# Seconds after which a submit that has not returned is checked (starting processes takes tenths of
# a second), and that the workers of an idle pool get to end before they are killed.
_WATCHDOG_INTERVAL = 2.0
_SHUTDOWN_LIMIT = 10.0  # seconds after that, for the user's executor or factory to return


class ExecutorRunner(Runner):
    """Runs batches in an executor."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        function: UserFunction,
        context: Context,
        adapter: ExecutorAdapter,
        batch_timeout: float | None = None,
    ) -> None:
        super().__init__()
        self._loop = loop
        self._user_function = function
        self._context = context
        self._adapter = adapter
        self._timeout = batch_timeout
        self._function: PickledFunction | None = None
        self._function_lock = threading.Lock()  # the executor may ask in several threads
        self._slots = Slots(function, by_thread=adapter.threads > 0)
        self._pending: set[BatchCall] = set()
        self._watchdog: asyncio.TimerHandle | None = None
        self._submit_thread = SubmitThread()
        # For a batcher that is dropped without a stop.
        weakref.finalize(self, self._submit_thread.end)

    async def start(self) -> None:
        """Load the function in each worker of an executor of ours, or in one of a given one."""
        # The standard pool starts a process for each call that waits.
        calls = self._adapter.workers if self._adapter.owned else 1
        meet: HasCallers | None = None
        if self._adapter.threads and self._user_function.setup is not None and not self._pending:
            # Each thread gets one of the calls.
            meet = functools.partial(_meet, threading.Barrier(calls))
        ready: list[asyncio.Future[Outcome]] = [self._loop.create_future() for _ in range(calls)]
        for future in ready:
            self.submit(None, functools.partial(resolve, future), has_callers=meet)
        outcomes = await asyncio.gather(*ready)
        del ready, future  # the traceback of an exception holds this frame
        raise_first(outcomes, self._user_function.setup)

    def submit(
        self,
        batch: list[Any] | None,
        on_done: OnDone,
        on_timeout: OnTimeout | None = None,
        has_callers: HasCallers | None = None,
        on_results: OnResults | None = None,
        facts: BatchFacts | None = None,
    ) -> None:
        """Run one batch (None: set up only); see `Runner.submit`."""
        call = BatchCall(
            self._loop, self._slots, self._pickled_function, self._context.copy(), batch, on_done,
            on_timeout, has_callers, on_results, facts,
        )  # fmt: skip
        if self._timeout is not None and on_timeout is not None:
            call.on_start = lambda: self._call_on_loop(self._arm_timer, call)
        self._pending.add(call)
        try:
            self._enqueue(call)
        except BaseException:
            self._pending.discard(call)
            raise

    def owns_task(self, task: asyncio.Task[Any] | None) -> bool:  # noqa: ARG002 - its context counts
        # A thread that runs a batch has made it, by run_coroutine_threadsafe().
        running = running_batch.get()
        return running is not None and running[2] is self._user_function

    @property
    def tears_down(self) -> bool:
        return self._slots.tears_down

    async def run_tear_downs(self) -> None:
        if self._slots.close():
            for _ in range(self._adapter.threads or 1):
                self._run_where_it_may_block(self._submit_tear_down)
        ended = self._loop.create_future()
        self._slots.torn_down.add_done_callback(lambda _: self._call_on_loop(resolve, ended, None))
        await asyncio.wait([ended])

    def _submit_tear_down(self) -> None:
        tear_down = functools.partial(self._context.copy().run, self._slots.tear_down_idle)
        try:
            self._adapter.submit(tear_down)
        except Exception:  # noqa: BLE001 - the user has shut it down, or Python is exiting
            threading.Thread(target=tear_down, name="async_batcher-tear-down", daemon=True).start()

    async def close(self, *, kill: bool) -> None:
        if kill:
            for call in list(self._pending):
                msg = "the batcher was stopped before the batch had ended"
                self._finish(call, BatcherStoppedError(msg))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCHDOG_INTERVAL):
                    await self.run_tear_downs()
            self._adapter.kill()
        ended = self._loop.create_future()
        self._shut_down(lambda: self._call_on_loop(resolve, ended, None))
        done, _ = await asyncio.wait([ended], timeout=_WATCHDOG_INTERVAL)
        if not done:  # a worker is stopped, or does not react to the pool
            self._adapter.kill()
            await asyncio.wait([ended], timeout=_SHUTDOWN_LIMIT)

    def close_without_loop(self) -> None:
        self._pending.clear()
        self._adapter.kill()
        self._shut_down(lambda: None)

    def _shut_down(self, then: Callable[[], object]) -> None:
        def shut_down() -> None:
            try:
                self._adapter.shut_down()
            finally:
                then()

        if self._adapter.owned:
            self._run_where_it_may_block(shut_down)
        else:  # there is nothing to shut down
            then()
        self._submit_thread.end()

    def _run_where_it_may_block(self, task: Callable[[], None]) -> None:
        if self._adapter.submit_may_block:
            self._submit_thread.put(task)
        else:
            task()

    def _pickled_function(self) -> PickledFunction:
        from async_batcher._pool.pickled_function import PickledFunction

        with self._function_lock:  # a second one would be set up, too
            if self._function is None:
                workers = 0 if self._timeout is None else self._adapter.workers
                self._function = PickledFunction(
                    self._user_function, runs_main=self._adapter.runs_main, workers=workers
                )
            return self._function

    def _enqueue(self, call: BatchCall) -> None:
        call.submitted = False
        self._run_where_it_may_block(lambda: self._submit_now(call))
        if not call.submitted and self._watchdog is None:
            self._watchdog = self._loop.call_later(_WATCHDOG_INTERVAL, self._check_stuck)

    def _submit_now(self, call: BatchCall) -> None:
        try:
            outcome = call.request().outcome if self._adapter.pickles else None
            if outcome is not None:
                self._call_on_loop(self._finish, call, outcome)
                return
            future, source = self._adapter.submit(call)
        except BaseException as exc:  # noqa: BLE001 - the callers of this batch get it
            self._call_on_loop(self._finish, call, exc)
            return
        call.submitted = True
        future.add_done_callback(lambda future: self._on_future_done(call, future, source))

    def _on_future_done(self, call: BatchCall, future: AnyFuture, source: Any) -> None:
        # The executor chooses the thread, and may hold a lock: decode only, the rest on the loop.
        outcome = self._decode(call, future, source)
        if isinstance(future, asyncio.Future):  # it calls back on the loop
            self._on_outcome(call, outcome)
        else:
            self._call_on_loop(self._on_outcome, call, outcome)

    def _decode(self, call: BatchCall, future: AnyFuture, source: Any) -> Outcome | None:
        try:
            try:
                reply = future.result()
            except BaseException as exc:  # noqa: BLE001 - the executor's: user code raises inside
                return self._adapter.to_error(exc, source)
            return call.read(reply)
        except BaseException as exc:  # noqa: BLE001 - or the callers would wait forever
            return exc

    def _on_outcome(self, call: BatchCall, outcome: Outcome | None) -> None:
        if outcome is not None:
            self._finish(call, outcome)
        elif call in self._pending:  # the worker lacked something: the batch has not started
            call.cancel_timer()
            self._enqueue(call)

    def _finish(self, call: BatchCall, outcome: Outcome) -> None:
        self._pending.discard(call)
        if not self._pending and self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        call.finish(outcome)

    def _arm_timer(self, call: BatchCall) -> None:
        if call in self._pending and call.timer is None and self._timeout is not None:
            call.timer = LimitTimer(self._loop, self._timeout, self._on_timeout, call)

    def _on_timeout(self, call: BatchCall) -> None:
        if call.on_timeout is not None:
            msg = (
                f"the batch timed out (batch_timeout={counted(self._timeout or 0, 'second')}). It "
                "cannot be stopped where it runs, and keeps its slot until it returns; "
                "executor='process' kills a worker that hangs"
            )
            call.on_timeout(BatchTimeoutError(msg))

    def _call_on_loop(self, callback: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: no caller is left
            self._loop.call_soon_threadsafe(callback, *args)

    def _check_stuck(self) -> None:
        # A submit of the standard pool blocks forever while the pool breaks and a worker does not
        # end: the callers must not. This runs only while batches are in flight.
        self._watchdog = None
        stuck = [call for call in self._pending if not call.submitted]
        if stuck and self._adapter.blocks_forever():
            msg = "the executor given as executor= is broken and takes no batches; make a new one"
            for call in stuck:
                self._finish(call, PoolBrokenError(msg))
        if self._pending:
            self._watchdog = self._loop.call_later(_WATCHDOG_INTERVAL, self._check_stuck)


def _meet(barrier: threading.Barrier) -> bool:
    """Wait until each thread is here, within a limit: the executor may have fewer threads."""
    with contextlib.suppress(threading.BrokenBarrierError):
        barrier.wait(_WATCHDOG_INTERVAL)
    return True


class SubmitThread:
    """Runs one task after the other. The thread starts with the first; it may block forever."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, task: Callable[[], None]) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="async_batcher-submit", daemon=True)
            thread.start()  # raises if the system has no thread left; the next task tries again
            self._thread = thread
        self._tasks.put(task)

    def end(self) -> None:
        """Let the thread end after the tasks that it has."""
        if self._thread is not None:
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # or it would keep its batch until the next one comes
