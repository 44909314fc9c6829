"""The parent's side of our fork server (`fork_server.py`)."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.offload import run_in_helper
from async_batcher._pool.processes import interpreter, resource_tracker
from async_batcher._pool.processes.exit_status import exit_phrase
from async_batcher._pool.processes.interpreter import spawn_python
from async_batcher._pool.processes.process_watcher import (
    ProcessWatcher,
    kill_and_reap,
    reap_orphans,
    resume,
)
from async_batcher._pool.state.worker import PRELOAD_FAILED, StartFailure
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.remote_exception import decode_exception
from async_batcher._transport import shared_memory, status_page
from async_batcher._transport.protocol import FORK_REQUEST, ForkServerEvent, take_events

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from concurrent.futures import Executor

    from async_batcher._eventloop.guarded_loop import GuardedLoop
    from async_batcher._pool.processes.process_watcher import ChildFds
    from async_batcher._pool.worker_handle import WorkerHandle
    from async_batcher._transport.protocol import Preload


class ForkServerLauncher(ProcessWatcher):
    """Asks a fork server for workers.

    The server starts with the first worker, and again if it exits or does not react in time. After
    `renew` another one starts workers. If that never serves, as its ``preload`` has failed, the one
    before does so again.

    Args:
        loop: The event loop.
        thread_pool: Starts processes.
        preload: Returns what a server is to import; see `fork_server.serve`.
    """

    def __init__(
        self, loop: GuardedLoop, thread_pool: Executor, preload: Callable[[], Preload | None]
    ) -> None:
        super().__init__(loop)
        self._thread_pool = thread_pool
        self._preload = preload
        self._servers: list[_ForkServerClient] = []  # the last one starts workers
        self._renews = False

    def launch(self, worker: WorkerHandle, child_fds: ChildFds) -> None:
        self._servers = servers = [server for server in self._servers if not server.closed]
        if self._renews or not servers or servers[-1].retired:
            servers.append(_ForkServerClient(self, self._loop, self._thread_pool, self._preload()))
            self._renews = False
        servers[-1].request(worker, child_fds)

    def renew(self) -> None:
        self._renews = True

    def cancel_starts(self) -> None:
        for server in self._servers:
            server.cancel_starts()

    def on_serving(self, server: _ForkServerClient) -> None:
        """Retire the servers before one that serves."""
        for before in self._servers[: self._servers.index(server)]:
            before.retire()

    def why_not_again(self, failed: _ForkServerClient) -> str:
        """Return why another start would be by an older server; empty: it would not."""
        is_next = self._servers[-1] is failed and not self._renews
        is_older = any(not (one.closed or one.retired) for one in self._servers[:-1])
        return "a new fork server could not be started" if is_next and is_older else ""

    def on_start_timeout(self, worker: WorkerHandle) -> None:
        for server in self._servers:
            server.on_start_timeout(worker)

    async def close(self) -> None:
        for server in self._servers:
            await server.close()
        await super().close()

    def close_without_loop(self) -> None:
        super().close_without_loop()
        for server in self._servers:
            server.close_now()

    def close_after_fork(self) -> None:
        super().close_after_fork()
        for server in self._servers:
            server.close_fds()


class _ForkServerClient:
    """One fork server; ``launcher`` watches a worker that outlives it.

    Attributes:
        closed: Whether it has exited, or has been killed.
        retired: Whether it is closed when its workers have exited.
    """

    def __init__(
        self,
        launcher: ForkServerLauncher,
        loop: GuardedLoop,
        thread_pool: Executor,
        preload: Preload | None,
    ) -> None:
        self.closed = self.retired = False
        self._loop = loop
        self._launcher = launcher
        self._importing = ""  # the module of preload that it imports
        self._last_number = 0
        self._serving = False
        self._queued: list[tuple[int, ChildFds]] = []  # requests for when it serves
        self._pending: dict[int, WorkerHandle] = {}  # by number of the request
        self._running: dict[int, WorkerHandle] = {}  # by process id
        self._data = bytearray()
        self._pids: list[int] = []  # its process id, until it is killed
        with contextlib.ExitStack() as undo:
            life_pipe, self._life_pipe = os.pipe()
            undo.callback(os.close, life_pipe)
            undo.callback(os.close, self._life_pipe)
            page = shared_memory.create_anonymous(status_page.SIZE)
            undo.callback(os.close, page)
            self._page = status_page.StatusPage(os.dup(page))
            undo.callback(self._page.close)
            self._socket, child = socket.socketpair()
            undo.callback(child.close)
            undo.callback(self._socket.close)
            self._socket.setblocking(False)  # noqa: FBT003 - its only argument
            child.setblocking(True)  # noqa: FBT003 - despite `socket.setdefaulttimeout`
            self._loop.add_reader(self._socket.fileno(), self._on_readable)
            undo.callback(self._loop.remove_reader, self._socket.fileno())
            self._started = run_in_helper(
                loop, thread_pool, lambda: self._start(child, life_pipe, page, preload)
            )
            undo.pop_all()
        self._started.add_done_callback(loop.guard(self._on_started))

    def _start(
        self, child: socket.socket, life_pipe: int, page: int, modules: Preload | None
    ) -> int:
        try:
            resource_tracker.ensure_running()
            args = child.fileno(), life_pipe, page
            tracker = resource_tracker.descriptor() if modules else None
            fds = args if tracker is None else (*args, tracker)
            preload = pickle.dumps((tracker, modules), 5) if modules else b""
            module = "async_batcher._worker.fork_server"
            pid = spawn_python(module, "serve", (*args, preload), fds, page)
            self._pids.append(pid)
            if self.closed:  # meanwhile; the loop's thread may do this, too: one of them has the id
                with contextlib.suppress(IndexError):
                    kill_and_reap(self._pids.pop())
            return pid
        finally:
            child.close()
            os.close(life_pipe)
            os.close(page)

    def _on_started(self, started: asyncio.Future[int]) -> None:
        if (error := started.exception()) is not None:
            self._on_exit(error)
        elif not self.closed:
            self._on_readable()  # it may have exited before

    def request(self, worker: WorkerHandle, child_fds: ChildFds) -> None:
        self._last_number += 1
        self._pending[self._last_number] = worker
        if self._serving:
            self._send(self._last_number, child_fds)
        else:
            self._queued.append((self._last_number, child_fds))

    def cancel_starts(self) -> None:
        """Fail the requests that it has not got; if it is halted, it goes on."""
        queued, self._queued = self._queued, []
        for number, child_fds in queued:
            child_fds.close()
            error = RuntimeError("the pool is being stopped")
            self._loop.call_soon(self._pending.pop(number).on_start_failed, error)
        for pid in self._pids:
            resume(pid)

    def on_start_timeout(self, worker: WorkerHandle) -> None:
        """Close a server that has not forked a worker in time: it is stopped, or stuck."""
        if worker not in self._pending.values():
            return
        error = TimeoutError("the fork server did not react to the request")
        if not self._serving:
            error = interpreter.start_timeout_error(self._importing)
        self._on_exit(error)

    def _send(self, number: int, child_fds: ChildFds) -> None:
        try:
            request = FORK_REQUEST.pack(number)
            socket.send_fds(self._socket, [request], list(child_fds))
        except Exception as exc:  # noqa: BLE001 - it has exited or is stuck, or an audit hook
            self._loop.call_soon(self._pending.pop(number).on_start_failed, exc)
        finally:
            child_fds.close()

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if self._started.done():
                self._on_exit(self._started.exception())
            else:  # `_on_started` will know why it could not be started
                self._loop.remove_reader(self._socket.fileno())
            return
        self._data += data
        for message in self._take_messages():
            self._on_message(message)

    def _take_messages(self) -> Iterator[tuple[Any, ...]]:
        """Yield the messages that have been received."""
        try:
            yield from take_events(self._data)
        except Exception as exc:  # noqa: BLE001 - not a message, memory, an audit hook
            self._on_exit(exc)

    def _on_message(self, message: tuple[Any, ...]) -> None:
        match message:
            case (ForkServerEvent.SERVING,):
                self._serving, self._importing = True, ""
                self._page.close()
                self._launcher.on_serving(self)
                queued, self._queued = self._queued, []
                for number, child_fds in queued:
                    self._send(number, child_fds)
            case (ForkServerEvent.STARTED, number, pid):
                worker = self._running[pid] = self._pending.pop(number)
                worker.on_started(pid)
            case (ForkServerEvent.START_FAILED, number, *args):
                self._pending.pop(number).on_start_failed(OSError(*args))
                if not self._running:  # another server has the program's limits of then
                    self.retire()
            case (ForkServerEvent.EXITED, pid, exit_code):
                exited = self._running.pop(pid, None)
                if exited is not None:  # else it is a process that a module of preload has started
                    exited.on_exit(exit_code)
                    self._close_if_unused()
            case (ForkServerEvent.PRELOADING, name):
                self._importing = name
            case (ForkServerEvent.PRELOAD_FAILED, name, failure):
                failed = decode_exception(Codec(), failure)
                for worker in self._pending.values():
                    why = f"importing {name!r} for preload failed"
                    worker.worker.start_failure = StartFailure(failed, why, PRELOAD_FAILED)
                self._on_exit(failed)

    def retire(self) -> None:
        self.retired = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self.retired and not self._pending and not self._running:
            self.close_now()

    def _on_exit(self, error: BaseException | None) -> None:
        """Close a server that exited or cannot be used; watch its workers one by one.

        Args:
            error: Why it could not be started or used; None: it exited.
        """
        if self.closed:
            return
        pending, running = list(self._pending.values()), list(self._running.items())
        self._pending.clear()
        self._running.clear()
        hint, failure = "", "" if self._serving else self._page.failure
        code = self.close_now()
        if error is None:
            if self._importing:
                hint = f" while it imported {self._importing!r} for preload. See its standard error"
            elif not self._serving:
                hint = f". {interpreter.start_failure_cause(code, failure)}"
            error = ConnectionError(f"the fork server {exit_phrase(code)}{hint}")
        for worker in pending:
            if not self._serving:
                worker.worker.explain_start_failure(error, self._launcher.why_not_again(self))
            self._loop.call_soon(worker.on_start_failed, error)
        for pid, worker in running:
            self._launcher.watch(pid, worker)

    async def close(self) -> None:
        with contextlib.suppress(Exception):  # `_on_exit` has reported it
            await self._started
        self.close_now()

    def close_now(self) -> int | None:
        """Close it, and return its exit code if it has one."""
        if self.closed:
            return None
        self.closed = True
        if not self._loop.is_closed():
            self._loop.remove_reader(self._socket.fileno())
        for _, child_fds in self._queued:
            child_fds.close()
        self._queued.clear()
        self._page.close()
        return self._kill()

    def _kill(self) -> int | None:
        self._close_life_pipe()
        code = None
        with contextlib.suppress(IndexError):  # there is no process yet, or it has been killed
            code = kill_and_reap(self._pids.pop())
            reap_orphans(self._find_orphans())
        self._socket.close()
        return code

    def _find_orphans(self) -> set[int]:
        """Return the workers that a server which has exited leaves behind."""
        pids = set(self._running)
        with contextlib.suppress(OSError):  # closed, or nothing more to read
            while data := self._socket.recv(65_536):
                self._data += data
        for message in self._take_messages():
            if message[0] == ForkServerEvent.STARTED:
                pids.add(message[2])
            elif message[0] == ForkServerEvent.EXITED:
                pids.discard(message[1])
        return pids

    def close_fds(self) -> None:
        self._socket.close()
        self._close_life_pipe()

    def _close_life_pipe(self) -> None:
        if self._life_pipe != -1:
            life_pipe, self._life_pipe = self._life_pipe, -1  # first: it is closed once only
            os.close(life_pipe)
