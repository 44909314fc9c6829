"""The worker's end of the channel: frames over a socket, with calls that block."""

from __future__ import annotations

import functools
import os
import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING

from async_batcher._transport.descriptors import ANCILLARY_SIZE, received_descriptors
from async_batcher._transport.framing import FrameReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from async_batcher._transport.framing import Message

# Seconds that a worker stays awake for the next batch: as long as its parent takes to turn a result
# into a batch.
_SPIN_SECONDS = 200e-6

# Yields the processor to other processes. A sleep of 0 takes as long as timers are coarse.
_yield_cpu = getattr(os, "sched_yield", functools.partial(time.sleep, 0))


class WorkerChannel:
    """The worker's end.

    Args:
        fd: The descriptor of a stream socket to the parent.

    Attributes:
        descriptors: What has come with messages, for those that mention one.
    """

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)  # noqa: FBT003 - despite `socket.setdefaulttimeout`
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._reader = FrameReader()
        self._received: deque[Message] = deque()  # and not handled yet
        self._spins = False  # whether the last wait was short
        self.descriptors: deque[int] = deque()

    def receive(self) -> Message:
        """Return the next message.

        Raises:
            EOFError: The parent has exited, or has closed the channel.
            FrameError: What was received is not a message.
            MemoryError: There is no memory for a message.
        """
        while not self._received:
            space = [self._reader.space]
            try:
                count, ancillary, _, _ = self._socket.recvmsg_into(
                    space, ANCILLARY_SIZE, socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                count, ancillary = self._wait_and_receive(space)
            if ancillary:
                self.descriptors.extend(received_descriptors(ancillary))
            if not count:
                raise EOFError
            self._received.extend(self._reader.buffer_updated(count))
            if self._reader.error is not None:
                raise self._reader.error
        return self._received.popleft()

    def give_back(self, messages: Sequence[Message]) -> None:
        """Have `receive` return messages again, in this order."""
        self._received.extendleft(reversed(messages))

    def send(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Send a message (`framing.encode`)."""
        for piece in pieces:
            self._socket.sendall(piece)

    def close(self) -> None:
        self._socket.close()

    def _wait_and_receive(
        self, space: list[memoryview]
    ) -> tuple[int, list[tuple[int, int, bytes]]]:
        until = time.monotonic() + _SPIN_SECONDS
        if self._spins:  # a process that has to wake is several times slower
            while time.monotonic() < until and not self._poll.poll(0):
                _yield_cpu()
        count, ancillary, _, _ = self._socket.recvmsg_into(space, ANCILLARY_SIZE)
        self._spins = time.monotonic() < until
        return count, ancillary
