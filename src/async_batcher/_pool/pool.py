"""`WorkerPool`: worker processes on the event loop, with one private channel each.

::

    run(function, *args) -> CallEncoder -> PoolDispatcher -> worker's socket -> function(*args)
            ^                                                        |
            `----------- read by the event loop, without a thread <--'

A pool has one `PoolDispatcher` at a time, bound to the loop that was running when it was made. A
stopped pool, or one whose loop has closed, gets another one when it is started or used again.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from async_batcher._eventloop.future import resolve
from async_batcher._eventloop.lifecycle import Lifecycle
from async_batcher._pool.call_encoder import CallEncoder
from async_batcher._pool.checks import check_positive_seconds
from async_batcher._pool.dispatcher import PoolDispatcher
from async_batcher._pool.pool_options import PoolOptions
from async_batcher._pool.state.ledger import WorkerLedger
from async_batcher._pool.work_item import return_or_raise
from async_batcher._worker.user_function import is_async
from async_batcher.current import context_outside_of_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.context import BaseContext
    from types import TracebackType
    from typing import Self

    from async_batcher._pool.pool_executor import PoolExecutor
    from async_batcher._pool.work_item import WorkItem
    from async_batcher._worker.results import Outcome
    from async_batcher.stats import WorkerCounts

R = TypeVar("R")

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker process of a `WorkerPool`, at one moment.

    Attributes:
        pid: Process id. None until the process exists.
        state: ``"starting"`` (set-ups included), ``"idle"``, ``"busy"`` (runs a batch),
            ``"stopping"`` (asked to exit) or ``"exiting"`` (interrupted, killed or crashed).
        batches: Number of batches that the worker has run.
        memory: Private resident memory in bytes. Where the system does not tell, the peak of all
            resident memory, or 0.
    """

    pid: int | None
    state: Literal["starting", "idle", "busy", "stopping", "exiting"]
    batches: int
    memory: int


class WorkerPool:
    """A pool of worker processes that the event loop drives itself.

    Pass it to one or several batchers as ``executor=``, or use it alone::

        async with WorkerPool(max_workers=4) as pool:
            text = await pool.run(extract_text, page, timeout=30.0)

    Scripts need no ``if __name__ == "__main__":``, since workers do not run the main module.

    Args:
        max_workers: Number of worker processes. None means one for each usable CPU core.
        mp_context: Start method: ``"forkserver"``, ``"spawn"`` or ``"fork"``, or a multiprocessing
            context, of which only the start method counts. None means forkserver on Linux, and
            spawn elsewhere.
        initializer: Function that each worker calls before its first batch.
        initargs: Arguments of the initializer.
        max_tasks_per_child: Number of batches after which a worker is replaced. None disables it.
            The replacement is ready before the worker stops, which then has 30 seconds for its exit
            handlers. If batchers with a ``setup_worker`` use the pool, the worker goes on until the
            replacement has run their set-ups; but with 1, no worker runs a second batch.
        max_memory_per_child: Private resident memory in bytes after which a worker is replaced.
            None disables it.
        threads_per_worker: Threads of BLAS, OpenMP, PyTorch, TensorFlow, joblib, Polars and Rayon,
            unless the environment sets them. None means CPU cores divided by workers; 0 sets none.
        start_timeout: Timeout in seconds for a worker to get ready, imports of ``preload``
            included. It also limits a set-up that no caller waits for; see
            `AsyncBatcher.setup_worker`.
        preload: Names of modules that are imported once, with one thread, in the process that
            workers are forked from. They share the memory of what is not changed, such as the
            arrays of a model. Needs the start method forkserver. A module that leaves a thread
            running is refused, and none may use a GPU.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range, or the system does not have the start method.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        mp_context: BaseContext | str | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        max_tasks_per_child: int | None = None,
        max_memory_per_child: int | None = None,
        threads_per_worker: int | None = None,
        start_timeout: float = 60.0,
        preload: Sequence[str] = (),
    ) -> None:
        """Check the options; the workers start with the first call, or with `start`."""
        self._options = PoolOptions(
            max_workers=max_workers,
            mp_context=mp_context,
            initializer=initializer,
            initargs=initargs,
            max_tasks_per_child=max_tasks_per_child,
            max_memory_per_child=max_memory_per_child,
            threads_per_worker=threads_per_worker,
            start_timeout=start_timeout,
            preload=preload,
        )
        self._name = f"WorkerPool-{next(_numbers)}"
        self._context = context_outside_of_batches()
        self._ledger = WorkerLedger()
        self.crash_times: deque[float] = deque()  # see `Runner`
        self._lifecycle = Lifecycle("pool", PoolDispatcher.close_now)
        self.calls = CallEncoder()

    def __repr__(self) -> str:
        dispatcher = self._lifecycle.session
        if dispatcher is not None:
            return repr(dispatcher)
        return f"<{self._name} {self._lifecycle.state} max_workers={self.max_workers}>"

    @property
    def max_workers(self) -> int:
        """Number of worker processes."""
        return self._options.size

    async def start(self) -> None:
        """Start all workers, and wait until they are ready; also after `stop`.

        Raises:
            PoolBrokenError: No worker can be started. Its cause says why, with the traceback of an
                ``initializer`` or a module of ``preload`` that raised.
            SerializationError: The ``initializer`` cannot be pickled.
        """
        self._lifecycle.is_stopped = False
        await self.dispatcher().start()

    async def restart_workers(self) -> None:
        """Replace every worker, and wait until those of now have exited.

        The new ones import the modules of ``preload`` again, and run the ``initializer`` and all
        set-ups. One after another, each worker works until its replacement is ready. A cancelled
        call does not end the restart.

        Raises:
            PoolBrokenError: A replacement cannot be started, or a set-up raises there. Its cause
                says why; workers that have not been replaced work on.
            BatcherStoppedError: The pool was stopped, before or meanwhile.
        """
        if self._lifecycle.current() is not None or self._lifecycle.is_stopped:
            await self.dispatcher().restart_workers()

    async def run(
        self,
        function: Callable[..., R],
        /,
        *args: Any,
        timeout: float | None = None,  # noqa: ASYNC109 - of the worker's time
    ) -> R:
        """Call a function in a worker; start the pool if it is not running.

        Args:
            function: Sync function. Lambdas, closures, methods and functions of the main module are
                allowed.
            *args: Arguments of the function.
            timeout: Timeout in seconds from when the function starts. None disables it. Then the
                function gets `KeyboardInterrupt`, and its worker is killed 0.5 seconds later.

        Returns:
            The function's result.

        Raises:
            BatchTimeoutError: The function ran for longer than ``timeout``.
            WorkerDiedError: The worker crashed while it ran the function.
            PoolBrokenError: No worker can be started.
            SerializationError: The function, an argument or the result cannot be pickled or
                unpickled.
            BatcherStoppedError: The pool was stopped, before or meanwhile.
            Exception: What the function raised. The worker's traceback is the cause of the last
                exception in its chain of causes; a note names the function and the worker.
        """
        if function is not self.calls.last[0] and is_async(function):
            msg = (
                f"{function!r} is async, and a worker has no event loop; await it in this process, "
                "or pass a sync function"
            )
            raise TypeError(msg)
        if timeout is not None:
            check_positive_seconds("timeout", timeout)
        dispatcher = self._lifecycle.get(self._make_dispatcher)
        future = dispatcher.new_future()
        work_item = self.calls.work_item(
            function,
            args,
            {},
            partial(resolve, future),  # no variable of this frame: see the end
            timeout=timeout,
        )
        if work_item is not None:
            dispatcher.submit(work_item)
        try:
            outcome: Outcome = await future
        except (asyncio.CancelledError, GeneratorExit):
            if work_item is not None:
                dispatcher.withdraw(work_item)
            raise
        try:
            return return_or_raise(outcome, function)  # type: ignore[no-any-return]
        finally:
            del outcome, future  # the traceback of an exception holds this frame

    async def stop(self, force: bool = False, timeout: float | None = None) -> None:  # noqa: ASYNC109, FBT001, FBT002 - as of AsyncBatcher
        """Refuse new work, run what is queued, and wait until all workers have exited.

        A cancelled stop is forced. A second stop does nothing.

        Args:
            force: Whether to fail all work with `BatcherStoppedError` and kill the workers. Idle
                workers with tear-downs get up to 2 seconds for them.
            timeout: Timeout in seconds after which the stop is forced. None disables it.

        Raises:
            TimeoutError: The stop was forced after ``timeout``.
            RuntimeError: The pool runs on another event loop.
        """
        await self._lifecycle.stop(force=force, timeout=timeout)

    async def __aenter__(self) -> Self:
        """Start the pool; see `start`."""
        try:
            await self.start()
        except BaseException:
            await self.stop(force=True)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the pool, by force if an exception leaves the block."""
        await self.stop(force=exc_type is not None)

    def workers(self) -> list[WorkerInfo]:
        """Return the worker processes, including those that start, stop or exit."""
        dispatcher = self._lifecycle.session
        if dispatcher is None or dispatcher.is_inherited:
            return []
        return [
            WorkerInfo(handle.worker.pid, state, handle.worker.batches, handle.memory())
            for handle in dispatcher.workers()
            if (state := handle.worker.public_state) != "exited"
        ]

    def debug_state(self) -> dict[str, Any]:
        """Return what the pool knows and its last 200 events, for reports of errors.

        The keys and values are for people: they may change with any release.
        """
        dispatcher = self._lifecycle.session
        return {} if dispatcher is None else dispatcher.debug_state()

    def as_executor(self) -> PoolExecutor:
        """Return a `concurrent.futures.Executor` that runs this pool in its own thread.

        The pool must not be in use. A pool that has been stopped is reopened.

        Raises:
            RuntimeError: The pool is in use on an event loop.
        """
        from async_batcher._pool.pool_executor import PoolExecutor

        self._lifecycle.discard_closed_loop()
        if self._lifecycle.session is not None:
            msg = "the pool is in use on an event loop; make another pool for the executor"
            raise RuntimeError(msg)
        self._lifecycle.is_stopped = False
        return PoolExecutor(self)

    # --- for the runner and the executor

    @property
    def _is_stopped(self) -> bool:  # what asks an executor whether it is over reads such names
        return self._lifecycle.is_stopped

    def dispatcher(self) -> PoolDispatcher:
        """Return the dispatcher on the running loop; make one if there is none.

        Raises:
            BatcherStoppedError: The pool has been stopped.
            RuntimeError: The pool is in use on another loop, or in the parent process.
        """
        return self._lifecycle.get(self._make_dispatcher)

    def _make_dispatcher(self) -> PoolDispatcher:
        if sys.platform == "win32":
            msg = (
                "WorkerPool needs an event loop that can watch sockets, which Windows does not "
                "have; use a ProcessPoolExecutor"
            )
            raise RuntimeError(msg)
        loop = asyncio.get_running_loop()
        self.crash_times.clear()  # another loop may have another clock
        return self._context.run(
            PoolDispatcher, self._name, loop, self._context, self._options, self._ledger
        )

    def worker_counts(self) -> WorkerCounts:
        """Return how many workers were started, and how they ended."""
        return self._ledger.counts()

    def withdraw(self, work_item: WorkItem) -> None:
        """Take a work item back if no worker has it yet."""
        if self._lifecycle.session is not None:
            self._lifecycle.session.withdraw(work_item)

    def close_without_loop(self) -> None:
        """Kill the workers after their loop has closed."""
        self._lifecycle.discard_closed_loop()

    def __reduce__(self) -> Any:
        """Refuse to be pickled."""
        msg = "a WorkerPool cannot be pickled; make one where it is used"
        raise TypeError(msg)
