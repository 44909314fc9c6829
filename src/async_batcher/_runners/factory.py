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
- An executor that breaks is made again (`owned_executor`). A `WorkerPool` replaces its workers
  itself, so it is made once.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from async_batcher._pool.checks import is_worker_pool
from async_batcher._runners.base import Runner
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

# Where executors keep that they are broken or shut down; none has a public attribute for it.
_END_ATTRIBUTES = ("_broken", "_shutdown", "_shutdown_thread", "_is_shut_down", "_is_stopped")

logger = logging.getLogger("async_batcher")


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


def is_over(executor: object) -> bool | None:
    """Tell whether an executor is broken or shut down; None if unknown."""
    if type(executor) is ThreadPoolExecutor:  # asked for each batch
        return bool(executor._broken or executor._shutdown)  # noqa: SLF001
    flags = getattr(executor, "_flags", None)  # of loky
    values = [
        *(getattr(executor, name, None) for name in _END_ATTRIBUTES),
        *(getattr(flags, name, None) for name in ("broken", "shutdown")),
    ]
    # A subclass may have methods of these names. `_broken` is a message or False; None in loky,
    # where that means nothing.
    known = [value for value in values if isinstance(value, bool | str | BaseException)]
    return any(map(bool, known)) if known else None


def discard(made: Executor | WorkerPool | None) -> None:
    """Shut down an executor in which nothing runs, without waiting."""
    if not isinstance(made, Executor):
        return  # a `WorkerPool` starts with its first batch
    try:
        made.shutdown(wait=False)
    except Exception as exc:  # noqa: BLE001 - the user's executor
        log_failed_shutdown(made, exc)


def log_failed_shutdown(executor: Executor, error: Exception) -> None:
    name = type(executor).__qualname__
    logger.error("%s.shutdown() failed: %s", name, one_line(error), exc_info=error)


class PendingRunner(Runner):
    """The runner of a batcher whose factory has not returned yet. It gets no batches.

    Args:
        loop: The batcher's event loop.
        make: Makes the executor; called in a thread.
        adopt: Makes the runner for the executor; called on the loop.
        function: The name of the batch function, for the log.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        make: Factory,
        adopt: Callable[[Executor | WorkerPool], Runner],
        function: str,
    ) -> None:
        super().__init__()
        self._loop = loop
        self._make = make
        self._adopt = adopt
        self._use: Callable[[Runner, Executor | WorkerPool], object]
        self._fail: Callable[[BaseException], object]
        self._function = function
        self._runner: Runner | None = None
        self._error: BaseException | None = None
        self._decided: asyncio.Future[None] = loop.create_future()  # by the factory, or by a stop

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
        await asyncio.wait([self._decided])
        if self._runner is None:
            raise CallerExceptions().own(self._error or _stopped_error())
        return self._runner

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
            await asyncio.wait([self._decided], timeout=FACTORY_STOP_GRACE)
        if self._runner is not None:
            await self._runner.close(kill=kill)
        elif not self._decided.done():
            self._error = _stopped_error()
            self._decided.set_result(None)

    def _call(self) -> None:
        made = error = None
        try:
            made = self._make()
        except BaseException as exc:  # noqa: BLE001 - user code
            error = exc
        try:
            self._loop.call_soon_threadsafe(self._on_returned, made, error)
        except RuntimeError:  # the loop has closed
            discard(made)
        finally:
            del error  # its traceback holds this frame

    def _on_returned(self, made: Executor | WorkerPool | None, error: BaseException | None) -> None:
        if self._decided.done():
            discard(made)
            return
        if made is not None:
            try:
                self._runner = self._adopt(made)
            except BaseException as exc:  # noqa: BLE001 - or the callers would wait forever
                discard(made)
                error = exc
        self._decided.set_result(None)
        if error is not None:
            self._error = error
            logger.error("No executor for batches of %s: %s", self._function, one_line(error))
            self._fail(error)
        elif self._runner is not None and made is not None:
            self._use(self._runner, made)


def _stopped_error() -> BatcherStoppedError:
    msg = "the batcher was stopped before its executor= factory returned"
    return BatcherStoppedError(msg)
