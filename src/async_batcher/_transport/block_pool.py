"""The blocks of shared memory that one worker may use, as the parent sees them.

::

    free --acquire--> leased, for a batch or for results --reply--> free, or in use by user code
      ^                                                |
      `------------------ results copied out ----------'

Rules:

- A block belongs to one worker and is closed with it. Its descriptor is sent to the worker before
  the block's first use.
- Blocks are sized by need and reused. A larger one replaces one that was too small, and one that is
  far too large is freed after a while. In the steady state none is made.
- A block that is in use, or that a helper thread copies to or from, is not leased.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_batcher._transport import framing, shared_memory
from async_batcher._transport.protocol import MessageKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from async_batcher._transport.shared_memory import SharedBlock

_TRIM_INTERVAL = 64  # replies between two looks at what is needed
_TRIM_FACTOR = 4  # times as large as what was needed since the last look: freed


class BlockLease:
    """A block that is, or may be, leased.

    Attributes:
        is_free: Whether it may be leased.
        copying: Whether a helper thread copies to or from it.
    """

    __slots__ = ("block", "block_id", "copying", "is_free")

    def __init__(self, block_id: int, block: SharedBlock) -> None:
        self.block_id = block_id
        self.block = block
        self.is_free = False
        self.copying = False


class BlockPool:
    """The blocks of one worker.

    Args:
        send: Sends the worker a message about a block, with its descriptor if it is new.

    Attributes:
        leases: The blocks by their ids.
    """

    def __init__(self, send: Callable[[Sequence[bytes | memoryview], Sequence[int]], None]) -> None:
        self._send = send
        self.leases: dict[int, BlockLease] = {}
        self._last_id = 0
        self._replies = 0
        self._largest_need = 0  # bytes, since the last trim
        self._is_closed = False

    def acquire(self, need: int) -> BlockLease | None:
        """Lease the smallest free block of at least ``need`` bytes."""
        leases = self.leases.values()
        fitting = [lease for lease in leases if lease.is_free and lease.block.size >= need]
        return _leased(min(fitting, key=_size, default=None))

    def acquire_largest(self) -> BlockLease | None:
        """Lease the largest free block, for results, whose size is not known yet."""
        free = [lease for lease in self.leases.values() if lease.is_free]
        return _leased(max(free, key=_size, default=None))

    def add(self, block: SharedBlock) -> BlockLease | None:
        """Lease new memory, in place of the largest free block that was too small.

        Returns:
            None, and the memory is freed, if the worker has exited.
        """
        if self._is_closed:
            block.close()
            return None
        outgrown = [lease for lease in self._free() if lease.block.size < block.size]
        if outgrown:
            self._discard(max(outgrown, key=_size))
        self._last_id += 1
        lease = self.leases[self._last_id] = BlockLease(self._last_id, block)
        message = framing.encode(
            MessageKind.ADD_BLOCK, block_id=lease.block_id, sizes=(block.size,)
        )
        self._send(message, [block.fd])
        return lease

    def release_unused(self, in_use: Sequence[int], need: int, result_block_id: int) -> None:
        """Free what a worker that has replied does not need.

        Args:
            in_use: The ids of the blocks that its user code still views.
            need: Bytes that the larger of the batch and its results took.
            result_block_id: The block that holds the results; 0: none.
        """
        for lease in self.leases.values():
            if not lease.copying:
                lease.is_free = lease.block_id not in in_use and lease.block_id != result_block_id
        self._largest_need = max(self._largest_need, need)
        self._replies += 1
        if self._replies % _TRIM_INTERVAL == 0:
            enough = _TRIM_FACTOR * shared_memory.block_size(self._largest_need)
            for lease in self._free():
                if lease.block.size > enough:
                    self._discard(lease)
            self._largest_need = 0

    def copy_done(self, lease: BlockLease, *, is_free: bool) -> None:
        """Note that the helper thread has finished."""
        lease.copying = False
        lease.is_free = is_free
        if self._is_closed:
            lease.block.close()

    def close(self) -> None:
        """Close the blocks, each when no helper thread copies to or from it."""
        self._is_closed = True
        for lease in self.leases.values():
            if not lease.copying:
                lease.block.close()
        self.leases.clear()

    def _free(self) -> list[BlockLease]:
        return [lease for lease in self.leases.values() if lease.is_free]

    def _discard(self, lease: BlockLease) -> None:
        del self.leases[lease.block_id]
        lease.block.close()
        self._send(framing.encode(MessageKind.FREE_BLOCK, block_id=lease.block_id), [])


def _leased(lease: BlockLease | None) -> BlockLease | None:
    if lease is not None:
        lease.is_free = False
    return lease


def _size(lease: BlockLease) -> int:
    return lease.block.size
