"""Whose turn it is: the queue of a pool that several batchers share. Pure.

Rules:

- One source after the other, in the order in which they began to wait; first in, first out within a source. So a source with a
  thousand batches holds up another with one by one batch at most.
- What is put back comes before everything else of its source.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A queue that takes turns between sources.

    Attributes:
        lines: The line of each source that something of waits; none is empty.
    """

    def __init__(self) -> None:
        self.lines: OrderedDict[Hashable, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        """Things that wait."""
        return sum(map(len, self.lines.values()))

    def __iter__(self) -> Iterator[T]:
        """Everything that waits."""
        for line in self.lines.values():
            yield from line

    def put(self, source: Hashable, thing: T) -> None:
        """Let something wait at the end of its source's line."""
        self.lines.setdefault(source, deque()).append(thing)

    def put_back(self, source: Hashable, thing: T) -> None:
        """Let something that was taken wait again, ahead of all others."""
        self.lines.setdefault(source, deque()).appendleft(thing)
        self.lines.move_to_end(source, last=False)

    def take(self) -> T:
        """The next one.

        Raises:
            LookupError: Nothing waits.
        """
        source = next(iter(self.lines), None)
        if source is None and not self.lines:
            msg = "nothing waits"
            raise LookupError(msg)
        line = self.lines[source]
        thing = line.popleft()
        if line:
            self.lines.move_to_end(source)
        else:
            del self.lines[source]
        return thing

    def remove(self, source: Hashable, thing: T) -> bool:
        """Take out one that does not want to wait any longer.

        Returns:
            Whether it was waiting.
        """
        line = self.lines.get(source)
        if line is None or thing not in line:
            return False
        line.remove(thing)
        if not line:
            del self.lines[source]
        return True

    def clear(self) -> list[T]:
        """Take everything out."""
        everything = list(self)
        self.lines.clear()
        return everything
