"""How messages travel: `pack` and `unpack`, `frame` and `FrameReader`, however the stream is chopped."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher import _frames
from async_batcher._bulk import BULKY
from async_batcher._frames import FrameReader, frame, pack, unpack

CHUNK = _frames._CHUNK
# Sizes of parts, around everything that treats sizes differently.
SIZES = st.one_of(
    st.integers(0, 300),
    st.sampled_from([BULKY - 1, BULKY, BULKY + 1, CHUNK - 20, CHUNK - 12, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]),
)
FRAMES = st.lists(st.lists(SIZES, min_size=1, max_size=6), max_size=6)


def content(seed: int, size: int) -> bytes:
    """Bytes that differ from part to part."""
    return bytes((seed * 31 + i) % 251 for i in range(min(size, 251))) * (size // 251 + 1)


def parts_of(sizes: list[list[int]]) -> list[list[bytes]]:
    """Frames with parts of those sizes."""
    return [[content(17 * i + j, size)[:size] for j, size in enumerate(row)] for i, row in enumerate(sizes)]


def read(reader: FrameReader, stream: bytes, steps: list[int]) -> list[list[bytes]]:
    """Feed a stream in reads of those sizes at most, the last one over and over."""
    frames: list[list[bytes]] = []
    place = 0
    while place < len(stream):
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        space = reader.space()
        assert len(space), "a read into no space looks like the end of the stream"
        count = min(step, len(space), len(stream) - place)
        space[:count] = stream[place : place + count]
        place += count
        frames += [[bytes(part) for part in parts] for parts in reader.received(count)]
    return frames


@settings(deadline=None, max_examples=50)
@given(FRAMES, st.lists(st.integers(1, 2 * CHUNK), min_size=1, max_size=30))
def test_any_chopping_gives_the_same_frames(sizes: list[list[int]], steps: list[int]) -> None:
    """Frames come out whole, in order, each once, wherever one read ends and the next begins."""
    frames = parts_of(sizes)
    stream = b"".join(bytes(piece) for parts in frames for piece in frame(parts))
    reader = FrameReader()
    assert read(reader, stream, [*steps, 5000]) == frames
    assert read(reader, stream, [CHUNK]) == frames, "the reader is as new"


def test_byte_by_byte() -> None:
    """A stream that trickles."""
    frames = parts_of([[0], [5, 0, 7], [1, 300], [0, 0]])
    stream = b"".join(bytes(piece) for parts in frames for piece in frame(parts))
    assert read(FrameReader(), stream, [1]) == frames


@pytest.mark.parametrize("count", [1, 1000, CHUNK // 8 - 1, CHUNK // 8, CHUNK // 8 + 1, 3 * CHUNK // 8])
@pytest.mark.parametrize("step", [1000, 10 * CHUNK])
def test_many_parts(count: int, step: int) -> None:
    """The sizes of the parts alone may take more room than one read."""
    frames = parts_of([[10] * count, [3, 4], [0] * count])
    stream = b"".join(bytes(piece) for parts in frames for piece in frame(parts))
    assert read(FrameReader(), stream, [step]) == frames


@settings(deadline=None, max_examples=30)
@given(FRAMES, st.integers(0, 10_000))
def test_a_stream_that_breaks_off(sizes: list[list[int]], lost: int) -> None:
    """What was whole before the break has come out, and nothing else."""
    frames = parts_of(sizes)
    streams = [b"".join(map(bytes, frame(parts))) for parts in frames]
    stream = b"".join(streams)
    rest = len(stream) - lost
    whole = 0
    while whole < len(streams) and rest >= len(streams[whole]):
        rest -= len(streams[whole])
        whole += 1
    assert read(FrameReader(), stream[: max(0, len(stream) - lost)], [CHUNK]) == frames[:whole]


def test_parts_after_the_first_are_writable() -> None:
    """They hold arrays, which user code may change in place."""
    for size in (10, BULKY, CHUNK, 2 << 20):
        stream = b"".join(map(bytes, frame([b"head", content(1, size)[:size]])))
        reader = FrameReader()
        frames: list[list[Any]] = []
        place = 0
        while place < len(stream):
            space = reader.space()
            count = min(len(space), len(stream) - place)
            space[:count] = stream[place : place + count]
            place += count
            frames += reader.received(count)
        ((_, part),) = frames
        assert not memoryview(part).readonly


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(SIZES, st.booleans(), st.booleans()), max_size=8))
def test_a_message_is_the_same_again(buffers: list[tuple[int, bool, bool]]) -> None:
    """Large buffers travel beside the pickle, small ones in it, and none is copied into it in vain."""
    message: tuple[Any, ...] = ("run", 1, [])
    expected: list[tuple[str, bytes]] = []
    large = 0
    for i, (size, is_writable, is_wrapped) in enumerate(buffers):
        data: Any = content(i, size)[:size]
        expected.append(("wrapped" if is_wrapped else "plain", bytes(data)))
        if is_writable:
            data = bytearray(data)
        if is_wrapped:
            large += size if size >= BULKY else 0
            data = pickle.PickleBuffer(data)
        message[2].append(data)
    head, bulk = pack(message)
    assert sum(len(view) for view in bulk) == large
    kind, number, contents = unpack(head, [bytearray(view) for view in bulk])
    assert (kind, number) == ("run", 1)
    assert [bytes(data) for data in contents] == [data for _, data in expected]


NUMBERS = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 255),
    st.sampled_from([_frames.PLAIN, _frames.OWN, _frames.WHOLE]),
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.sampled_from(["", "0123456789abcdef"]),
    st.lists(NUMBERS, max_size=5),
    st.binary(max_size=300),
    st.lists(st.binary(max_size=300), max_size=3),
)
def test_what_a_message_says_is_read(
    kind: int, form: int, number: int, source: int, target: int, key: str, sizes: list[int], body: bytes, bulk: list[bytes]
) -> None:
    """Each field on its own, whatever the others are."""
    head = _frames.encode(kind, form, number, source, target, key, sizes, body)
    message = _frames.decode([head, *bulk])
    assert message[:7] == (kind, form, number, source, target, key, tuple(sizes))
    assert bytes(message.body) == body
    assert message.bulk == bulk
