"""How the large buffers of a batch and of its results get to one worker and back: in the message, or in shared memory.

::

    load --too small for a block--------------------------> depart: they go in the message
         --a block is free: written here, or in a helper--> depart: the message names the block
         --none is: made in a helper----------------------> the same; no memory to be had: in the message
    unload <--the results' block: read here, or in a helper thread-- the reply

Rules:

- Nothing long is copied, and no memory is made, on the loop's thread.
- A block that a helper copies to or from is not lent, and not given back, until that is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.offload import run_in_helper
from async_batcher._transport import framing, shared_memory
from async_batcher._transport.block_pool import BlockPool
from async_batcher._transport.shared_memory import SHM_THRESHOLD

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from async_batcher._transport.block_pool import BlockLease
    from async_batcher._transport.channel import Channel
    from async_batcher._transport.shared_memory import SharedBlock

# Bytes that are copied on the loop's thread: about a tenth of a millisecond's work, as long as a trip to a helper thread takes.
MAX_INLINE_COPY = 1 << 20


class BlockStager:
    """The large buffers on their way to one worker and back.

    Args:
        loop: The loop that all happens on.
        channel: To the worker.
        helpers: Threads for what would hold the loop up.
        on_no_room: Called when there was no shared memory to be had.

    Attributes:
        blocks: The shared memory that is lent to the worker.
        in_use: The blocks that its user code still looked into when it was done.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, channel: Channel, helpers: Executor, on_no_room: Callable[[OSError], None]
    ) -> None:
        self.blocks = BlockPool(channel.send)
        self.in_use: Sequence[int] = ()
        self._loop = loop
        self._channel = channel
        self._helpers = helpers
        self._on_no_room = on_no_room
        self._need = 0  # bytes of the batch that is on its way

    def stage(self, bulk: Sequence[Any], depart: Callable[[BlockLease | None], None], is_awaited: Callable[[], bool]) -> None:
        """Put the buffers of a batch where they will travel.

        Args:
            bulk: They.
            depart: Called then, at once or later, with the block that they are in; None: they go in the message.
            is_awaited: Whether the worker still waits for the batch; if not, ``depart`` is not called later.
        """
        self._need = shared_memory.bytes_needed(map(len, bulk))
        if self._need < SHM_THRESHOLD:
            depart(None)
            return
        lent = self.blocks.acquire(self._need)
        if self._need <= MAX_INLINE_COPY and lent is not None:
            lent.block.write(bulk)
            depart(lent)
        else:
            self._stage_in_helper(bulk, lent, depart, is_awaited)

    def _stage_in_helper(
        self,
        bulk: Sequence[Any],
        lent: BlockLease | None,
        depart: Callable[[BlockLease | None], None],
        is_awaited: Callable[[], bool],
    ) -> None:
        need = self._need
        if lent is not None:
            lent.copying = True

        def copy() -> SharedBlock | OSError:
            block = None
            try:
                block = lent.block if lent is not None else _new_block(need)
                block.write(bulk)
            except OSError as exc:
                if lent is None and block is not None:
                    block.close()
                return exc
            return block

        def copied(done: asyncio.Future[SharedBlock | OSError]) -> None:
            block, taken = done.result(), lent
            if taken is not None:
                self.blocks.copy_done(taken, is_free=isinstance(block, OSError))
            elif not isinstance(block, OSError):
                taken = self.blocks.add(block)
            if not is_awaited():
                return
            if isinstance(block, OSError):
                self._on_no_room(block)
                taken = None
            depart(taken)

        run_in_helper(self._loop, self._helpers, copy).add_done_callback(copied)

    def returned(self, message: framing.Message) -> None:
        """The worker has answered: what it does not hold, nor has put its results in, may be lent again."""
        need, self._need = max(self._need, shared_memory.bytes_needed(message.sizes)), 0
        held, self.in_use = self.in_use, ()
        self.blocks.release_unused(held, need, message.source)

    def copy_out(
        self, message: framing.Message, take: Callable[[framing.Message], None], fail: Callable[[BaseException], None]
    ) -> None:
        """Copy the results of a reply out of their block.

        Args:
            message: The reply.
            take: Called then, at once or later, with the reply and its results.
            fail: Called with what went wrong instead.
        """
        lent = self.blocks.all[message.source]
        if sum(message.sizes) > MAX_INLINE_COPY:
            self._copy_out_in_helper(message, lent, take, fail)
            return
        try:
            bulk = lent.block.read(message.sizes, as_bytes=message.target)
        except BaseException as exc:  # noqa: BLE001 - memory, most likely; nobody is to wait for ever because of it
            lent.is_free = True
            fail(exc)
        else:
            lent.is_free = True  # first: who gets the results may go on at once
            take(message._replace(bulk=bulk))

    def _copy_out_in_helper(
        self,
        message: framing.Message,
        lent: BlockLease,
        take: Callable[[framing.Message], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """The same in a helper thread; the worker may go on with another block meanwhile."""
        lent.copying = True

        def copied(done: asyncio.Future[Any]) -> None:
            self.blocks.copy_done(lent, is_free=True)
            error = done.exception()
            if error is not None:
                fail(error)
            else:
                take(message._replace(bulk=done.result()))

        def read() -> Any:
            return lent.block.read(message.sizes, as_bytes=message.target)

        run_in_helper(self._loop, self._helpers, read).add_done_callback(copied)

    def grant(self, need: int) -> None:
        """The worker asks for a block for its results."""
        fitting = self.blocks.acquire(need)
        if fitting is not None:
            self._channel.send(framing.encode(framing.NEED_BLOCK, number=fitting.name))
            return

        def made(done: asyncio.Future[SharedBlock]) -> None:
            try:
                block = done.result()
            except OSError as exc:
                self._on_no_room(exc)
                self._channel.send(framing.encode(framing.NEED_BLOCK, number=0))
                return
            lent = self.blocks.add(block)
            if lent is not None:
                self._channel.send(framing.encode(framing.NEED_BLOCK, number=lent.name))

        run_in_helper(self._loop, self._helpers, lambda: _new_block(need)).add_done_callback(made)


def _new_block(need: int) -> SharedBlock:
    """A block of shared memory for that many bytes, and some to spare.

    Raises:
        OSError: There is not so much.
    """
    size = shared_memory.block_size(need)
    return shared_memory.SharedBlock(shared_memory.create_anonymous(size), size)
