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

import os
from typing import TYPE_CHECKING

from async_batcher import _shm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Every so many batches, blocks are given back that are so many times as large as what has been needed since the last time.
_TRIM_AFTER = 64
_FAR_TOO_LARGE = 4


class Block:
    """One block.

    Attributes:
        name: What the worker knows it by.
        fd: Its descriptor.
        size: Bytes.
        is_free: Whether it may be lent.
        copying: Whether a helper thread copies to or from it.
    """

    __slots__ = ("copying", "fd", "is_free", "name", "size")

    def __init__(self, name: int, fd: int, size: int) -> None:
        self.name = name
        self.fd = fd
        self.size = size
        self.is_free = False
        self.copying = False


class Blocks:
    """The blocks of one worker.

    Args:
        announce: Sends the worker a message about a block, with its descriptor if it is new.
    """

    def __init__(self, announce: Callable[[tuple[str, *tuple[int, ...]], Sequence[int]], None]) -> None:
        self._announce = announce
        self._blocks: dict[int, Block] = {}
        self._names = 0
        self._replies = 0
        self._largest_need = 0  # bytes, since blocks were last given back
        self._is_closed = False

    def __getitem__(self, name: int) -> Block:
        """The block of that name."""
        return self._blocks[name]

    def lend(self, need: int) -> Block | None:
        """The smallest free block of ``need`` bytes or more."""
        fitting = [block for block in self._blocks.values() if block.is_free and block.size >= need]
        return self._lent(min(fitting, key=_size, default=None))

    def lend_largest(self) -> Block | None:
        """The largest free block: for results, whose size nobody knows yet."""
        return self._lent(max((block for block in self._blocks.values() if block.is_free), key=_size, default=None))

    def adopt(self, fd: int, size: int) -> Block | None:
        """Take new memory into use and lend it, instead of the largest free block that was too small.

        Returns:
            None, and the memory is given back, when the worker has gone.
        """
        if self._is_closed:
            os.close(fd)
            return None
        outgrown = [block for block in self._blocks.values() if block.is_free and block.size < size]
        if outgrown:
            self._give_back(max(outgrown, key=_size))
        self._names += 1
        block = self._blocks[self._names] = Block(self._names, fd, size)
        self._announce(("block", block.name, size), [fd])
        return block

    def returned(self, held: Sequence[int], need: int, results: int) -> None:
        """The worker has answered.

        Args:
            held: The names of those that its user code still looks into.
            need: Bytes that the largest of the batch and its results took.
            results: The name of the one that the results are in; 0: none.
        """
        for block in self._blocks.values():
            if not block.copying:
                block.is_free = block.name not in held and block.name != results
        self._largest_need = max(self._largest_need, need)
        self._replies += 1
        if self._replies % _TRIM_AFTER == 0:
            enough = _FAR_TOO_LARGE * _shm.size_for(self._largest_need)
            for block in [block for block in self._blocks.values() if block.is_free and block.size > enough]:
                self._give_back(block)
            self._largest_need = 0

    def copied(self, block: Block, *, is_free: bool) -> None:
        """The helper thread is done with it."""
        block.copying = False
        block.is_free = is_free
        if self._is_closed:
            os.close(block.fd)

    def close(self) -> None:
        """The worker has gone. What a helper thread copies from stays until it is done."""
        if not self._is_closed:
            self._is_closed = True
            for block in self._blocks.values():
                if not block.copying:
                    os.close(block.fd)
            self._blocks.clear()

    def _lent(self, block: Block | None) -> Block | None:
        if block is not None:
            block.is_free = False
        return block

    def _give_back(self, block: Block) -> None:
        del self._blocks[block.name]
        os.close(block.fd)
        self._announce(("drop", block.name), [])


def _size(block: Block) -> int:
    return block.size
