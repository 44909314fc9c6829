"""The blocks of shared memory that are lent to one worker, as their owner sees them.

::

    free --lend--> a batch, or room for results --reply--> free again, or held: the worker's user code still looks into it
      ^                                            |
      `------------------- copied out -------------'

Rules:

- A block belongs to one worker and goes with it; its descriptor is sent to the worker before its first use.
- Sized by need and reused: a larger one takes the place of one that was too small, and one that is far too large goes after a
  while. In the steady state none is made.
- One that is held, or that a helper thread copies to or from, is not lent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_batcher._transport import framing, shared_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from async_batcher._transport.shared_memory import SharedBlock

# Every so many batches, blocks are given back that are so many times as large as what has been needed since the last time.
_TRIM_AFTER = 64
_FAR_TOO_LARGE = 4


class BlockLease:
    """A block that is, or may be, lent.

    Attributes:
        name: What the worker knows it by.
        block: The memory.
        is_free: Whether it may be lent.
        copying: Whether a helper thread copies to or from it.
    """

    __slots__ = ("block", "copying", "is_free", "name")

    def __init__(self, name: int, block: SharedBlock) -> None:
        self.name = name
        self.block = block
        self.is_free = False
        self.copying = False


class BlockPool:
    """The blocks of one worker.

    Args:
        announce: Sends the worker a message about a block, with its descriptor if it is new.

    Attributes:
        all: The blocks by their names.
    """

    def __init__(self, announce: Callable[[Sequence[bytes | memoryview], Sequence[int]], None]) -> None:
        self._announce = announce
        self.all: dict[int, BlockLease] = {}
        self._names = 0
        self._replies = 0
        self._largest_need = 0  # bytes, since blocks were last given back
        self._is_closed = False

    def acquire(self, need: int) -> BlockLease | None:
        """The smallest free block of ``need`` bytes or more."""
        fitting = [lent for lent in self.all.values() if lent.is_free and lent.block.size >= need]
        return self._lent(min(fitting, key=_size, default=None))

    def acquire_largest(self) -> BlockLease | None:
        """The largest free block: for results, whose size nobody knows yet."""
        return self._lent(max((lent for lent in self.all.values() if lent.is_free), key=_size, default=None))

    def add(self, block: SharedBlock) -> BlockLease | None:
        """Take new memory into use and lend it, instead of the largest free block that was too small.

        Returns:
            None, and the memory is given back, when the worker has gone.
        """
        if self._is_closed:
            block.close()
            return None
        outgrown = [lent for lent in self.all.values() if lent.is_free and lent.block.size < block.size]
        if outgrown:
            self._discard(max(outgrown, key=_size))
        self._names += 1
        new = self.all[self._names] = BlockLease(self._names, block)
        self._announce(framing.encode(framing.ADD_BLOCK, number=new.name, target=block.size), [block.fd])
        return new

    def release_unused(self, held: Sequence[int], need: int, results: int) -> None:
        """The worker has answered.

        Args:
            held: The names of those that its user code still looks into.
            need: Bytes that the largest of the batch and its results took.
            results: The name of the one that the results are in; 0: none.
        """
        for lent in self.all.values():
            if not lent.copying:
                lent.is_free = lent.name not in held and lent.name != results
        self._largest_need = max(self._largest_need, need)
        self._replies += 1
        if self._replies % _TRIM_AFTER == 0:
            enough = _FAR_TOO_LARGE * shared_memory.block_size(self._largest_need)
            for lent in [lent for lent in self.all.values() if lent.is_free and lent.block.size > enough]:
                self._discard(lent)
            self._largest_need = 0

    def copy_done(self, lent: BlockLease, *, is_free: bool) -> None:
        """The helper thread is done with it."""
        lent.copying = False
        lent.is_free = is_free
        if self._is_closed:
            lent.block.close()

    def close(self) -> None:
        """The worker has gone. What a helper thread copies from stays until that is done."""
        self._is_closed = True
        for lent in self.all.values():
            if not lent.copying:
                lent.block.close()
        self.all.clear()

    def _lent(self, lent: BlockLease | None) -> BlockLease | None:
        if lent is not None:
            lent.is_free = False
        return lent

    def _discard(self, lent: BlockLease) -> None:
        del self.all[lent.name]
        lent.block.close()
        self._announce(framing.encode(framing.FREE_BLOCK, number=lent.name), [])


def _size(lent: BlockLease) -> int:
    return lent.block.size
