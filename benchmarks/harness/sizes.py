"""How much is measured: ``--quick``, the usual run, or ``--full``.

Each load names the first mode that measures it, and each mode includes the modes before it. A quick
run is so short that it only shows that the benchmarks work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

MODES = ("quick", "usual", "full")


def loads(
    *, quick: Iterable[Any], usual: Iterable[Any] = (), full: Iterable[Any] = ()
) -> list[Any]:
    """Return the values of a parameter, each marked with the first mode that measures it.

    A value that is a tuple has one element for each of several parameters.
    """
    return [
        *quick,
        *(_param(value, pytest.mark.usual) for value in usual),
        *(_param(value, pytest.mark.full) for value in full),
    ]


def _param(value: Any, mark: pytest.MarkDecorator) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=mark)


def is_measured(mode: str, marks: Iterable[str]) -> bool:
    """Return whether a benchmark with these marks runs in that mode."""
    return all(MODES.index(mark) <= MODES.index(mode) for mark in marks if mark in MODES)
