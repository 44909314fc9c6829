"""Large buffers beside a pickle, rather than copied into it.

pickle sets aside the buffers of objects that offer them (arrays do), but never plain ``bytes`` and ``bytearray``, which are what
images, documents and files are made of. Here those that stand near the top of a value, as the items of a batch do, are wrapped so
that they are set aside too; they are read as what they were.
"""

from __future__ import annotations

import io
import pickle
import sys
from typing import TYPE_CHECKING, Any

from async_batcher._serialization import tensors

if TYPE_CHECKING:
    from collections.abc import Callable

# Bytes from which a buffer is worth a part of its own: below, one more copy costs less than one more part.
MIN_BUFFER_SIZE = 4096

_SCAN_THRESHOLD = 65_536  # bytes of a pickle; what is not larger is not searched for large bytes
_DEPTH = 4  # lists and tuples inside each other that are looked into: a call's arguments, one of them a batch, its items
_LENGTH = 1024  # entries of one that are looked at: more are not likely to be large
_BYTES = frozenset({bytes, bytearray})
_LISTS = frozenset({list, tuple})


class OutOfBandPickler:
    """Makes pickles, their large buffers beside them.

    A pickler is used again and again: to make one takes longer than to pickle a short list of numbers. So it is for one thread.

    Args:
        pickler: The type of the pickler.
    """

    def __init__(self, pickler: type[pickle.Pickler] = pickle.Pickler) -> None:
        self._type = pickler
        self._spare: tuple[pickle.Pickler, _PickleSink, list[pickle.PickleBuffer]] | None = None
        self._reducers: Any = None  # for tensors, once torch has been imported

    def dumps(self, value: Any) -> tuple[bytes, list[pickle.PickleBuffer]]:
        """A pickle, and the large buffers that are not in it.

        Raises:
            Exception: What pickling raised.
        """
        if self._reducers is None and "torch" in sys.modules:
            self._reducers = tensors.reducers()
            if self._reducers is not None:
                self._spare = None
        spare = pickler, sink, found = self._spare or self._new(_PickleSink())
        self._spare = None  # user code may come back here meanwhile
        sink.value = value
        try:
            pickler.dump(value)
        except _LargeBytesError:
            file = io.BytesIO()
            pickler, _, found = self._new(file)
            pickler.dump(wrap_large_bytes(value))
            return file.getvalue(), found
        sink.value = None
        data = sink.pieces.pop()
        if sink.pieces:
            return b"".join((*sink.pieces, data)), found
        if len(data) >= MIN_BUFFER_SIZE:  # a large one leaves a large memo, which takes long to clear
            return data, found
        pickler.clear_memo()
        self._spare = spare
        if not found:
            return data, []
        aside = found.copy()
        found.clear()
        return data, aside

    def _new(self, file: Any) -> tuple[pickle.Pickler, Any, list[pickle.PickleBuffer]]:
        found, aside = buffer_collector()
        pickler = self._type(file, 5, buffer_callback=aside)
        if self._reducers is not None:
            pickler.dispatch_table = self._reducers
        return pickler, file, found


def buffer_collector() -> tuple[list[pickle.PickleBuffer], Callable[[pickle.PickleBuffer], bool]]:
    """A list for the large buffers of one pickle, and the ``buffer_callback`` that fills it."""
    found: list[pickle.PickleBuffer] = []

    def aside(buffer: pickle.PickleBuffer) -> bool:
        with buffer.raw() as raw:  # raises for one that cannot be copied in one piece: here, where it is its owner's fault
            if raw.nbytes < MIN_BUFFER_SIZE:
                return True  # into the pickle
        # Itself, not a buffer of the view: Python 3.11 crashes when it collects a view of a view in a cycle.
        found.append(buffer)
        return False

    return found, aside


class _LargeBytesError(Exception):
    pass


class _PickleSink:
    """Takes a pickle; breaks off a large one, before it is made, where the value has large bytes that could stand beside it.

    Attributes:
        value: What is pickled.
        pieces: What has come of it; a small one comes in one piece.
    """

    __slots__ = ("pieces", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self.pieces: list[bytes] = []

    def write(self, data: bytes) -> None:
        if (len(data) > _SCAN_THRESHOLD or self.pieces) and self._may_break_off():
            raise _LargeBytesError
        self.pieces.append(data)

    def _may_break_off(self) -> bool:
        return len(self.pieces) < 2 and type(self.value) in _LISTS and _has_large_bytes(self.value, _DEPTH)


class BytesBuffer:
    """Large bytes on their way."""

    __slots__ = ("content",)

    def __init__(self, content: bytes | bytearray) -> None:
        self.content = content

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (type(self.content), (pickle.PickleBuffer(self.content),))


def wrap_large_bytes(value: Any) -> Any:
    """The same value, or a copy of its outermost lists and tuples in which large bytes are wrapped."""
    return _wrapped(value, _DEPTH, {}) if type(value) in _LISTS and _has_large_bytes(value, _DEPTH) else value


def _has_large_bytes(value: list[Any] | tuple[Any, ...], depth: int) -> bool:
    """Most values have none, and shall not cost more than this look."""
    if len(value) > _LENGTH:
        return False
    kinds = set(map(type, value))
    if not kinds.isdisjoint(_BYTES) and any(len(entry) >= MIN_BUFFER_SIZE for entry in value if type(entry) in _BYTES):
        return True
    if not depth or kinds.isdisjoint(_LISTS):
        return False
    return any(_has_large_bytes(entry, depth - 1) for entry in value if type(entry) in _LISTS)


def _wrapped(value: Any, depth: int, known: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _BYTES and len(value) >= MIN_BUFFER_SIZE:
        return known.setdefault(id(value), BytesBuffer(value))  # what stands in two places is one object again on the other side
    if kind not in _LISTS or not depth or len(value) > _LENGTH:
        return value
    if id(value) not in known:
        entries = [_wrapped(entry, depth - 1, known) for entry in value]
        is_same = all(new is old for new, old in zip(entries, value, strict=True))
        known[id(value)] = value if is_same else kind(entries)
    return known[id(value)]
