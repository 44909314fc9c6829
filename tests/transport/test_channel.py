"""The parent's channel to a worker: pauses, in which messages collect."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from async_batcher._eventloop.guarded_loop import GuardedLoop
from async_batcher._transport import channel as channel_module
from async_batcher._transport import framing
from async_batcher._transport.channel import Channel
from async_batcher._transport.protocol import MessageKind
from tests.support.polling import turn, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    pytest.mark.every_loop,
]


class Ends:
    """Both ends of a channel.

    Attributes:
        worker: The worker's end.
        read: The numbers of the messages that the parent has read.
        ended: Whether the parent has seen the end.
        errors: What reading raised.
    """

    def __init__(self) -> None:
        self.read: list[int] = []
        self.ended = False
        self.errors: list[Exception] = []
        loop = GuardedLoop(asyncio.get_running_loop(), self.errors.append)
        self.channel = Channel(
            loop, lambda message: self.read.append(message.seq), self._on_end, self.errors.append
        )
        self.worker = socket.socket(fileno=self.channel.child_fd)

    def _on_end(self, error: Exception | None) -> None:
        assert error is None
        self.ended = True

    def send(self, seq: int) -> None:
        """Send the parent a message."""
        for piece in framing.encode(MessageKind.BEGUN, seq=seq):
            self.worker.sendall(piece)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    """A channel on the loop of the test."""
    both = Ends()
    yield both
    both.channel.stop()
    both.channel.close()
    both.worker.close()
    assert not both.errors


@pytest.fixture
def long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses do not end during a test."""
    monkeypatch.setattr(channel_module, "PAUSE_SECONDS", 3600.0)


@pytest.mark.usefixtures("long_pauses")
async def test_a_pause(ends: Ends) -> None:
    """Nothing is read until the pause ends, except by a drain; the parent may send."""
    ends.channel.pause()
    ends.channel.pause()
    ends.send(1)
    ends.send(2)
    await turn(5)
    assert ends.read == []
    ends.channel.send(framing.encode(MessageKind.STOP))
    (message,) = read_one(ends.worker)
    assert message.kind == MessageKind.STOP
    ends.channel.drain()
    assert ends.read == [1, 2]


@pytest.mark.usefixtures("long_pauses")
async def test_the_first_message_causes_no_pause(ends: Ends) -> None:
    """A worker whose messages come far apart is always watched."""
    ends.channel.pause()
    ends.send(1)
    await wait_until(lambda: ends.read == [1])


async def test_the_end_of_a_pause(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has collected is read; then each message is, as it comes."""
    monkeypatch.setattr(channel_module, "PAUSE_SECONDS", 0.05)
    ends.channel.pause()
    ends.channel.pause()
    for seq in range(100):
        ends.send(seq)
    await wait_until(lambda: ends.read == list(range(100)))
    ends.send(100)
    await wait_until(lambda: ends.read[-1] == 100)


@pytest.mark.usefixtures("long_pauses")
async def test_messages_far_apart(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no pause if the last message came long ago."""
    ends.channel.pause()
    monkeypatch.setattr(ends.channel, "_asked_to_pause_at", -math.inf)
    ends.channel.pause()
    ends.send(1)
    await wait_until(lambda: ends.read == [1])


async def test_a_channel_that_stops_in_a_pause(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptor is not watched after that: it may be another's."""
    monkeypatch.setattr(channel_module, "PAUSE_SECONDS", 0.01)
    ends.channel.pause()
    ends.channel.pause()
    ends.channel.stop()
    ends.channel.close()
    ends.channel.pause()
    ends.worker.close()
    await asyncio.sleep(0.05)
    assert not ends.ended


async def test_a_worker_that_exits_in_a_pause(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had sent is read, and then its end."""
    monkeypatch.setattr(channel_module, "PAUSE_SECONDS", 0.01)
    ends.channel.pause()
    ends.channel.pause()
    ends.send(1)
    ends.worker.close()
    await wait_until(lambda: ends.ended)
    assert ends.read == [1]


def read_one(worker: socket.socket) -> list[framing.Message]:
    """Return the messages that one read of the worker's end gives."""
    reader = framing.FrameReader()
    return reader.buffer_updated(worker.recv_into(reader.space))


async def test_a_handler_that_ends_the_program(ends: Ends) -> None:
    """The messages that came with the one that it handles are handled all the same."""
    frames = [framing.encode(MessageKind.REPLY, seq=number)[0] for number in (1, 2, 3)]

    def handle(message: framing.Message) -> None:
        ends.read.append(message.seq)
        if message.seq == 1:
            raise SystemExit

    ends.channel._on_message = handle
    ends.worker.sendall(b"".join(map(bytes, frames)))
    with pytest.raises(SystemExit):
        ends.channel._read()
    await wait_until(lambda: ends.read == [1, 2, 3])
    assert not ends.errors


@pytest.mark.parametrize("is_read", [True, False])
async def test_descriptors_that_wait_to_be_sent(ends: Ends, is_read: bool) -> None:
    """The channel has its own until then, or until it ends; their owner may close them."""
    files = count_descriptors()
    large, small = bytes(10_000_000), b"descriptor"
    ends.channel.send([large])
    end, pipe = os.pipe()
    ends.channel.send([small], [end])
    os.close(end)
    if is_read:
        await asyncio.to_thread(read_exactly, ends.worker, len(large))
        data, (received,), _, _ = await asyncio.to_thread(
            socket.recv_fds, ends.worker, len(small), 1
        )
        assert data == small
        os.write(pipe, b"seen")
        assert os.read(received, 10) == b"seen"
        os.close(received)
    else:
        ends.channel.stop()
    os.close(pipe)
    await turn()
    assert count_descriptors() <= files
    assert not ends.ended


def count_descriptors() -> int:
    """Return how many this process has open."""
    return len(list(Path("/dev/fd").iterdir()))


def read_exactly(worker: socket.socket, count: int) -> None:
    """Read that many bytes."""
    while count:
        count -= len(worker.recv(min(count, 65_536)))
