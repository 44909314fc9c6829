"""Runners: where a batch runs. A runner gets batches of items, and knows nothing of their futures.

=========================  ==================  ========================  =======================
``executor=``              runner              adapter of the executor   slots: one set-up each
=========================  ==================  ========================  =======================
(async ``process_batch``)  `CoroutineRunner`   -                         the event loop
None                       `ExecutorRunner`    `DefaultExecutorAdapter`  as many as are needed
an executor                `ExecutorRunner`    `ExecutorAdapter`         the same; or its workers
"thread"                   `ExecutorRunner`    `OwnedExecutorAdapter`    the threads
"process", a `WorkerPool`  `WorkerPoolRunner`  -                         the workers
a factory, until it has    `PendingRunner`     -                         -
returned: an executor      `ExecutorRunner`    `OwnedExecutorAdapter`    the threads or workers
or a `WorkerPool`          `WorkerPoolRunner`  -                         the workers
=========================  ==================  ========================  =======================

Where there is no `WorkerPool` (on Windows), "process" is a factory of a standard pool.

Rules of a runner:

- `submit` never raises because of the batch. ``on_done`` is called exactly once, on the event
  loop's thread.
- Results that a generator yields go to ``on_results`` before that, on the same thread, unless the
  batch is pickled for an executor; then the worker collects them.
- A batch holds its slot until ``on_done`` is called, even if its callers are gone before.
- A batch runs in a copy of the context that was captured when the batcher was made.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from typing import TypeAlias

    from async_batcher._eventloop.halts import LimitTimer
    from async_batcher._worker.results import Outcome
    from async_batcher.current import BatchFacts
    from async_batcher.exceptions import BatchTimeoutError
    from async_batcher.failures import Later
    from async_batcher.stats import WorkerCounts

    OnDone: TypeAlias = Callable[[Outcome], None]
    # Called if a batch timed out and cannot be stopped, so that its slot leaks.
    OnTimeout: TypeAlias = Callable[[BatchTimeoutError], None]
    # Called, before ``on_done``, with the results of the next items, in order.
    OnResults: TypeAlias = Callable[[list[Any]], None]
    # Called with a `Later` that is not the outcome of its batch.
    OnLater: TypeAlias = Callable[[Later], None]
    HasCallers: TypeAlias = Callable[[], bool]


class BatchHandle:
    """A batch in a runner, as the front end sees it.

    Attributes:
        is_waiting: Whether it waits for a worker, or at one.
        began_at: When it began, on `time.monotonic`, if it had to wait: infinity until then.
            Otherwise 0.
    """

    __slots__ = ()

    is_waiting = False
    began_at = 0.0

    def cancel(self, *, force: bool, on_later: OnLater) -> None:
        """Cancel a batch without callers.

        Args:
            force: Without it, only if the batch has not started: ``on_done`` is then called before
                this returns. With it, ``on_done`` is called sooner or later.
            on_later: Called with a `Later` that the batch raises all the same, perhaps after
                ``on_done``, if that is not its outcome.
        """
        raise NotImplementedError


class RunningBatch:
    """A batch that a runner has; see `Runner.submit` for the callbacks.

    Attributes:
        timer: Of its time limit, while it is running; `finish` cancels it.
    """

    def __init__(
        self,
        on_done: OnDone,
        on_timeout: OnTimeout | None,
        has_callers: HasCallers | None,
        on_results: OnResults | None,
    ) -> None:
        self._on_done: OnDone | None = on_done
        self.on_timeout = on_timeout
        self._has_callers = has_callers
        self._on_results = on_results
        self.timer: asyncio.TimerHandle | LimitTimer | None = None

    def is_wanted(self) -> bool:
        """Tell whether it is to start."""
        has_callers = self._has_callers
        return has_callers is None or has_callers()

    def take(self, result: Any) -> bool:
        """Pass on a result that was yielded; return whether one of the other items has a caller."""
        on_results, has_callers = self._on_results, self._has_callers
        if on_results is None or has_callers is None:  # it is finished for the callers
            return False
        self._pass_on(on_results, result)
        return has_callers()

    def _pass_on(self, on_results: OnResults, result: Any) -> None:
        on_results([result])

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def finish(self, outcome: Outcome) -> None:
        """Pass the outcome on; only the first one counts."""
        self.cancel_timer()
        # They lead to the callers, thus to what is raised there, whose traceback leads here.
        self._has_callers = self._on_results = None
        on_done, self._on_done = self._on_done, None
        if on_done is not None:
            on_done(outcome)


class Runner:
    """Where batches run. The defaults are those of a runner that owns nothing.

    Attributes:
        runs_on_loop: Whether batches run on the event loop's own thread.
        crash_times: When batches recently crashed a worker or timed out; see `FailureIsolator`.
    """

    runs_on_loop = False

    def __init__(self) -> None:
        self.crash_times: deque[float] = deque()

    def full_batches_ahead(self, concurrency: int) -> int:  # noqa: ARG002 - of one that can take some
        """Return how many full batches may be submitted beyond ``concurrency``."""
        return 0

    async def start(self) -> None:
        """Start workers and run set-ups ahead of the first batch; raise what goes wrong there."""

    def submit(
        self,
        batch: list[Any],
        on_done: OnDone,
        on_timeout: OnTimeout,
        has_callers: HasCallers,
        on_results: OnResults,
        facts: BatchFacts | None = None,
    ) -> BatchHandle | None:
        """Run one batch, then call ``on_done`` with the outcome of what is left of it.

        Args:
            batch: The items.
            on_done: Called once.
            on_timeout: Called before that, at most once, if the batch timed out and cannot be
                stopped.
            has_callers: Asked, in any thread, when the batch starts in this process, and after each
                result that it yields.
            on_results: Called before ``on_done``, any number of times, with the results of the next
                items, which are then no longer left.
            facts: What the batch knows of itself beside its size; see `current_batch`. None: the
                defaults.

        Returns:
            Its handle, if it can be cancelled.
        """
        raise NotImplementedError

    def recall(self) -> None:
        """Have no batch start that waits: its ``on_done`` is called with `BatchRecalledError`.

        That may be after this returns. Batches that have started go on.
        """

    def owns_task(self, task: asyncio.Task[Any] | None) -> bool:  # noqa: ARG002 - most use no tasks
        """Tell whether ``task`` runs one of the batches."""
        return False

    def exclude_task(self, task: asyncio.Task[Any] | None) -> None:
        """Keep `close` from waiting for ``task``: the batch that calls it."""

    @property
    def tears_down(self) -> bool:
        """Whether a set-up has run that has, or may have, something to tear down."""
        return False

    async def run_tear_downs(self) -> None:
        """Run every tear-down while no batch runs. `close` follows, also if this is cancelled."""

    async def close(self, *, kill: bool) -> None:
        """End what the batcher made: with ``kill`` at once, otherwise when it is idle.

        With ``kill``, tear-downs that can run now get a moment; others run when their batch ends.
        """

    def workers(self) -> WorkerCounts | None:
        """Return what is known of worker processes; None if there are none of the batcher's."""
        return None

    def close_without_loop(self) -> None:
        """End what can be ended after the loop was closed without `close`."""
