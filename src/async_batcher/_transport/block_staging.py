"""How large buffers get to one worker and back: in the message, or in shared memory.

::

    stage --too small for a block-----------------------------> send: they go in the message
          --a block is free: written here, or in a helper-----> send: the message names the block
          --none is free: made in a helper--------------------> the same; no memory: in the message
    copy_out <--the results' block: read here, or in a helper-- the reply

Rules:

- The loop's thread makes no long copy and no memory.
- A block that a helper copies to or from is neither leased nor freed until that is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._eventloop.offload import run_in_helper
from async_batcher._transport import framing, shared_memory
from async_batcher._transport.block_pool import BlockPool
from async_batcher._transport.protocol import MessageKind
from async_batcher._transport.shared_memory import SHM_THRESHOLD

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from async_batcher._transport.block_pool import BlockLease
    from async_batcher._transport.channel import Channel
    from async_batcher._transport.shared_memory import SharedBlock

# Bytes copied on the loop's thread: about a tenth of a millisecond, like a trip to a helper thread.
MAX_INLINE_COPY = 1 << 20


class BlockStager:
    """The large buffers on their way to one worker and back.

    Args:
        loop: The event loop.
        channel: To the worker.
        helpers: Threads for long copies.
        on_shm_exhausted: Called if shared memory could not be had.

    Attributes:
        blocks: The shared memory of the worker.
        in_use: The blocks that its user code still views, as it says before a reply.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        channel: Channel,
        helpers: Executor,
        on_shm_exhausted: Callable[[OSError], None],
    ) -> None:
        self.blocks = BlockPool(channel.send)
        self.in_use: Sequence[int] = ()
        self._loop = loop
        self._channel = channel
        self._helpers = helpers
        self._on_shm_exhausted = on_shm_exhausted
        self._need = 0  # bytes of the batch that is on its way

    def stage(
        self,
        buffers: Sequence[Any],
        send: Callable[[BlockLease | None], None],
        is_awaited: Callable[[], bool],
    ) -> None:
        """Put the buffers of a batch where they will travel.

        Args:
            buffers: The large buffers.
            send: Called then, at once or later, with their block; None: they go in the message.
            is_awaited: Whether the worker still waits for the batch. If not, ``send`` is not called
                later.
        """
        need = self._need = shared_memory.bytes_needed(map(len, buffers))
        if need < SHM_THRESHOLD:
            send(None)
            return
        lease = self.blocks.acquire(need)
        if lease is not None:
            if need <= MAX_INLINE_COPY:
                lease.block.write(buffers)
                send(lease)
                return
            lease.copying = True

        def copy() -> SharedBlock:
            block = lease.block if lease is not None else _new_block(need)
            try:
                block.write(buffers)
            except BaseException:
                if lease is None:
                    block.close()
                raise
            return block

        def on_copied(done: asyncio.Future[SharedBlock]) -> None:
            error, staged = done.exception(), lease
            if lease is not None:
                self.blocks.copy_done(lease, is_free=error is not None)
            elif error is None:
                staged = self.blocks.add(done.result())
            if not is_awaited():
                return
            if isinstance(error, OSError):
                self._on_shm_exhausted(error)
            send(staged if error is None else None)

        run_in_helper(self._loop, self._helpers, copy).add_done_callback(on_copied)

    def on_reply(self, message: framing.Message) -> None:
        """Free the blocks that are not in use and do not hold the results."""
        need = max(self._need, shared_memory.bytes_needed(message.sizes))
        in_use = self.in_use
        self._need, self.in_use = 0, ()
        self.blocks.release_unused(in_use, need, message.block_id)

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
        lease = self.blocks.leases[message.block_id]

        def read() -> list[Any]:
            return lease.block.read(message.sizes, as_bytes=message.result_block_id)

        def on_done(done: asyncio.Future[list[Any]]) -> None:
            self.blocks.copy_done(lease, is_free=True)
            error = done.exception()
            if error is not None:
                on_error(error)
            else:
                on_copied(message._replace(buffers=done.result()))

        if sum(message.sizes) > MAX_INLINE_COPY:
            lease.copying = True  # the worker may go on with another block meanwhile
            run_in_helper(self._loop, self._helpers, read).add_done_callback(on_done)
            return
        try:
            buffers = read()
        except BaseException as exc:  # noqa: BLE001 - memory, most likely; callers must learn of it
            lease.is_free = True
            on_error(exc)
        else:
            lease.is_free = True  # first: a caller that gets a result may go on at once
            on_copied(message._replace(buffers=buffers))

    def grant(self, need: int) -> None:
        """Lease the worker a block of ``need`` bytes for its results, as it has asked."""
        fitting = self.blocks.acquire(need)
        if fitting is not None:
            self._send_granted(fitting.block_id)
            return

        def on_made(done: asyncio.Future[SharedBlock]) -> None:
            try:
                block = done.result()
            except OSError as exc:
                self._on_shm_exhausted(exc)
                self._send_granted(0)
                return
            lease = self.blocks.add(block)
            if lease is not None:
                self._send_granted(lease.block_id)

        run_in_helper(self._loop, self._helpers, lambda: _new_block(need)).add_done_callback(
            on_made
        )

    def _send_granted(self, block_id: int) -> None:
        self._channel.send(framing.encode(MessageKind.NEED_BLOCK, block_id=block_id))


def _new_block(need: int) -> SharedBlock:
    """Make a block for ``need`` bytes, and some to spare.

    Raises:
        OSError: There is not enough memory.
    """
    size = shared_memory.block_size(need)
    return shared_memory.SharedBlock(shared_memory.create_anonymous(size), size)
