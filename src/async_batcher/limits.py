"""`Limit`: what a batch, the queue or a span of time may hold, in any unit.

::

    @batched(limits=[Limit(by=len, per_batch=1_000_000), Limit(by="batches", rate=(10, 1.0))])
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Limit"]


@dataclass(frozen=True, eq=False)
class Limit:
    """A limit on cost or rate, beside ``max_batch_size`` and ``max_queue_size``.

    Batchers of one event loop that are given the same `Limit` share it: their queues together hold
    at most ``queued``, and together they dispatch at most ``rate``. On another event loop, their
    first call raises RuntimeError.

    Args:
        by: The cost of an item: a function of one item, called once, when the item is enqueued. It
            returns a number, 0 or more. If it raises, or returns something else, the call
            for that item fails. None counts items, ``"batches"`` counts batches.
        per_batch: Maximum total cost of a batch. An item that costs more runs alone. Items
            keep their order: none overtakes an item that does not fit into the batch.
        queued: Maximum total cost of the queue; beyond it, the queue is full. An item that
            costs more is a `ValueError`.
        rate: ``(n, seconds)``: a cost of ``n`` at most is dispatched in any span of that length.
            Batches that exceed it wait in the queue, where they hold no slot and fill up, and
            those of all keys behind them wait, too. So a batch costs ``n`` at most, and an item
            that costs more is a `ValueError`. Items that run again count again.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range, or nothing is limited.
    """

    by: Callable[[Any], float] | Literal["batches"] | None = None
    _: KW_ONLY
    per_batch: float | None = None
    queued: float | None = None
    rate: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        by: Any = self.by
        rate: Any = self.rate
        if by is not None and by != "batches" and not callable(by):
            msg = f"by={by!r}: must be a function of one item, 'batches', or None"
            raise TypeError(msg)
        if self.per_batch is None and self.queued is None and rate is None:
            msg = "Limit() limits nothing; it needs per_batch, queued or rate"
            raise ValueError(msg)
        if by == "batches" and (self.per_batch is not None or self.queued is not None):
            msg = "by='batches' counts batches, for rate; items are queued, and are in a batch"
            raise ValueError(msg)
        # Without a function each item, or batch, counts as 1.
        least = 0.0 if callable(by) else 1.0
        for name, number in (("per_batch", self.per_batch), ("queued", self.queued)):
            if number is not None:
                _check_number(f"{name}={number!r}", number, least)
        if rate is not None:
            if not isinstance(rate, tuple | list) or len(rate) != 2:
                msg = f"rate={rate!r}: must be (n, seconds)"
                raise TypeError(msg)
            _check_number(f"rate={rate!r}: n", rate[0], least)
            _check_number(f"rate={rate!r}: seconds", rate[1], 0.0)
            object.__setattr__(self, "rate", tuple(rate))


def _check_number(shown: str, value: object, least: float) -> None:
    if isinstance(value, bool) or not hasattr(type(value), "__float__"):
        msg = f"{shown} must be a number, not {type(value).__name__}"
        raise TypeError(msg)
    number = float(value)  # type: ignore[arg-type]
    if not 0 < number < math.inf or number < least:
        msg = f"{shown} must be a finite number, " + (f"at least {least:g}" if least else "above 0")
        raise ValueError(msg)
