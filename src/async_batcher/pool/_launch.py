"""How worker processes are started, and how their end is seen. One launcher for each start method.

===========  ====================================================  ==============================================
launcher     starts a worker                                       sees its end
===========  ====================================================  ==============================================
ForkServer   by asking our own fork server (`_forkserver.py`)      the server reaps it, and says so
Spawner      as a new Python, in a helper thread                   `os.pidfd_open`, or a kqueue
Forker       with `os.fork`, on the loop's thread                  the same
===========  ====================================================  ==============================================

Rules:

- None runs the user's main module, swaps ``sys.modules["__main__"]`` or touches what multiprocessing keeps for the process.
- An end is seen by the end of the process itself, whoever still holds its channel open.
- A child is deaf to Ctrl-C from its first moment: SIGINT is blocked while it is made.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from async_batcher import _forkserver

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from concurrent.futures import Executor

# What a new Python runs: the path, so that it can find this package, and then a function of it.
_BOOT = (
    "import pickle, sys; path, module, name, args = pickle.load(sys.stdin.buffer); sys.path[:] = path; "
    "import importlib; getattr(importlib.import_module(module), name)(*args)"
)


class Ends(NamedTuple):
    """The worker's descriptors, which the launcher closes here once the worker has them."""

    channel: int
    status: int
    life: int

    def close(self) -> None:
        """Close them here."""
        for fd in self:
            os.close(fd)


class Owner(Protocol):
    """Who is told of a process; always on the loop's thread."""

    def started(self, pid: int) -> None:
        """It has been started."""

    def not_started(self, error: BaseException) -> None:
        """It could not be started."""

    def ended(self, exit_code: int | None) -> None:
        """It has ended; negative: the number of a signal, None: unknown."""


class Launcher(Protocol):
    """Starts processes."""

    def launch(self, owner: Owner, ends: Ends) -> None:
        """Start a worker; ``owner`` hears of it."""

    async def close(self) -> None:
        """End what was made to start workers; their own ends are their owners' matter."""

    def abandon(self) -> None:
        """The same without the loop, which has closed."""

    def forget(self) -> None:
        """In a forked child: close what belongs to the parent."""


def launcher_for(method: str, loop: asyncio.AbstractEventLoop, helpers: Executor) -> ForkServer | Spawner | Forker:
    """The launcher for a start method, ``"forkserver"``, ``"spawn"`` or ``"fork"``."""
    if method == "forkserver":
        return ForkServer(loop, helpers)
    return Spawner(loop, helpers) if method == "spawn" else Forker(loop)


def search_path() -> list[str]:
    """``sys.path`` as it holds for another process: the current folder by its name."""
    return [entry or str(Path.cwd()) for entry in sys.path]


def new_python(module: str, name: str, args: tuple[int, ...]) -> int:
    """Start a Python that calls a function of this package with descriptors, which it inherits.

    Returns:
        Its process id; reaping it is the caller's matter.
    """
    from multiprocessing.spawn import get_executable

    executable = get_executable()
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does
    with _without_interrupts():
        process = subprocess.Popen(  # noqa: S603 - this very Python
            [os.fsdecode(executable or sys.executable), *flags, "-c", _BOOT], stdin=subprocess.PIPE, pass_fds=args
        )
    process.returncode = 0  # it is looked after here: Popen shall neither reap it nor warn of it
    assert process.stdin is not None  # noqa: S101 - a pipe was asked for
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(pickle.dumps((search_path(), module, name, args)))
    return process.pid


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Watched:
    """Watches processes: one descriptor for each, which becomes readable when the process ends."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watches: dict[int, Any] = {}  # by process id

    def _watch(self, pid: int, owner: Owner) -> None:
        watch: Any
        if hasattr(os, "pidfd_open"):
            try:
                watch = open(os.pidfd_open(pid), "rb", buffering=0)  # noqa: SIM115, PTH123 - for its close()
            except ProcessLookupError:  # none of our children, and gone already
                self._loop.call_soon(owner.ended, None)
                return
        else:
            kqueue: Any = select  # where it is; there are no types for it elsewhere
            watch = kqueue.kqueue()
            event = kqueue.kevent(pid, kqueue.KQ_FILTER_PROC, kqueue.KQ_EV_ADD | kqueue.KQ_EV_ONESHOT, kqueue.KQ_NOTE_EXIT)
            with contextlib.suppress(ProcessLookupError):
                watch.control([event], 0)
        self._watches[pid] = watch
        self._loop.add_reader(watch.fileno(), self._on_end, pid, owner)

    def _on_end(self, pid: int, owner: Owner) -> None:
        watch = self._watches.pop(pid)
        self._loop.remove_reader(watch.fileno())
        watch.close()
        try:
            _, status = os.waitpid(pid, 0)
        except ChildProcessError:  # a fork server's child, or a program that reaps every child
            owner.ended(None)
        else:
            owner.ended(os.waitstatus_to_exitcode(status))

    async def close(self) -> None:
        """Nothing of its own."""

    def abandon(self) -> None:
        """Reap what was killed; the loop that would have told has closed."""
        for pid, watch in self._watches.items():
            watch.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._watches.clear()

    def forget(self) -> None:
        for watch in self._watches.values():
            watch.close()


class ForkServer(_Watched):
    """Asks a fork server of its own; starts it with the first worker, and again if it should die."""

    def __init__(self, loop: asyncio.AbstractEventLoop, helpers: Executor) -> None:
        super().__init__(loop)
        self._helpers = helpers
        self._server: _Server | None = None

    def launch(self, owner: Owner, ends: Ends) -> None:
        if self._server is None or self._server.is_lost:
            self._server = _Server(self._loop, self._helpers, self._watch)
        self._server.request(owner, ends)

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()

    def abandon(self) -> None:
        super().abandon()
        if self._server is not None:
            self._server.abandon()

    def forget(self) -> None:
        super().forget()
        if self._server is not None:
            self._server.forget()


class _Server:
    """One fork server, as its parent sees it.

    Args:
        loop: The loop that watches its socket.
        helpers: Where it is started.
        adopt: Watches a worker that lives on when the server has died.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, helpers: Executor, adopt: Callable[[int, Owner], None]) -> None:
        self.is_lost = False
        self._loop = loop
        self._adopt = adopt
        self._names = 0
        self._serving = False
        self._unsent: list[tuple[int, Ends]] = []  # requests that wait for it to be there
        self._starting: dict[int, Owner] = {}  # by name
        self._running: dict[int, Owner] = {}  # by process id
        self._data = bytearray()
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)  # noqa: FBT003 - its only argument
        life, self._life = os.pipe()
        self._loop.add_reader(self._socket.fileno(), self._on_readable)
        self._pid: int | None = None
        self._made = loop.run_in_executor(helpers, self._make, theirs, life)
        self._made.add_done_callback(self._on_made)

    def _make(self, theirs: socket.socket, life: int) -> int:
        try:
            self._pid = new_python("async_batcher._forkserver", "serve", (theirs.fileno(), life))
            pid = self._pid
            if self.is_lost:  # given up meanwhile
                self._kill()
            return pid
        finally:
            theirs.close()
            os.close(life)

    def _on_made(self, made: asyncio.Future[int]) -> None:
        if not made.cancelled() and (error := made.exception()) is not None:
            self._lose(error)

    def request(self, owner: Owner, ends: Ends) -> None:
        self._names += 1
        self._starting[self._names] = owner
        if self._serving:
            self._send(self._names, ends)
        else:
            self._unsent.append((self._names, ends))

    def _send(self, name: int, ends: Ends) -> None:
        try:
            socket.send_fds(self._socket, [_forkserver.REQUEST.pack(name)], list(ends))
        except OSError as exc:  # it has died, or does not listen
            self._starting.pop(name).not_started(exc)
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
            self._lose(ConnectionError("the fork server has ended"))
            return
        self._data += data
        while len(self._data) >= _forkserver.LENGTH.size:
            (length,) = _forkserver.LENGTH.unpack_from(self._data)
            end = _forkserver.LENGTH.size + length
            if len(self._data) < end:
                return
            message = pickle.loads(self._data[_forkserver.LENGTH.size : end])  # noqa: S301 - our own
            del self._data[:end]
            self._on_message(message)

    def _on_message(self, message: tuple[Any, ...]) -> None:
        match message:
            case ("serving",):
                self._serving = True
                unsent, self._unsent = self._unsent, []
                for name, ends in unsent:
                    self._send(name, ends)
            case ("started", name, pid):
                owner = self._running[pid] = self._starting.pop(name)
                owner.started(pid)
            case ("failed", name, why):
                self._starting.pop(name).not_started(OSError(why))
            case ("ended", pid, exit_code):
                self._running.pop(pid).ended(exit_code)

    def _lose(self, error: BaseException) -> None:
        """It has died, or could not be started: somebody else must see how its workers end."""
        if self.is_lost:
            return
        self.is_lost = True
        self._loop.remove_reader(self._socket.fileno())
        for _, ends in self._unsent:
            ends.close()
        self._unsent.clear()
        starting, running = list(self._starting.values()), list(self._running.items())
        self._starting.clear()
        self._running.clear()
        self._kill()
        for owner in starting:
            owner.not_started(error)
        for pid, owner in running:
            self._adopt(pid, owner)

    async def close(self) -> None:
        with contextlib.suppress(Exception):  # told to those who wait for a worker
            await self._made
        if not self.is_lost:
            self.is_lost = True
            self._loop.remove_reader(self._socket.fileno())
            for _, ends in self._unsent:
                ends.close()
            self._kill()

    def abandon(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            self._kill()

    def _kill(self) -> None:
        self.forget()
        pid, self._pid = self._pid, None
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # the program reaps every child
                os.waitpid(pid, 0)  # takes no time: it has been killed

    def forget(self) -> None:
        self._socket.close()
        if self._life != -1:
            os.close(self._life)
            self._life = -1


class Spawner(_Watched):
    """Starts a new Python for each worker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, helpers: Executor) -> None:
        super().__init__(loop)
        self._helpers = helpers
        self._making: set[asyncio.Future[int]] = set()

    def launch(self, owner: Owner, ends: Ends) -> None:
        made = self._loop.run_in_executor(self._helpers, new_python, "async_batcher._child", "work", tuple(ends))
        self._making.add(made)

        def on_made(made: asyncio.Future[int]) -> None:
            self._making.discard(made)
            ends.close()
            if made.cancelled():
                return
            error = made.exception()
            if error is not None:
                owner.not_started(error)
                return
            self._watch(made.result(), owner)
            owner.started(made.result())

        made.add_done_callback(on_made)


class Forker(_Watched):
    """Forks this process."""

    def launch(self, owner: Owner, ends: Ends) -> None:
        try:
            with _without_interrupts():
                pid = os.fork()
        except OSError as exc:
            ends.close()
            self._loop.call_soon(owner.not_started, exc)
            return
        if pid == 0:
            try:
                import atexit

                from async_batcher._child import work

                atexit._clear()  # noqa: SLF001 - the parent's handlers, as multiprocessing does
                work(*ends)
            finally:
                os._exit(1)  # never back into the parent's loop
        ends.close()
        self._watch(pid, owner)
        self._loop.call_soon(owner.started, pid)


class _Forgetful(Protocol):
    def forget(self) -> None: ...


_alive: weakref.WeakSet[_Forgetful] = weakref.WeakSet()
_fork_hook = threading.Lock()  # taken once, by whoever registers the hook


def forget_after_fork(holder: _Forgetful) -> None:
    """Have ``holder.forget`` called in every child that this process forks.

    A child that kept the parent's end of a life pipe or of a channel would keep a worker alive after the parent's death.
    """
    _alive.add(holder)
    if _fork_hook.acquire(blocking=False):
        os.register_at_fork(after_in_child=_forget_all)


def _forget_all() -> None:
    for holder in list(_alive):
        holder.forget()
