"""Frames: how a message travels over a stream socket between a pool and its worker. No I/O of its own, but for `send`.

::

    message (builtins) --pack--> head, bulk --frame--> bytes on the socket --FrameReader--> head, bulk --unpack--> message

    frame:  number of parts (4 bytes) | size of each (8 bytes) | the parts:  head, bulk 1, bulk 2, ...

Rules:

- Large buffers inside a message (`pickle.PickleBuffer`) are not copied into its pickle, but follow it as parts of their own, or
  go through shared memory (`_shm.py`).
- Both ends are of this package, so a frame is trusted; a stream that ends inside one is a death, and simply ends.
"""

from __future__ import annotations

import pickle
import struct
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from async_batcher._shm import room

if TYPE_CHECKING:
    from collections.abc import Sequence

Buffer: TypeAlias = "bytes | bytearray | memoryview | pickle.PickleBuffer"

# Bytes from which a buffer is worth a part of its own: below, one more copy costs less than one more part.
BULKY = 4096

_CHUNK = 65_536  # bytes read at a time; a frame that fits is read with one call
_COUNT = struct.Struct("=I")
_SIZE = struct.Struct("=Q")


def pack(message: tuple[Any, ...]) -> tuple[bytes, list[memoryview]]:
    """A message as a short pickle, and the large buffers in it."""
    bulk: list[memoryview] = []

    def take(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < BULKY:
            return True  # into the pickle
        bulk.append(raw)
        return False

    return pickle.dumps(message, 5, buffer_callback=take), bulk


def unpack(head: Buffer, bulk: Sequence[Any]) -> Any:
    """The message again; its large buffers are those of ``bulk``."""
    return pickle.loads(head, buffers=bulk)  # noqa: S301 - builtins only, from this program's own worker or parent


def frame(parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """The parts with the sizes before them, ready to be sent; one piece where they are small."""
    sizes = [len(part) for part in parts]
    start = _COUNT.pack(len(parts)) + b"".join(map(_SIZE.pack, sizes))
    return [start + parts[0], *parts[1:]] if sizes[0] <= _CHUNK else [start, *parts]


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
        if known is None or known[1] + sum(known[0]) <= _CHUNK:
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


def flatten(frames: Sequence[Sequence[bytes | memoryview]]) -> list[memoryview]:
    """Views of everything that is to be sent, in order."""
    return [memoryview(piece) for piece in chain.from_iterable(frames)]
