"""How worker processes are started: one launcher for each start method.

==================  ================================================  ===============================================
launcher            starts a worker                                   sees its end
==================  ================================================  ===============================================
ForkServerLauncher  by asking our own fork server (`fork_server.py`)  the server reaps it, and reports it
SpawnLauncher       as a new Python, in a helper thread               `os.pidfd_open`, a kqueue, or a waiting thread
ForkLauncher        with `os.fork`, on the loop's thread              the same
==================  ================================================  ===============================================

None runs the user's main module, swaps ``sys.modules["__main__"]`` or touches what multiprocessing keeps for the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import warnings
from typing import TYPE_CHECKING, NoReturn, Protocol

from async_batcher._eventloop.offload import run_in_helper
from async_batcher._pool import resource_tracker
from async_batcher._pool.fork_server_client import ForkServerLauncher
from async_batcher._pool.interpreter import spawn_python
from async_batcher._pool.process_watcher import ProcessWatcher, kill_and_reap
from async_batcher._worker import signals as worker_signals

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from async_batcher._pool.process_watcher import ChildFds, ProcessCallbacks


class Launcher(Protocol):
    """Starts processes."""

    def launch(self, owner: ProcessCallbacks, ends: ChildFds) -> None:
        """Start a worker, and tell ``owner`` afterwards. It takes over ``ends``, unless it raises and has started nothing."""

    def give_up_on(self, owner: ProcessCallbacks) -> None:
        """A worker that it was to start has not been ready in time."""

    async def close(self) -> None:
        """End what was made to start workers; their own ends are their owners' matter."""

    def abandon(self) -> None:
        """The same without the loop, which has closed."""

    def forget(self) -> None:
        """In a forked child: close what belongs to the parent."""


def launcher_for(
    method: str, loop: asyncio.AbstractEventLoop, helpers: Executor
) -> ForkServerLauncher | SpawnLauncher | ForkLauncher:
    """The launcher for a start method, ``"forkserver"``, ``"spawn"`` or ``"fork"``."""
    if method == "forkserver":
        return ForkServerLauncher(loop, helpers)
    return SpawnLauncher(loop, helpers) if method == "spawn" else ForkLauncher(loop)


class SpawnLauncher(ProcessWatcher):
    """Starts a new Python for each worker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, helpers: Executor) -> None:
        super().__init__(loop)
        self._helpers = helpers
        self._making: set[asyncio.Future[int]] = set()
        self._is_abandoned = False
        self._unheard: set[int] = set()  # processes that have been started and whose owners have not heard of it

    def launch(self, owner: ProcessCallbacks, ends: ChildFds) -> None:
        def make() -> int:
            try:
                resource_tracker.ensure_running()
                pid = spawn_python("async_batcher._worker.main", "worker_main", tuple(ends))
            finally:
                ends.close()
            self._unheard.add(pid)
            if self._is_abandoned:
                self._end_unheard()
            return pid

        made = run_in_helper(self._loop, self._helpers, make)
        self._making.add(made)

        def on_made(made: asyncio.Future[int]) -> None:
            self._making.discard(made)
            error = made.exception()
            if error is not None:
                owner.not_started(error)
                return
            pid = made.result()
            self._unheard.discard(pid)
            self.watch(pid, owner)
            owner.started(pid)

        made.add_done_callback(on_made)

    def abandon(self) -> None:
        self._is_abandoned = True
        self._end_unheard()
        super().abandon()

    def _end_unheard(self) -> None:
        with contextlib.suppress(KeyError):  # by whom it is taken, by whom it is ended: the loop's thread or a helper
            while True:
                kill_and_reap(self._unheard.pop())

    async def close(self) -> None:
        if self._making:  # of members that have not waited for it
            await asyncio.wait(self._making)
            await asyncio.sleep(0)
        await super().close()


class ForkLauncher(ProcessWatcher):
    """Forks this process."""

    def launch(self, owner: ProcessCallbacks, ends: ChildFds) -> None:
        for stream in (sys.stdout, sys.stderr):  # or the worker prints once more what waits there
            with contextlib.suppress(Exception):  # closed, or none, or one of the user's
                stream.flush()
        with worker_signals.blocked():
            pid, warned = _fork()
            if pid == 0:
                _run_worker(ends)
        ends.close()
        self._loop.call_soon(owner.started, pid)
        self.watch(pid, owner)
        for warning in warned:
            self._loop.call_soon(_warn, warning)  # by itself: a filter may make an error of it


def _fork() -> tuple[int, list[warnings.WarningMessage]]:
    """Fork, without a warning that is an error: it would be raised when the child is there, and nothing would know the child."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pid = os.fork()
    return pid, warned or []


def _warn(warning: warnings.WarningMessage) -> None:
    registry = globals().setdefault("__warningregistry__", {})
    warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno, __name__, registry)


def _run_worker(ends: ChildFds) -> NoReturn:
    try:
        from async_batcher._worker import bootstrap
        from async_batcher._worker import main as worker_main

        bootstrap.drop_parent_state()
        worker_main.worker_main(*ends)
    finally:
        os._exit(1)  # never back into the parent's loop
