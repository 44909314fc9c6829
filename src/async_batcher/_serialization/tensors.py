"""PyTorch's tensors: each travels as its own bytes, beside the pickle as arrays do.

torch itself pickles the whole storage that a tensor is a view of (for a row of a data set, the data
set), and copies it several times. Here a plain tensor travels as the NumPy array over its memory.
torch reduces any other tensor, and torch's functions rebuild it, so it arrives as from torch's own
pickle; only its storage is replaced.

::

    tensor --as an array--> from_numpy, (array,)         dense, of a NumPy type, without gradient
           --by torch--> rebuild function, (storage, offset, size, stride, ...)  others, on the CPU
                                               |
                       the part that the tensor covers, or a copy without the gaps
                                               |
                                  PickleBuffer --> a storage over the memory of the received buffer

Rules:

- Only the unpickling of a tensor imports torch. A program that has not imported torch has no
  tensors: `reducers` returns None.
- `copyreg` stays unchanged, and with it the user's own pickles; what the user has registered there
  takes precedence.
- Two tensors over one storage arrive as two, as with pickle. One tensor in two places stays one.
- Only `Tensor.numpy` exposes memory. It makes torch refuse to resize the storage, which would free
  memory that a buffer still refers to.
- torch pickles tensors of other devices than the CPU, of a torch without NumPy, and all that this
  module does not know.
"""

from __future__ import annotations

import copyreg
import math
import pickle
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROTOCOL = 5

# What `Tensor.numpy` raises for a tensor whose memory it cannot expose: another layout, device or
# type, a gradient, a conjugated or negated view, a mode that replaces torch's functions, no NumPy.
_UNSUITABLE = (RuntimeError, TypeError)


def reducers(others: Mapping[type, Any] = copyreg.dispatch_table) -> _Reducers | None:
    """Return a `dispatch_table` for tensors; None while torch is not imported.

    The table ``others`` takes precedence, and applies to all else.
    """
    torch = sys.modules.get("torch")
    # Not imported, still being imported by another thread, or a stand-in.
    if not isinstance(getattr(torch, "Tensor", None), type):
        return None
    try:
        return _Reducers(torch, others)
    except AttributeError:  # a torch that is too old
        return None


class _Reducers(Mapping[type, Any]):
    """A `dispatch_table`; iteration leaves tensors out."""

    def __init__(self, torch: Any, others: Mapping[type, Any]) -> None:
        self._torch = torch
        self._others = others
        self._tensor: Any = torch.Tensor
        self._rebuild_subclass = torch._tensor._rebuild_from_type_v2  # noqa: SLF001
        utils = torch._utils  # noqa: SLF001
        self._rebuild_typed = (utils._rebuild_tensor_v2, utils._rebuild_qtensor)  # noqa: SLF001
        self._rebuild_untyped = utils._rebuild_tensor_v3  # noqa: SLF001

    def __getitem__(self, kind: type) -> Any:
        found = self._others.get(kind)
        if found is not None:
            return found
        if issubclass(kind, self._tensor):
            return self._reduce
        raise KeyError(kind)

    def __iter__(self) -> Iterator[type]:
        return iter(self._others)

    def __len__(self) -> int:
        return len(self._others)

    def _reduce(self, tensor: Any) -> Any:
        if type(tensor) is self._tensor and not tensor.__dict__:
            try:
                array = tensor.numpy()
            except _UNSUITABLE:
                pass
            else:
                if array.flags.forc:
                    return (_tensor, (array,))
        reduced = tensor.__reduce_ex__(_PROTOCOL)
        if type(reduced) is not tuple:
            return reduced
        rebuild, args, *rest = reduced
        try:
            if rebuild is self._rebuild_subclass:  # or a tensor with attributes
                function, kind, inner, state = args
                args = (function, kind, self._with_own_bytes(function, inner), state)
            else:
                args = self._with_own_bytes(rebuild, args)
        except _UNSUITABLE:
            return reduced
        return (rebuild, args, *rest)

    def _with_own_bytes(self, rebuild: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace the storage in the arguments of a rebuild function by what the tensor covers.

        These functions of torch and the order of their arguments are in every file that
        `torch.save` has written, so they do not change.
        """
        has_dtype = rebuild is self._rebuild_untyped
        if not has_dtype and rebuild not in self._rebuild_typed:
            return args
        storage, offset, size, stride, *rest = args
        untyped = storage if has_dtype else storage._untyped_storage  # noqa: SLF001
        dtype = rest[2] if has_dtype else storage.dtype
        width = dtype.itemsize
        count = math.prod(size)
        steps = ((length - 1) * step for length, step in zip(size, stride, strict=True))
        span = 1 + sum(steps) if count else 0
        if untyped.device.type != "cpu" or (offset + span) * width > untyped.nbytes():
            return args  # larger than its storage: an element is smaller than a byte
        torch = self._torch
        if span > count:
            # As integers for every type: a conjugated view must not be resolved, a quantized one
            # not converted.
            kinds = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.complex128)
            kind = next(kind for kind in kinds if kind.itemsize == width)
            copied = self._over(untyped, kind, offset, size, stride).clone()
            untyped, offset, stride, span = copied.untyped_storage(), 0, copied.stride(), count
        whole = self._over(untyped, torch.uint8, 0, (untyped.nbytes(),), (1,)).numpy()
        own = whole[offset * width : (offset + span) * width]
        # The function for types without a typed storage takes one of bytes, as `torch.load` gives
        # it.
        part = _TensorBytes(own, torch.uint8 if has_dtype else dtype)
        return (part, 0, size, stride, *rest)

    def _over(self, untyped: Any, dtype: Any, offset: int, size: Any, stride: Any) -> Any:
        empty = self._torch.empty(0, dtype=dtype, device="cpu")  # the default device may be another
        return empty.set_(untyped, offset, size, stride)


class _TensorBytes:
    """Pickles as a storage with these bytes."""

    __slots__ = ("_array", "_dtype")

    def __init__(self, array: Any, dtype: Any) -> None:
        self._array = array
        self._dtype = dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return (_storage, (pickle.PickleBuffer(self._array), self._dtype))


def _tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(array)


def _storage(buffer: Any, dtype: Any) -> Any:
    import torch

    if memoryview(buffer).nbytes:
        untyped = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    else:  # which `frombuffer` refuses
        untyped = torch.UntypedStorage(0)
    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
