"""A worker process of a `WorkerPool`: what it does from its first moment to its last.

::

    start --> deaf to Ctrl-C, ends with its parent --> INIT --> threads, path, initializer, programs --> READY
                                                                              it raised: --> UNFIT
    RUN    --> the status page says "begun" --> _worker.perform --> REPLY    one at a time
    BLOCK, DROP    blocks of shared memory come and go
    LEAVE, or the end of the channel --> exit handlers, end

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
from async_batcher._wire import Codec, at_place, encode_exception, unreadable
from async_batcher._worker import limit_threads, perform, quieten

# Bytes of large buffers from which a reply goes through shared memory. With 2 workers on 2 cores the socket was the faster way up
# to about here; benchmarks/test_pool.py.
SHARED_FROM = 65_536

# Seconds that a worker stays awake for the next batch: as long as its parent takes to turn an answer into one.
_AWAKE = 200e-6

_LARGEST_KEPT = 30 << 20  # bytes; glibc does not keep more than 32 MB

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
        keep_freed_memory()
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


def keep_freed_memory() -> None:
    """Have the C library keep what large objects give back, rather than return it to the system with every batch.

    Else each batch of large bytes pays a page fault for every 4 kB of them, which costs more than copying them does. glibc takes
    the largest block that was freed so far for its measure; what is never touched costs nothing. See mallopt(3),
    M_MMAP_THRESHOLD.
    """
    bytes(_LARGEST_KEPT)


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
    """The program behind `WorkerPool.run`: the result in a tuple, so that an exception that is returned is not raised.

    The function may be given as its place: to pickle one, and unpickle it, takes longer than a short list of numbers.
    """
    ((function, args, kwargs),) = batch
    if type(function) is tuple:
        function = _functions.get(function) or _find(function)
    return [(function(*args, **kwargs),)]


_functions: dict[tuple[str, str], Any] = {}  # by their places; see `_wire.place_of`


def _find(place: tuple[str, str]) -> Any:
    """The function there.

    Raises:
        SerializationError: There is none.
    """
    try:
        function = _functions[place] = at_place(*place)
    except BaseException as exc:
        raise unreadable("function", exc) from exc  # noqa: EM101 - the name of a thing
    return function


def call_each(function: Any, calls: list[tuple[Any, ...]]) -> list[Any]:
    """What a chunk of `Executor.map` is: several calls that travel together."""
    return [function(*args) for args in calls]


class _Worker:
    def __init__(self, channel: socket.socket, status: Status) -> None:
        self._channel = channel
        self._status = status
        self._reader = _frames.FrameReader()
        self._descriptors: deque[int] = deque()
        self._frames: deque[list[Any]] = deque()  # that have come and not been looked at
        self._waiting: deque[_frames.Message] = deque()  # that came while it waited for something else
        self._blocks: dict[int, _shm.Block] = {}
        self._peak = _peak_meter()
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._is_quick = False

    def serve(self) -> int:
        """Do what the parent says until it says to leave."""
        while True:
            message = self._waiting.popleft() if self._waiting else self._receive()
            if message.kind == _frames.RUN:
                self._run(message)
            elif message.kind == _frames.INIT:
                if not self._init(_frames.unpack(message.body)):
                    return 0
            elif message.kind == _frames.LEAVE:
                return 0
            del message  # or it would keep its batch until the next one comes

    def _run(self, message: _frames.Message) -> None:
        """Run one batch and answer."""
        number, target, given, given_sizes = message.number, message.target, message.source, message.sizes
        self._status.begin(number, time.monotonic())
        form, body, results = self._perform(message)
        sizes = [len(result) for result in results]
        are_bytes = all(type(result.obj) is bytes for result in results)
        source = given
        inline: list[bytes] = []
        if not given or not self._blocks[given].holds(results, given_sizes):  # else it has changed its batch in place
            source, inline = self._place(results, target)
        # What the batch and its results refer to goes before the blocks are looked at: they may be views of a block.
        del message, results
        held = [name for name, block in self._blocks.items() if not block.is_free()]
        if source in held:  # user code, which may change them while the parent reads, has the results too
            source, inline = self._place(self._blocks[source].views(sizes), target)
        if held:
            self._send(_frames.encode(_frames.HELD, _frames.WHOLE, body=pickle.dumps(held)), [])
        if self._peak is not None:
            self._status.peak = self._peak()
        in_block = sizes if source else ()
        self._send(_frames.encode(_frames.REPLY, form, number, source, are_bytes, sizes=in_block, body=body), inline)

    def _perform(self, message: _frames.Message) -> tuple[int, _frames.Buffer, list[memoryview]]:
        """What comes of a batch, as it is sent: what the body is, the body, and the large buffers beside it."""
        bulk = self._blocks[message.source].views(message.sizes) if message.source else message.bulk
        if message.form == _frames.WHOLE:
            reply = perform(message.key, *_frames.unpack(message.body, bulk), out_of_band=True)
        else:
            reply = perform(message.key, None, None, (message.form == _frames.OWN, message.body, bulk), out_of_band=True)
        if reply[0] == "done" and type(reply[1]) is tuple:
            own, data, buffers = reply[1]
            if type(data) is bytes:
                return _frames.OWN if own else _frames.PLAIN, data, [buffer.raw() for buffer in buffers]
        return _frames.WHOLE, *_frames.pack(reply)

    def _place(self, results: list[memoryview], target: int) -> tuple[int, list[bytes]]:
        """Copy large results into a block.

        Returns:
            Its name, and nothing; or 0, and what is to go in the message.
        """
        need = _shm.need_of(map(len, results))
        if need >= SHARED_FROM:
            if not target or self._blocks[target].size < need:
                target = self._ask_for_room(need)
            if target:
                with contextlib.suppress(OSError):  # the system cannot back it after all
                    self._blocks[target].write(results)
                    return target, []
        return 0, [bytes(result) for result in results]

    def _ask_for_room(self, need: int) -> int:
        """A block for results, or 0 where there is none."""
        self._send(_frames.encode(_frames.ROOM, number=need), [])
        while True:
            message = self._receive()
            if message.kind == _frames.ROOM:
                return message.number
            if message.kind not in (_frames.BLOCK, _frames.DROP):
                self._waiting.append(message)

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
            failure = pickle.dumps(encode_exception(codec, exc))
            self._send(_frames.encode(_frames.UNFIT, _frames.WHOLE, body=failure), [])
            return False
        for program in settings["programs"]:
            perform(*program, out_of_band=True)  # what goes wrong here goes wrong again with the batch, whose callers learn of it
        self._send(_frames.encode(_frames.READY), [])
        return True

    def _receive(self) -> _frames.Message:
        """The next message; what it says about blocks is done at once."""
        while not self._frames:
            self._wait()
            count, ancillary, _, _ = self._channel.recvmsg_into([self._reader.space()], _ANCILLARY)
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors = array("i")
                    descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
                    self._descriptors.extend(descriptors)
            if not count:
                raise EOFError
            self._frames.extend(self._reader.received(count))
        message = _frames.decode(self._frames.popleft())
        if message.kind == _frames.BLOCK:
            self._blocks[message.number] = _shm.Block(self._descriptors.popleft(), message.target)
        elif message.kind == _frames.DROP:
            self._blocks.pop(message.number).close()
        return message

    def _wait(self) -> None:
        """Wait for the next message: awake, and for a moment, where the last one was as quick.

        A process that has fallen asleep takes several times as long to do the same.
        """
        until = time.monotonic() + _AWAKE
        while self._is_quick and time.monotonic() < until:
            if self._poll.poll(0):
                return
            _shm.give_way()
        self._poll.poll()
        self._is_quick = time.monotonic() < until

    def _send(self, head: bytes, bulk: list[bytes]) -> None:
        for piece in _frames.frame([head, *bulk]):
            self._channel.sendall(piece)


def _peak_meter() -> Any:
    """What tells the peak of this process's resident memory, in bytes; None where the parent can see the memory for itself."""
    if os.path.exists("/proc/self/statm"):  # noqa: PTH110 - pathlib is not needed here otherwise
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
