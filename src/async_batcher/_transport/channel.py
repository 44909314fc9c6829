"""The channel to one worker: frames over a socket that the event loop watches.

Nothing here blocks, and no worker starves the others: after a few calls the loop serves them first.
A worker that sends many messages in one go wakes the loop for each of them, unless it is paused.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections import deque
from itertools import islice, takewhile
from typing import TYPE_CHECKING

from async_batcher._transport import framing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from async_batcher._eventloop.guarded_loop import GuardedLoop

_MAX_PIECES = 64  # buffers for one call of sendmsg; the system's limit is 1024
_MAX_WRITES = 16  # calls, before the loop serves others
_MAX_DRAIN_READS = 1024  # more than the parts of messages that fit in a socket

# Seconds of a pause: long beside the time of a wake-up, which is some 30 us.
PAUSE_SECONDS = 1e-3


class Channel:
    """The parent's end.

    Args:
        loop: The loop that watches it.
        on_message: Called with each message that comes.
        on_end: Called once, when the worker's end has closed; or with `FrameReader.error`.
        on_error: Called with what reading raised, or ``on_message`` or ``on_end``.

    Attributes:
        child_fd: The descriptor of the worker's end; the owner passes it on and closes it.
        is_open: Whether it is watched, and may be written to.
        bytes_sent: Bytes that were sent after a wait; grows while the worker reads a long message.
    """

    def __init__(
        self,
        loop: GuardedLoop,
        on_message: Callable[[framing.Message], None],
        on_end: Callable[[Exception | None], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._loop = loop
        self._on_message = on_message
        self._on_end = on_end
        self._on_error = on_error
        self._reader = framing.FrameReader()
        # Pieces, and the descriptors that go with each.
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        self._is_writing = False
        self._received: deque[framing.Message] = deque()  # and not handled yet
        self._asked_to_pause_at = -math.inf
        self.is_open = True
        self._socket, child = socket.socketpair()
        try:
            self._socket.setblocking(False)  # noqa: FBT003 - its only argument
            child.setblocking(True)  # noqa: FBT003 - despite `socket.setdefaulttimeout`
            self._watch()
        except BaseException:
            self._socket.close()
            child.close()
            raise
        self.child_fd = child.detach()
        self.bytes_sent = 0

    def send(self, pieces: Sequence[bytes | memoryview], descriptors: Sequence[int] = ()) -> None:
        """Send a message (`framing.encode`), and descriptors with its first byte."""
        if not self.is_open:
            return
        if len(pieces) == 1 and not self._unsent and not descriptors:  # nearly always
            (piece,) = pieces
            try:
                sent = self._socket.send(piece)
            except BlockingIOError:
                sent = 0
            except OSError as exc:
                self._on_send_error(exc)
                return
            if sent == len(piece):
                return
            self._unsent.append((memoryview(piece)[sent:], []))
            self._on_writable()
            return
        was_idle = not self._unsent
        fds = [os.dup(fd) for fd in descriptors]  # the owner may close them before they are sent
        for piece in pieces:
            self._unsent.append((memoryview(piece), fds))
            fds = []
        if was_idle:
            self._on_writable()

    def drain(self) -> None:
        """Read what has come, without waiting for an end that others may hold open."""
        for _ in range(_MAX_DRAIN_READS):
            if not self.is_open or not self._read():
                return

    def pause(self) -> None:
        """Let messages collect for `PAUSE_SECONDS`, if they come as close together as that.

        Called after each wake-up for a message that need not be read at once. The first of them
        causes no pause, nor does one that comes long after the last.
        """
        now = time.monotonic()
        is_soon = now - self._asked_to_pause_at < 2 * PAUSE_SECONDS  # with the pause in between
        self._asked_to_pause_at = now
        if is_soon and self.is_open:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.call_later(PAUSE_SECONDS, self._watch)

    def stop(self) -> None:
        """Stop reading and writing."""
        if self.is_open:
            self.is_open = False
            self._loop.remove_reader(self._socket.fileno())
            self._stop_writing()
            self._clear_unsent()

    def _clear_unsent(self) -> None:
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()

    def close(self) -> None:
        """Close the descriptor without the loop, which may have closed or be another process's."""
        self.is_open = False
        self._clear_unsent()
        self._socket.close()

    def _watch(self) -> None:
        if self.is_open:
            self._loop.add_reader_unguarded(self._socket.fileno(), self._read)

    def _read(self) -> bool:
        """Read once, and tell whether anything had come. The loop calls again if there is more."""
        try:
            count = self._socket.recv_into(self._reader.space)
        except BlockingIOError:
            if self._received:
                self._handle_received()
            return False
        except OSError:
            count = 0
        try:
            messages = self._reader.buffer_updated(count) if count else []
            if len(messages) == 1 and not self._received:  # nearly always
                self._on_message(messages[0])
            else:
                self._received += messages
        except Exception as exc:  # noqa: BLE001 - as in `_handle_received`
            self._on_error(exc)
            return False
        if self._received:
            self._handle_received()
        if (not count or self._reader.error is not None) and self.is_open:
            self.stop()
            try:
                self._on_end(self._reader.error)
            except Exception as exc:  # noqa: BLE001
                self._on_error(exc)
        return bool(count)

    def _handle_received(self) -> None:
        received = self._received
        try:
            while received:
                self._on_message(received.popleft())
        except Exception as exc:  # noqa: BLE001 - here rather than in a guard: it is read often
            self._on_error(exc)
        finally:
            if received:  # a task that was resumed has raised SystemExit, for example
                self._loop.call_soon(self._handle_received)

    def _on_writable(self) -> None:
        unsent = self._unsent
        try:
            for _ in range(_MAX_WRITES):
                if not unsent:
                    self._stop_writing()
                    return
                piece, descriptors = unsent[0]
                if descriptors:
                    sent = socket.send_fds(self._socket, [piece], descriptors)
                elif len(unsent) == 1:
                    sent = self._socket.send(piece)
                else:
                    few = takewhile(lambda entry: not entry[1], islice(unsent, _MAX_PIECES))
                    sent = self._socket.sendmsg([piece for piece, _ in few])
                self._drop_sent(sent)
        except BlockingIOError:
            pass
        except OSError as exc:
            self._clear_unsent()
            self._stop_writing()
            self._on_send_error(exc)
            return
        if not self._is_writing:
            self._is_writing = True
            self._loop.add_writer(self._socket.fileno(), self._on_writable)

    def _on_send_error(self, error: OSError) -> None:
        """End the channel unless the worker has closed it, which reading shows."""
        if not isinstance(error, BrokenPipeError | ConnectionResetError) and self.is_open:
            self.stop()
            self._loop.call_soon(self._on_end, None)

    def _drop_sent(self, sent: int) -> None:
        self.bytes_sent += sent
        while sent:
            piece, fds = self._unsent[0]
            for fd in fds:
                os.close(fd)
            if sent < len(piece):
                self._unsent[0] = (piece[sent:], [])  # its descriptors went with its first byte
                return
            self._unsent.popleft()
            sent -= len(piece)

    def _stop_writing(self) -> None:
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._socket.fileno())
