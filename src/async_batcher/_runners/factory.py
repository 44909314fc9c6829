"""Factories: callables without arguments that make an executor, until the first one returns.

::

    first call --> PendingRunner --thread: factory()--> Executor, WorkerPool --> its runner runs
                                                  `-> an error, for every caller of the session;
                                                      the next call starts over

Rules:

- A factory runs in a thread of its own: it may take seconds, while the event loop goes on.
- No batch is dispatched before the factory returns: its workers define how many batches run at a
  time, and how many items of `process_many` each gets.
- What a factory returns after the batcher was stopped is shut down.
- An executor that breaks is made again (`OwnedExecutorAdapter`). A `WorkerPool` replaces its
  workers itself, so it is made once.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from async_batcher._pool.checks import is_worker_pool
from async_batcher._pool.cpu_count import cpu_count
from async_batcher._runners.base import Runner
from async_batcher._runners.known_executors import is_over, shut_down
from async_batcher._serialization.caller_exceptions import CallerExceptions
from async_batcher._serialization.exception_text import one_line
from async_batcher.exceptions import BatcherStoppedError, PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from async_batcher._pool.pool import WorkerPool

    Factory: TypeAlias = Callable[[], Executor | WorkerPool]

# Seconds that a stop waits for a factory; constructing a pool takes milliseconds.
FACTORY_STOP_GRACE = 2.0

logger = logging.getLogger("async_batcher")


def standard_factory(executor: str, workers: int, *, has_worker_pool: bool) -> Factory:
    """Return what makes the executor for ``executor="thread"`` or ``executor="process"``."""
    if executor == "thread":
        return partial(ThreadPoolExecutor, workers, thread_name_prefix="async_batcher")
    if not has_worker_pool:
        return partial(_standard_pool, workers)
    from async_batcher._pool.pool import WorkerPool

    return partial(WorkerPool, workers)


def _standard_pool(workers: int) -> Executor:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from async_batcher._worker.bootstrap import init_standard_worker

    # Not fork: with other threads, a forked child may hang on a lock that is never released.
    method = "forkserver" if sys.platform == "linux" else "spawn"
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context(method),
        initializer=init_standard_worker,
        initargs=(max(1, cpu_count() // workers),),
    )


def call_factory(factory: Factory, name: str) -> Executor | WorkerPool:
    """Call a factory; raise PoolBrokenError, with the option's ``name``, if that makes none."""
    try:
        made: Any = factory()
    except BaseException as exc:
        msg = (
            f"{name} raised {one_line(exc)}. No batch can run without its executor; "
            "the next call tries again"
        )
        raise PoolBrokenError(msg) from exc
    if not isinstance(made, Executor) and not is_worker_pool(made):
        hint = ""
        if inspect.iscoroutine(made):
            made.close()  # or Python warns that it was never awaited
            hint = ", not a coroutine"
        elif isinstance(made, type):
            hint = ", not a class"
        msg = (
            f"{name} returned {made!r:.120}; it must return a concurrent.futures.Executor "
            f"or a WorkerPool{hint}"
        )
        raise PoolBrokenError(msg)
    if is_over(made):
        msg = (
            f"{name} returned an executor that is broken or shut down ({made!r:.120}), perhaps one "
            "that it returned before; it must make a new one at each call"
        )
        raise PoolBrokenError(msg)
    return made  # type: ignore[no-any-return]


def _discard(made: Executor | WorkerPool | None) -> None:
    """Shut down what a factory made, in which nothing runs, without waiting."""
    if isinstance(made, Executor):  # a `WorkerPool` starts with its first batch
        shut_down(made, wait=False)


class PendingRunner(Runner):
    """The runner of a batcher whose factory has not returned yet. It gets no batches.

    Args:
        loop: The batcher's event loop.
        make: Makes the executor; called in a thread.
        adopt: Makes the runner for the executor; called on the loop.
        name: What the log calls the batcher.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        make: Factory,
        adopt: Callable[[Executor | WorkerPool], Runner],
        name: str,
    ) -> None:
        super().__init__()
        self._loop = loop
        self._make = make
        self._adopt = adopt
        self._use: Callable[[Runner, Executor | WorkerPool], object]
        self._fail: Callable[[BaseException], object]
        self._name = name
        self._made: asyncio.Future[Runner] = loop.create_future()  # or the factory failed

    def begin(
        self,
        use: Callable[[Runner, Executor | WorkerPool], object],
        fail: Callable[[BaseException], object],
    ) -> None:
        """Call the factory; raise RuntimeError if the system has no thread left.

        Args:
            use: Called on the loop with the runner and what the factory returned.
            fail: Called on the loop with what it raised.
        """
        self._use, self._fail = use, fail
        threading.Thread(target=self._call, name="async_batcher-factory", daemon=True).start()

    async def ready(self) -> Runner:
        """Wait for the factory; raise its error, or BatcherStoppedError."""
        await asyncio.wait([self._made])
        if self._runner is None:
            raise CallerExceptions().own(self._made.exception())  # type: ignore[arg-type]
        return self._runner

    @property
    def _runner(self) -> Runner | None:
        made = self._made
        return made.result() if made.done() and made.exception() is None else None

    async def start(self) -> None:
        await (await self.ready()).start()

    @property
    def tears_down(self) -> bool:
        return self._runner is not None and self._runner.tears_down

    async def run_tear_downs(self) -> None:
        if self._runner is not None:
            await self._runner.run_tear_downs()

    async def close(self, *, kill: bool) -> None:
        """End what the factory made; if it takes long, as soon as it returns."""
        if not kill:
            await asyncio.wait([self._made], timeout=FACTORY_STOP_GRACE)
        if self._runner is not None:
            await self._runner.close(kill=kill)
        elif not self._made.done():
            msg = "the batcher was stopped before its executor= factory returned"
            self._set_error(BatcherStoppedError(msg))

    def _call(self) -> None:
        made = error = None
        try:
            made = self._make()
        except BaseException as exc:  # noqa: BLE001 - user code
            error = exc
        try:
            self._loop.call_soon_threadsafe(self._on_returned, made, error)
        except RuntimeError:  # the loop has closed
            _discard(made)
        finally:
            del error  # its traceback holds this frame

    def _on_returned(self, made: Executor | WorkerPool | None, error: BaseException | None) -> None:
        if self._made.done():
            _discard(made)
            return
        if made is not None:
            try:
                runner = self._adopt(made)
            except BaseException as exc:  # noqa: BLE001 - or the callers would wait forever
                _discard(made)
                error = exc
        if error is not None:
            self._set_error(error)
            logger.error("%s: the executor could not be made: %s", self._name, one_line(error))
            self._fail(error)
        elif made is not None:
            self._made.set_result(runner)
            self._use(runner, made)

    def _set_error(self, error: BaseException) -> None:
        self._made.set_exception(error)
        self._made.exception()  # or asyncio logs that it was never retrieved
