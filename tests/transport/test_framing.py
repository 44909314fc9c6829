"""How messages travel: `encode` and `FrameReader`, however the stream is chopped; `dumps` and `loads`."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher._serialization.out_of_band import MIN_BUFFER_SIZE
from async_batcher._transport import framing
from async_batcher._transport.framing import FrameReader, Message, bare_pickle, dumps, encode, envelope, loads

CHUNK = framing._CHUNK
LEAD = framing._START
# Sizes of parts, around everything that treats sizes differently.
SIZES = st.one_of(
    st.integers(0, 300),
    st.sampled_from(
        [
            MIN_BUFFER_SIZE - 1,
            MIN_BUFFER_SIZE,
            MIN_BUFFER_SIZE + 1,
            CHUNK - LEAD - 1,
            CHUNK - LEAD,
            CHUNK - 1,
            CHUNK,
            CHUNK + 1,
            3 * CHUNK,
        ]
    ),
)
PARTS = st.lists(st.lists(SIZES, min_size=1, max_size=6), max_size=6)  # of each message: its body, and the buffers that follow


def some(seed: int, size: int) -> bytes:
    """Bytes that differ from part to part."""
    return (bytes((seed * 31 + i) % 251 for i in range(min(size, 251))) * (size // 251 + 1))[:size]


def messages_of(sizes: list[list[int]]) -> list[Message]:
    """Messages with parts of those sizes; every second one has sizes of buffers in a block as well."""
    return [
        Message(
            framing.RUN,
            framing.PICKLE,
            i,
            2 * i,
            3 * i,
            b"%016d" % i,
            (10 * i,) * (i % 2),
            some(17 * i, row[0]),
            [some(17 * i + 1 + j, size) for j, size in enumerate(row[1:])],
        )
        for i, row in enumerate(sizes)
    ]


def stream_of(messages: list[Message]) -> bytes:
    """They as they are sent."""
    return b"".join(bytes(piece) for message in messages for piece in encode(*message[:7], bytes(message.body), message.bulk))


def comparable(message: Message) -> Message:
    """The same with everything immutable."""
    return message._replace(sizes=tuple(message.sizes), body=bytes(message.body), bulk=[bytes(part) for part in message.bulk])


def read(reader: FrameReader, stream: bytes, steps: list[int]) -> list[Message]:
    """Feed a stream in reads of those sizes at most, the last one over and over."""
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


@settings(deadline=None, max_examples=50)
@given(PARTS, st.lists(st.integers(1, 2 * CHUNK), min_size=1, max_size=30))
def test_any_chopping_gives_the_same_messages(sizes: list[list[int]], steps: list[int]) -> None:
    """Messages come out whole, in order, each once, wherever one read ends and the next begins."""
    messages = messages_of(sizes)
    stream = stream_of(messages)
    reader = FrameReader()
    assert read(reader, stream, [*steps, 5000]) == messages
    assert read(reader, stream, [CHUNK]) == messages, "the reader is as new"


def test_byte_by_byte() -> None:
    """A stream that trickles."""
    messages = messages_of([[0], [5, 0, 7], [1, 300], [0, 0]])
    assert read(FrameReader(), stream_of(messages), [1]) == messages


@pytest.mark.parametrize("count", [1, 1000, (CHUNK - LEAD) // 8 - 1, (CHUNK - LEAD) // 8, CHUNK // 8 + 1, 3 * CHUNK // 8])
@pytest.mark.parametrize("step", [1000, 10 * CHUNK])
def test_many_parts(count: int, step: int) -> None:
    """The sizes of the parts alone may take more room than one read."""
    messages = messages_of([[10] * count, [3, 4], [0] * count])
    assert read(FrameReader(), stream_of(messages), [step]) == messages


@settings(deadline=None, max_examples=30)
@given(PARTS, st.integers(0, 10_000))
def test_a_stream_that_breaks_off(sizes: list[list[int]], lost: int) -> None:
    """What was whole before the break has come out, and nothing else."""
    messages = messages_of(sizes)
    streams = [stream_of([message]) for message in messages]
    stream = b"".join(streams)
    rest = len(stream) - lost
    whole = 0
    while whole < len(streams) and rest >= len(streams[whole]):
        rest -= len(streams[whole])
        whole += 1
    assert read(FrameReader(), stream[: max(0, len(stream) - lost)], [CHUNK]) == messages[:whole]


def test_what_follows_is_writable() -> None:
    """It holds arrays, which user code may change in place."""
    for size in (10, MIN_BUFFER_SIZE, CHUNK, 2 << 20):
        stream = b"".join(map(bytes, encode(framing.RUN, body=b"body", bulk=[some(1, size)])))
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
        assert not memoryview(message.bulk[0]).readonly


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(SIZES, st.booleans(), st.booleans()), max_size=8))
def test_a_message_is_the_same_again(buffers: list[tuple[int, bool, bool]]) -> None:
    """Large buffers travel beside the pickle, small ones in it, and none is copied into it in vain."""
    message: tuple[Any, ...] = ("run", 1, [])
    expected: list[tuple[str, bytes]] = []
    large = 0
    for i, (size, is_writable, is_wrapped) in enumerate(buffers):
        data: Any = some(i, size)
        expected.append(("wrapped" if is_wrapped else "plain", bytes(data)))
        if is_writable:
            data = bytearray(data)
        if is_wrapped:
            large += size if size >= MIN_BUFFER_SIZE else 0
            data = pickle.PickleBuffer(data)
        message[2].append(data)
    head, bulk = dumps(message)
    assert sum(len(view) for view in bulk) == large
    kind, number, contents = loads(head, [bytearray(view) for view in bulk])
    assert (kind, number) == ("run", 1)
    assert [bytes(data) for data in contents] == [data for _, data in expected]


NUMBERS = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 255),
    st.sampled_from([framing.PICKLE, framing.CODEC_PICKLE, framing.ENVELOPE]),
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.sampled_from([bytes(16), b"0123456789abcdef"]),
    st.lists(NUMBERS, max_size=5),
    st.binary(max_size=300),
    st.lists(st.binary(max_size=300), max_size=3),
)
def test_what_a_message_says_is_read(
    kind: int, form: int, number: int, source: int, target: int, key: bytes, sizes: list[int], body: bytes, bulk: list[bytes]
) -> None:
    """Each field on its own, whatever the others are."""
    message = Message(kind, form, number, source, target, key, tuple(sizes), body, bulk)
    assert read(FrameReader(), stream_of([message]), [CHUNK]) == [message]


def test_one_pickle_is_its_own_body() -> None:
    """What is all there is to say is not pickled again; what is more is, the large buffers still beside it."""
    large = pickle.PickleBuffer(bytearray(MIN_BUFFER_SIZE))
    assert bare_pickle((False, b"pickle", [])) == (framing.PICKLE, b"pickle", [])
    content = bare_pickle((True, b"pickle", [large]))
    assert content is not None
    form, body, bulk = content
    assert (form, body, [len(view) for view in bulk]) == (framing.CODEC_PICKLE, b"pickle", [MIN_BUFFER_SIZE])
    blobs: list[Any] = [None, (False, large, [])]
    assert [bare_pickle(blob) for blob in blobs] == [None, None], "a pickle that is large itself goes beside"
    form, body, bulk = envelope(("reply", (False, large, [])))
    assert form == framing.ENVELOPE
    assert len(bulk) == 1
    assert bytes(loads(body, bulk)[1][1]) == bytes(MIN_BUFFER_SIZE)
