"""The user's function as `tune` runs it, where it runs: a worker process, or a thread.

It is found by its name in each worker, as a command's function is; so what crosses is small, and imports little.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.exception_text import is_exception
from async_batcher._worker.results import normalize_results

if TYPE_CHECKING:
    from async_batcher._target import Target


class Called:
    """A batcher's function: that of the user, over a batch.

    Args:
        target: The user's function.
        each: Whether it takes one item, not a batch.

    Attributes:
        target: The same.
    """

    def __init__(self, target: Target, *, each: bool) -> None:
        self.target = target
        self._each = each

    def __call__(self, batch: list[Any]) -> Any:
        """What the user's function returns."""
        function = self.target.function
        return [function(item) for item in batch] if self._each else function(batch)


class Timed:
    """The same, but its answers are the seconds that the batch took."""

    def __init__(self, called: Called) -> None:
        self._called = called

    def __call__(self, batch: list[Any]) -> list[Any]:
        """Run the batch; an item that fails by itself keeps its exception."""
        count = len(batch)  # now: the user's code may use up its list
        began = time.perf_counter()
        answers = normalize_results(self._called(batch), count)
        took = time.perf_counter() - began
        return [answer if is_exception(answer) else took for answer in answers]
