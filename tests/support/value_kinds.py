"""What can be said of a value of any type: whether it can be written to, and equals another.

For workers, too: a package is imported only where a value of it is.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any


@dataclass
class Document:
    """Holds bytes in an attribute."""

    name: str
    content: bytes


def package_of(value: Any) -> str:
    """Return the name of the package that a value's type, or the first base of it, is from."""
    for kind in type(value).__mro__:
        name = kind.__module__.partition(".")[0]
        if name in ("numpy", "pandas", "polars", "pyarrow", "torch", "PIL"):
            return name
    return type(value).__module__


def type_name(value: Any) -> str:
    """Return the name of a value's type."""
    return type(value).__qualname__


def is_writable(value: Any) -> bool | None:
    """Tell whether a value can be changed in place, by writing what is there; None: never."""
    package = package_of(value)
    with contextlib.suppress(TypeError, ValueError):
        if package == "torch":
            value.detach().reshape(-1)[:1].copy_(value.detach().reshape(-1)[:1])
        elif package == "pandas":
            return _is_writable_in_pandas(value)
        elif package == "PIL":
            value.putpixel((0, 0), value.getpixel((0, 0)))
        elif package in ("polars", "pyarrow") or isinstance(value, str | bytes | int | tuple):
            return None
        elif isinstance(value, io.BytesIO):
            value.write(value.getvalue()[:1])
            value.seek(0)
        elif package == "numpy":
            if not hasattr(value, "flags") or not hasattr(value, "__setitem__"):  # a scalar
                return None
            value[...] = value.copy()
        elif isinstance(value, dict | list | Document):
            return None
        else:
            value[0] = value[0]
        return True
    return False


def _is_writable_in_pandas(value: Any) -> bool | None:
    import pandas

    if isinstance(value, pandas.Index):
        return None
    if isinstance(value, pandas.DataFrame):
        value.iloc[0, 0] = value.iloc[0, 0]
    elif isinstance(value, pandas.Series):
        value.iloc[0] = value.iloc[0]
    else:
        value[0] = value[0]
    return True


def is_equal(one: Any, other: Any) -> bool:
    """Tell whether two values of one type are equal."""
    package = package_of(one)
    if package == "numpy":
        import numpy as np

        if isinstance(one, np.ma.MaskedArray):
            masks = (np.ma.getmaskarray(one), np.ma.getmaskarray(other))
            fills = (one.fill_value, other.fill_value)
            return bool((masks[0] == masks[1]).all() and fills[0] == fills[1]) and is_equal(
                one.filled(), other.filled()
            )
        return bool(one.dtype == other.dtype and np.array_equal(one, other))
    if package == "torch":
        import torch

        return bool(
            torch.equal(one, other)
            and one.dtype == other.dtype
            and one.requires_grad == other.requires_grad
        )
    if package in ("pandas", "polars", "pyarrow"):
        return bool(one.equals(other))
    if package == "PIL":
        return bool(
            (one.mode, one.size, one.tobytes()) == (other.mode, other.size, other.tobytes())
        )
    if isinstance(one, io.BytesIO):
        return bool(one.getvalue() == other.getvalue())
    return bool(one == other)


def described(batch: list[Any]) -> list[Any]:
    """Return for each item its type, whether it can be written to, and the item."""
    return [(type_name(item), is_writable(item), item) for item in batch]
