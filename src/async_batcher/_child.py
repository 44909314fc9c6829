"""A worker process of a `WorkerPool`: what it does from its first moment to its last.

::

    start --> deaf to Ctrl-C, ends with its parent --> ("init", ...) --> threads, path, initializer, programs --> ("ready",)
                                                                                              it raised: --> ("unfit", why)
    ("run", ...)  --> the status page says "begun" --> _worker.perform --> ("reply", ...)    one at a time
    ("block", ...), ("drop", ...)  blocks of shared memory come and go
    ("leave",), or the end of the channel --> exit handlers, end

Rules:

- One private channel, on which parent and worker take turns; nothing is shared with another worker.
- It ends when its parent does, however that dies, also while C code holds the GIL: on Linux the kernel sends SIGKILL when the
  parent's end of the life pipe closes.
- The user's main module is never run here.
- Imports neither asyncio nor what it does not use.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import sys
import time
from array import array
from collections import deque
from typing import Any

from async_batcher import _frames, _shm
from async_batcher._status import Status
from async_batcher._wire import Codec, encode_exception
from async_batcher._worker import limit_threads, perform, quieten

# Bytes of large buffers from which a reply goes through shared memory. With 2 workers on 2 cores the socket was the faster way up
# to about here; benchmarks/test_pool.py.
SHARED_FROM = 65_536

_ANCILLARY = socket.CMSG_SPACE(16 * array("i").itemsize)  # for the descriptors that come with one read


def work(channel: int, status: int, life: int) -> None:
    """Be a worker until the end; does not return.

    Args:
        channel: The descriptor of a stream socket to the parent.
        status: That of the status page.
        life: That of the read end of a pipe whose other end the parent holds, and nobody else.
    """
    code = 1
    try:
        quieten()
        end_with(life)
        sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123 - for as long as the process lives
        with socket.socket(fileno=channel) as parent:
            code = _Worker(parent, Status(status)).serve()
    except (EOFError, ConnectionError):
        code = 0  # the parent has gone, or has let go of this worker
    except BaseException:  # noqa: BLE001 - must not return into what forked it
        import traceback

        traceback.print_exc()
    finally:
        end(code)


def end_with(life: int) -> None:
    """See to it that this process ends when the other end of the pipe ``life`` is closed."""
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([life], [], [], 0)[0]:  # it was closed before
            os._exit(1)
    else:
        import threading

        def watch() -> None:
            os.read(life, 1)
            os._exit(1)

        threading.Thread(target=watch, name="async_batcher-parent-watch", daemon=True).start()


def end(code: int) -> None:
    """End this process as a program ends, but not the one that it was forked from."""
    import atexit

    try:
        atexit._run_exitfuncs()  # noqa: SLF001 - as multiprocessing does; the forked ones were cleared
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BaseException:  # noqa: BLE001, S110 - user code; it ends all the same
        pass
    finally:
        os._exit(code)


def call(batch: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> list[tuple[Any]]:
    """The program behind `WorkerPool.run`: the result in a tuple, so that an exception that is returned is not raised."""
    ((function, args, kwargs),) = batch
    return [(function(*args, **kwargs),)]


class _Worker:
    def __init__(self, channel: socket.socket, status: Status) -> None:
        self._channel = channel
        self._status = status
        self._reader = _frames.FrameReader()
        self._descriptors: deque[int] = deque()
        self._frames: deque[list[Any]] = deque()  # that have come and not been looked at
        self._waiting: deque[list[Any]] = deque()  # that came while it waited for something else
        self._blocks: dict[int, _shm.Mapping] = {}
        self._peak = _peak_meter()

    def serve(self) -> int:
        """Do what the parent says until it says to leave."""
        while True:
            parts = self._waiting.popleft() if self._waiting else self._receive()
            match self._message(parts):
                case ("run", number, head, source, places, target):
                    self._run(number, head, self._blocks[source].views(places) if source else parts[1:], target)
                case ("init", settings):
                    if not self._init(settings):
                        return 0
                case ("leave",):
                    return 0

    def _run(self, number: int, head: bytes, bulk: list[Any], target: int) -> None:
        """Run one batch and answer."""
        self._status.begin(number, time.monotonic())
        reply = perform(*_frames.unpack(head, bulk), out_of_band=True)
        bulk.clear()
        head, results = _frames.pack(reply)
        name, places = self._place(results, target)
        inline = [] if name else [bytes(result) for result in results]
        # What the results refer to goes before the blocks are looked at: they may be views of the batch.
        del reply, results
        held = [name for name, block in self._blocks.items() if not block.is_free()]
        if self._peak is not None:
            self._status.peak = self._peak()
        self._send(("reply", number, head, name, places, held), inline)

    def _place(self, results: list[memoryview], target: int) -> tuple[int, _shm.Places]:
        """Copy large results into a block.

        Returns:
            Its name, and where they are; 0 if they are to go in the message.
        """
        need = _shm.need_of(results)
        if need < SHARED_FROM:
            return 0, []
        if not target or self._blocks[target].size < need:
            target = self._ask_for_room(need)
            if not target:
                return 0, []
        try:
            return target, _shm.write(self._blocks[target].fd, results)
        except OSError:  # the system cannot back it after all
            return 0, []

    def _ask_for_room(self, need: int) -> int:
        """A block for results, or 0 where there is none."""
        self._send(("room", need), [])
        while True:
            parts = self._receive()
            match self._message(parts):
                case ("room", name):
                    return int(name)
                case ("block", *_) | ("drop", *_):
                    continue
            self._waiting.append(parts)

    def _message(self, parts: list[Any]) -> tuple[Any, ...]:
        """The message of a frame; what is about blocks is done at once."""
        message: tuple[Any, ...] = pickle.loads(parts[0])  # noqa: S301 - our own
        match message:
            case ("block", name, size):
                self._blocks[name] = _shm.Mapping(self._descriptors.popleft(), size)
            case ("drop", name):
                self._blocks.pop(name).close()
        return message

    def _init(self, settings: dict[str, Any]) -> bool:
        """Get ready, and say so."""
        limit_threads(settings["threads"])
        sys.path[:] = settings["path"]
        sys.argv[:] = settings["argv"]
        if settings["authkey"] is not None:
            import multiprocessing

            multiprocessing.current_process().authkey = settings["authkey"]
        codec = Codec(worker=True)
        with contextlib.suppress(OSError):  # it has gone; a relative path will say so
            os.chdir(settings["folder"])
        try:
            if settings["initializer"] is not None:
                initializer, arguments = codec.loads(settings["initializer"])
                initializer(*arguments)
        except BaseException as exc:  # noqa: BLE001 - user code
            self._send(("unfit", encode_exception(codec, exc)), [])
            return False
        for program in settings["programs"]:
            perform(*program, out_of_band=True)  # what goes wrong here goes wrong again with the batch, whose callers learn of it
        self._send(("ready",), [])
        return True

    def _receive(self) -> list[Any]:
        """The next frame."""
        while not self._frames:
            data, ancillary, _, _ = self._channel.recvmsg_into([self._reader.space()], _ANCILLARY)
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors = array("i")
                    descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
                    self._descriptors.extend(descriptors)
            if not data:
                raise EOFError
            self._frames.extend(self._reader.received(data))
        return self._frames.popleft()

    def _send(self, message: tuple[Any, ...], bulk: list[bytes]) -> None:
        for piece in _frames.frame([pickle.dumps(message, 5), *bulk]):
            self._channel.sendall(piece)


def _peak_meter() -> Any:
    """What tells the peak of this process's resident memory, in bytes; None where the parent can see the memory for itself."""
    if os.path.exists("/proc/self/statm"):  # noqa: PTH110 - pathlib is not needed here otherwise
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
