"""Starts workers, and owns what they are started with: the launcher and the helper threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from async_batcher._eventloop.future import resolve
from async_batcher._pool.processes.interpreter import current_dir, program_argv, search_path
from async_batcher._pool.processes.launchers import launcher_for
from async_batcher._pool.worker_handle import WorkerHandle
from async_batcher._worker.inherited import read_inherited

if TYPE_CHECKING:
    from contextvars import Context

    from async_batcher._pool.driver import WorkerDriver
    from async_batcher._pool.pool_options import PoolOptions
    from async_batcher._pool.state.worker import Worker
    from async_batcher._transport.protocol import Preload, WorkerSettings


class WorkerStarter:
    """Starts the workers of a pool."""

    def __init__(self, context: Context, driver: WorkerDriver, options: PoolOptions) -> None:
        self._loop = driver.loop
        self._context = context
        self._driver = driver
        self._options = options
        self._initializer = options.pickled_initializer()
        self._threads: set[threading.Thread] = set()  # of the pool; each adds itself
        self._thread_pool = ThreadPoolExecutor(
            options.size + 1,
            thread_name_prefix="async_batcher-pool",
            initializer=lambda threads: threads.add(threading.current_thread()),
            initargs=(self._threads,),
        )
        self._launcher = launcher_for(
            options.start_method, self._loop, self._thread_pool, self._preload
        )

    def start(self, worker: Worker) -> None:
        """Start the process of a worker, whose handle is there before anything of it can fail."""
        self._context.run(self._start, worker)

    def _start(self, worker: Worker) -> None:
        handle = WorkerHandle(worker, self._loop, self._driver, self._thread_pool)
        self._driver.handles[worker] = handle
        try:
            handle.send_init(self._settings(worker.number))
            self._launcher.launch(handle, handle.child_fds)
        except BaseException as exc:
            handle.child_fds.close()
            self._loop.call_soon(handle.on_start_failed, exc)
            if not isinstance(exc, Exception):  # Ctrl-C
                raise

    def _settings(self, number: int | None) -> WorkerSettings:
        process = multiprocessing.current_process()
        return {
            "number": number,
            "threads": self._options.threads,
            "path": search_path(),
            "argv": program_argv(),
            "folder": current_dir(),
            "inherited": read_inherited(),
            "parent": (process.name, os.getpid()),
            "authkey": bytes(process.authkey),  # for the proxies of multiprocessing's managers
            "start_method": multiprocessing.get_start_method(allow_none=True),
            "initializer": self._initializer,
        }

    def _preload(self) -> Preload | None:
        """Return what a fork server is to import, and needs for that."""
        names = self._options.preload
        return (names, {**self._settings(None), "initializer": None}) if names else None

    def renew(self) -> None:
        """Start later workers from a new fork server, if there is one."""
        self._launcher.renew()

    def cancel_starts(self) -> None:
        """Start no process that has not been started: the pool stops."""
        self._launcher.cancel_starts()
        self._thread_pool.shutdown(wait=False)  # now, while processes exit

    def on_start_timeout(self, worker: WorkerHandle) -> None:
        """Handle a worker that was not ready in time; the fork server may be why."""
        self._launcher.on_start_timeout(worker)

    async def close(self) -> None:
        """Close the launcher and the threads, when all workers have exited."""
        await self._launcher.close()
        if not any(thread.is_alive() for thread in list(self._threads)):  # most often
            self._thread_pool.shutdown()
            return
        ended = self._loop.create_future()

        def shut_down() -> None:
            self._thread_pool.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(resolve, ended, None)

        # In a thread, since a helper may still copy a large batch for a cancelled caller.
        try:
            name = "async_batcher-pool-end"
            thread = threading.Thread(target=shut_down, name=name, daemon=True)
            thread.start()
        except RuntimeError:  # no threads left
            self._thread_pool.shutdown()
        else:
            await ended
            thread.join()

    def close_without_loop(self) -> None:
        self._launcher.close_without_loop()
        self._thread_pool.shutdown(wait=False)

    def close_after_fork(self) -> None:
        self._launcher.close_after_fork()
