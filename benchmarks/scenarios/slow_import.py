"""A function whose module takes two seconds to import, as one that loads a model does."""

from __future__ import annotations

import time

IMPORT_SECONDS = 2.0

time.sleep(IMPORT_SECONDS)


def imported_slowly(batch: list[str]) -> list[str]:
    """Compute, a little for the batch and a little for each item."""
    until = time.thread_time() + 0.001 + 0.0002 * len(batch)
    while time.thread_time() < until:
        pass
    return batch
