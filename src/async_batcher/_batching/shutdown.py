"""Start and end of a scheduler: drain, force, tear-downs, timeouts.

::

    close() --> drain --> tear-downs --> Runner.close --> ended
      |          |           |
      `----------`-----------`--- force, timeout, cancellation: abort, Runner.close(kill=True)
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextvars import Context

    from async_batcher._batching.scheduler import Scheduler
    from async_batcher._runners.base import Runner


class Shutdown:
    """Starts and ends one scheduler.

    Attributes:
        ended: Resolved when everything that the batcher made has ended.
    """

    def __init__(self, scheduler: Scheduler, context: Context) -> None:
        loop = scheduler.loop
        self._scheduler = scheduler
        self._loop = loop
        self._context = context
        self._starting = 0  # calls of `start` that have not returned
        self._forced = False
        self._drained: asyncio.Future[None] = loop.create_future()
        self._tear_downs: asyncio.Task[None] | None = None
        self._torn_down: asyncio.Future[None] = loop.create_future()
        self._ending: asyncio.Task[None] | None = None
        self.ended: asyncio.Future[None] = loop.create_future()

    @property
    def _runner(self) -> Runner:
        return self._scheduler.inflight.runner

    async def start(self) -> None:
        """Start the runner; see `Runner.start`."""
        self._starting += 1
        try:
            await self._runner.start()
        finally:
            self._starting -= 1
            self.check_drained()

    async def close(self, *, force: bool, timeout: float | None) -> None:  # noqa: ASYNC109 - it bounds one stage of several
        """Accept no more, run what is queued, and end.

        Raises:
            TimeoutError: It took longer than ``timeout``; what had not finished has failed.
        """
        scheduler = self._scheduler
        scheduler.closing = True
        timed_out = False
        until = self._loop.time() + (timeout or 0.0)
        task = asyncio.current_task()
        if self._runner.owns_task(task):
            self._runner.exclude_task(task)  # by force: a batch cannot wait for itself
        try:
            if force:
                self.abort()
            else:
                scheduler.drain()
            if not self._drained.done():
                done, _ = await asyncio.wait([self._drained], timeout=timeout)
                if not done:
                    timed_out = True
                    self.abort()
            if self._ending is None:
                self._ending = self._loop.create_task(self._end(), context=self._context.copy())
            if not timed_out and timeout is not None and self._runner.tears_down:
                left = max(0.0, until - self._loop.time())
                await asyncio.wait([self._torn_down], timeout=left)
                if not self._torn_down.done():
                    timed_out = True
                    self.abort()
            await asyncio.shield(self._ending)
        except asyncio.CancelledError:
            await self._end_forced()
            raise
        if timed_out:
            msg = f"the batcher did not stop within {timeout} seconds; it was stopped by force"
            raise TimeoutError(msg)

    def abort(self) -> None:
        """Fail everything now."""
        self._forced = True
        if self._tear_downs is not None:
            self._tear_downs.cancel()
        self._scheduler.fail_everything()
        self.mark_drained()

    def check_drained(self) -> None:
        """Go on with the end if nothing runs, waits or starts."""
        scheduler = self._scheduler
        if not scheduler.closing or self._starting or self._drained.done():
            return
        if not (scheduler.inflight or scheduler.inflight.isolator or len(scheduler.queue)):
            self.mark_drained()

    def mark_drained(self) -> None:
        if not self._drained.done():
            self._drained.set_result(None)

    def mark_ended(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    async def _end(self) -> None:
        runner = self._runner
        try:
            if not self._forced and runner.tears_down:
                self._tear_downs = self._loop.create_task(
                    runner.run_tear_downs(), context=self._context.copy()
                )
                await asyncio.wait([self._tear_downs])
            if not self._torn_down.done():
                self._torn_down.set_result(None)
            await runner.close(kill=self._forced)
        finally:
            self._scheduler.expiry.cancel()
            self.mark_ended()

    async def _end_forced(self) -> None:
        """Complete the end although the task that waits for it is cancelled."""
        self.abort()
        if self._ending is None or self._ending.cancelled():
            self._ending = self._loop.create_task(self._end(), context=self._context.copy())
        while not self._ending.done():
            try:
                await asyncio.wait([self._ending])
            except asyncio.CancelledError:
                continue
