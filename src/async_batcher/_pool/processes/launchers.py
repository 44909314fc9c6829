"""How worker processes are started: one launcher for each start method.

- `ForkServerLauncher` asks our fork server (`fork_server_client.py`), which reaps the worker and
  reports its exit.
- `SpawnLauncher` starts a new Python in a helper thread, `ForkLauncher` forks on the loop's thread.
  Both see the exit by `os.pidfd_open`, a kqueue, or a thread.

None of them runs the user's main module, replaces ``sys.modules["__main__"]`` or changes what
multiprocessing keeps for the process.

A launcher's ``launch(worker, child_fds)`` starts a process and calls ``worker.on_started``. It owns
``child_fds``, unless it raises, and then it has started nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import warnings
from typing import TYPE_CHECKING, NoReturn

from async_batcher._eventloop.offload import run_in_helper
from async_batcher._pool.processes import resource_tracker
from async_batcher._pool.processes.fork_server_client import ForkServerLauncher
from async_batcher._pool.processes.interpreter import spawn_python, start_timeout_error
from async_batcher._pool.processes.process_watcher import ProcessWatcher, kill_and_reap
from async_batcher._worker import bootstrap
from async_batcher._worker import signals as worker_signals

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from async_batcher._eventloop.guarded_loop import GuardedLoop
    from async_batcher._pool.processes.process_watcher import ChildFds
    from async_batcher._pool.worker_handle import WorkerHandle
    from async_batcher._transport.protocol import Preload


def launcher_for(
    method: str, loop: GuardedLoop, thread_pool: Executor, preload: Callable[[], Preload | None]
) -> ForkServerLauncher | SpawnLauncher | ForkLauncher:
    if method == "forkserver":
        return ForkServerLauncher(loop, thread_pool, preload)
    return SpawnLauncher(loop, thread_pool) if method == "spawn" else ForkLauncher(loop)


class SpawnLauncher(ProcessWatcher):
    """Starts a new Python for each worker."""

    def __init__(self, loop: GuardedLoop, thread_pool: Executor) -> None:
        super().__init__(loop)
        self._thread_pool = thread_pool
        self._starting: set[asyncio.Future[int]] = set()
        self._cancelled = self._closed = False
        self._unreported: set[int] = set()  # processes whose `on_started` has not been called

    def launch(self, worker: WorkerHandle, child_fds: ChildFds) -> None:
        def start() -> int:
            try:
                resource_tracker.ensure_running()
                if self._cancelled:
                    msg = "the pool is being stopped"
                    raise RuntimeError(msg)
                args = tuple(child_fds)
                module = "async_batcher._worker.main"
                pid = spawn_python(module, "worker_main", args, page=args[1])
            finally:
                child_fds.close()
            self._unreported.add(pid)
            if self._closed:
                self._kill_unreported()
            return pid

        starting = run_in_helper(self._loop, self._thread_pool, start)
        self._starting.add(starting)

        def on_done(started: asyncio.Future[int]) -> None:
            self._starting.discard(started)
            error = started.exception()
            if error is not None:
                worker.on_start_failed(error)
                return
            pid = started.result()
            self._unreported.discard(pid)
            self.watch(pid, worker)
            worker.on_started(pid)

        starting.add_done_callback(self._loop.guard(on_done))

    def on_start_timeout(self, worker: WorkerHandle) -> None:
        if not worker.progress(None).is_running:
            worker.worker.explain_start_failure(start_timeout_error())

    def cancel_starts(self) -> None:
        self._cancelled = True

    def close_without_loop(self) -> None:
        self._cancelled = self._closed = True
        self._kill_unreported()
        super().close_without_loop()

    def _kill_unreported(self) -> None:
        # The loop's thread and a helper may both do this: each kills what it pops.
        with contextlib.suppress(KeyError):
            while True:
                kill_and_reap(self._unreported.pop())

    async def close(self) -> None:
        if self._starting:  # workers that were killed before they had a process
            await asyncio.wait(self._starting)
            await asyncio.sleep(0)
        await super().close()


class ForkLauncher(ProcessWatcher):
    """Forks this process."""

    def launch(self, worker: WorkerHandle, child_fds: ChildFds) -> None:
        for stream in (sys.stdout, sys.stderr):  # or the worker prints their buffers again
            with contextlib.suppress(Exception):  # closed, missing, or the user's object
                stream.flush()
        with worker_signals.blocked():
            pid, warned = bootstrap.fork()
            if pid == 0:
                _run_worker(child_fds)
        child_fds.close()
        self._loop.call_soon(worker.on_started, pid)
        self.watch(pid, worker)
        for warning in warned:  # by itself: a filter may turn the warning into an error
            self._loop.call_soon_unguarded(_warn, warning)


def _warn(warning: warnings.WarningMessage) -> None:
    registry = globals().setdefault("__warningregistry__", {})
    place = warning.filename, warning.lineno, __name__
    warnings.warn_explicit(warning.message, warning.category, *place, registry)


def _run_worker(child_fds: ChildFds) -> NoReturn:
    try:
        from async_batcher._worker import main as worker_main

        bootstrap.drop_parent_state()
        worker_main.worker_main(*child_fds)
    finally:
        os._exit(1)  # never back into the parent's loop
