"""Frames: messages over the stream socket between the parent and a worker. No I/O.

::

    header | sizes of the buffers in a block | sizes of the buffers that follow | body | buffers

Rules:

- Large buffers are not copied into a pickle. They follow the body, or lie in a block of shared
  memory (`shared_memory.py`), one after the other.
- Both ends belong to this package, so a frame is trusted. A stream that ends in one is a crash.
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
_SIZE = struct.Struct("=Q")
# Bytes of the body, buffers in a block, buffers that follow; then the first fields of `Message`.
_HEADER = struct.Struct("=QIIBBQQQ16s")
_FIELDS = 3  # where those begin
_START = _HEADER.size

# The fields of a message before its body, the bytes of the body and of each buffer that follows,
# and where the body begins.
_FrameHeader: TypeAlias = tuple[tuple[Any, ...], list[int], int]


class Message(NamedTuple):
    """What one side says to the other; `protocol.MessageKind` says which fields count.

    Attributes:
        kind: A `protocol.MessageKind`.
        form: What the body is; see `protocol`.
        seq: Sequence number of the batch.
        block_id: The block that holds the large buffers; 0: they are ``buffers``.
        result_block_id: The block that is leased for results; 0: none. Of a reply: whether its
            buffers in a block are all ``bytes``.
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
    key: bytes
    sizes: Sequence[int]
    body: Buffer
    buffers: list[Any]


def encode(
    kind: int,
    form: int = 0,
    seq: int = 0,
    block_id: int = 0,
    result_block_id: int = 0,
    key: bytes = b"",
    sizes: Sequence[int] = (),
    body: bytes = b"",
    buffers: Sequence[bytes | memoryview] = (),
) -> list[bytes | memoryview]:
    """Make a message's frame, in the pieces that are to be sent; a small one is one piece."""
    header = _HEADER.pack(
        len(body), len(sizes), len(buffers), kind, form, seq, block_id, result_block_id, key
    )
    if sizes or buffers:
        header += b"".join(map(_SIZE.pack, [*sizes, *map(len, buffers)]))
    return [header + body, *buffers] if len(body) <= _CHUNK else [header, body, *buffers]


class FrameReader:
    """Puts messages together from what a socket receives.

    Attributes:
        space: Where the next bytes are to be written; `buffer_updated` takes their number.
    """

    def __init__(self) -> None:
        self._chunk = bytearray(_CHUNK)
        self._view = self.space = memoryview(self._chunk)
        self._filled = 0
        self._large: tuple[Any, ...] = ()  # fields of a message that is too large for the chunk
        self._parts: list[Any] = []  # where its bytes go
        self._missing: list[memoryview] = []  # what of them has not come yet, last part first

    def buffer_updated(self, count: int) -> list[Message]:
        """Return the messages that are complete, now that ``space`` has ``count`` more bytes."""
        if count >= _START and self.space is self._view:  # most often one short message
            (size, in_block, following, kind, form, seq, block_id, result_block_id, key) = (
                _HEADER.unpack_from(self._chunk)
            )
            if _START + size == count and not in_block and not following:
                body = self._chunk[_START:count]
                return [_message((kind, form, seq, block_id, result_block_id, key, (), body, []))]
        messages = self._put_together(count)
        if self._missing:
            self.space = self._missing[-1]
        else:
            self.space = self._view[self._filled :] if self._filled else self._view
        return messages

    def _put_together(self, count: int) -> list[Message]:
        if self._missing:
            rest = self._missing[-1][count:]
            if rest:
                self._missing[-1] = rest
                return []
            self._missing.pop()
            return [] if self._missing else [self._take_large()]
        self._filled += count
        messages: list[Message] = []
        place = 0
        while (found := self._cut(place)) is not None:
            message, place = found
            messages.append(message)
        if place:
            self._view[: self._filled - place] = self._view[place : self._filled]
            self._filled -= place
        messages.extend(self._begin_large())
        if self._filled == len(self._chunk):  # with the sizes of very many buffers
            self._chunk = bytearray(2 * self._filled)
            self._chunk[: self._filled] = self._view
            self._view = memoryview(self._chunk)
        return messages

    def _header(self, place: int) -> _FrameHeader | None:
        """Read the header of the frame at ``place``, if it has come."""
        if self._filled - place < _START:
            return None
        header = _HEADER.unpack_from(self._chunk, place)
        size, in_block, following = header[:_FIELDS]
        start = place + _START
        body = start + (in_block + following) * _SIZE.size
        if body > self._filled:
            return None
        sizes = [size for (size,) in _SIZE.iter_unpack(self._view[start:body])]
        return (*header[_FIELDS:], sizes[:in_block]), [size, *sizes[in_block:]], body

    def _cut(self, place: int) -> tuple[Message, int] | None:
        """Return the message at ``place`` and where it ends, if it has come."""
        header = self._header(place)
        if header is None:
            return None
        fields, sizes, place = header
        if place + sum(sizes) > self._filled:
            return None
        parts: list[Any] = []
        for size in sizes:
            parts.append(self._chunk[place : place + size])
            place += size
        return _message((*fields, parts[0], parts[1:])), place

    def _begin_large(self) -> list[Message]:
        """Give a message that exceeds the chunk memory of its own, and move there what has come."""
        header = self._header(0)
        if header is None:
            return []
        self._large, sizes, start = header
        if start + sum(sizes) <= len(self._chunk):
            return []
        self._parts = [allocate(size) for size in sizes]
        views = [memoryview(part) for part in self._parts]
        while views and (have := self._filled - start) > 0:
            taken = min(have, len(views[0]))
            views[0][:taken] = self._view[start : start + taken]
            start += taken
            if taken < len(views[0]):
                views[0] = views[0][taken:]
                break
            views.pop(0)
        self._filled = 0
        self._missing = [view for view in reversed(views) if len(view)]
        return [] if self._missing else [self._take_large()]

    def _take_large(self) -> Message:
        fields, parts = self._large, self._parts
        self._large, self._parts = (), []
        return _message((*fields, parts[0], parts[1:]))


# Message(*fields) without a call of Python code.
_message: Callable[[tuple[Any, ...]], Message] = partial(tuple.__new__, Message)
