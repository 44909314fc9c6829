"""Frames: messages over the stream socket between the parent and a worker. No I/O.

::

    mark, header | sizes of the buffers in a block | sizes of those that follow | body | buffers

Rules:

- Large buffers are not copied into a pickle. They follow the body, or lie in a block of shared
  memory (`shared_memory.py`), one after the other.
- Both ends belong to this package, so a frame is trusted. A stream that ends in one is a crash.
- Code of the user's that writes to a wrong descriptor may write between two frames. So each frame
  begins with a mark; where it is missing, nothing more can be read.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from async_batcher._transport.shared_memory import allocate

if TYPE_CHECKING:
    import pickle
    from collections.abc import Callable, Sequence

Buffer: TypeAlias = "bytes | bytearray | memoryview | pickle.PickleBuffer"

_CHUNK = 65_536  # bytes read at a time; a frame that fits is read with one call
_SHOWN_BYTES = 40  # of what is not a frame, in the error
_SIZE = struct.Struct("=Q")
_MARK = b"\xabfr\x01"  # not text
# The mark, bytes of the body, buffers in a block, buffers that follow; then the first fields of
# `Message`.
_HEADER = struct.Struct("=4sQIIBBQQQ?16s")
_FIELDS = 4  # where those begin
_START = _HEADER.size


class FrameError(Exception):
    """What was received is not a frame."""


class Message(NamedTuple):
    """What one side says to the other; `protocol.MessageKind` says which fields count.

    Attributes:
        kind: A `protocol.MessageKind`.
        form: What the body is; see `protocol`.
        seq: Sequence number of the batch.
        block_id: The block that holds the large buffers; 0: they are ``buffers``.
        result_block_id: Of a batch: the block that is leased for its results; 0: none.
        are_bytes: Of a reply: whether its buffers in a block are all ``bytes``.
        key: Names the function.
        sizes: Bytes of each buffer in the block.
        body: A pickle.
        buffers: The large buffers that are in no block; writable.
    """

    kind: int
    form: int
    seq: int
    block_id: int
    result_block_id: int
    are_bytes: bool
    key: bytes
    sizes: Sequence[int]
    body: Buffer
    buffers: list[Any]


def encode(
    kind: int,
    form: int = 0,
    seq: int = 0,
    key: bytes = b"",
    body: bytes = b"",
    block_id: int = 0,
    result_block_id: int = 0,
    sizes: Sequence[int] = (),
    buffers: Sequence[bytes | memoryview] = (),
    *,
    are_bytes: bool = False,
) -> list[bytes | memoryview]:
    """Make a message's frame, in the pieces that are to be sent; a small one is one piece."""
    header = _HEADER.pack(
        _MARK, len(body), len(sizes), len(buffers),
        kind, form, seq, block_id, result_block_id, are_bytes, key,
    )  # fmt: skip
    if sizes or buffers:
        header += b"".join(map(_SIZE.pack, [*sizes, *map(len, buffers)]))
    return [header + body, *buffers] if len(body) <= _CHUNK else [header, body, *buffers]


class FrameReader:
    """Puts messages together from what a socket receives.

    Attributes:
        space: Where the next bytes are to be written; `buffer_updated` takes their number.
        error: Why nothing more can be read: a `FrameError`, or there is no memory for a message.
    """

    def __init__(self) -> None:
        self._chunk = bytearray(_CHUNK)
        self._view = self.space = memoryview(self._chunk)
        self._filled = 0
        self._fields: tuple[Any, ...] = ()  # of a message that is too large for the chunk
        self._parts: list[Any] = []  # its body and buffers
        self._missing: list[memoryview] = []  # what of them has not come yet, last part first
        self.error: Exception | None = None

    def buffer_updated(self, count: int) -> list[Message]:
        """Return the messages that are complete, now that ``space`` has ``count`` more bytes."""
        messages: list[Message] = []
        try:
            if count >= _START and self.space is self._view:  # most often one short message
                header = _HEADER.unpack_from(self._chunk)
                if header[:_FIELDS] == (_MARK, count - _START, 0, 0):
                    rest: tuple[Any, ...] = ((), self._chunk[_START:count], [])
                    return [_message(header[_FIELDS:] + rest)]
            if self._missing:
                self._continue_large(count, messages)
            else:
                self._read_chunk(count, messages)
        except (FrameError, MemoryError) as exc:
            self.error = exc
        if self._missing:
            self.space = self._missing[-1]
        else:
            self.space = self._view[self._filled :] if self._filled else self._view
        return messages

    def _continue_large(self, count: int, messages: list[Message]) -> None:
        self._missing[-1] = self._missing[-1][count:]
        if not self._missing[-1]:
            self._missing.pop()
        if not self._missing:
            messages.append(self._take_message())

    def _read_chunk(self, count: int, messages: list[Message]) -> None:
        """Take the messages out of the chunk; what does not fit in it gets memory of its own."""
        self._filled += count
        place = 0
        while not self._missing and place < self._filled:
            come = self._view[place : self._filled]
            if len(come) < _START:
                if come[: len(_MARK)] != _MARK[: len(come)]:  # now: a worker may send no more
                    raise _frame_error(come)
                break
            header = _HEADER.unpack_from(come)
            mark, size, in_block, following = header[:_FIELDS]
            if mark != _MARK:
                raise _frame_error(come)
            start = place + _START
            if not (in_block or following) and start + size <= self._filled:  # a short message
                place = start + size
                messages.append(_message((*header[_FIELDS:], (), self._chunk[start:place], [])))
                continue
            table, start = start, start + (in_block + following) * _SIZE.size
            if start > self._filled:
                break
            counts = [count for (count,) in _SIZE.iter_unpack(self._view[table:start])]
            sizes = [size, *counts[in_block:]]
            end = start + sum(sizes)
            if self._filled < end <= place + len(self._chunk):
                break  # the rest of it will fit in the chunk
            self._fields = (*header[_FIELDS:], counts[:in_block])
            self._take_parts(sizes, start)
            place = min(end, self._filled)
            if not self._missing:
                messages.append(self._take_message())
        if place:
            self._view[: self._filled - place] = self._view[place : self._filled]
            self._filled -= place
        if self._filled == len(self._chunk):  # with the sizes of very many buffers
            self._chunk = bytearray(2 * self._filled)
            self._chunk[: self._filled] = self._view
            self._view = memoryview(self._chunk)

    def _take_parts(self, sizes: list[int], place: int) -> None:
        """Copy what has come of the parts that begin at ``place``, and make memory for the rest."""
        for size in sizes:
            part: Any = self._chunk[place : min(place + size, self._filled)]
            if len(part) < size:
                come, part = part, _allocate(size)
                view = memoryview(part)
                view[: len(come)] = come
                self._missing.append(view[len(come) :])
            self._parts.append(part)
            place += size
        self._missing.reverse()

    def _take_message(self) -> Message:
        body, *buffers = self._parts
        self._parts = []
        return _message((*self._fields, body, buffers))


def _allocate(size: int) -> Any:
    try:
        return allocate(size)
    except (MemoryError, OSError, OverflowError) as exc:
        msg = f"there is no memory for {size:,} bytes of a message"
        raise MemoryError(msg) from exc


def _frame_error(come: memoryview) -> FrameError:
    return FrameError(f"not a message of the pool: {bytes(come[:_SHOWN_BYTES])!r}")


# Message(*fields) without a call of Python code.
_message: Callable[[tuple[Any, ...]], Message] = partial(tuple.__new__, Message)
