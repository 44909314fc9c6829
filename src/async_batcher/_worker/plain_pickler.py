"""A pickler for results that unpickle anywhere, since they hold no user code."""

from __future__ import annotations

import pickle
from types import BuiltinFunctionType, FunctionType
from typing import Any

from async_batcher._serialization import arrays, tensors
from async_batcher._serialization.out_of_band import BytesBuffer

_PLAIN_MODULES = frozenset(
    {"builtins", "collections", "copyreg", "datetime", "decimal", "fractions", "numpy", "torch"}
    | {"uuid", "_codecs"}
)

_REDUCERS = (arrays.__name__, tensors.__name__)


class _NotPlainError(Exception):
    pass


class PlainPickler(pickle.Pickler):
    """Refuses exceptions, and objects of other modules than `_PLAIN_MODULES`."""

    def reducer_override(self, obj: Any) -> Any:
        # Not called for int, str, bytes, list, dict and the like.
        holder = obj if isinstance(obj, type | FunctionType | BuiltinFunctionType) else type(obj)
        module = getattr(holder, "__module__", None) or ""
        if type(obj) is BytesBuffer or module in _REDUCERS:
            return NotImplemented
        if module.partition(".")[0] not in _PLAIN_MODULES or isinstance(obj, BaseException):
            raise _NotPlainError
        return NotImplemented
