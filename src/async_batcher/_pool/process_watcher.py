"""Processes: what owns one, how the end of one is seen, what a forked child must forget.

An end is seen by the end of the process itself, even if another process still holds its channel open.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator


class ChildFds:
    """The worker's descriptors, which the launcher closes here once the worker has them.

    Args:
        channel: See `main.worker_main`, and so for the others.
        status: The status page.
        life: The life pipe.
    """

    def __init__(self, channel: int, status: int, life: int) -> None:
        self._descriptors: tuple[int, ...] = (channel, status, life)

    def __iter__(self) -> Iterator[int]:
        """They, in the order of `main.worker_main`; none once they are closed."""
        return iter(self._descriptors)

    def close(self) -> None:
        """Close them here; again: nothing."""
        descriptors, self._descriptors = self._descriptors, ()
        for fd in descriptors:
            os.close(fd)


class ProcessCallbacks(Protocol):
    """Who is told of a process; always on the loop's thread."""

    def started(self, pid: int) -> None:
        """It has been started."""

    def not_started(self, error: BaseException) -> None:
        """It could not be started."""

    def ended(self, exit_code: int | None) -> None:
        """It has ended; negative: the number of a signal, None: unknown."""


def kill(pid: int) -> None:
    """Send a process SIGKILL. Where that is refused (another user now, an audit hook), the end of its life pipe ends it."""
    with contextlib.suppress(Exception):
        os.kill(pid, signal.SIGKILL)


def kill_and_reap(pid: int) -> int | None:
    """Kill a process whose life pipe has been closed, and reap it if it is a child of this one; takes no time.

    Returns:
        Its exit code, which may be of an end of its own before; None if it is another's child.
    """
    kill(pid)
    return _reap(pid)


# Errors that are no refusal of the call itself.
_NOTHING_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESRCH)


def _exit_fd(pid: int) -> Any:
    """What becomes readable when a process ends; None where the system has no such thing, or refuses it.

    Raises:
        ProcessLookupError: It has ended.
        OSError: There are no descriptors.
    """
    try:
        if hasattr(os, "pidfd_open"):
            return _Descriptor(os.pidfd_open(pid))
        if hasattr(select, "kqueue"):
            return _kqueue(pid)
    except OSError as exc:
        if exc.errno in _NOTHING_LEFT:
            raise
    return None  # a Python that was built for Linux before 5.3, an older kernel, or a sandbox


def _kqueue(pid: int) -> Any:
    kqueue: Any = select  # there are no types for it elsewhere
    watch = kqueue.kqueue()
    event = kqueue.kevent(pid, kqueue.KQ_FILTER_PROC, kqueue.KQ_EV_ADD | kqueue.KQ_EV_ONESHOT, kqueue.KQ_NOTE_EXIT)
    try:
        watch.control([event], 0)
    except BaseException:
        watch.close()
        raise
    return watch


class _Descriptor:
    """A descriptor that is closed like a file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


def _reap(pid: int) -> int | None:
    """The exit code of a process that has ended, or is about to; None where it is not to be had."""
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:  # a fork server's child, or a program that reaps every child
        return None
    return os.waitstatus_to_exitcode(status)


class ProcessWatcher:
    """Watches processes: one descriptor for each, which becomes readable when the process ends, or else one thread for each."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watches: dict[int, Any] = {}  # by process id

    def watch(self, pid: int, owner: ProcessCallbacks) -> None:
        """Tell ``owner`` when the process ends. One that cannot be watched is killed, and ``owner`` learns why."""
        watch = None
        try:
            watch = _exit_fd(pid)
            if watch is None:
                self._wait_in_thread(pid, owner)
            else:
                self._loop.add_reader(watch.fileno(), self._on_end, pid, owner)
                self._watches[pid] = watch
        except ProcessLookupError:  # it has ended
            self._loop.call_soon(lambda: owner.ended(_reap(pid)))
        except Exception as exc:  # noqa: BLE001 - no descriptors left, or an audit hook
            if watch is not None:
                watch.close()
            kill(pid)
            self._loop.call_soon(owner.not_started, exc)
            self._wait_in_thread(pid, owner)  # reaps it

    def _on_end(self, pid: int, owner: ProcessCallbacks) -> None:
        watch = self._watches.pop(pid)
        self._loop.remove_reader(watch.fileno())
        watch.close()
        owner.ended(_reap(pid))

    def _wait_in_thread(self, pid: int, owner: ProcessCallbacks) -> None:
        def wait() -> None:
            try:
                _, status = os.waitpid(pid, 0)
            except ChildProcessError:
                return  # another's child, or reaped by the program: the end of its channel has to tell
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(owner.ended, os.waitstatus_to_exitcode(status))

        with contextlib.suppress(Exception):  # no thread to be had: the same
            threading.Thread(target=wait, name="async_batcher-child", daemon=True).start()

    def give_up_on(self, owner: ProcessCallbacks) -> None:
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


class _ClosesAfterFork(Protocol):
    def forget(self) -> None: ...


_alive: weakref.WeakSet[_ClosesAfterFork] = weakref.WeakSet()
_fork_hook = threading.Lock()  # taken once, by whoever registers the hook


def close_after_fork(holder: _ClosesAfterFork) -> None:
    """Have ``holder.forget`` called in every child that this process forks.

    A child that kept the parent's end of a life pipe or of a channel would keep a worker alive after the parent's death.
    """
    _alive.add(holder)
    if _fork_hook.acquire(blocking=False):
        os.register_at_fork(after_in_child=_close_all_after_fork)


def _close_all_after_fork() -> None:
    for holder in list(_alive):
        holder.forget()
