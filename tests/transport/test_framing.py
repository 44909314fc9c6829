"""Messages over a stream: `encode` and `FrameReader`, wherever the stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher._serialization.out_of_band import MIN_BUFFER_SIZE
from async_batcher._transport import framing
from async_batcher._transport.framing import FrameReader, Message, encode
from async_batcher._transport.protocol import CODEC_PICKLE, ENVELOPE, PICKLE, MessageKind

CHUNK = framing._CHUNK
HEADER = framing._START
# Sizes of parts, on both sides of every limit.
SIZES = st.one_of(
    st.integers(0, 300),
    st.sampled_from(
        [
            MIN_BUFFER_SIZE - 1,
            MIN_BUFFER_SIZE,
            MIN_BUFFER_SIZE + 1,
            CHUNK - HEADER - 1,
            CHUNK - HEADER,
            CHUNK - 1,
            CHUNK,
            CHUNK + 1,
            3 * CHUNK,
        ]
    ),
)
# Of each message: its body, and the buffers that follow.
PARTS = st.lists(st.lists(SIZES, min_size=1, max_size=6), max_size=6)


def content(seed: int, size: int) -> bytes:
    """Return bytes that differ from part to part."""
    return (bytes((seed * 31 + i) % 251 for i in range(min(size, 251))) * (size // 251 + 1))[:size]


def messages_of(sizes: list[list[int]]) -> list[Message]:
    """Return messages with parts of those sizes; every second one names buffers in a block too."""
    return [
        Message(
            MessageKind.RUN,
            PICKLE,
            i,
            2 * i,
            3 * i,
            bool(i % 3),
            b"%016d" % i,
            (10 * i,) * (i % 2),
            content(17 * i, row[0]),
            [content(17 * i + 1 + j, size) for j, size in enumerate(row[1:])],
        )
        for i, row in enumerate(sizes)
    ]


def stream_of(messages: list[Message]) -> bytes:
    """Return the bytes of these messages."""
    return b"".join(
        bytes(piece)
        for message in messages
        for piece in encode(**message._asdict() | {"body": bytes(message.body)})
    )


def comparable(message: Message) -> Message:
    """Return a copy whose parts compare by value."""
    return message._replace(
        sizes=tuple(message.sizes),
        body=bytes(message.body),
        buffers=[bytes(part) for part in message.buffers],
    )


def read(reader: FrameReader, stream: bytes, steps: list[int]) -> list[Message]:
    """Feed a stream in reads of at most those sizes; the last size repeats."""
    messages: list[Message] = []
    place = 0
    while place < len(stream):
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        space = reader.space
        assert len(space), "a read into no space looks like the end of the stream"
        count = min(step, len(space), len(stream) - place)
        space[:count] = stream[place : place + count]
        place += count
        messages += [comparable(message) for message in reader.buffer_updated(count)]
    return messages


@settings(max_examples=50)
@given(PARTS, st.lists(st.integers(1, 2 * CHUNK), min_size=1, max_size=30))
def test_any_cuts_give_the_same_messages(sizes: list[list[int]], steps: list[int]) -> None:
    """Messages come out complete, in order and once, wherever one read ends and the next begins."""
    messages = messages_of(sizes)
    stream = stream_of(messages)
    reader = FrameReader()
    assert read(reader, stream, [*steps, 5000]) == messages
    assert read(reader, stream, [CHUNK]) == messages, "the reader can go on"


def test_a_stream_that_comes_byte_by_byte() -> None:
    """A read may return a single byte."""
    messages = messages_of([[0], [5, 0, 7], [1, 300], [0, 0]])
    assert read(FrameReader(), stream_of(messages), [1]) == messages


@pytest.mark.parametrize(
    "count",
    [1, 1000, (CHUNK - HEADER) // 8 - 1, (CHUNK - HEADER) // 8, CHUNK // 8 + 1, 3 * CHUNK // 8],
)
@pytest.mark.parametrize("step", [1000, 10 * CHUNK])
def test_many_parts(count: int, step: int) -> None:
    """The sizes of the parts alone may take more bytes than one read."""
    messages = messages_of([[10] * count, [3, 4], [0] * count])
    assert read(FrameReader(), stream_of(messages), [step]) == messages


@settings(max_examples=30)
@given(PARTS, st.integers(0, 10_000))
def test_a_stream_that_breaks_off(sizes: list[list[int]], lost: int) -> None:
    """The messages that were complete before the break come out, and no others."""
    messages = messages_of(sizes)
    streams = [stream_of([message]) for message in messages]
    stream = b"".join(streams)
    rest = len(stream) - lost
    whole = 0
    while whole < len(streams) and rest >= len(streams[whole]):
        rest -= len(streams[whole])
        whole += 1
    assert read(FrameReader(), stream[: max(0, len(stream) - lost)], [CHUNK]) == messages[:whole]


def test_buffers_are_writable() -> None:
    """They hold arrays, which user code may change in place."""
    for size in (10, MIN_BUFFER_SIZE, CHUNK, 2 << 20):
        stream = b"".join(
            map(bytes, encode(MessageKind.RUN, body=b"body", buffers=[content(1, size)]))
        )
        reader = FrameReader()
        messages: list[Message] = []
        place = 0
        while place < len(stream):
            space = reader.space
            count = min(len(space), len(stream) - place)
            space[:count] = stream[place : place + count]
            place += count
            messages += reader.buffer_updated(count)
        (message,) = messages
        assert not memoryview(message.buffers[0]).readonly


NUMBERS = st.integers(0, 2**64 - 1)


@settings(max_examples=50)
@given(
    st.integers(0, 255),
    st.sampled_from([PICKLE, CODEC_PICKLE, ENVELOPE]),
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.booleans(),
    st.sampled_from([bytes(16), b"0123456789abcdef"]),
    st.lists(NUMBERS, max_size=5),
    st.binary(max_size=300),
    st.lists(st.binary(max_size=300), max_size=3),
)
def test_each_field_is_read(
    kind: int,
    form: int,
    seq: int,
    block_id: int,
    result_block_id: int,
    are_bytes: bool,
    key: bytes,
    sizes: list[int],
    body: bytes,
    buffers: list[bytes],
) -> None:
    """Each field comes out as it was, for all values of the others."""
    ids = (block_id, result_block_id)
    message = Message(kind, form, seq, *ids, are_bytes, key, tuple(sizes), body, buffers)
    assert read(FrameReader(), stream_of([message]), [CHUNK]) == [message]
