"""Frames: how messages travel over the stream socket between a pool and its worker. No I/O.

::

    frame:    lead, of fixed size | sizes of the buffers in a block | sizes of the buffers that follow | body | buffers

Rules:

- What a batch costs most often is one pickle there and one back, which is the body itself (`PICKLE`, `CODEC_PICKLE`: see
  `Payload`). Whatever is more than that (a program, definitions, a failure) is a pickle of builtins around the user's pickles
  (`ENVELOPE`).
- Large buffers are not copied into a pickle. They follow it, or lie in a block of shared memory (`shared_memory.py`), one after
  the other.
- Both ends are of this package, so a frame is trusted; a stream that ends inside one is a death, and simply ends.
"""

from __future__ import annotations

import pickle
import struct
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from async_batcher._serialization.out_of_band import MIN_BUFFER_SIZE
from async_batcher._transport.shared_memory import allocate

if TYPE_CHECKING:
    from collections.abc import Sequence

Buffer: TypeAlias = "bytes | bytearray | memoryview | pickle.PickleBuffer"

# What a message is about.
INIT: Final = 1  # parent: settings, whole
RUN: Final = 2  # parent: a batch; number, key, source, target
ADD_BLOCK: Final = 3  # parent: a new block, its descriptor with it; number: its name, target: its size
FREE_BLOCK: Final = 4  # parent: a block is no more; number: its name
NEED_BLOCK: Final = (
    5  # worker: a block for results is wanted; number: bytes. Parent: here it is; number: its name, 0: there is none
)
STOP: Final = 6  # parent: end
READY: Final = 7  # worker
INIT_FAILED: Final = 8  # worker: the initializer raised; a failure, whole
REPLY: Final = 9  # worker: to the batch of that number; source
BLOCKS_IN_USE: Final = 10  # worker: before a reply, the names of the blocks that user code still looks into, whole
TRACKER: Final = 11  # parent: the program's resource tracker, its descriptor with it; see `main.join_tracker`
BEGUN: Final = 12  # worker: the function of the batch of that number has been loaded and set up, and the batch begins
TEAR_DOWN: Final = 13  # parent: drop the function of that key, and tear down what its set-up made; number

# What a body is.
PICKLE: Final = 0  # the pickle of a plain `Payload`
CODEC_PICKLE: Final = 1  # that of a `Payload` which needs the codec's unpickler
ENVELOPE: Final = 2  # a pickle of builtins

_CHUNK = 65_536  # bytes read at a time; a frame that fits is read with one call
_SIZE = struct.Struct("=Q")
# Bytes of the body, buffers in a block, buffers that follow; then the first fields of `Message`.
_HEADER = struct.Struct("=QIIBBQQQ16s")
_FIELDS = 3  # where those begin
_START = _HEADER.size


class Message(NamedTuple):
    """What one side says to the other.

    Attributes:
        kind: What it is about; see above.
        form: What the body is: `PICKLE`, `CODEC_PICKLE` or `ENVELOPE`.
        number: Of the batch, or see the kind.
        source: The name of the block that its large buffers are in; 0: they are ``bulk``.
        target: The name of the block that is lent for results; 0: none. Of a reply: whether its buffers in a block are all bytes.
        key: Names the program.
        sizes: Bytes of each buffer in the block.
        body: A pickle.
        bulk: The large buffers, if they are in no block; writable.
    """

    kind: int
    form: int
    number: int
    source: int
    target: int
    key: bytes
    sizes: Sequence[int]
    body: Buffer
    bulk: list[Any]


def encode(
    kind: int,
    form: int = PICKLE,
    number: int = 0,
    source: int = 0,
    target: int = 0,
    key: bytes = b"",
    sizes: Sequence[int] = (),
    body: bytes = b"",
    bulk: Sequence[bytes | memoryview] = (),
) -> list[bytes | memoryview]:
    """A message's frame, in the pieces that are to be sent; one piece where it is small."""
    lead = _HEADER.pack(len(body), len(sizes), len(bulk), kind, form, number, source, target, key)
    if sizes or bulk:
        lead += b"".join(map(_SIZE.pack, [*sizes, *map(len, bulk)]))
    return [lead + body, *bulk] if len(body) <= _CHUNK else [lead, body, *bulk]


# What the body is, the body, and the large buffers beside it.
Content: TypeAlias = "tuple[int, bytes, list[memoryview]]"


def bare_pickle(blob: Any) -> Content | None:
    """A `Payload` that is all there is to say; None where it is something else, or too large to be a body."""
    if type(blob) is tuple:
        own, data, buffers = blob
        if type(data) is bytes:
            return CODEC_PICKLE if own else PICKLE, data, [buffer.raw() for buffer in buffers] if buffers else buffers
    return None


def envelope(parts: tuple[Any, ...]) -> Content:
    """Builtins, whatever they are."""
    return ENVELOPE, *dumps(parts)


def dumps(whole: tuple[Any, ...]) -> tuple[bytes, list[memoryview]]:
    """Builtins as a short pickle, and the large buffers in it."""
    bulk: list[memoryview] = []

    def take(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < MIN_BUFFER_SIZE:
            return True  # into the pickle
        bulk.append(raw)
        return False

    return pickle.dumps(whole, 5, buffer_callback=take), bulk


def loads(body: Buffer, bulk: Sequence[Any] = ()) -> Any:
    """The builtins again; the large buffers among them are those of ``bulk``."""
    return pickle.loads(body, buffers=bulk)  # noqa: S301 - builtins only, from this program's own worker or parent


class FrameReader:
    """Puts messages together from what comes over a socket.

    Attributes:
        space: Where the next bytes are to be written; then tell `buffer_updated` how many came.
    """

    def __init__(self) -> None:
        self._chunk = bytearray(_CHUNK)
        self._view = self.space = memoryview(self._chunk)
        self._filled = 0
        self._large: _FrameHeader | None = None  # of a message that is too large for the chunk
        self._parts: list[Any] = []  # where its bytes go
        self._missing: list[memoryview] = []  # what of them has not come yet, last part first

    def buffer_updated(self, count: int) -> list[Message]:
        """``count`` bytes have been written to ``space``.

        Returns:
            The messages that are whole now.
        """
        if count >= _START and self.space is self._view:  # most often it is one short message
            size, in_block, following, kind, form, number, source, target, key = _HEADER.unpack_from(self._chunk)
            if _START + size == count and not in_block and not following:
                return [_message((kind, form, number, source, target, key, (), self._chunk[_START:count], []))]
        messages = self._put_together(count)
        self.space = self._missing[-1] if self._missing else self._view[self._filled :] if self._filled else self._view
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

    def _head(self, place: int) -> _FrameHeader | None:
        """What the frame that begins at ``place`` says of itself, if so much of it has come."""
        if self._filled - place < _START:
            return None
        lead = _HEADER.unpack_from(self._chunk, place)
        size, in_block, following = lead[:_FIELDS]
        start = place + _START
        body = start + (in_block + following) * _SIZE.size
        if body > self._filled:
            return None
        sizes = [_SIZE.unpack_from(self._chunk, start + i * _SIZE.size)[0] for i in range(in_block + following)]
        return _FrameHeader(lead[_FIELDS:], sizes[:in_block], [size, *sizes[in_block:]], body)

    def _cut(self, place: int) -> tuple[Message, int] | None:
        """The message at ``place`` and where it ends, if it has come whole."""
        head = self._head(place)
        if head is None or head.start + sum(head.parts) > self._filled:
            return None
        place = head.start
        parts: list[Any] = []
        for size in head.parts:
            parts.append(self._chunk[place : place + size])
            place += size
        return head.message(parts), place

    def _begin_large(self) -> list[Message]:
        """Give a message that will not fit into the chunk the memory for its parts, and move there what has come of it."""
        head = self._head(0)
        if head is None or head.start + sum(head.parts) <= len(self._chunk):
            return []
        self._large = head
        self._parts = [allocate(size) for size in head.parts]
        views = [memoryview(part) for part in self._parts]
        start = head.start
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
        head, parts = self._large, self._parts
        self._large, self._parts = None, []
        assert head is not None  # noqa: S101 - parts are made for one
        return head.message(parts)


class _FrameHeader(NamedTuple):
    """What a frame says of itself.

    Attributes:
        fields: The first fields of its message.
        sizes: Bytes of each buffer in a block.
        parts: Bytes of the body, and of each buffer that follows.
        start: Where the body begins.
    """

    fields: tuple[Any, ...]
    sizes: list[int]
    parts: list[int]
    start: int

    def message(self, parts: list[Any]) -> Message:
        """The message, with the body and the buffers that follow it."""
        message: Message = _message((*self.fields, self.sizes, parts[0], parts[1:]))
        return message


_message: Any = partial(tuple.__new__, Message)  # without a call of Python code for each, as Message() is
