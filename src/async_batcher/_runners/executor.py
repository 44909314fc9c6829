r"""Batches that run in a `concurrent.futures.Executor`: one trip for each, there and back.

::

    run(batch) --> Call --> submit --> in this process:  Call()               --> its outcome, as it is
                                   \-> pickled on the way: Job() in the worker --> a reply --> read --> outcome
                                                              ^                      |
                                                              `---- what it lacks <--'

Rules:

- What is submitted is one small callable. Called in this process it runs in place; pickled it crosses as bytes (`run_batch.Job`).
  So process pools, loky and interpreters need no case of their own.
- What an executor may block in (starting processes, waiting for its own lock while it breaks) happens in a thread of ours,
  never on the event loop. So does pickling, and reading a reply.
- A trip ends exactly once, on the loop's thread, in `_end`.
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

from async_batcher._runners.base import NotBegunError
from async_batcher._runners.slots import Slots
from async_batcher._serialization.caller_exceptions import raise_first
from async_batcher.exceptions import BatcherStoppedError, BatchTimeoutError, PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from contextvars import Context

    from async_batcher._pool.batch_request import Cargo, Crossing
    from async_batcher._runners.adapters import Place
    from async_batcher._worker.results import Outcome
    from async_batcher._worker.user_function import Program

# Seconds after which a submit that has not returned is looked into (starting processes takes tenths of a second), and that
# the workers of an idle pool get to end by themselves before they are killed.
_PATIENCE = 2.0
_LAST_PATIENCE = 10.0  # seconds after that, for an executor or a factory of the user's that does not return


class InPlace:
    """What came of a call that ran in this process."""

    __slots__ = ("outcome",)

    def __init__(self, outcome: Outcome) -> None:
        self.outcome: Outcome | None = outcome

    def take(self) -> Outcome | None:
        """The outcome, once: the executor's future may live on in a reference cycle, and is not to keep it."""
        outcome, self.outcome = self.outcome, None
        return outcome


class Call:
    """What is submitted for one batch.

    Args:
        program: Run in place, where the call is not pickled.
        cargo: Makes the program as it is sent; called where the call is pickled.
        context: Where it runs, if in place.
        batch: The items; None to get ready only.
        begins: Called where it begins to run, or is on its way to a worker that is free; in any thread.
        is_wanted: Asked where it begins to run, if in place; False: it need not.
        slots: Where it runs, if in place and there is a set-up.
    """

    def __init__(
        self,
        program: Program,
        cargo: Callable[[], Cargo],
        context: Context,
        batch: list[Any] | None,
        begins: Callable[[], object] | None = None,
        is_wanted: Callable[[], bool] | None = None,
        slots: Slots | None = None,
    ) -> None:
        self._slots = slots
        self._program = program
        self._cargo = cargo
        self._context = context
        self._batch = batch
        self._begins = begins
        self._is_wanted = is_wanted
        self._crossing: Crossing | None = None

    def __call__(self) -> InPlace:
        """Run it here."""
        is_wanted, self._is_wanted = self._is_wanted, None  # it knows who waits, and so what is raised there, which leads here
        if is_wanted is not None and not is_wanted():
            return InPlace(NotBegunError())
        del is_wanted
        return InPlace(self._context.run(self._run))

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross as bytes."""
        crossing = self.crossing()
        if self._begins is not None and crossing.carries_items:
            self._begins()
        return crossing.job().__reduce__()

    def crossing(self) -> Crossing:
        """The batch as it crosses; pickled at the first call."""
        if self._crossing is None:
            from async_batcher._pool.batch_request import Crossing

            self._crossing = Crossing(self._cargo(), self._batch)
        return self._crossing

    def read(self, reply: Any) -> Outcome | None:
        """What came of the batch; None: submit the call again, the worker lacks something that is now packed."""
        if isinstance(reply, InPlace):
            return reply.take()
        return self.crossing().read(reply)

    def _run(self) -> Outcome:
        if self._slots is not None:
            outcome = self._slots.run(self._batch, self._begins)
            try:
                return NotBegunError() if outcome is None else outcome
            finally:
                del outcome  # the traceback of an exception holds this frame
        if self._batch is None:
            return []
        if self._begins is not None:
            self._begins()
        return self._program.run(self._batch)


class _Trip:
    """One batch on its way. It belongs to the loop's thread; only ``is_away`` is set elsewhere."""

    __slots__ = ("call", "done", "is_away", "late", "timer")
    call: Call

    def __init__(self, done: Callable[[Outcome], None], late: Callable[[BatchTimeoutError], None] | None) -> None:
        self.done = done
        self.late = late
        self.is_away = False  # the executor has taken it
        self.timer: asyncio.TimerHandle | None = None


class ExecutorRunner:
    """Runs batches in an executor.

    Args:
        loop: The loop on which ``done`` is called.
        program: The user's function and its set-up.
        context: A copy of it is made for each batch that runs in this process.
        place: The executor.
        batch_timeout: Seconds that a batch may run; None: as long as it likes.
    """

    is_on_loop = False

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        program: Program,
        context: Context,
        place: Place,
        batch_timeout: float | None = None,
    ) -> None:
        self._loop = loop
        self._program = program
        self._context = context
        self._place = place
        self._timeout = batch_timeout
        self.spent: deque[float] = deque()
        self._cargo = functools.cache(self._make_cargo)
        self._slots: Slots | None = None
        if program.setup is not None and not place.crosses:
            self._slots = Slots(program, by_thread=place.has_threads)
        self._left: asyncio.Future[None] | None = None  # done when the slots have been torn down
        self._trips: set[_Trip] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._errands = _ErrandThread()
        weakref.finalize(self, self._errands.end)  # for a batcher that is dropped without a stop

    async def start(self) -> None:
        """Start the workers, if they are ours, and load the program in as many of them as answer; in one of what was given."""
        jobs = self._place.workers if self._place.is_ours else 1  # the standard pool starts a process for each job that waits
        meet: Callable[[], bool] | None = None
        if self._place.has_threads and jobs > 1 and self._slots is not None and not self._trips:
            meet = functools.partial(_meet, threading.Barrier(jobs))  # so that each thread gets one of them
        outcomes = await asyncio.gather(*(self._get_ready(meet) for _ in range(jobs)))
        raise_first(outcomes, self._program.setup)

    async def _get_ready(self, meet: Callable[[], bool] | None) -> Outcome:
        ready: asyncio.Future[Outcome] = self._loop.create_future()

        def done(outcome: Outcome) -> None:
            if not ready.done():
                ready.set_result(outcome)

        self._depart(None, done, is_wanted=meet)
        return await ready

    def run(
        self,
        batch: list[Any],
        done: Callable[[Outcome], None],
        late: Callable[[BatchTimeoutError], None],
        is_wanted: Callable[[], bool],
    ) -> None:
        """Send one batch, which nothing ends before its time."""
        self._depart(batch, done, late if self._timeout is not None else None, is_wanted)

    def runs_in(self, task: asyncio.Task[Any] | None) -> bool:  # noqa: ARG002 - batches run in no task
        """Never: batches run elsewhere."""
        return False

    def spare(self, task: asyncio.Task[Any] | None) -> None:
        """No task is a batch of it."""

    @property
    def tears_down(self) -> bool:
        """Whether set-ups in this process have something to tear down."""
        return self._slots is not None and self._slots.tears_down

    async def leave(self) -> None:
        """Have every slot run its tear-down, where its set-up has run."""
        if self._slots is None:
            return
        if self._slots.close(lambda: self._tell(functools.partial(_resolve, left))):
            left = self._left = self._loop.create_future()
            for _ in range(self._place.workers if self._place.has_threads else 1):
                if self._place.blocks:
                    self._errands.put(self._send_leave)
                else:
                    self._send_leave()
        if self._left is not None:
            await asyncio.wait([self._left])

    async def close(self, *, kill: bool) -> None:
        """End the executor if we made it; with ``kill``, and every trip that is under way."""
        if kill:
            for trip in list(self._trips):
                self._end(trip, BatcherStoppedError("the batcher was stopped before the batch had ended"))
            if self._slots is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PATIENCE):
                        await self.leave()
            self._place.kill()
        if not self._place.is_ours or not self._place.blocks:
            self._place.shut_down()
            self._errands.end()
            return
        ended = self._loop.create_future()

        def shut_down() -> None:
            try:
                self._place.shut_down()
            finally:
                self._tell(functools.partial(_resolve, ended))

        self._errands.put(shut_down)
        self._errands.end()
        done, _ = await asyncio.wait([ended], timeout=_PATIENCE)
        if not done:  # a worker is stopped, or deaf to the pool
            self._place.kill()
            await asyncio.wait([ended], timeout=_LAST_PATIENCE)

    def workers(self) -> None:
        """None to see."""

    def abandon(self) -> None:
        """End what can be ended without the loop."""
        self._trips.clear()
        self._place.kill()
        if self._place.blocks:
            self._errands.put(self._place.shut_down)
        else:
            self._place.shut_down()
        self._errands.end()

    def _send_leave(self) -> None:
        """Have a thread of the executor tear down; where it takes no more calls, one of ours."""
        assert self._slots is not None  # noqa: S101 - `leave` has looked
        leave = functools.partial(self._context.copy().run, self._slots.leave)
        try:
            self._place.submit(leave)
        except Exception:  # noqa: BLE001 - the user has shut it down, or the program ends
            threading.Thread(target=leave, name="async_batcher-tear-down", daemon=True).start()

    def _make_cargo(self) -> Cargo:
        from async_batcher._pool.batch_request import Cargo

        workers = 0 if self._timeout is None else self._place.workers
        return Cargo(self._program, runs_main=self._place.runs_main, workers=workers)

    def _depart(
        self,
        batch: list[Any] | None,
        done: Callable[[Outcome], None],
        late: Callable[[BatchTimeoutError], None] | None = None,
        is_wanted: Callable[[], bool] | None = None,
    ) -> None:
        trip = _Trip(done, late)
        begins = None if late is None else lambda: self._tell(lambda: self._set_timer(trip))
        trip.call = Call(self._program, self._cargo, self._context.copy(), batch, begins, is_wanted, self._slots)
        self._trips.add(trip)
        try:
            self._send(trip)
        except BaseException:
            self._trips.discard(trip)
            raise

    def _send(self, trip: _Trip) -> None:
        if not self._place.blocks:
            self._hand_over(trip)
            return
        trip.is_away = False
        self._errands.put(lambda: self._hand_over(trip))
        if self._watch is None:
            self._watch = self._loop.call_later(_PATIENCE, self._look_after)

    def _hand_over(self, trip: _Trip) -> None:
        try:
            if self._place.crosses:
                outcome = trip.call.crossing().outcome
                if outcome is not None:
                    self._tell(lambda: self._end(trip, outcome))
                    return
            future, source = self._place.submit(trip.call)
        except BaseException as exc:  # noqa: BLE001 - whatever it is, it is this batch's
            error = exc
            self._tell(lambda: self._end(trip, error))
            return
        trip.is_away = True
        if isinstance(future, asyncio.Future):  # its callbacks come from the loop
            future.add_done_callback(lambda future: self._arrived(trip, self._read(trip, future, source)))
        else:
            future.add_done_callback(lambda future: self._landed(trip, future, source))

    def _landed(self, trip: _Trip, future: Future[Any], source: object) -> None:
        # In whichever thread, and under whichever of its locks, the executor likes: so nothing but reading is done here.
        outcome = self._read(trip, future, source)
        self._tell(lambda: self._arrived(trip, outcome))

    def _read(self, trip: _Trip, future: Future[Any] | asyncio.Future[Any], source: object) -> Outcome | None:
        try:
            try:
                reply = future.result()
            except BaseException as exc:  # noqa: BLE001 - the executor's own failure: user code raises inside the call
                return self._place.lost(exc, source)
            return trip.call.read(reply)
        except BaseException as exc:  # noqa: BLE001 - nobody is to wait for ever because a reply or a death cannot be read
            return exc

    def _arrived(self, trip: _Trip, outcome: Outcome | None) -> None:
        if trip not in self._trips:
            return
        if outcome is None:
            if trip.timer is not None:  # the worker lacked something: the batch has not begun
                trip.timer.cancel()
                trip.timer = None
            self._send(trip)
        else:
            self._end(trip, outcome)

    def _end(self, trip: _Trip, outcome: Outcome) -> None:
        if trip not in self._trips:
            return
        self._trips.discard(trip)
        if trip.timer is not None:
            trip.timer.cancel()
        if not self._trips:
            self._rest()
        trip.done(outcome)

    def _set_timer(self, trip: _Trip) -> None:
        if trip in self._trips and trip.timer is None and self._timeout is not None:
            trip.timer = self._loop.call_later(self._timeout, self._out_of_time, trip)

    def _out_of_time(self, trip: _Trip) -> None:
        if trip in self._trips and trip.late is not None:
            msg = (
                f"the batch ran for longer than batch_timeout={self._timeout} seconds. It cannot be ended where it runs, and "
                "keeps its slot until it returns; executor='process' ends a worker that hangs"
            )
            trip.late(BatchTimeoutError(msg))

    def _tell(self, what: Callable[[], object]) -> None:
        """Do something on the loop's thread, in a turn of its own."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
            self._loop.call_soon_threadsafe(what)

    def _look_after(self) -> None:
        # A submit of the standard pool waits for ever while the pool breaks and one of its workers will not end: see to it that
        # nobody waits with it. This runs only while batches are under way.
        self._watch = None
        stuck = [trip for trip in self._trips if not trip.is_away]
        if stuck and self._place.has_failed():
            msg = "the executor that was given as executor= is broken and takes no more batches; make a new one"
            for trip in stuck:
                self._end(trip, PoolBrokenError(msg))
        if self._trips:
            self._watch = self._loop.call_later(_PATIENCE, self._look_after)

    def _rest(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None


def _meet(barrier: threading.Barrier) -> bool:
    """Wait until each thread is here; not for ever, since there may not be as many threads as were wanted."""
    with contextlib.suppress(threading.BrokenBarrierError):
        barrier.wait(_PATIENCE)
    return True


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _ErrandThread:
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
