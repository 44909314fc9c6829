"""Processes: who owns one, how a new Python is started, how the end of one is seen, what a forked child must forget.

Rules:

- An end is seen by the end of the process itself, whoever still holds its channel open.
- A child is deaf to Ctrl-C from its first moment: SIGINT is blocked while it is made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from async_batcher._by_value import BOOT_MARK

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

# What a new Python runs: the path, so that it can find this package, and then a function of it.
_BOOT = (
    f"{BOOT_MARK} = True; "
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


def search_path() -> list[str]:
    """``sys.path`` as it holds for another process: the current folder by its name."""
    here = current_folder()
    return [entry or here for entry in sys.path if entry or here]


def current_folder() -> str:
    """The current folder; empty when it has been removed."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def new_python(module: str, name: str, args: tuple[int, ...]) -> int:
    """Start a Python that calls a function of this package with descriptors, which it inherits.

    Returns:
        Its process id; reaping it is the caller's matter.
    """
    from multiprocessing.spawn import get_executable

    executable = get_executable()
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does
    with without_interrupts():
        process = subprocess.Popen(  # noqa: S603 - this very Python
            [os.fsdecode(executable or sys.executable), *flags, "-c", _BOOT], stdin=subprocess.PIPE, pass_fds=args
        )
    process.returncode = 0  # it is looked after here: Popen shall neither reap it nor warn of it
    assert process.stdin is not None  # noqa: S101 - a pipe was asked for
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(pickle.dumps((search_path(), module, name, args)))
    return process.pid


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Block SIGINT in this thread, and so in the child that it makes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_now(pid: int) -> None:
    """Kill a process, and reap it if it is this one's child; takes no time."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # another's, or the program reaps every child
        os.waitpid(pid, 0)


def _watch_for_end(pid: int) -> Any:
    """What becomes readable when a process ends; None where the system has no such thing.

    Raises:
        ProcessLookupError: It has ended.
        OSError: There are no descriptors, or the system does not let us.
    """
    if hasattr(os, "pidfd_open"):
        return open(os.pidfd_open(pid), "rb", buffering=0)  # noqa: PTH123 - for its close()
    if not hasattr(select, "kqueue"):  # a Python that was built for Linux before 5.3
        return None
    kqueue: Any = select  # there are no types for it elsewhere
    watch = kqueue.kqueue()
    event = kqueue.kevent(pid, kqueue.KQ_FILTER_PROC, kqueue.KQ_EV_ADD | kqueue.KQ_EV_ONESHOT, kqueue.KQ_NOTE_EXIT)
    try:
        watch.control([event], 0)
    except BaseException:
        watch.close()
        raise
    return watch


def _reap(pid: int) -> int | None:
    """The exit code of a process that has ended; None where it is not to be had."""
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:  # a fork server's child, or a program that reaps every child
        return None
    return os.waitstatus_to_exitcode(status)


class Watched:
    """Watches processes: one descriptor for each, which becomes readable when the process ends, or else one thread for each."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watches: dict[int, Any] = {}  # by process id

    def watch(self, pid: int, owner: Owner) -> None:
        """Tell ``owner`` when the process ends."""
        try:
            watch = _watch_for_end(pid)
        except ProcessLookupError:  # it has ended
            self._loop.call_soon(lambda: owner.ended(_reap(pid)))
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):  # one whose end nobody would see cannot be kept
                end_now(pid)
                self._loop.call_soon(owner.ended, None)
            else:  # an old kernel, or a sandbox
                self._wait_in_thread(pid, owner)
        else:
            if watch is None:
                self._wait_in_thread(pid, owner)
                return
            self._watches[pid] = watch
            self._loop.add_reader(watch.fileno(), self._on_end, pid, owner)

    def _on_end(self, pid: int, owner: Owner) -> None:
        watch = self._watches.pop(pid)
        self._loop.remove_reader(watch.fileno())
        watch.close()
        owner.ended(_reap(pid))

    def _wait_in_thread(self, pid: int, owner: Owner) -> None:
        def wait() -> None:
            try:
                _, status = os.waitpid(pid, 0)
            except ChildProcessError:
                return  # another's child, or reaped by the program: the end of its channel has to tell
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(owner.ended, os.waitstatus_to_exitcode(status))

        with contextlib.suppress(RuntimeError):  # no thread to be had: the same
            threading.Thread(target=wait, name="async_batcher-child", daemon=True).start()

    def give_up_on(self, owner: Owner) -> None:
        """A worker that it was to start has not been ready in time; where nothing stands between, that is its own matter."""

    async def close(self) -> None:
        """Let go of those whose owners did not wait for their end any longer."""
        for pid, watch in self._watches.items():
            self._loop.remove_reader(watch.fileno())
            watch.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - does not wait
        self._watches.clear()

    def abandon(self) -> None:
        """Reap what was killed; the loop that would have told has closed, or is about to."""
        for pid, watch in self._watches.items():
            if not self._loop.is_closed():
                self._loop.remove_reader(watch.fileno())
            watch.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._watches.clear()

    def forget(self) -> None:
        for watch in self._watches.values():
            watch.close()


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
