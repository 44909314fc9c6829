"""The fork server of one `WorkerPool`: a small process that forks workers in milliseconds.

::

    pool --- number, and the worker's four descriptors ----> fork --> main.worker_main
    pool <-- STARTED or START_FAILED ----------------------'
    pool <-- EXITED ------------------------------ a worker has exited, even if its channel is open
    pool <-- PRELOADING, PRELOAD_FAILED ---------- before it takes requests; see `preload.py`

Rules:

- It has one thread, and imports what every worker needs before the first fork. It runs no code of
  the user's except the modules of ``preload`` (`preload.py`), and never the main module.
- It ends with its parent, as a worker does, or when its socket is closed. It leaves the signals of
  the process group to its parent (`signals.py`).
- It unblocks SIGCHLD. Its workers get the parent's signal mask later (`inherited.py`).

The standard fork server is not used. From Python 3.14 it runs the user's main module, the whole
process shares it, and it reports an exit only by closing a pipe, which helpers of the worker may
hold open.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import pickle
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from async_batcher._serialization.codec import Codec
from async_batcher._serialization.remote_exception import encode_exception
from async_batcher._transport.protocol import FORK_REQUEST, ForkServerEvent, encode_event
from async_batcher._worker import bootstrap, inherited
from async_batcher._worker import main as worker_main
from async_batcher._worker import signals as worker_signals
from async_batcher._worker.identity import set_title

if TYPE_CHECKING:
    from async_batcher._transport.protocol import Preload

_WORKER_DESCRIPTORS = 4  # see `main.worker_main`


def serve(control: int, life: int, page: int, preload: bytes) -> NoReturn:
    """Fork workers until the socket is closed, and end the process.

    Args:
        control: The descriptor of a stream socket to the pool.
        life: As of `main.worker_main`.
        page: The descriptor of the status page for what is raised here; see `interpreter.py`.
        preload: A pickle of the descriptor of the parent's resource tracker, or None, and a
            `Preload`. Empty if there is nothing to import.
    """
    worker_signals.handle()
    inherited.note_environ()
    bootstrap.exit_with_parent(life)
    for descriptor in (control, life, page):
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - its only argument
    with contextlib.suppress(ImportError):
        # Every worker needs them; see `bootstrap.join_tracker` and `inherited.py`.
        import multiprocessing.resource_tracker  # noqa: F401
        import resource  # noqa: F401
    pool = socket.socket(fileno=control)
    pool.setblocking(True)  # noqa: FBT003 - despite `socket.setdefaulttimeout`
    if preload:
        _preload(pool, life, *pickle.loads(preload))  # noqa: S301 - from this program
    waker, wake = socket.socketpair()
    wake.setblocking(False)  # noqa: FBT003 - its only argument
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    poll = select.poll()  # not select.select, which takes no descriptor above 1023
    for one in (pool, waker):
        poll.register(one, select.POLLIN)
    set_title("fork server")
    gc.collect()
    gc.freeze()  # workers share these objects for as long as the collector leaves them alone
    _send(pool, ForkServerEvent.SERVING)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if waker.fileno() in ready:
            waker.recv(4096)
            _reap(pool)
        if pool.fileno() in ready:
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    pool, FORK_REQUEST.size, _WORKER_DESCRIPTORS
                )
            except ConnectionError:
                data = b""
            if not data:
                os._exit(0)  # at once: there is nothing to clean up
            (number,) = FORK_REQUEST.unpack(data)
            try:
                pid = _fork(descriptors)
            except OSError as exc:
                _send(pool, ForkServerEvent.START_FAILED, number, *exc.args)
            else:
                if pid == 0:
                    _run_worker(descriptors, [pool, waker, wake], [life, page])
                _send(pool, ForkServerEvent.STARTED, number, pid)
            for descriptor in descriptors:
                os.close(descriptor)


def _fork(descriptors: list[int]) -> int:
    if len(descriptors) < _WORKER_DESCRIPTORS:
        msg = f"{os.strerror(errno.EMFILE)} in the fork server"
        raise OSError(errno.EMFILE, msg)
    # Warnings are dropped. A thread here is not the program's: `sitecustomize` has started it.
    pid, _ = bootstrap.fork()
    return pid


def _preload(pool: socket.socket, life: int, tracker: int | None, preload: Preload) -> None:
    """Import modules; if one cannot be, report that, and end the process."""
    from async_batcher._worker.preload import Preloader

    if tracker is not None:
        os.set_inheritable(tracker, False)  # noqa: FBT003 - its only argument
        bootstrap.join_tracker(tracker)
    bootstrap.show_crashes()
    names, settings = preload
    bootstrap.initialize(settings, life)
    preloader = Preloader(functools.partial(_send, pool, ForkServerEvent.PRELOADING))
    failure = None
    try:
        preloader.load(names)
    except BaseException as exc:  # noqa: BLE001 - user code
        failure = encode_exception(Codec(worker=True), exc)
    for stream in (sys.stdout, sys.stderr):  # or each worker prints their buffers again
        with contextlib.suppress(Exception):  # closed, missing, or the user's object
            stream.flush()
    if failure is not None:
        _send(pool, ForkServerEvent.PRELOAD_FAILED, preloader.current, failure)
        os._exit(1)
    worker_signals.handle()  # again: a module may have set handlers


def _run_worker(descriptors: list[int], sockets: list[socket.socket], others: list[int]) -> None:
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for one in sockets:
            one.close()
        for descriptor in others:
            os.close(descriptor)
        bootstrap.drop_parent_state()
        bootstrap.reseed_numpy()
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
        _send(pool, ForkServerEvent.EXITED, pid, os.waitstatus_to_exitcode(status))


def _send(pool: socket.socket, kind: ForkServerEvent, *content: Any) -> None:
    event = encode_event(kind, *content)
    try:
        pool.sendall(event)
    except OSError:  # the pool has exited
        os._exit(0)
