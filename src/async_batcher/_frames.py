"""Frames: how messages travel over the stream socket between a pool and its worker. No I/O.

::

    frame:    number of parts (4 bytes) | size of each (8 bytes) | part 1 | part 2 ...
    part 1:   lead, of fixed size | sizes of the buffers in a block | body
    others:   buffers that are in no block

Rules:

- What a batch costs most often is one pickle there and one back, which is the body itself (`PLAIN`, `OWN`: see `Blob`). Whatever
  is more than that (a program, definitions, a failure) is a pickle of builtins around the user's pickles (`WHOLE`).
- Large buffers are not copied into a pickle. They follow it as parts of their own, or lie in a block of shared memory
  (`_shm.py`), one after the other.
- Both ends are of this package, so a frame is trusted; a stream that ends inside one is a death, and simply ends.
"""

from __future__ import annotations

import pickle
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from async_batcher._bulk import BULKY
from async_batcher._shm import room

if TYPE_CHECKING:
    from collections.abc import Sequence

Buffer: TypeAlias = "bytes | bytearray | memoryview | pickle.PickleBuffer"

# What a message is about.
INIT: Final = 1  # parent: settings, whole
RUN: Final = 2  # parent: a batch; number, key, source, target
BLOCK: Final = 3  # parent: a new block, its descriptor with it; number: its name, target: its size
DROP: Final = 4  # parent: a block is no more; number: its name
ROOM: Final = 5  # worker: a block for results is wanted; number: bytes. Parent: here it is; number: its name, 0: there is none
LEAVE: Final = 6  # parent: end
READY: Final = 7  # worker
UNFIT: Final = 8  # worker: the initializer raised; a failure, whole
REPLY: Final = 9  # worker: to the batch of that number; source
HELD: Final = 10  # worker: before a reply, the names of the blocks that user code still looks into, whole

# What a body is.
PLAIN: Final = 0  # the pickle of a plain `Blob`
OWN: Final = 1  # that of a `Blob` which needs the codec's unpickler
WHOLE: Final = 2  # a pickle of builtins

_CHUNK = 65_536  # bytes read at a time; a frame that fits is read with one call
_COUNT = struct.Struct("=I")
_SIZE = struct.Struct("=Q")
_ONE = struct.Struct("=IQ")  # the most frequent head of a frame: a single part
_LEAD = struct.Struct("=BBQQQ16sI")  # kind, what the body is, number, source, target, key, buffers in a block


class Message(NamedTuple):
    """What one side says to the other.

    Attributes:
        kind: What it is about; see above.
        form: What the body is: `PLAIN`, `OWN` or `WHOLE`.
        number: Of the batch, or see the kind.
        source: The name of the block that its large buffers are in; 0: they are ``bulk``.
        target: The name of the block that is lent for results; 0: none. Of a reply: whether its buffers in a block are all bytes.
        key: Names the program.
        sizes: Bytes of each buffer in the block.
        body: A pickle.
        bulk: The large buffers, if they are in no block.
    """

    kind: int
    form: int
    number: int
    source: int
    target: int
    key: str
    sizes: tuple[int, ...]
    body: Buffer
    bulk: list[Any]


def encode(
    kind: int,
    form: int = PLAIN,
    number: int = 0,
    source: int = 0,
    target: int = 0,
    key: str = "",
    sizes: Sequence[int] = (),
    body: Buffer = b"",
) -> bytes:
    """The first part of a message's frame."""
    lead = _LEAD.pack(kind, form, number, source, target, key.encode(), len(sizes))
    return b"".join((lead, *map(_SIZE.pack, sizes), body) if sizes else (lead, body))


def decode(parts: list[Any]) -> Message:
    """The message that the parts of a frame are."""
    head = parts[0]
    kind, form, number, source, target, key, count = _LEAD.unpack_from(head)
    start = _LEAD.size
    sizes = tuple(_SIZE.unpack_from(head, start + i * _SIZE.size)[0] for i in range(count)) if count else ()
    body = memoryview(head)[start + count * _SIZE.size :]
    return Message(kind, form, number, source, target, key.decode() if key[0] else "", sizes, body, parts[1:])


def pack(content: tuple[Any, ...]) -> tuple[bytes, list[memoryview]]:
    """Builtins as a short pickle, and the large buffers in it."""
    bulk: list[memoryview] = []

    def take(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < BULKY:
            return True  # into the pickle
        bulk.append(raw)
        return False

    return pickle.dumps(content, 5, buffer_callback=take), bulk


def unpack(body: Buffer, bulk: Sequence[Any] = ()) -> Any:
    """The builtins again; the large buffers among them are those of ``bulk``."""
    return pickle.loads(body, buffers=bulk)  # noqa: S301 - builtins only, from this program's own worker or parent


def frame(parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """The parts with the sizes before them, ready to be sent; one piece where they are small."""
    if len(parts) == 1:
        start = _ONE.pack(1, len(parts[0]))
    else:
        start = _COUNT.pack(len(parts)) + b"".join([_SIZE.pack(len(part)) for part in parts])
    return [start + parts[0], *parts[1:]] if len(parts[0]) <= _CHUNK else [start, *parts]


class FrameReader:
    """Puts frames together from what comes over a socket.

    Ask `space` where the next bytes are to go, and tell `received` how many came.
    """

    def __init__(self) -> None:
        self._chunk = bytearray(_CHUNK)
        self._view = memoryview(self._chunk)
        self._filled = 0
        self._parts: list[Any] = []  # of a frame that is too large for the chunk: where its bytes go
        self._missing: list[memoryview] = []  # what of them has not come yet, last part first

    def space(self) -> memoryview:
        """Where the next bytes are to be written."""
        return self._missing[-1] if self._missing else self._view[self._filled :]

    def received(self, count: int) -> list[list[Any]]:
        """``count`` bytes have been written to `space`.

        Returns:
            The frames that are whole now, each a list of its parts; a part is bytes, or a writable buffer.
        """
        if self._missing:
            rest = self._missing[-1][count:]
            if rest:
                self._missing[-1] = rest
                return []
            self._missing.pop()
            return [] if self._missing else [self._take_parts()]
        self._filled += count
        if self._filled >= _ONE.size:  # most often it is one small frame
            number, size = _ONE.unpack_from(self._chunk)
            if number == 1 and _ONE.size + size == self._filled:
                self._filled = 0
                return [[bytes(self._view[_ONE.size : _ONE.size + size])]]
        frames: list[list[Any]] = []
        place = 0
        while (found := self._cut(place)) is not None:
            parts, place = found
            frames.append(parts)
        if place:
            self._view[: self._filled - place] = self._view[place : self._filled]
            self._filled -= place
        if self._filled >= _COUNT.size:
            frames.extend(self._begin_large())
        if self._filled == len(self._chunk):  # with the sizes of very many parts
            self._chunk = bytearray(2 * self._filled)
            self._chunk[: self._filled] = self._view
            self._view = memoryview(self._chunk)
        return frames

    def _sizes(self, place: int) -> tuple[list[int], int] | None:
        """The sizes of the parts of the frame that begins at ``place``, and where its first part begins."""
        if self._filled - place < _COUNT.size:
            return None
        (count,) = _COUNT.unpack_from(self._chunk, place)
        start = place + _COUNT.size + count * _SIZE.size
        if start > self._filled:
            return None
        return [_SIZE.unpack_from(self._chunk, place + _COUNT.size + i * _SIZE.size)[0] for i in range(count)], start

    def _cut(self, place: int) -> tuple[list[Any], int] | None:
        """The parts of the frame at ``place`` and where it ends, if it has come whole."""
        known = self._sizes(place)
        if known is None:
            return None
        sizes, start = known
        if start + sum(sizes) > self._filled:
            return None
        parts: list[Any] = []
        for index, size in enumerate(sizes):
            piece = self._view[start : start + size]
            parts.append(bytearray(piece) if index else bytes(piece))
            start += size
        return parts, start

    def _begin_large(self) -> list[list[Any]]:
        """Give a frame that will not fit into the chunk the memory for its parts, and move there what has come of it."""
        known = self._sizes(0)
        if known is None or known[1] + sum(known[0]) <= len(self._chunk):
            return []
        sizes, start = known
        self._parts = [room(size) for size in sizes]
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
        return [] if self._missing else [self._take_parts()]

    def _take_parts(self) -> list[Any]:
        parts, self._parts = self._parts, []
        return parts
