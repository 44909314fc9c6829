"""Streams with something else than messages in them: an error or an end, and no wrong message."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from async_batcher._transport import framing
from async_batcher._transport.framing import FrameError, FrameReader, Message
from async_batcher._transport.protocol import ForkServerEvent, encode_event, take_events
from async_batcher._transport.status_page import SIZE, StatusPage
from async_batcher._transport.token_pipe import TokenPipe, TokenReader
from tests.support.damage import common_prefix, damaged
from tests.transport.test_framing import CHUNK, HEADER, comparable, messages_of, stream_of

if TYPE_CHECKING:
    from collections.abc import Callable

MARK = framing._MARK
PARTS = st.lists(
    st.lists(
        st.integers(0, 200) | st.sampled_from([CHUNK - HEADER, CHUNK + 1]), min_size=1, max_size=4
    ),
    min_size=1,
    max_size=4,
)
STEPS = st.lists(st.integers(1, 2 * CHUNK), min_size=1, max_size=10)
RUBBISH = st.binary(min_size=1, max_size=2 * HEADER).filter(
    lambda some: not MARK.startswith(some[: len(MARK)])
)


def read(reader: FrameReader, stream: bytes, steps: list[int]) -> list[Message]:
    """Feed a stream, in reads of at most those sizes, until there is an error."""
    messages: list[Message] = []
    place = turn = 0
    while place < len(stream) and reader.error is None:
        space = reader.space
        assert len(space), "a read into no space looks like the end of the stream"
        count = min(steps[turn % len(steps)], len(space), len(stream) - place)
        space[:count] = stream[place : place + count]
        place += count
        turn += 1
        messages += [comparable(message) for message in reader.buffer_updated(count)]
    return messages


@settings(max_examples=50)
@given(PARTS, st.data(), STEPS)
def test_a_damaged_stream(sizes: list[list[int]], data: st.DataObject, steps: list[int]) -> None:
    """The messages before the damage come out, and then an error, an end, or other messages."""
    messages = messages_of(sizes)
    streams = [stream_of([message]) for message in messages]
    stream = b"".join(streams)
    changed = data.draw(damaged(stream))
    intact = common_prefix(stream, changed)
    whole = 0
    while whole < len(streams) and len(streams[whole]) <= intact:
        intact -= len(streams[whole])
        whole += 1
    reader = FrameReader()
    found = read(reader, changed, steps)
    assert found[:whole] == messages[:whole]
    assert reader.error is None or isinstance(reader.error, FrameError | MemoryError)


@settings(max_examples=50)
@given(PARTS, st.integers(0, 4), RUBBISH, STEPS)
def test_something_else_between_two_messages(
    sizes: list[list[int]], place: int, rubbish: bytes, steps: list[int]
) -> None:
    """The messages before it come out, and nothing that comes later is taken for a message."""
    messages = messages_of(sizes)
    stream = stream_of(messages[:place]) + rubbish + stream_of(messages[place:])
    reader = FrameReader()
    assert read(reader, stream, steps) == messages[:place]
    assert isinstance(reader.error, FrameError)


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("step", [1, CHUNK])
def test_a_mark_that_only_begins(cut: int, step: int) -> None:
    """A part of a frame is an error as soon as something else follows."""
    (message,) = messages_of([[100]])
    frame = stream_of([message])
    reader = FrameReader()
    assert read(reader, frame[:cut], [step]) == []
    assert reader.error is None
    read(reader, frame * 2, [step])
    assert isinstance(reader.error, FrameError)


@pytest.mark.parametrize("size", [2**60, 2**63, 2**64 - 1])
@pytest.mark.parametrize("part", ["body", "buffer"])
def test_a_size_beyond_all_memory(size: int, part: str) -> None:
    """There is an error at once: no memory is taken, and the bytes are not waited for."""
    fields = (1, 0, 1, 0, 0, False, bytes(16))
    if part == "body":
        frame = framing._HEADER.pack(MARK, size, 0, 0, *fields)
    else:
        frame = framing._HEADER.pack(MARK, 5, 0, 1, *fields) + struct.pack("=Q", size) + b"body."
    before = messages_of([[3], [4]])
    reader = FrameReader()
    assert read(reader, stream_of(before) + frame, [CHUNK]) == before
    assert isinstance(reader.error, MemoryError)
    assert f"{size:,} bytes" in str(reader.error)


@given(st.binary(max_size=5 * HEADER), STEPS)
def test_random_bytes(stream: bytes, steps: list[int]) -> None:
    """No message comes out."""
    reader = FrameReader()
    assert read(reader, stream, steps) == []
    assert (reader.error is None) == MARK.startswith(stream[: len(MARK)])


# The fork server.


EVENTS: list[tuple[Any, ...]] = [
    (ForkServerEvent.PRELOADING, "module"),
    (ForkServerEvent.SERVING,),
    (ForkServerEvent.STARTED, 1, 1234),
    (ForkServerEvent.START_FAILED, 2, "no memory " * 50),
    (ForkServerEvent.EXITED, 1234, -9),
]


def take(stream: bytes, steps: list[int]) -> list[tuple[Any, ...]]:
    """Return the events of a stream that comes in such pieces."""
    events: list[tuple[Any, ...]] = []
    waiting = bytearray()
    place = turn = 0
    while place < len(stream):
        step = steps[turn % len(steps)]
        waiting += stream[place : place + step]
        place += step
        turn += 1
        events += take_events(waiting)
    return events


@settings(max_examples=50)
@given(st.lists(st.sampled_from(EVENTS), max_size=6), STEPS)
def test_events_in_any_pieces(events: list[tuple[Any, ...]], steps: list[int]) -> None:
    """Events come out complete, in order and once."""
    stream = b"".join(encode_event(*event) for event in events)
    assert take(stream, [min(step, 40) for step in steps]) == events


@settings(max_examples=50)
@given(st.lists(st.sampled_from(EVENTS), min_size=1, max_size=6), st.integers(0, 6), RUBBISH, STEPS)
def test_something_else_between_two_events(
    events: list[tuple[Any, ...]], place: int, rubbish: bytes, steps: list[int]
) -> None:
    """There is an error for any content, and wherever a read ends."""
    assume(rubbish[:1] != encode_event(ForkServerEvent.SERVING)[:1])
    before, after = (
        b"".join(encode_event(*event) for event in some)
        for some in (events[:place], events[place:])
    )
    with pytest.raises(ConnectionError, match="something else than messages"):
        take(before + rubbish + after, steps)


# What is no stream of messages.


@given(st.binary(max_size=40), st.integers(1, 2**64 - 1))
def test_something_else_in_the_token_pipe(content: bytes, seq: int) -> None:
    """A worker that reads it takes no token, and no batch waits for it."""
    read_end, write_end = os.pipe()
    try:
        os.set_blocking(read_end, False)
        os.write(write_end, content)
        reader = TokenReader(read_end)
        if content:
            with pytest.raises(ValueError, match="not a token"):
                reader.take(seq)
        else:
            assert reader.take(seq) is False
            os.close(write_end)
            write_end = -1
            with pytest.raises(EOFError):
                reader.take(seq)
    finally:
        os.close(read_end)
        if write_end != -1:
            os.close(write_end)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 2**64 - 1), unique=True, min_size=1, max_size=20), st.data())
def test_a_token_is_taken_once(seqs: list[int], data: st.DataObject) -> None:
    """By the worker, in order, or by the parent."""
    seqs.sort()
    pipe = TokenPipe()
    try:
        reader = TokenReader(pipe.child_fd)
        for seq in seqs:
            pipe.put(seq)
        count = data.draw(st.integers(0, len(seqs)))
        assert all(reader.take(seq) for seq in seqs[:count])
        assert pipe.take_all() == set(seqs[count:])
        assert not any(reader.take(seq) for seq in seqs[count:])
    finally:
        pipe.close()
        os.close(pipe.child_fd)


@settings(max_examples=50)
@given(st.binary(min_size=64, max_size=64) | st.just(b"\xff" * 64), st.integers(1, 2**64 - 1))
def test_any_bytes_on_a_status_page(content: bytes, seq: int) -> None:
    """Reading it raises nothing, and numbers fit."""
    fd = os.memfd_create("test") if hasattr(os, "memfd_create") else -1
    if fd == -1:
        pytest.skip("no memfd")
    os.write(fd, content * (SIZE // len(content)))
    page = StatusPage(fd)
    try:
        started = page.started_at(seq)
        assert started is None or isinstance(started, float)
        for number in (page.started_seq, page.peak_rss, page.abandoned_seq):
            assert 0 <= number < 2**64
        reads: list[Callable[[int], bool]] = [page.is_setting_up, page.claim_interrupt]
        assert all(type(asks(seq)) is bool for asks in reads)
        assert type(page.tears_down) is bool
        page.mark_started(seq, 1.5)
        assert (page.started_at(seq), page.is_setting_up(seq)) == (1.5, False)
    finally:
        page.close()
