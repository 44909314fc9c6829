"""The user's function as ``tune`` runs it: in a worker process, or in a thread."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from async_batcher.cli._item_processor import call_batch

if TYPE_CHECKING:
    from async_batcher.cli._import_string import ImportedFunction


class MeasuredFunction:
    """The batch function of a trial. ``each``: the user's function takes one item, not a batch."""

    def __init__(self, imported: ImportedFunction, *, each: bool) -> None:
        self.imported = imported
        self._each = each

    def __call__(self, batch: list[Any]) -> Any:
        function = self.imported.function
        return [function(item) for item in batch] if self._each else function(batch)


class TimedFunction:
    """The same, but its results are the seconds that the batch took."""

    def __init__(self, function: MeasuredFunction) -> None:
        self._function = function

    def __call__(self, batch: list[Any]) -> list[Any]:
        began = time.perf_counter()
        results = call_batch(self._function, batch)
        took = time.perf_counter() - began
        return [result if isinstance(result, BaseException) else took for result in results]
