"""Child processes: who owns one, how its exit is seen, what a forked child must close.

The exit is seen on the process itself, even if another process still holds its channel open.
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

from async_batcher._worker.signals import INTERRUPT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from async_batcher._eventloop.guarded_loop import GuardedLoop
    from async_batcher._pool.worker_handle import WorkerHandle

# Errors of a system call that do not mean that the system refuses the call itself.
_RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESRCH)


class ChildFds:
    """The worker's descriptors, in the order of `main.worker_main`.

    The launcher closes them in this process when the worker has them.
    """

    def __init__(self, channel: int, status: int, life_pipe: int, tokens: int) -> None:
        self._fds: tuple[int, ...] = (channel, status, life_pipe, tokens)

    def __iter__(self) -> Iterator[int]:
        return iter(self._fds)

    def close(self) -> None:
        fds, self._fds = self._fds, ()
        for fd in fds:
            os.close(fd)


def kill(pid: int) -> None:
    """Send SIGKILL. Where that is refused, the closed life pipe ends the process."""
    with contextlib.suppress(Exception):  # another user's process now, an audit hook
        os.kill(pid, signal.SIGKILL)


def interrupt(pid: int) -> None:
    """Interrupt a worker; see `signals.py`. It is killed soon, if that is refused or ignored."""
    with contextlib.suppress(Exception):  # it has exited, an audit hook
        os.kill(pid, INTERRUPT)


def resume(pid: int) -> None:
    """Have a process go on that is halted."""
    with contextlib.suppress(Exception):  # it has exited, an audit hook
        os.kill(pid, signal.SIGCONT)


def kill_and_reap(pid: int) -> int | None:
    """Kill a process whose life pipe is closed, and reap it if it is a child; does not block.

    Returns:
        Its exit code, perhaps of an earlier exit of its own; None if it is not a child.
    """
    kill(pid)
    return _reap(pid)


def _exit_fd(pid: int) -> Any:
    """Return an object whose descriptor becomes readable when a process exits.

    Returns:
        None where the system has no such thing, or refuses it: a Python that was built for Linux
        before 5.3, an older kernel, a sandbox.

    Raises:
        ProcessLookupError: The process has exited.
        OSError: No descriptors are left.
    """
    try:
        if hasattr(os, "pidfd_open"):
            return _Descriptor(os.pidfd_open(pid))
        if hasattr(select, "kqueue"):
            return _kqueue(pid)
    except OSError as exc:
        if exc.errno in _RESOURCE_ERRORS:
            raise
    return None


def _kqueue(pid: int) -> Any:
    kqueue: Any = select  # typed on macOS only
    watch = kqueue.kqueue()
    flags = kqueue.KQ_EV_ADD | kqueue.KQ_EV_ONESHOT
    event = kqueue.kevent(pid, kqueue.KQ_FILTER_PROC, flags, kqueue.KQ_NOTE_EXIT)
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
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:  # a fork server's child, or the program reaps every child
        return None
    return os.waitstatus_to_exitcode(status)


def reap_orphans(pids: Iterable[int]) -> None:
    """Reap workers of a fork server that has exited; they have been killed, or are about to be.

    They are children of this process if it is the first one of a container, or a subreaper. It may
    have others, so each is waited for by its own pid; in a thread, since it may not have exited.
    """
    left = []
    for pid in pids:
        with contextlib.suppress(ChildProcessError):  # the system reaps it
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                left.append(pid)
    if left:

        def reap_all() -> None:
            for pid in left:
                _reap(pid)

        with contextlib.suppress(RuntimeError):  # Python is exiting, or no thread is left
            threading.Thread(target=reap_all, name="async_batcher-reap", daemon=True).start()


class ProcessWatcher:
    """Watches processes by one descriptor each, or else by one thread each."""

    def __init__(self, loop: GuardedLoop) -> None:
        self._loop = loop
        self._watches: dict[int, Any] = {}  # by process id

    def watch(self, pid: int, worker: WorkerHandle) -> None:
        """Call `on_exit` when the process exits; kill a process that cannot be watched."""
        watch = None
        try:
            watch = _exit_fd(pid)
            if watch is None:
                self._wait_in_thread(pid, worker)
            else:
                self._loop.add_reader(watch.fileno(), self._on_readable, pid, worker)
                self._watches[pid] = watch
        except ProcessLookupError:  # it has exited
            self._loop.call_soon(lambda: worker.on_exit(_reap(pid)))
        except Exception as exc:  # noqa: BLE001 - no descriptors left, or an audit hook
            if watch is not None:
                watch.close()
            kill(pid)
            self._loop.call_soon(worker.on_start_failed, exc)
            self._wait_in_thread(pid, worker)  # reaps it

    def _on_readable(self, pid: int, worker: WorkerHandle) -> None:
        watch = self._watches.pop(pid)
        self._loop.remove_reader(watch.fileno())
        watch.close()
        worker.on_exit(_reap(pid))

    def _wait_in_thread(self, pid: int, worker: WorkerHandle) -> None:
        def wait() -> None:
            try:
                _, status = os.waitpid(pid, 0)
            except ChildProcessError:
                return  # not a child, or reaped by the program: its channel will end
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(worker.on_exit, code)

        with contextlib.suppress(Exception):  # without a thread, its channel tells
            threading.Thread(target=wait, name="async_batcher-child", daemon=True).start()

    def renew(self) -> None:
        """Start later workers from a new fork server, if there is one."""

    def cancel_starts(self) -> None:
        """Start no process that has not been started: the pool stops."""

    def on_start_timeout(self, worker: WorkerHandle) -> None:
        """Handle a worker that timed out while starting: say why, or restart what starts them."""

    async def close(self) -> None:
        """Stop watching processes whose owners no longer wait for their exit."""
        self._close_watches(os.WNOHANG)

    def close_without_loop(self) -> None:
        """Reap the processes, which have been killed."""
        self._close_watches(0)

    def _close_watches(self, wait_options: int) -> None:
        for pid, watch in self._watches.items():
            if not self._loop.is_closed():
                self._loop.remove_reader(watch.fileno())
            watch.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, wait_options)
        self._watches.clear()

    def close_after_fork(self) -> None:
        for watch in self._watches.values():
            watch.close()


class _ClosesAfterFork(Protocol):
    def close_after_fork(self) -> None: ...


_close_in_children: weakref.WeakSet[_ClosesAfterFork] = weakref.WeakSet()
# Acquired once, and never released. No thread waits for it, so a forked child cannot hang on it.
_hook_registered = threading.Lock()


def close_after_fork(owner: _ClosesAfterFork) -> None:
    """Have ``owner.close_after_fork`` called in every child that this process forks.

    A child that kept the parent's end of a life pipe or channel would keep a worker alive after
    the parent's exit.
    """
    _close_in_children.add(owner)
    if _hook_registered.acquire(blocking=False):
        os.register_at_fork(after_in_child=_close_all_after_fork)


def _close_all_after_fork() -> None:
    owners = list(_close_in_children)
    _close_in_children.clear()  # a child of this child may use the same numbers
    for owner in owners:
        owner.close_after_fork()
