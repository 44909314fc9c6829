"""The line of those who wait until the queue has room: first come, first served.

While anyone is in it, the queue is full: whoever makes room there calls `Line.let_in` at once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from async_batcher._forming import Forming


class Place:
    """A place in the line; later, what is known of its item in the queue.

    Attributes:
        item: What is to go into the queue.
        future: Who waits for it.
        ticket: That of the item, once it is in the queue.
    """

    __slots__ = ("future", "item", "ticket")

    def __init__(self, item: Any, future: asyncio.Future[Any]) -> None:
        self.item = item
        self.future = future
        self.ticket: int | None = None


class Line:
    """The line in front of a queue.

    Args:
        forming: The queue.
    """

    def __init__(self, forming: Forming[Any, asyncio.Future[Any]]) -> None:
        self._forming = forming
        self._places: OrderedDict[Place, None] = OrderedDict()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._places)

    def join(self, item: Any, future: asyncio.Future[Any]) -> Place:
        """Wait at its end."""
        place = Place(item, future)
        self._places[place] = None
        return place

    def leave(self, place: Place) -> bool:
        """Wait no more; says whether it was still in the line."""
        if place not in self._places:
            return False
        del self._places[place]
        return True

    def let_in(self, now: float) -> None:
        """Let the first ones into the queue, as far as there is room."""
        while self._places and self._forming.has_room:
            place, _ = self._places.popitem(last=False)
            place.ticket = self._forming.add(now, place.item, place.future)

    def clear(self) -> list[asyncio.Future[Any]]:
        """Send everybody away.

        Returns:
            Who waited.
        """
        waiting = [place.future for place in self._places]
        self._places.clear()
        return waiting
