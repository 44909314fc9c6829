"""A worker process of a `WorkerPool`: what it does from its first moment to its last.

::

    start --> handles SIGINT, SIGTERM, SIGHUP; ends with its parent --> INIT --> threads, path, initializer --> READY
                                                                                           it raised: --> INIT_FAILED
    RUN    --> run_batch: load and set up, the first time; the status page says "begun" --> REPLY    one at a time
    TEAR_DOWN    a function is dropped, after its tear-down --> REPLY
    ADD_BLOCK, FREE_BLOCK    blocks of shared memory come and go
    TRACKER        the resource tracker of the program, which is the worker's from then on
    STOP, or the end of the channel --> exit handlers, end

Rules:

- One private channel, on which parent and worker take turns; nothing is shared with another worker.
- It ends when its parent does, however that dies, also while C code holds the GIL: on Linux the kernel sends SIGKILL when the
  parent's end of the life pipe closes.
- The user's main module is never run here.
- Imports neither asyncio nor what it does not use.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pickle
import select
import signal
import socket
import sys
import time
from array import array
from collections import deque
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.by_value import BOOT_MARK, REGISTRY, START_MARK
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.diagnostics import unpickling_error
from async_batcher._serialization.object_path import load_object
from async_batcher._serialization.remote_exception import encode_exception
from async_batcher._transport import framing, shared_memory
from async_batcher._transport.shared_memory import SHM_THRESHOLD
from async_batcher._transport.status_page import StatusPage
from async_batcher._worker.run_batch import drop, limit_blas_threads, reset_signals, run_batch

if TYPE_CHECKING:
    from collections.abc import Sequence


# Seconds that a worker stays awake for the next batch: as long as its parent takes to turn an answer into one.
_SPIN_SECONDS = 200e-6

# Lets go of the processor; takes it again if nobody wants it. (A sleep of 0 takes as long as timers are coarse.)
_yield_cpu = getattr(os, "sched_yield", functools.partial(time.sleep, 0))

# What a worker ends with whose own code has raised; EX_SOFTWARE of sysexits.h.
EXIT_INTERNAL_ERROR = 70

_LARGEST_KEPT = 30 << 20  # bytes; glibc does not keep more than 32 MB

_ANCILLARY = socket.CMSG_SPACE(16 * array("i").itemsize)  # for the descriptors that come with one read


def worker_main(channel: int, status: int, life: int) -> None:
    """Be a worker until the end; does not return.

    Args:
        channel: The descriptor of a stream socket to the parent.
        status: That of the status page.
        life: That of the read end of a pipe whose other end the parent holds, and nobody else.
    """
    code = EXIT_INTERNAL_ERROR
    try:
        for descriptor in (channel, status, life):
            os.set_inheritable(descriptor, False)  # noqa: FBT003 - its only argument; they are nobody's that user code starts
        REGISTRY.keeps_modules = False  # a forked process's main module takes the globals that are sent
        reset_signals()
        exit_with_parent(life)
        raise_malloc_threshold()
        sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123 - for as long as the process lives
        with socket.socket(fileno=channel) as parent:
            parent.setblocking(True)  # noqa: FBT003 - its only argument; whatever `socket.setdefaulttimeout` says
            code = WorkerLoop(parent, StatusPage(status)).serve()
    except (EOFError, ConnectionError):
        code = 0  # the parent has gone, or has let go of this worker
    except BaseException:  # noqa: BLE001 - must not return into what forked it
        import traceback

        traceback.print_exc()
    finally:
        exit_process(code)


class FrozenStart:
    """What `multiprocessing.freeze_support` calls in a frozen program that was started in place of an interpreter.

    Args:
        path: ``sys.path`` from now on.
        module: A module of this package.
        name: The function that is called in it.
        args: What it is called with.
    """

    def __init__(self, path: list[str], module: str, name: str, args: tuple[int, ...]) -> None:
        self._path = path
        self._module = module
        self._name = name
        self._args = args

    def _bootstrap(self, sentinel: int) -> Any:  # as a process object of multiprocessing
        import importlib

        os.close(sentinel)
        setattr(sys.modules["__main__"], BOOT_MARK, True)  # it has run as far as freeze_support, and goes no further
        os.environ.pop(START_MARK, None)
        sys.path[:] = self._path
        return getattr(importlib.import_module(self._module), self._name)(*self._args)


def forget_program() -> None:
    """In a process that was forked: drop the exit handlers, and what multiprocessing knows, of the process that forked it."""
    import atexit

    atexit._clear()  # noqa: SLF001 - as multiprocessing does, and so is the rest
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None:
        sys.modules["multiprocessing.process"]._children = set()  # type: ignore[attr-defined]  # noqa: SLF001
        util._finalizer_registry.clear()  # noqa: SLF001
        util._run_after_forkers()  # noqa: SLF001
        atexit.register(util._exit_function)  # noqa: SLF001


def join_tracker(fd: int) -> None:
    """Register named shared memory and semaphores where the program does, with the resource tracker behind a descriptor.

    A tracker of the worker's own would unlink, when the worker ends, what the program still uses.
    """
    with contextlib.suppress(ImportError):  # a Python without it, whose user code cannot use one either
        from multiprocessing import resource_tracker

        tracker: Any = resource_tracker._resource_tracker  # noqa: SLF001 - as multiprocessing does for its workers
        if tracker._fd is None:  # noqa: SLF001 - else it was inherited by fork, or user code has started one before
            tracker._fd, fd = fd, -1  # noqa: SLF001
    if fd != -1:
        os.close(fd)


def exit_with_parent(life: int) -> None:
    """See to it that this process ends when the other end of the pipe ``life`` is closed."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox refuses it: then a thread
            _have_kernel_end_with(life)
            return
    import threading

    def watch() -> None:
        os.read(life, 1)
        os._exit(1)

    threading.Thread(target=watch, name="async_batcher-parent-watch", daemon=True).start()


def _have_kernel_end_with(life: int) -> None:
    import fcntl

    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    closed = select.poll()  # not select.select, which takes no descriptor above 1023
    closed.register(life, select.POLLIN)
    if closed.poll(0):  # before it could tell
        os._exit(1)


def raise_malloc_threshold() -> None:
    """Have the C library keep what large objects give back, rather than return it to the system with every batch.

    Else each batch of large bytes pays a page fault for every 4 kB of them, which costs more than copying them does. glibc takes
    the largest block that was freed so far for its measure; what is never touched costs nothing. See mallopt(3),
    M_MMAP_THRESHOLD.
    """
    bytes(_LARGEST_KEPT)


def exit_process(code: int) -> None:
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


def call_function(batch: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> list[tuple[Any]]:
    """The program behind `WorkerPool.run`: the result in a tuple, so that an exception that is returned is not raised.

    The function may be given as its place: to pickle one, and unpickle it, takes longer than a short list of numbers.
    """
    ((function, args, kwargs),) = batch
    if type(function) is tuple:
        function = _functions.get(function) or _find(function)
    return [(function(*args, **kwargs),)]


class SentFunction:
    """The program behind `WorkerPool.run` for a function that is sent by value: once to each worker, not with each call.

    Args:
        function: The user's function.
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, batch: list[tuple[bool, tuple[Any, ...], dict[str, Any]]]) -> list[tuple[Any]]:
        """Call it; see `call_function`. The first of the three says whether it is called for each entry of a chunk."""
        ((is_chunk, args, kwargs),) = batch
        return [(call_chunk(self.function, *args) if is_chunk else self.function(*args, **kwargs),)]


_functions: dict[tuple[str, str], Any] = {}  # by their places; see `object_path.object_path`


def _find(place: tuple[str, str]) -> Any:
    """The function there.

    Raises:
        SerializationError: There is none.
    """
    try:
        function = _functions[place] = load_object(*place)
        REGISTRY.note_imported(function)
    except BaseException as exc:
        raise unpickling_error("function", exc) from exc  # noqa: EM101 - the name of a thing
    return function


def call_chunk(function: Any, calls: list[tuple[Any, ...]]) -> list[Any]:
    """What a chunk of `Executor.map` is: several calls that travel together."""
    return [function(*args) for args in calls]


class _NoDescriptorsError(OSError):
    pass


class WorkerLoop:
    def __init__(self, channel: socket.socket, status: StatusPage) -> None:
        self._channel = channel
        self._status = status
        self._reader = framing.FrameReader()
        self._descriptors: deque[int] = deque()
        self._messages: deque[framing.Message] = deque()  # that have come and not been looked at
        self._blocks: dict[int, shared_memory.SharedBlock] = {}
        self._pid = os.getpid()
        self._peak = _peak_rss_reader()
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._is_quick = False
        self._number = 0  # of the batch
        self._has_prepared = False  # its function has been loaded for it, which the parent must learn of

    def prepares(self) -> None:
        """See `run_batch.Watch`."""
        self._status.prepare(self._number)
        self._has_prepared = True

    def tears_down(self) -> None:
        """See `run_batch.Watch`."""
        self._status.tears_down = True

    def begins(self) -> None:
        """See `run_batch.Watch`."""
        if self._has_prepared:
            self._check_process(1)
        self._status.mark_started(self._number, time.monotonic())
        if self._has_prepared:
            self._has_prepared = False
            self._send(framing.encode(framing.BEGUN, number=self._number))

    def serve(self) -> int:
        """Do what the parent says until it says to leave."""
        while True:
            message = self._receive()
            if message.kind == framing.RUN:
                self._run(message)
            elif message.kind == framing.INIT:
                if not self._init(framing.loads(message.body)):
                    return 0
            elif message.kind == framing.TEAR_DOWN:
                reply = drop(message.key)
                self._check_process(1)
                form, body, _ = framing.envelope(reply)
                self._send(framing.encode(framing.REPLY, form, message.number, body=body))
            elif message.kind == framing.STOP:
                return 0
            del message  # or it would keep its batch until the next one comes

    def _run(self, message: framing.Message) -> None:
        """Run one batch and answer."""
        number = self._number = message.number
        self._has_prepared = False
        try:
            form, body, results = self._perform(message)
            if self._peak is not None:
                self._status.peak_rss = self._peak()
            if not results and not self._blocks:
                self._send(framing.encode(framing.REPLY, form, number, 0, 0, b"", (), body))
                return
            are_bytes = all(type(result.obj) is bytes for result in results)
            source, sizes, inline = self._store_results(results, message.source, message.sizes, message.target)
        except (MemoryError, _NoDescriptorsError) as exc:  # not of the user's code, but for its sake: the worker goes on
            failure = encode_exception(Codec(worker=True), OSError(*exc.args) if isinstance(exc, OSError) else exc)
            form, body, results = framing.envelope(("raised", failure))
            source, are_bytes, sizes, inline = 0, False, (), []
        self._send(framing.encode(framing.REPLY, form, number, source, are_bytes, b"", sizes, body, inline))

    def _perform(self, message: framing.Message) -> framing.Content:
        """What comes of a batch, as it is sent."""
        _, form, _, source, _, key, sizes, body, bulk = message
        if source:
            if source not in self._blocks:
                msg = "the batch could not be received: this worker process has no file descriptors left"
                raise _NoDescriptorsError(errno.EMFILE, msg)
            bulk = self._blocks[source].views(sizes)
        if form == framing.ENVELOPE:
            reply = run_batch(key, *framing.loads(body, bulk), out_of_band=True, watch=self)
        else:
            reply = run_batch(key, None, None, (form == framing.CODEC_PICKLE, body, bulk), out_of_band=True, watch=self)
        self._check_process(0 if reply[0] == "done" else 1)
        plain = framing.bare_pickle(reply[1]) if reply[0] == "done" else None
        return plain or framing.envelope(reply)

    def _check_process(self, code: int) -> None:
        """End a process that user code has forked and that has come back from it: the channel is its parent's."""
        if os.getpid() != self._pid:
            os._exit(code)

    def _store_results(
        self, results: list[memoryview], given: int, given_sizes: Sequence[int], target: int
    ) -> tuple[int, Sequence[int], list[bytes]]:
        """Put large results where the parent will read them, and tell it which blocks user code still looks into.

        Args:
            results: They are gone when this returns.
            given: The block that the batch came in, or 0.
            given_sizes: Bytes of each buffer in it.
            target: The block that is lent for results, or 0.

        Returns:
            The name of the block that they are in and the size of each, or 0; and what is to go in the message.
        """
        sizes = [len(result) for result in results]
        source = given
        inline: list[bytes] = []
        if not given or not self._blocks[given].contains(results, given_sizes):  # else it has changed its batch in place
            source, inline = self._store_in_block(results, target)
        results.clear()  # before the blocks are looked at: they may be views of one
        held = [name for name, block in self._blocks.items() if not block.has_no_views()]
        if source in held:  # user code, which may change them while the parent reads, has the results too
            source, inline = self._store_in_block(self._blocks[source].views(sizes), target)
        if held:
            self._send(framing.encode(framing.BLOCKS_IN_USE, framing.ENVELOPE, body=pickle.dumps(held)))
        return source, sizes if source else (), inline

    def _store_in_block(self, results: list[memoryview], target: int) -> tuple[int, list[bytes]]:
        """Copy large results into a block.

        Returns:
            Its name, and nothing; or 0, and what is to go in the message.
        """
        need = shared_memory.bytes_needed(map(len, results))
        if need >= SHM_THRESHOLD:
            if target not in self._blocks or self._blocks[target].size < need:
                target = self._request_block(need)
            if target:
                with contextlib.suppress(OSError):  # the system cannot back it after all
                    self._blocks[target].write(results)
                    return target, []
        return 0, [bytes(result) for result in results]

    def _request_block(self, need: int) -> int:
        """A block for results, or 0 where there is none."""
        self._send(framing.encode(framing.NEED_BLOCK, number=need))
        others: list[framing.Message] = []
        while (message := self._receive()).kind != framing.NEED_BLOCK:
            others.append(message)
        self._messages.extendleft(reversed(others))
        return message.number if message.number in self._blocks else 0

    def _init(self, settings: dict[str, Any]) -> bool:
        """Get ready, and say so."""
        with contextlib.suppress(OSError):  # it has been removed; a relative path will say so
            os.chdir(settings["folder"])  # first: a relative entry of the path refers to it
        limit_blas_threads(settings["threads"])
        sys.path = settings["path"]
        sys.argv = settings["argv"]
        if settings["authkey"] is not None:
            import multiprocessing

            multiprocessing.current_process().authkey = settings["authkey"]
        codec = Codec(worker=True)
        try:
            if settings["initializer"] is not None:
                initializer, arguments = codec.loads(settings["initializer"])
                REGISTRY.note_imported(initializer)
                initializer(*arguments)
        except BaseException as exc:  # noqa: BLE001 - user code
            failure = pickle.dumps(encode_exception(codec, exc))
            self._send(framing.encode(framing.INIT_FAILED, framing.ENVELOPE, body=failure))
            return False
        self._send(framing.encode(framing.READY))
        return True

    def _receive(self) -> framing.Message:
        """The next message that is not about blocks, which come and go at once."""
        while True:
            while not self._messages:
                until = time.monotonic() + _SPIN_SECONDS
                if self._is_quick:
                    self._spin(until)
                count, ancillary, _, _ = self._channel.recvmsg_into([self._reader.space], _ANCILLARY)
                if ancillary:
                    self._take_descriptors(ancillary)
                if not count:
                    raise EOFError
                self._is_quick = time.monotonic() < until
                self._messages.extend(self._reader.buffer_updated(count))
            message = self._messages.popleft()
            if message.kind == framing.ADD_BLOCK:
                if self._descriptors:  # else user code has used up all that a process may have
                    self._blocks[message.number] = shared_memory.SharedBlock(self._descriptors.popleft(), message.target)
            elif message.kind == framing.FREE_BLOCK:
                if message.number in self._blocks:
                    self._blocks.pop(message.number).close()
            elif message.kind == framing.TRACKER:
                if self._descriptors:
                    join_tracker(self._descriptors.popleft())
            else:
                return message

    def _take_descriptors(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors = array("i")
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
                for descriptor in descriptors:
                    os.set_inheritable(descriptor, False)  # noqa: FBT003 - its only argument
                self._descriptors.extend(descriptors)

    def _spin(self, until: float) -> None:
        """Wait for the next message for a moment, since the last one was quick.

        A process that has fallen asleep takes several times as long to do the same.
        """
        while time.monotonic() < until:
            if self._poll.poll(0):
                return
            _yield_cpu()

    def _send(self, pieces: Sequence[bytes | memoryview]) -> None:
        for piece in pieces:
            self._channel.sendall(piece)


def _peak_rss_reader() -> Any:
    """What tells the peak of this process's resident memory, in bytes; None where the parent can see the memory for itself."""
    if os.path.exists("/proc/self/statm"):  # noqa: PTH110 - pathlib is not needed here otherwise
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
