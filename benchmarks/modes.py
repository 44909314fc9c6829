"""How much is measured: ``--quick``, what is usual, or ``--full``.

Each load of a benchmark says from which mode on it is measured, and each mode measures what those before it do. In a quick run
everything is so short that it shows only that it works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

MODES = ("quick", "usual", "full")


def loads(*, quick: Iterable[Any], usual: Iterable[Any] = (), full: Iterable[Any] = ()) -> list[Any]:
    """The values of a parameter, or tuples for several: of the quick run, and what the usual and the full run add."""
    return [
        *quick,
        *(_param(value, pytest.mark.usual) for value in usual),
        *(_param(value, pytest.mark.full) for value in full),
    ]


def _param(value: Any, mark: pytest.MarkDecorator) -> Any:
    return pytest.param(*value, marks=mark) if isinstance(value, tuple) else pytest.param(value, marks=mark)


def is_measured(mode: str, marks: Iterable[str]) -> bool:
    """Whether a benchmark with these marks is run in that mode."""
    return all(MODES.index(mark) <= MODES.index(mode) for mark in marks if mark in MODES)
