"""Arrays of NumPy and Arrow: each travels as its own bytes, beside the pickle.

NumPy copies an array with gaps, dates, a mask or a mapped file into the pickle. Arrow pickles the
whole buffers that a slice is a view of: for a few rows, the table. Here the bytes of such an array
travel as one contiguous buffer. An array that has none, or is read-only, is copied for that.

::

    ndarray -------> flat bytes, type, shape --------> an array over the received buffer
    memmap --------> an ndarray ---------------------> a view of it
    MaskedArray ---> two of them, data and mask -----> a masked array of both
    Arrow's slice -> an array without the rest ------> as from Arrow's own pickle

Rules:

- An array arrives as from the package's own pickle: the same type, writable or not. All that this
  module does not know, such as other subclasses, is left to the packages.
- It imports neither package. A program that has not imported one has no arrays of it.
"""

from __future__ import annotations

import functools
import pickle
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PROTOCOL = 5

# Bytes. What would be saved by treating a smaller array, or smaller gaps, is not worth a copy.
_MIN_BYTES = 4096


def reducers() -> dict[type, Callable[[Any], Any]]:
    """Return reducers, by type, for the arrays of the packages that are imported."""
    return _reducers(len(sys.modules))


@functools.lru_cache(maxsize=1)
def _reducers(_imported: int) -> dict[type, Callable[[Any], Any]]:
    found: dict[Any, Callable[[Any], Any]] = {
        _type_in("numpy", "ndarray"): _reduce_array,
        _type_in("numpy", "memmap"): _reduce_memmap,
        _type_in("numpy.ma", "MaskedArray"): _reduce_masked,
        **dict.fromkeys(_subclasses(_type_in("pyarrow", "Array")), _reduce_arrow),
    }
    found.pop(None, None)
    return found


def _type_in(module: str, name: str) -> type | None:
    # The module may be blocked, still being imported by another thread, or a stand-in.
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def _subclasses(kind: Any) -> Iterator[type]:
    if kind is not None:
        for subclass in kind.__subclasses__():
            yield subclass
            yield from _subclasses(subclass)


def _reduce_array(array: Any) -> Any:
    dtype = array.dtype
    if array.nbytes < _MIN_BYTES or dtype.hasobject or _has_buffer(array, dtype.kind):
        return array.__reduce_ex__(_PROTOCOL)
    if not array.flags.forc or not array.flags.writeable:
        array = array.copy("A")
    order = "C" if array.flags.c_contiguous else "F"
    buffer = pickle.PickleBuffer(array.ravel(order).view("u1"))
    return (_array, (array.shape, dtype, buffer, order))


def _has_buffer(array: Any, kind: str) -> bool:
    """Tell whether NumPy puts an array beside a pickle: from 2.3, with its axes in any order."""
    if kind in "mMV":
        try:
            memoryview(array)
        except ValueError:  # dates and durations have no format in a buffer
            return False
    if array.flags.forc:
        return True
    axes = sorted(range(array.ndim), key=array.strides.__getitem__, reverse=True)
    return bool(array.transpose(axes).flags.c_contiguous)


def _array(shape: Any, dtype: Any, buffer: Any, order: Any) -> Any:
    import numpy

    return numpy.frombuffer(buffer, dtype).reshape(shape, order=order)


def _reduce_memmap(array: Any) -> Any:
    if array.nbytes < _MIN_BYTES:
        return array.__reduce_ex__(_PROTOCOL)
    return (_memmap, (_writable(array.view(sys.modules["numpy"].ndarray)),))


def _memmap(array: Any) -> Any:
    import numpy

    return array.view(numpy.memmap)


def _reduce_masked(array: Any) -> Any:
    mask = sys.modules["numpy.ma"].getmaskarray(array)
    return (_masked, (_writable(array.data), _writable(mask), array._fill_value))  # noqa: SLF001


def _masked(data: Any, mask: Any, fill_value: Any) -> Any:
    from numpy.ma import MaskedArray

    array = MaskedArray(data, mask)
    array.fill_value = fill_value
    return array


def _writable(array: Any) -> Any:
    return array if array.flags.writeable else array.copy()


def _reduce_arrow(array: Any) -> Any:
    try:
        if array.get_total_buffer_size() - array.nbytes >= _MIN_BYTES:
            array = sys.modules["pyarrow"].concat_arrays([array])  # a copy
    except (NotImplementedError, ValueError):  # of Arrow: a kind that it cannot measure or copy
        pass
    return array.__reduce__()
