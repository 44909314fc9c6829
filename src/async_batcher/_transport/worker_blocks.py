"""The shared memory of one worker, as the parent sees it, and the copies to and from it.

::

    stage --too small for a block---------------------------> they go in the message
          --a block is free: written here, or in a helper---> the message names the block
          --none is free: made in a helper------------------> the same; no memory: in the message
    copy_out <--the results' block: read here, or in a helper-- the reply

    free --lease----> leased, for a batch or for results --reply--> free, or in use by user code
      ^                                                |
      `------------------ results copied out ----------'

Rules:

- A block belongs to one worker. Its descriptor is sent to the worker before the block's first use.
- Blocks are sized by need and reused. A larger one replaces one that was too small, and one that is
  far too large is freed after a while. In the steady state none is made.
- The loop's thread makes no long copy and no memory. A block that a helper copies to or from is
  neither leased nor freed until that is done.
- A discarded block is closed at once; one that a helper copies, with the last reference to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.offload import run_in_helper
from async_batcher._transport import framing, shared_memory
from async_batcher._transport.protocol import MessageKind, loads
from async_batcher._transport.shared_memory import SHM_THRESHOLD, SharedBlock

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from async_batcher._eventloop.guarded_loop import GuardedLoop

# Bytes copied on the loop's thread: about a tenth of a millisecond, like a trip to a helper thread.
MAX_INLINE_COPY = 1 << 20

_TRIM_INTERVAL = 64  # replies between two looks at what is needed
_TRIM_FACTOR = 4  # times as large as what was needed since the last look: freed


class WorkerBlocks:
    """The blocks of one worker.

    Args:
        loop: The event loop.
        send: Sends the worker a message, and a descriptor with it.
        helpers: Threads for long copies.
        on_shm_exhausted: Called if shared memory could not be had.

    Attributes:
        blocks: The blocks by their ids, which are not 0.
    """

    def __init__(
        self,
        loop: GuardedLoop,
        send: Callable[[Sequence[bytes | memoryview], Sequence[int]], None],
        helpers: Executor,
        on_shm_exhausted: Callable[[OSError], None],
    ) -> None:
        self._loop = loop
        self._send = send
        self._helpers = helpers
        self._on_shm_exhausted = on_shm_exhausted
        self.blocks: dict[int, SharedBlock] = {}
        # Those that user code still views, as the worker says before a reply.
        self._in_use: Sequence[int] = ()
        self._leased: set[int] = set()  # the others are free
        self._waiting: set[int] = set()  # leased for a batch that waits at the worker
        self._copied: set[int] = set()  # leased until a helper has copied to or from them
        self._last_id = 0
        self._replies = 0
        self._largest_need = 0  # bytes, since the last trim
        self._is_closed = False

    def stage(self, buffers: Sequence[Any], send: Callable[[int], None]) -> int | None:
        """Put the large buffers of a batch where they will travel.

        Args:
            buffers: The large buffers.
            send: Called with the id of their block, if a helper copies them first.

        Returns:
            That id, 0: they go in the message; None if a helper copies them.
        """
        need = shared_memory.bytes_needed(map(len, buffers))
        self._largest_need = max(self._largest_need, need)
        if need < SHM_THRESHOLD:
            return 0
        block_id = self._lease(need)
        known = self.blocks.get(block_id)
        if known is not None and need <= MAX_INLINE_COPY:
            try:
                known.write(buffers)
            except OSError as exc:  # it has not been mapped yet, and cannot be
                self._leased.discard(block_id)
                self._report(exc)
                block_id = 0
            return block_id
        self._copied.add(block_id)

        def copy() -> SharedBlock:
            block = _new_block(need) if known is None else known
            block.write(buffers)
            return block

        def on_copied(done: asyncio.Future[SharedBlock]) -> None:
            self._copied.discard(block_id)
            if done.exception() is not None:
                self._leased.discard(block_id)
                self._report(done.exception())
                send(0)
            else:
                send(block_id or self._add(done.result()))

        run_in_helper(self._loop, self._helpers, copy).add_done_callback(
            self._loop.guard(on_copied)
        )
        return None

    def lease_largest(self) -> int:
        """Lease the largest free block, for results, whose size is not known yet; 0: none."""
        block_id = max(self._free(), key=self._size, default=0)
        self._leased.add(block_id)
        return block_id

    def keep_for_waiting(self, *block_ids: int) -> None:
        """Keep leased blocks through the next reply, since the batch waits for that."""
        self._waiting.update(block_ids)

    def free_waiting(self) -> None:
        """Free the blocks of a batch that was taken back."""
        self._leased -= self._waiting
        self._waiting.clear()

    def discard(self, block_id: int) -> None:
        """Discard a block that the worker lacks, or that of a batch which was taken back.

        Kept free, there would be one for each such batch until the worker replies.
        """
        self._leased.discard(block_id)
        if block_id in self.blocks:
            self._discard(block_id)

    def on_message(self, message: framing.Message) -> None:
        """Do what the worker says of its blocks."""
        if message.kind == MessageKind.NEED_BLOCK:
            self._grant(message.sizes[0])
        elif message.kind == MessageKind.FREE_BLOCK:
            self.discard(message.block_id)
        elif message.kind == MessageKind.BLOCKS_IN_USE:
            self._in_use = loads(message.body)

    def _grant(self, need: int) -> None:
        """Lease the worker a block of ``need`` bytes for its results, as it has asked."""
        block_id = self._lease(need)
        if block_id:
            self._send_granted(block_id)
            return

        def on_made(done: asyncio.Future[SharedBlock]) -> None:
            self._report(done.exception())
            self._send_granted(self._add(done.result()) if done.exception() is None else 0)

        made = run_in_helper(self._loop, self._helpers, lambda: _new_block(need))
        made.add_done_callback(self._loop.guard(on_made))

    def on_reply(self, message: framing.Message) -> None:
        """Free the blocks that are not in use and do not hold the results.

        The worker goes on with the batch that waited, if there is one.
        """
        self._leased = {*self._in_use, message.block_id, *self._copied, *self._waiting}
        self._waiting.clear()
        self._in_use = ()
        results = shared_memory.bytes_needed(message.sizes)
        self._largest_need = max(self._largest_need, results)
        self._replies += 1
        if self._replies % _TRIM_INTERVAL == 0:
            enough = _TRIM_FACTOR * shared_memory.block_size(self._largest_need)
            for block_id in self._free():
                if self._size(block_id) > enough:
                    self._discard(block_id)
            self._largest_need = 0

    def copy_out(
        self,
        message: framing.Message,
        on_copied: Callable[[framing.Message], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        """Copy the results of a reply out of their block.

        Args:
            message: The reply.
            on_copied: Called then, at once or later, with the reply and its buffers.
            on_error: Called with the error in its place.
        """
        block_id = message.block_id
        block = self.blocks[block_id]

        def read() -> list[Any]:
            return block.read(message.sizes, as_bytes=message.are_bytes)

        def on_read(buffers: list[Any] | BaseException) -> None:
            self._copied.discard(block_id)
            self._leased.discard(block_id)  # first: a caller that gets a result may go on at once
            if isinstance(buffers, BaseException):
                on_error(buffers)
            else:
                on_copied(message._replace(buffers=buffers))

        if sum(message.sizes) > MAX_INLINE_COPY:
            self._copied.add(block_id)  # the worker may go on with another block meanwhile
            copied = run_in_helper(self._loop, self._helpers, read)
            copied.add_done_callback(
                self._loop.guard(lambda done: on_read(done.exception() or done.result()))
            )
            return
        try:
            buffers = read()
        except BaseException as exc:  # noqa: BLE001 - memory, most likely; callers must learn of it
            on_read(exc)
        else:
            on_read(buffers)

    def close(self) -> None:
        self._is_closed = True
        for block_id in self.blocks.keys() - self._copied:
            self.blocks[block_id].close()
        self.blocks.clear()

    def _free(self) -> set[int]:
        return self.blocks.keys() - self._leased

    def _size(self, block_id: int) -> int:
        return self.blocks[block_id].size

    def _lease(self, need: int) -> int:
        """Lease the smallest free block of at least ``need`` bytes; 0: there is none."""
        fitting = [block_id for block_id in self._free() if self._size(block_id) >= need]
        block_id = min(fitting, key=self._size, default=0)
        self._leased.add(block_id)
        return block_id

    def _add(self, block: SharedBlock) -> int:
        """Lease new memory, in place of the largest free block that was too small.

        Returns:
            Its id; 0, and the memory is freed, if the worker has exited.
        """
        if self._is_closed:
            return 0
        outgrown = [block_id for block_id in self._free() if self._size(block_id) < block.size]
        if outgrown:
            self._discard(max(outgrown, key=self._size))
        self._last_id += 1
        block_id = self._last_id
        self.blocks[block_id] = block
        self._leased.add(block_id)
        message = framing.encode(MessageKind.ADD_BLOCK, block_id=block_id, sizes=(block.size,))
        try:
            self._send(message, [block.fd])
        except OSError as exc:  # no descriptors are left
            self._leased.discard(block_id)
            self.blocks.pop(block_id).close()
            self._report(exc)
            return 0
        return block_id

    def _discard(self, block_id: int) -> None:
        self._send(framing.encode(MessageKind.FREE_BLOCK, block_id=block_id), [])
        block = self.blocks.pop(block_id)
        if block_id not in self._copied:  # else a helper uses it, which may have the last reference
            block.close()

    def _report(self, error: BaseException | None) -> None:
        if isinstance(error, OSError):
            self._on_shm_exhausted(error)

    def _send_granted(self, block_id: int) -> None:
        self._send(framing.encode(MessageKind.NEED_BLOCK, block_id=block_id), [])


def _new_block(need: int) -> SharedBlock:
    """Make a block for ``need`` bytes, and some to spare.

    Raises:
        OSError: There is not enough memory.
    """
    size = shared_memory.block_size(need)
    return SharedBlock(shared_memory.create_anonymous(size), size)
