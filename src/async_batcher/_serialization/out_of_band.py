"""Large buffers beside a pickle (PEP 574), rather than copied into it.

pickle hands out the buffers of objects that offer them, as arrays do, but never plain ``bytes`` and
``bytearray``, of which images, documents and files are made. This module wraps those near the top
of a value, such as the items of a batch, so that they travel beside the pickle too. They arrive as
what they were. `arrays.py` and `tensors.py` offer more buffers than the packages do.
"""

from __future__ import annotations

import copyreg
import pickle
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from async_batcher._serialization import arrays, tensors

if TYPE_CHECKING:
    from collections.abc import Callable

# Bytes. One more copy of a smaller buffer costs less than one more part of a message.
MIN_BUFFER_SIZE = 4096

# Bytes of a pickle. The values of smaller pickles are not searched for large bytes.
_SCAN_THRESHOLD = 65_536
_DEPTH = 4  # nested containers that are searched: arguments, among them a batch, its items
_LENGTH = 1024  # entries; those of a longer list are not searched, nor likely to be large
_BYTES = frozenset({bytes, bytearray})
_CONTAINERS = frozenset({list, tuple, dict})


class BufferPickler:
    """Makes pickles, with their large buffers beside them if ``out_of_band`` is set.

    It reuses its picklers: to create one takes longer than to pickle a short list of numbers.
    """

    def __init__(
        self, pickler: type[pickle.Pickler] = pickle.Pickler, *, out_of_band: bool = True
    ) -> None:
        self._type = pickler
        self._out_of_band = out_of_band
        # More than one if several threads pickle at once, or user code while it is pickled. `pop`
        # and `append` are one step each, so no two threads have the same one.
        self._spares: list[tuple[pickle.Pickler, list[bytes], list[pickle.PickleBuffer]]] = []
        self._had_large_bytes = False  # the last value, so the next one may
        self._reducers: Any = None  # a `dispatch_table`; None: that of copyreg
        self._imported = 0  # modules, when it was made
        self._registered: dict[Any, Any] = {}  # with copyreg, then

    def dumps(self, value: Any) -> tuple[bytes, list[pickle.PickleBuffer]]:
        if len(sys.modules) != self._imported or copyreg.dispatch_table != self._registered:
            self._update_reducers()
        if self._had_large_bytes:
            self._had_large_bytes = _has_large_bytes(value)
            if self._had_large_bytes:
                return self._dumps_wrapped(value)
        try:
            spare = self._spares.pop()
        except IndexError:
            spare = self._new()
        pickler, pieces, found = spare
        pickler.dump(value)
        data = pieces.pop()
        if pieces or len(data) > _SCAN_THRESHOLD:
            if self._out_of_band and _has_large_bytes(value):
                self._had_large_bytes = True
                return self._dumps_wrapped(value)
            data = b"".join((*pieces, data))
        # A large one leaves a large memo, which takes long to clear.
        if len(data) >= MIN_BUFFER_SIZE:
            return data, found
        pickler.clear_memo()
        buffers: list[pickle.PickleBuffer] = []
        if found:
            buffers, found[:] = found.copy(), []
        self._spares.append(spare)
        return data, buffers

    def _dumps_wrapped(self, value: Any) -> tuple[bytes, list[pickle.PickleBuffer]]:
        pickler, pieces, found = self._new()
        pickler.dump(wrap_large_bytes(value))
        return b"".join(pieces), found

    def _update_reducers(self) -> None:
        self._imported = len(sys.modules)
        self._registered = dict(copyreg.dispatch_table)
        own = arrays.reducers()
        # A dict: pickle looks up the type of each object, most of which have no reducer.
        table = {**own, **self._registered} if own else None
        self._reducers = tensors.reducers(table or copyreg.dispatch_table) or table
        self._spares.clear()

    def _new(self) -> tuple[pickle.Pickler, list[bytes], list[pickle.PickleBuffer]]:
        """Make a pickler; return it, its output, which is one piece if small, and its buffers."""
        pieces: list[bytes] = []
        found, callback = buffer_collector(out_of_band=self._out_of_band)
        pickler = self._type(SimpleNamespace(write=pieces.append), 5, buffer_callback=callback)
        if self._reducers is not None:
            pickler.dispatch_table = self._reducers
        return pickler, pieces, found


def buffer_collector(
    *, out_of_band: bool = True
) -> tuple[list[pickle.PickleBuffer], Callable[[pickle.PickleBuffer], bool] | None]:
    """Return a list for the large buffers of one pickle, and the callback that fills it, if any."""
    found: list[pickle.PickleBuffer] = []

    def callback(buffer: pickle.PickleBuffer) -> bool:
        # Raises for a buffer that is not contiguous: here, where the error belongs to its owner.
        with buffer.raw() as raw:
            if raw.nbytes < MIN_BUFFER_SIZE:
                return True  # into the pickle
        # Not the view: Python 3.11 crashes when it collects a view of a view in a cycle.
        found.append(buffer)
        return False

    return found, callback if out_of_band else None


class BytesBuffer:
    """Large bytes, which pickle as an out-of-band buffer."""

    __slots__ = ("content",)

    def __init__(self, content: bytes | bytearray) -> None:
        self.content = content

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (type(self.content), (pickle.PickleBuffer(self.content),))


_IN_PROGRESS: Any = object()  # in place of a container that is met again inside itself


def _has_large_bytes(value: Any, depth: int = _DEPTH) -> bool:
    # Most values have none, and must not cost more than this look.
    if type(value) not in _CONTAINERS or len(value) > _LENGTH:
        return False
    entries = _entries(value)
    kinds = set(map(type, entries))
    if not kinds.isdisjoint(_BYTES) and any(
        len(entry) >= MIN_BUFFER_SIZE for entry in entries if type(entry) in _BYTES
    ):
        return True
    if not depth or kinds.isdisjoint(_CONTAINERS):
        return False
    return any(_has_large_bytes(entry, depth - 1) for entry in entries)


def wrap_large_bytes(value: Any) -> Any:
    """Wrap large bytes in a copy of the outermost containers; others are not copied.

    A value that contains itself is left as it is.
    """
    known: dict[int, Any] = {}
    wrapped = _wrap(value, _DEPTH, known)
    return value if _IN_PROGRESS in known.values() else wrapped


def _wrap(value: Any, depth: int, known: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _BYTES and len(value) >= MIN_BUFFER_SIZE:
        # An object that occurs twice is one object again on the other side.
        return known.setdefault(id(value), BytesBuffer(value))
    if kind not in _CONTAINERS or not depth or len(value) > _LENGTH:
        return value
    if id(value) not in known:
        known[id(value)] = _IN_PROGRESS
        entries = [_wrap(entry, depth - 1, known) for entry in _entries(value)]
        if any(entry is _IN_PROGRESS for entry in entries):
            return _IN_PROGRESS  # and so do those around it
        is_same = all(new is old for new, old in zip(entries, _entries(value), strict=True))
        copied = dict(zip(value, entries, strict=True)) if kind is dict else kind(entries)
        known[id(value)] = value if is_same else copied
    return known[id(value)]


def _entries(value: Any) -> Any:
    return value.values() if type(value) is dict else value
