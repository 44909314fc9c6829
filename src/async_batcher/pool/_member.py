"""One worker, as its pool sees it.

::

    STARTING --ready--> IDLE --run--> BUSY --reply--> IDLE ...      a batch at a time
        |                 |             |
        |                 `--leave------|--> LEAVING (will end by itself)
        `-----------------+-------------'--> DYING (killed, or its channel has closed) --its process has ended--> GONE

Rules:

- A death is the end of the channel or of the process, whichever is seen first. What the worker had sent before still counts.
- Nothing is written to or read from the channel with a call that may block; what is copied to or from shared memory is copied
  in a helper thread where it is long.
- Blocks of shared memory are lent to one worker and go with it. One that the worker's user code still looks into is not written
  to.
"""

from __future__ import annotations

import contextlib
import enum
import os
import pickle
import signal
import socket
import time
from collections import OrderedDict, deque
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Protocol

from async_batcher import _frames, _shm
from async_batcher._child import SHARED_FROM
from async_batcher._status import SIZE as STATUS_SIZE
from async_batcher._status import Status
from async_batcher._worker import MAX_PROGRAMS
from async_batcher.pool._launch import Ends

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable
    from concurrent.futures import Executor

    from async_batcher._wire import Failure
    from async_batcher.pool._task import Task

# Bytes that are copied on the loop's thread: about a tenth of a millisecond's work, as long as a trip to a helper thread takes.
COPIED_HERE = 1 << 20

_MOST_PIECES = 64  # buffers for one call of sendmsg; the system's limit is 1024
_READ_AT_ONCE = 16  # reads from one worker before the loop serves others
_PATIENCE_WITH_THE_DEAD = 1.0  # seconds for the news of how a process ended that has closed its channel, or was killed


class State(enum.Enum):
    """What a worker is doing."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    LEAVING = "leaving"
    DYING = "dying"
    GONE = "gone"


class Crew(Protocol):
    """Who is told of a worker; always on the loop's thread."""

    def on_ready(self, member: Member) -> None:
        """It can take a batch."""

    def on_idle(self, member: Member) -> None:
        """It has answered, and can take the next batch."""

    def on_reply(self, member: Member, task: Task, reply: Any) -> None:
        """The reply to a task is here."""

    def on_overdue(self, member: Member, task: Task) -> None:
        """It was killed, since the task ran for too long."""

    def on_failed(self, task: Task, error: BaseException) -> None:
        """The reply to a task cannot be taken."""

    def on_lost(self, member: Member, task: Task, *, has_begun: bool) -> None:
        """It died with this task."""

    def on_gone(self, member: Member) -> None:
        """Its process has ended."""

    def on_no_room(self, error: OSError) -> None:
        """There was no shared memory to be had."""


class _Block:
    """A block of shared memory, as its owner sees it."""

    __slots__ = ("copying", "fd", "is_free", "name", "size")

    def __init__(self, name: int, fd: int, size: int) -> None:
        self.name = name
        self.fd = fd
        self.size = size
        self.is_free = True
        self.copying = False  # a helper thread copies to or from it


class Member:
    """One worker.

    Args:
        loop: The loop that watches its channel.
        crew: Who is told.
        helpers: Threads for what would hold the loop up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, crew: Crew, helpers: Executor) -> None:
        self._loop = loop
        self._crew = crew
        self._helpers = helpers
        self.state = State.STARTING
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.batches = 0
        self.busy_seconds = 0.0
        self.made_at = time.monotonic()
        self.start_seconds = 0.0
        self.was_ready = False
        self.start_error: BaseException | None = None  # why it never was
        self.unfit: Failure | None = None  # what its initializer raised
        self.is_retiring = False  # a successor has been ordered
        self.is_outgrown = False  # it is to leave as soon as that is ready
        self.task: Task | None = None
        self._number = 0  # of the task, as the status page knows it
        self._departed_at = 0.0
        self._known: OrderedDict[str, None] = OrderedDict()  # programs that the worker keeps, as it keeps them
        self._blocks: dict[int, _Block] = {}
        self._names = 0
        self._timer: asyncio.TimerHandle | None = None
        self._reader = _frames.FrameReader()
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()  # pieces, and the descriptors that go with each
        self._has_ended = False
        self._is_watched = True
        self._is_writing = False
        self._is_forgotten = False
        self._channel, theirs = socket.socketpair()
        self._channel.setblocking(False)  # noqa: FBT003 - its only argument
        status = _shm.nameless(STATUS_SIZE)
        life, self._life = os.pipe()
        self.ends = Ends(theirs.detach(), os.dup(status), life)
        self._status = Status(status)
        loop.add_reader(self._channel.fileno(), self._on_readable)

    # What its pool asks of it.

    def run(self, task: Task) -> None:
        """Send it a task; it must be idle."""
        self.state = State.BUSY
        self.task = task
        self._number += 1
        head, bulk = _frames.pack(task.message(with_program=self._learns(task.key)))
        need = _shm.need_of(bulk)
        if need < SHARED_FROM:
            self._depart(head, bulk, None, [])
            return
        block = self._free_block(need)
        if need <= COPIED_HERE and block is not None:
            self._depart(head, [], block, _shm.write(block.fd, bulk))
        else:
            self._copy_and_depart(head, bulk, block, need)

    def leave(self) -> None:
        """Let it end by itself, which it does at once: it is idle."""
        self.state = State.LEAVING
        self._send(("leave",))

    def kill(self) -> None:
        """End it now, whatever it does."""
        if self.state is State.GONE:
            return
        self.state = State.DYING
        self._stop_watching()
        self._close_life()
        if self.pid is not None and not self._has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._set_timer(_PATIENCE_WITH_THE_DEAD, self._bury)
        elif self._has_ended:
            self._bury()

    def abandon(self) -> None:
        """End it without the loop, which has closed."""
        if self.pid is not None and not self._has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.state = State.GONE
        self._is_watched = False
        self.forget()

    def is_alive(self) -> bool:
        """Whether it is, or will be, of use."""
        return self.state in (State.STARTING, State.IDLE, State.BUSY)

    def begun_at(self) -> float | None:
        """When it began its task, on `time.monotonic`; None if it has not."""
        return self._status.begun_at(self._number)

    @property
    def peak(self) -> int:
        """See `Status.peak`."""
        return self._status.peak

    def forget(self) -> None:
        """Close what is ours: in a forked child, or when the loop has closed."""
        if self._is_forgotten:
            return
        self._is_forgotten = True
        self._channel.close()
        self._close_life()
        for block in self._blocks.values():
            if not block.copying:
                os.close(block.fd)
        self._blocks = {name: block for name, block in self._blocks.items() if block.copying}

    # What its launcher tells.

    def started(self, pid: int) -> None:
        """There is a process."""
        self.pid = pid
        if self.state is State.DYING:
            self.kill()

    def not_started(self, error: BaseException) -> None:
        """There is none."""
        self._has_ended = True
        self.start_error = self.start_error or error
        self._bury()

    def ended(self, exit_code: int | None) -> None:
        """The process has ended."""
        if self._has_ended:
            return
        self._has_ended = True
        self.exit_code = exit_code
        if self.state is not State.GONE:
            if self.state is not State.LEAVING:
                self.state = State.DYING
            self._read_the_rest()
            self._bury()

    # Its channel.

    def introduce(self, settings: dict[str, Any], timeout: float) -> None:
        """Send what it needs to get ready.

        Args:
            settings: See `_child`.
            timeout: Seconds that it may take.
        """
        for program in settings["programs"]:
            self._learns(program[0])
        self._send(("init", settings))
        self._set_timer(timeout, self._on_start_timeout)

    def _on_start_timeout(self) -> None:
        self._timer = None
        self.start_error = TimeoutError("it was not ready within start_timeout; it has been killed")
        self.kill()

    def _learns(self, key: str) -> bool:
        """Note that the worker will have that program.

        Returns:
            Whether it must be sent.
        """
        is_new = key not in self._known
        self._known[key] = None
        self._known.move_to_end(key)
        if len(self._known) > MAX_PROGRAMS:
            self._known.popitem(last=False)
        return is_new

    def knows(self, key: str) -> bool:
        """Whether the worker has that program."""
        return key in self._known

    def unlearn(self, key: str) -> None:
        """The worker says that it has not that program."""
        self._known.pop(key, None)

    def _depart(self, head: bytes, bulk: list[memoryview], block: _Block | None, places: _shm.Places) -> None:
        """Send the task, its buffers in the message or in a block."""
        assert self.task is not None  # noqa: S101 - `run` has set it
        source = 0
        if block is not None:
            block.is_free = False
            source = block.name
        target = max((one for one in self._blocks.values() if one.is_free), key=lambda one: one.size, default=None)
        if target is not None:
            target.is_free = False
        self._departed_at = time.monotonic()
        self._send(("run", self._number, head, source, places, target.name if target else 0), bulk)
        if self.task.timeout is not None:
            self._set_timer(self.task.timeout, self._on_timeout)

    def _copy_and_depart(self, head: bytes, bulk: list[memoryview], block: _Block | None, need: int) -> None:
        """The same with a long copy, or a block that is yet to be made: in a helper thread."""
        if block is not None:
            block.is_free = False
            block.copying = True

        def copy() -> tuple[int, int, _shm.Places] | OSError:
            try:
                if block is not None:
                    return block.fd, block.size, _shm.write(block.fd, bulk)
                size = _shm.size_for(need)
                fd = _shm.nameless(size)
                try:
                    return fd, size, _shm.write(fd, bulk)
                except BaseException:
                    os.close(fd)
                    raise
            except OSError as exc:
                return exc

        def copied(done: asyncio.Future[Any]) -> None:
            result = done.result()
            lent = block
            if lent is not None:
                self._copied(lent)
            elif not isinstance(result, OSError):
                lent = self._adopt_block(result[0], result[1])
            if self.state is not State.BUSY:
                return  # it has died; the task has been taken from it
            if isinstance(result, OSError):
                self._crew.on_no_room(result)
                self._depart(head, bulk, None, [])
            else:
                self._depart(head, [], lent, result[2])

        self._aside(copy, copied)

    def _aside(self, work: Callable[[], Any], then: Callable[[asyncio.Future[Any]], None]) -> None:
        self._loop.run_in_executor(self._helpers, work).add_done_callback(then)

    def _send(self, message: tuple[Any, ...], bulk: Iterable[memoryview] = (), descriptors: Iterable[int] = ()) -> None:
        pieces = _frames.frame([pickle.dumps(message, 5), *bulk])
        descriptors = list(descriptors)
        for piece in pieces:
            self._unsent.append((memoryview(piece), descriptors))
            descriptors = []
        if len(self._unsent) == len(pieces):
            self._on_writable()

    def _on_writable(self) -> None:
        unsent = self._unsent
        try:
            while unsent and self._is_watched:
                piece, descriptors = unsent[0]
                if descriptors:
                    sent = socket.send_fds(self._channel, [piece], descriptors)
                elif len(unsent) == 1:
                    sent = self._channel.send(piece)
                else:
                    few = takewhile(lambda entry: not entry[1], islice(unsent, _MOST_PIECES))
                    sent = self._channel.sendmsg([piece for piece, _ in few])
                while sent:  # descriptors go with the first byte of their piece
                    piece, _ = unsent[0]
                    if sent < len(piece):
                        unsent[0] = (piece[sent:], [])
                        break
                    unsent.popleft()
                    sent -= len(piece)
        except BlockingIOError:
            if not self._is_writing:
                self._is_writing = True
                self._loop.add_writer(self._channel.fileno(), self._on_writable)
            return
        except OSError:  # it has gone: reading will tell
            unsent.clear()
        self._stop_writing()

    def _stop_writing(self) -> None:
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._channel.fileno())

    def _on_readable(self) -> None:
        for _ in range(_READ_AT_ONCE):
            frames = self._read()
            if frames is None:
                return
            for parts in frames:
                self._on_frame(parts)
            if not self._is_watched:
                return

    def _read(self) -> list[list[Any]] | None:
        """What has come; None when there is nothing more for now."""
        try:
            count = self._channel.recv_into(self._reader.space())
        except BlockingIOError:
            return None
        except OSError:
            count = 0
        if not count:
            self._on_end_of_channel()
            return None
        return self._reader.received(count)

    def _read_the_rest(self) -> None:
        """What a worker that has ended had sent before, without waiting for the end of a channel that others may hold open."""
        while self._is_watched and (frames := self._read()) is not None:
            for parts in frames:
                self._on_frame(parts)

    def _on_end_of_channel(self) -> None:
        self._stop_watching()
        if self.state is State.LEAVING:
            self._set_timer(_PATIENCE_WITH_THE_DEAD, self.kill)
        elif not self._has_ended:
            self.kill()

    def _on_frame(self, parts: list[Any]) -> None:
        match pickle.loads(parts[0]):  # noqa: S301 - our own
            case ("reply", number, head, name, places, held):
                if number == self._number and self.task is not None:
                    self._on_reply(head, parts[1:], name, places, held)
            case ("room", need):
                self._make_room(need)
            case ("ready",):
                self.start_seconds = time.monotonic() - self.made_at
                self._cancel_timer()
                if self.state is State.STARTING:
                    self.was_ready = True
                    self.state = State.IDLE
                    self._crew.on_ready(self)
            case ("unfit", failure):
                self.unfit = failure

    def _on_reply(self, head: bytes, bulk: list[Any], name: int, places: _shm.Places, held: list[int]) -> None:
        self._cancel_timer()
        task, self.task = self.task, None
        assert task is not None  # noqa: S101 - asked by the caller
        self.batches += 1
        self.busy_seconds += time.monotonic() - self._departed_at
        for block in self._blocks.values():
            if not block.copying:
                block.is_free = block.name not in held
        if name and sum(size for _, size in places) > COPIED_HERE:
            self._copy_out(task, head, self._blocks[name], places)
            reply = None
        else:
            reply = _frames.unpack(head, _shm.read(self._blocks[name].fd, places) if name else bulk)
        if self.state is State.BUSY:
            self.state = State.IDLE
        if reply is not None:
            self._crew.on_reply(self, task, reply)
        if self.state is State.IDLE:
            self._crew.on_idle(self)

    def _copy_out(self, task: Task, head: bytes, block: _Block, places: _shm.Places) -> None:
        """Copy the results out in a helper thread; the worker may go on with another block meanwhile."""
        block.is_free = False
        block.copying = True

        def copied(done: asyncio.Future[Any]) -> None:
            self._copied(block)
            try:
                reply = _frames.unpack(head, done.result())
            except BaseException as exc:  # noqa: BLE001 - memory, most likely; nobody is to wait for ever because of it
                self._crew.on_failed(task, exc)
                return
            self._crew.on_reply(self, task, reply)

        self._aside(lambda: _shm.read(block.fd, places), copied)

    # Its blocks.

    def _free_block(self, need: int) -> _Block | None:
        """The smallest one that will do."""
        fitting = [block for block in self._blocks.values() if block.is_free and block.size >= need]
        return min(fitting, key=lambda block: block.size, default=None)

    def _adopt_block(self, fd: int, size: int) -> _Block | None:
        """Take a new block into use, instead of a free one that was too small."""
        if self.state not in (State.BUSY, State.IDLE):
            os.close(fd)
            return None
        outgrown = [block for block in self._blocks.values() if block.is_free and block.size < size]
        if outgrown:
            old = max(outgrown, key=lambda block: block.size)
            del self._blocks[old.name]
            os.close(old.fd)
            self._send(("drop", old.name))
        self._names += 1
        block = self._blocks[self._names] = _Block(self._names, fd, size)
        self._send(("block", block.name, size), descriptors=[fd])
        return block

    def _make_room(self, need: int) -> None:
        """The worker asks for a block for its results."""
        fitting = self._free_block(need)
        if fitting is not None:
            fitting.is_free = False
            self._send(("room", fitting.name))
            return
        size = _shm.size_for(need)

        def made(done: asyncio.Future[Any]) -> None:
            try:
                fd = done.result()
            except OSError as exc:
                self._crew.on_no_room(exc)
                self._send(("room", 0))
                return
            block = self._adopt_block(fd, size)
            if block is not None:
                block.is_free = False
                self._send(("room", block.name))

        self._aside(lambda: _shm.nameless(size), made)

    def _copied(self, block: _Block) -> None:
        block.copying = False
        block.is_free = True
        if self._is_forgotten:
            os.close(block.fd)
            self._blocks.pop(block.name, None)

    # Its time.

    def _on_timeout(self) -> None:
        self._timer = None
        overdue = self.task
        self._on_readable()  # the answer may be here: some loops look at their timers first
        if self.task is None or self.task is not overdue or self.task.timeout is None:
            return
        now = time.monotonic()
        begun = self.begun_at()
        if begun is None:
            # It was idle, and has not so much as begun: stopped, or starved of the processor. Another worker shall do it.
            rest = self._departed_at + max(self.task.timeout, _PATIENCE_WITH_THE_DEAD) - now
        else:
            rest = begun + self.task.timeout - now
        if rest > 0:
            self._set_timer(rest, self._on_timeout)
        elif begun is None:
            self._kill_with_task()
        else:
            task, self.task = self.task, None
            self.kill()
            self._crew.on_overdue(self, task)

    def _kill_with_task(self) -> None:
        task, self.task = self.task, None
        self.kill()
        if task is not None:
            self._crew.on_lost(self, task, has_begun=False)

    def _set_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(seconds, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Its end.

    def _stop_watching(self) -> None:
        if self._is_watched:
            self._is_watched = False
            self._loop.remove_reader(self._channel.fileno())
            self._stop_writing()
            self._unsent.clear()

    def _close_life(self) -> None:
        if self._life != -1:
            os.close(self._life)
            self._life = -1

    def _bury(self) -> None:
        """Its process has ended, or will not say how it does."""
        task, self.task = self.task, None
        has_begun = self.begun_at() is not None
        self._finish()
        if task is not None:
            self._crew.on_lost(self, task, has_begun=has_begun)
        self._crew.on_gone(self)

    def _finish(self) -> None:
        self.state = State.GONE
        self._cancel_timer()
        self._stop_watching()
        self._unsent.clear()
        self.forget()
        self._status.close()
