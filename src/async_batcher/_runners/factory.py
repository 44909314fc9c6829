"""Factories: callables without arguments that make what batches run in, and the time until the first one has returned.

::

    first call --> PendingRunner --thread: factory()--> Executor, WorkerPool --> its runner takes over, the queue moves
                                                    `-> an error --> every caller of the session; the next call tries again

Rules:

- A factory runs in a thread of its own: it may take seconds (to load a model, to reach a cluster) while the event loop goes on.
- No batch is dispatched before the factory has returned: its workers say how many batches run at a time, and how many items
  `process_many` puts into each.
- What a factory returned after the batcher stopped is shut down.
- An executor that breaks is made again (`adapters.Made`). A `WorkerPool` replaces its workers itself, so it is made once.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import deque
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from async_batcher._pool.checks import is_worker_pool
from async_batcher._serialization.caller_exceptions import CallerExceptions
from async_batcher._serialization.exception_text import one_line
from async_batcher.exceptions import BatcherStoppedError, PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from async_batcher._pool.pool import WorkerPool
    from async_batcher._runners.base import CancelBatch, Runner
    from async_batcher._worker.results import Outcome
    from async_batcher.exceptions import BatchTimeoutError

    Factory: TypeAlias = Callable[[], Executor | WorkerPool]

STOP_PATIENCE = 2.0  # seconds that a stop waits for a factory; those that only construct a pool return in milliseconds

# Where executors keep that they are broken or shut down; none says so in public. Standard pools, ours, `WorkerPool`.
_END_ATTRIBUTES = ("_broken", "_shutdown", "_shutdown_thread", "_is_shut_down", "_is_stopped")

logger = logging.getLogger("async_batcher")


def call_factory(factory: Factory, name: str) -> Executor | WorkerPool:
    """Call a factory, and check what it returns.

    Args:
        factory: The factory.
        name: The option as the user wrote it, for messages.

    Raises:
        PoolBrokenError: The factory raised, or returned something that can run no batch.
    """
    try:
        made: Any = factory()
    except BaseException as exc:
        msg = f"{name} raised {one_line(exc)}. No batch can run without its executor; the next call tries again"
        raise PoolBrokenError(msg) from exc
    if not isinstance(made, Executor) and not is_worker_pool(made):
        hint = ""
        if inspect.iscoroutine(made):
            made.close()  # or Python warns that it was never awaited
            hint = ", not a coroutine"
        elif isinstance(made, type):
            hint = ", not a class"
        msg = f"{name} returned {made!r:.120}; it must return a concurrent.futures.Executor or a WorkerPool{hint}"
        raise PoolBrokenError(msg)
    if is_over(made):
        msg = (
            f"{name} returned an executor that is broken or shut down ({made!r:.120}), perhaps one that it returned before; "
            "it must make a new one at each call"
        )
        raise PoolBrokenError(msg)
    return made  # type: ignore[no-any-return]


def is_over(executor: object) -> bool | None:
    """Return whether an executor is broken or shut down; None: it does not tell."""
    if type(executor) is ThreadPoolExecutor:  # asked for each batch
        return bool(executor._broken or executor._shutdown)  # noqa: SLF001
    flags = getattr(executor, "_flags", None)  # of loky
    values = [
        *(getattr(executor, name, None) for name in _END_ATTRIBUTES),
        *(getattr(flags, name, None) for name in ("broken", "shutdown")),
    ]
    # A subclass may have methods of these names. `_broken` is a message or False, and None in loky; that is no state by itself.
    known = [value for value in values if isinstance(value, bool | str | BaseException)]
    return any(map(bool, known)) if known else None


def discard(made: Executor | WorkerPool | None) -> None:
    """Shut down an executor in which nothing runs, without waiting for it."""
    if not isinstance(made, Executor):
        return  # a `WorkerPool` starts with its first batch
    try:
        made.shutdown(wait=False)
    except Exception:
        logger.exception("%s.shutdown() failed", type(made).__qualname__)


class PendingRunner:
    """The runner of a batcher whose executor a factory is still making.

    Args:
        loop: The event loop of the batcher.
        make: Returns the executor; called in a thread.
        adopt: Makes the runner for what ``make`` returned; called on the loop.
        use: Called on the loop with both.
        fail: Called on the loop with what ``make`` raised.
    """

    runs_on_loop = False

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        make: Factory,
        adopt: Callable[[Executor | WorkerPool], Runner],
        use: Callable[[Runner, Executor | WorkerPool], object],
        fail: Callable[[BaseException], object],
    ) -> None:
        self.spent: deque[float] = deque()
        self._loop = loop
        self._make = make
        self._adopt = adopt
        self._use = use
        self._fail = fail
        self._runner: Runner | None = None
        self._error: BaseException | None = None
        self._is_decided: asyncio.Future[None] = loop.create_future()  # by the factory, or by a stop

    def begin(self) -> None:
        """Call the factory.

        Raises:
            RuntimeError: The system has no thread left.
        """
        threading.Thread(target=self._call, name="async_batcher-factory", daemon=True).start()

    async def ready(self) -> Runner:
        """Wait for the factory.

        Raises:
            PoolBrokenError: See `call_factory`.
            BatcherStoppedError: The batcher was stopped first.
        """
        await asyncio.wait([self._is_decided])
        if self._runner is None:
            raise CallerExceptions().own(self._error or _stopped())
        return self._runner

    async def start(self) -> None:
        """Wait for the factory, and start what it made."""
        await (await self.ready()).start()

    def submit(
        self,
        batch: list[Any],
        done: Callable[[Outcome], None],
        late: Callable[[BatchTimeoutError], None],
        has_callers: Callable[[], bool],
    ) -> CancelBatch | None:
        """Never called: the session keeps its items until the runner is known."""
        raise NotImplementedError

    def owns_task(self, task: asyncio.Task[Any] | None) -> bool:  # noqa: ARG002 - nothing runs
        """Return False: nothing runs yet."""
        return False

    def exclude_task(self, task: asyncio.Task[Any] | None) -> None:
        """Do nothing: no task is a batch of it."""

    @property
    def tears_down(self) -> bool:
        """Whether what the factory made has something to tear down."""
        return self._runner is not None and self._runner.tears_down

    async def run_tear_downs(self) -> None:
        """Tear down in what the factory made."""
        if self._runner is not None:
            await self._runner.run_tear_downs()

    async def close(self, *, kill: bool) -> None:
        """End what the factory made; with ``kill``, and where the factory takes long, as soon as it has returned."""
        if not kill:
            await asyncio.wait([self._is_decided], timeout=STOP_PATIENCE)
        if self._runner is not None:
            await self._runner.close(kill=kill)
        else:
            self._give_up()

    def workers(self) -> None:
        """Return None: there are no workers yet."""

    def close_without_loop(self) -> None:
        """The loop has closed: `_call` sees that by itself."""

    def _give_up(self) -> None:
        if not self._is_decided.done():
            self._error = _stopped()
            self._is_decided.set_result(None)

    def _call(self) -> None:
        try:
            made = self._make()
        except BaseException as exc:  # noqa: BLE001 - user code
            error = exc
            self._tell(lambda: self._failed(error), None)
        else:
            self._tell(lambda: self._came(made), made)

    def _tell(self, report: Callable[[], object], made: Executor | WorkerPool | None) -> None:
        try:
            self._loop.call_soon_threadsafe(report)
        except RuntimeError:  # the loop has closed
            discard(made)

    def _came(self, made: Executor | WorkerPool) -> None:
        if self._is_decided.done():
            discard(made)
            return
        try:
            runner = self._adopt(made)
        except BaseException as exc:  # noqa: BLE001 - no caller waits for ever because an executor is odd
            discard(made)
            self._failed(exc)
            return
        self._runner = runner
        self._is_decided.set_result(None)
        self._use(runner, made)

    def _failed(self, error: BaseException) -> None:
        if not self._is_decided.done():
            self._error = error
            self._is_decided.set_result(None)
            logger.error("The executor of a batcher could not be made: %s", one_line(error))
            self._fail(error)


def _stopped() -> BatcherStoppedError:
    return BatcherStoppedError("the batcher was stopped before its executor= factory had returned")
