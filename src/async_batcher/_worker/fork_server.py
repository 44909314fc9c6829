"""The fork server of one `WorkerPool`: a small process that forks workers in milliseconds, and says how each ended.

::

    pool --- name, and the worker's three descriptors ---> fork --> main.worker_main
    pool <-- ("started", name, pid), ("failed", name, why) ---'
    pool <-- ("ended", pid, exit code) ------------------------- a worker has ended, whatever else holds its channel open

Rules:

- It has one thread, runs nothing of the user's, and imports what every worker needs before it forks the first.
- It ends with its parent, as a worker does (`main.exit_with_parent`), or when its socket is closed. It leaves the signals of the
  process group to its parent (`signals.py`).
- It unblocks the signals that it needs, SIGCHLD among them. Its workers get the signal mask that its parent has started it with.

The standard fork server is not used: from Python 3.14 it runs the user's main module by itself, it is shared with the whole
program, and it tells a death only by closing a pipe that helpers of the worker may hold open.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import signal
import socket
import struct
from typing import Any, NoReturn

from async_batcher._worker import main as worker_main
from async_batcher._worker import signals as worker_signals

REQUEST = struct.Struct("=Q")  # the name of the worker to be; its channel, status page and life pipe come with it
LENGTH = struct.Struct("=I")  # before each reply


def serve(control: int, life: int) -> NoReturn:
    """Fork workers until the socket is closed, and end the process.

    Args:
        control: The descriptor of a stream socket to the pool.
        life: See `main.worker_main`.
    """
    worker_signals.handle()
    worker_main.exit_with_parent(life)
    for descriptor in (control, life):
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - its only argument
    with contextlib.suppress(ImportError):
        import multiprocessing.resource_tracker  # noqa: F401 - every worker needs it: see `main.join_tracker`
    waker, wake = socket.socketpair()
    wake.setblocking(False)  # noqa: FBT003 - its only argument
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    pool = socket.socket(fileno=control)
    pool.setblocking(True)  # noqa: FBT003 - its only argument; whatever the program has set for its sockets
    poll = select.poll()  # not select.select, which takes no descriptor above 1023
    for one in (pool, waker):
        poll.register(one, select.POLLIN)
    gc.collect()
    gc.freeze()  # what is here now is shared by all workers, for as long as the collector leaves it alone
    _send(pool, ("serving",))
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if waker.fileno() in ready:
            waker.recv(4096)
            _reap(pool)
        if pool.fileno() in ready:
            try:
                data, descriptors, _, _ = socket.recv_fds(pool, REQUEST.size, 3)
            except ConnectionError:
                data = b""
            if not data:
                os._exit(0)  # as fast as can be: there is nothing to tidy up
            (name,) = REQUEST.unpack(data)
            try:
                pid = os.fork()
            except OSError as exc:
                _send(pool, ("failed", name, str(exc)))
            else:
                if pid == 0:
                    _run_worker(descriptors, [pool, waker, wake], life, mask)
                _send(pool, ("started", name, pid))
            for descriptor in descriptors:
                os.close(descriptor)


def _run_worker(descriptors: list[int], ours: list[socket.socket], life: int, mask: set[int | signal.Signals]) -> None:
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for one in ours:
            one.close()
        os.close(life)
        worker_main.forget_program()
        worker_main.worker_main(*descriptors)
    finally:
        os._exit(1)  # never back into the server's loop


def _reap(pool: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _send(pool, ("ended", pid, os.waitstatus_to_exitcode(status)))


def _send(pool: socket.socket, message: tuple[Any, ...]) -> None:
    data = pickle.dumps(message, 5)
    try:
        pool.sendall(LENGTH.pack(len(data)) + data)
    except OSError:  # the pool has gone
        os._exit(0)
