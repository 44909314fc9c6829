"""The line of those who wait until the queue has room: first come, first served.

While anyone is in it, the queue is full: whoever makes room there calls `Line.let_in` at once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from async_batcher._batching.bulk import Share
    from async_batcher._batching.queue import Forming


class Place:
    """A place in the line; later, what is known of its item in the queue.

    Attributes:
        item: What is to go into the queue.
        future: Who waits for it.
        ticket: That of the item, once it is in the queue.
        is_urgent: Whether it is due at once when it gets there.
    """

    __slots__ = ("future", "is_urgent", "item", "ticket")

    def __init__(self, item: Any, future: asyncio.Future[Any] | Share) -> None:
        self.item = item
        self.future: Any = future
        self.ticket: int | None = None
        self.is_urgent = False

    @property
    def size(self) -> int:
        """Items that wait here."""
        return 1

    def enter(self, forming: Forming[Any, Any], now: float) -> bool:
        """Go into the queue, which has room; says whether all has."""
        self.ticket = forming.add(now, self.item, self.future)
        return True


class SharedPlace(Place):
    """A place in the line for many items of one bulk, which go in as there is room.

    Attributes:
        item: All items of the bulk.
        future: The share of it that is still in the line.
    """

    __slots__ = ()

    @property
    def size(self) -> int:
        """Items that wait here."""
        share: Share = self.future
        return share.size

    def enter(self, forming: Forming[Any, Any], now: float) -> bool:
        """Go into the queue as far as there is room; says whether all has."""
        rest: Share = self.future
        share = rest.cut(forming.room)
        enter_many(forming, now, self.item[share.start : share.start + share.size], share)
        if not rest.size:
            rest.bulk.place = None
        return not rest.size


def enter_many(forming: Forming[Any, Any], now: float, items: list[Any], share: Share) -> bool:
    """Have the items of a share enter the queue, if there is room for all of them; says whether there was."""
    ticket = forming.add_many(now, items, share)
    if ticket is None:
        return False
    share.ticket = ticket
    share.bulk.queued.add(share)
    return True


class Line:
    """The line in front of a queue.

    Args:
        forming: The queue.
    """

    def __init__(self, forming: Forming[Any, Any]) -> None:
        self._forming = forming
        self._places: OrderedDict[Place, None] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether anyone waits."""
        return bool(self._places)

    def __len__(self) -> int:
        """How many items wait."""
        return sum(place.size for place in self._places)

    def join(self, place: Place) -> None:
        """Wait at its end."""
        self._places[place] = None

    def leave(self, place: Place) -> bool:
        """Wait no more; says whether it was still in the line."""
        if place not in self._places:
            return False
        del self._places[place]
        return True

    def let_in(self, now: float) -> None:
        """Let the first ones into the queue, as far as there is room."""
        while self._places and self._forming.has_room:
            place = next(iter(self._places))
            if place.enter(self._forming, now):
                del self._places[place]
            if place.is_urgent:
                self._forming.flush()

    def flush(self) -> None:
        """What waits now is due at once when it gets into the queue."""
        for place in self._places:
            place.is_urgent = True

    def clear(self) -> list[Any]:
        """Send everybody away.

        Returns:
            Who waited.
        """
        waiting = [place.future for place in self._places]
        self._places.clear()
        return waiting
