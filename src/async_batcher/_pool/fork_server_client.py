"""Our own fork server (`fork_server.py`), as its parent sees it."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.offload import run_in_helper
from async_batcher._pool import resource_tracker
from async_batcher._pool.exit_status import exit_status_name
from async_batcher._pool.interpreter import cause_of_no_start, spawn_python
from async_batcher._pool.process_watcher import ProcessWatcher, kill_and_reap
from async_batcher._transport.protocol import EVENT_LENGTH, FORK_REQUEST, ForkServerEvent

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from concurrent.futures import Executor

    from async_batcher._pool.process_watcher import ChildFds, ProcessCallbacks


class ForkServerLauncher(ProcessWatcher):
    """Asks a fork server of its own; starts it with the first worker, and again if it should die, or not answer in time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, helpers: Executor) -> None:
        super().__init__(loop)
        self._helpers = helpers
        self._server: _ForkServerClient | None = None

    def launch(self, owner: ProcessCallbacks, ends: ChildFds) -> None:
        if self._server is None or self._server.is_lost:
            self._server = _ForkServerClient(self._loop, self._helpers, self.watch)
        self._server.request(owner, ends)

    def give_up_on(self, owner: ProcessCallbacks) -> None:
        if self._server is not None:
            self._server.give_up_on(owner)

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()
        await super().close()

    def abandon(self) -> None:
        super().abandon()
        if self._server is not None:
            self._server.abandon()

    def forget(self) -> None:
        super().forget()
        if self._server is not None:
            self._server.forget()


class _ForkServerClient:
    """One fork server, as its parent sees it.

    Args:
        loop: The loop that watches its socket.
        helpers: Where it is started.
        adopt: Watches a worker that lives on when the server has died.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, helpers: Executor, adopt: Callable[[int, ProcessCallbacks], None]
    ) -> None:
        self.is_lost = False
        self._loop = loop
        self._adopt = adopt
        self._names = 0
        self._serving = False
        self._unsent: list[tuple[int, ChildFds]] = []  # requests that wait for it to be there
        self._starting: dict[int, ProcessCallbacks] = {}  # by name
        self._running: dict[int, ProcessCallbacks] = {}  # by process id
        self._data = bytearray()
        self._pid: int | None = None
        self._exit_code: int | None = None
        with contextlib.ExitStack() as undo:
            life, self._life = os.pipe()
            undo.callback(os.close, life)
            undo.callback(os.close, self._life)
            self._socket, theirs = socket.socketpair()
            undo.callback(theirs.close)
            undo.callback(self._socket.close)
            self._socket.setblocking(False)  # noqa: FBT003 - its only argument
            theirs.setblocking(True)  # noqa: FBT003 - despite `socket.setdefaulttimeout`
            self._loop.add_reader(self._socket.fileno(), self._on_readable)
            undo.callback(self._loop.remove_reader, self._socket.fileno())
            self._made = run_in_helper(loop, helpers, lambda: self._make(theirs, life))
            undo.pop_all()
        self._made.add_done_callback(self._on_made)

    def _make(self, theirs: socket.socket, life: int) -> int:
        try:
            resource_tracker.ensure_running()
            self._pid = spawn_python("async_batcher._worker.fork_server", "serve", (theirs.fileno(), life))
            pid = self._pid
            if self.is_lost:  # given up meanwhile
                self._kill()
            return pid
        finally:
            theirs.close()
            os.close(life)

    def _on_made(self, made: asyncio.Future[int]) -> None:
        if (error := made.exception()) is not None:
            self._lose(error)
        elif not self.is_lost:
            self._on_readable()  # its end may have come before

    def request(self, owner: ProcessCallbacks, ends: ChildFds) -> None:
        self._names += 1
        self._starting[self._names] = owner
        if self._serving:
            self._send(self._names, ends)
        else:
            self._unsent.append((self._names, ends))

    def give_up_on(self, owner: ProcessCallbacks) -> None:
        """A worker's time to start is over: if it was never forked, the server is halted or stuck, and will not fork another."""
        if owner in self._starting.values():
            self._lose(TimeoutError("the fork server did not answer"))

    def _send(self, name: int, ends: ChildFds) -> None:
        try:
            socket.send_fds(self._socket, [FORK_REQUEST.pack(name)], list(ends))
        except Exception as exc:  # noqa: BLE001 - it has ended, or does not listen, or an audit hook
            self._loop.call_soon(self._starting.pop(name).not_started, exc)
        finally:
            ends.close()

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if self._made.done():
                self._lose(self._made.exception())
            else:  # why it could not be started comes with that
                self._loop.remove_reader(self._socket.fileno())
            return
        self._data += data
        while len(self._data) >= EVENT_LENGTH.size:
            (length,) = EVENT_LENGTH.unpack_from(self._data)
            end = EVENT_LENGTH.size + length
            if len(self._data) < end:
                return
            try:
                message = pickle.loads(self._data[EVENT_LENGTH.size : end])  # noqa: S301 - our own
            except Exception as exc:  # noqa: BLE001 - memory, or an audit hook
                self._lose(exc)
                return
            del self._data[:end]
            self._on_message(message)

    def _on_message(self, message: tuple[Any, ...]) -> None:
        match message:
            case (ForkServerEvent.SERVING,):
                self._serving = True
                unsent, self._unsent = self._unsent, []
                for name, ends in unsent:
                    self._send(name, ends)
            case (ForkServerEvent.STARTED, name, pid):
                owner = self._running[pid] = self._starting.pop(name)
                owner.started(pid)
            case (ForkServerEvent.START_FAILED, name, why):
                self._starting.pop(name).not_started(OSError(why))
            case (ForkServerEvent.EXITED, pid, exit_code):
                self._running.pop(pid).ended(exit_code)

    def _lose(self, error: BaseException | None) -> None:
        """It has ended, or could not be started: its workers are watched one by one from now on.

        Args:
            error: Why it could not be started, or cannot be used; None: it has ended.
        """
        if self.is_lost:
            return
        self.is_lost = True
        self._loop.remove_reader(self._socket.fileno())
        self._drop_unsent()
        starting, running = list(self._starting.values()), list(self._running.items())
        self._starting.clear()
        self._running.clear()
        self._kill()
        if error is None:
            hint = "" if self._serving else f". {cause_of_no_start()}"
            error = ConnectionError(f"the fork server has ended ({exit_status_name(self._exit_code)}){hint}")
        for owner in starting:
            self._loop.call_soon(owner.not_started, error)
        for pid, owner in running:
            self._adopt(pid, owner)

    async def close(self) -> None:
        with contextlib.suppress(Exception):  # told to those who wait for a worker
            await self._made
        if not self.is_lost:
            self.is_lost = True
            self._loop.remove_reader(self._socket.fileno())
            self._drop_unsent()
            self._kill()

    def abandon(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            if not self._loop.is_closed():
                self._loop.remove_reader(self._socket.fileno())
            self._drop_unsent()
            self._kill()

    def _drop_unsent(self) -> None:
        for _, ends in self._unsent:
            ends.close()
        self._unsent.clear()

    def _kill(self) -> None:
        self.forget()
        pid, self._pid = self._pid, None
        if pid is not None:
            self._exit_code = kill_and_reap(pid)

    def forget(self) -> None:
        self._socket.close()
        if self._life != -1:
            os.close(self._life)
            self._life = -1
