"""A worker process of a `WorkerPool`, from its first moment to its last.

::

    start --> handles signals; ends with its parent --> INIT --> path, initializer --> READY
                                                                 it raised --> INIT_FAILED
    RUN        --> run_batch: loads and sets up the function, the first time --> BEGUN
                              what a generator yields --> RESULT ...           --> REPLY
                   but it does not begin if it was abandoned during the set-up
    RUN_AHEAD  --> the same, if the parent has not taken the batch back meanwhile, and the batch
                   before it has not raised `Later`
    TEAR_DOWN  --> the function is dropped, after its tear-down --> REPLY
    ADD_BLOCK, FREE_BLOCK, TRACKER    at any time; see `protocol.MessageKind`
    STOP, or the end of the channel --> exit handlers, end

Rules:

- One private channel, on which parent and worker take turns; nothing is shared with other workers.
- A worker ends when its parent does, even if the parent was killed or C code here holds the GIL: on
  Linux the kernel sends SIGKILL when the parent's end of the life pipe closes.
- The user's main module is never run here.
- It imports neither asyncio nor anything that it does not use.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import time
from typing import TYPE_CHECKING

from async_batcher._serialization.by_value import REGISTRY
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.exception_text import one_line
from async_batcher._serialization.remote_exception import encode_exception
from async_batcher._transport import framing, protocol, shared_memory
from async_batcher._transport.protocol import MessageKind, ReplyKind, decode_batch, encode_reply
from async_batcher._transport.shared_memory import SHM_THRESHOLD
from async_batcher._transport.status_page import StatusPage
from async_batcher._transport.token_pipe import TokenReader
from async_batcher._transport.worker_channel import WorkerChannel
from async_batcher._worker import bootstrap, calls, signals  # noqa: F401 - before a fork server forks
from async_batcher._worker.function_cache import drop_function
from async_batcher._worker.identity import set_worker_number, set_worker_title
from async_batcher._worker.run_batch import run_batch
from async_batcher.failures import Later

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_batcher._worker.function_cache import LoadedFunction


# Of each batch, so plain ints: Python compares those without a call.
_RUN, _RUN_AHEAD = int(MessageKind.RUN), int(MessageKind.RUN_AHEAD)
_REPLY, _DONE = int(MessageKind.REPLY), int(ReplyKind.DONE)

_OF_DESCRIPTORS = (MessageKind.ADD_BLOCK, MessageKind.FREE_BLOCK, MessageKind.TRACKER)


def worker_main(channel: int, status: int, life: int, tokens: int) -> None:
    """Be a worker until the end; does not return.

    Args:
        channel: The descriptor of a stream socket to the parent.
        status: The descriptor of the status page.
        life: The descriptor of the read end of a pipe whose other end only the parent holds.
        tokens: The descriptor for a `TokenReader`.
    """
    code = protocol.EXIT_INTERNAL_ERROR
    page = None
    try:
        page = StatusPage(status)
        page.mark_running()
        for descriptor in (channel, life, tokens):  # not for processes that user code runs
            os.set_inheritable(descriptor, False)  # noqa: FBT003 - its only argument
        REGISTRY.keeps_modules = False  # a forked main module takes the globals that are sent
        bootstrap.reset_signals()
        bootstrap.exit_with_parent(life)
        bootstrap.raise_malloc_threshold()
        bootstrap.close_stdin()
        parent = WorkerChannel(channel)
        try:
            code = WorkerLoop(parent, page, tokens, life).serve()
        except BaseException:
            parent.close()  # so that the parent does not wait for exit handlers
            raise
    except (EOFError, ConnectionError):
        code = 0  # the parent has exited, or has closed the channel
    except BaseException as exc:  # noqa: BLE001 - must not return into what forked it
        if page is not None:
            page.failure = one_line(exc)
        import traceback

        traceback.print_exc()
    finally:
        bootstrap.exit_process(code)


class _NoBlockError(OSError):
    """A batch's block of shared memory is not there: no descriptors or no memory were left."""


class WorkerLoop:
    """Does what the parent's messages say; also the observer of `run_batch`."""

    def __init__(self, channel: WorkerChannel, status: StatusPage, tokens: int, life: int) -> None:
        self._channel = channel
        self._status = status
        self._life = life
        self._blocks: dict[int, shared_memory.SharedBlock] = {}
        self._pid = os.getpid()
        self._peak_rss = bootstrap.peak_rss_reader()
        self._tokens = TokenReader(tokens)
        self._seq = 0  # of the batch
        self._has_loaded = False  # its function was loaded for it, which the parent must learn
        self._declines = False  # what was sent ahead: the batch before it has raised `Later`
        signals.handle_interrupt(lambda: status.claim_interrupt(self._seq))

    def on_load(self) -> None:
        self._status.mark_setting_up(self._seq)
        self._has_loaded = True

    def on_loaded(self, loaded: LoadedFunction) -> None:
        if loaded.tear_down is not None:
            self._status.tears_down = True
        set_worker_title(loaded.function.function)

    def on_begin(self) -> bool:
        if not self._has_loaded:
            self._status.mark_started(self._seq, time.monotonic())
            return True
        self._has_loaded = False
        self._exit_if_forked(1)
        is_wanted = self._status.abandoned_seq != self._seq
        if is_wanted:
            self._status.mark_started(self._seq, time.monotonic())
        self._channel.send(framing.encode(MessageKind.BEGUN, seq=self._seq))
        return is_wanted

    def on_result(self, reply: protocol.Reply) -> bool:
        if os.getpid() == self._pid:  # else user code has forked; see `_exit_if_forked`
            form, body, buffers = encode_reply(reply)
            # Without a block, which the parent would have to return before the next large result.
            pieces = framing.encode(MessageKind.RESULT, form, self._seq, b"", body, buffers=buffers)
            self._channel.send(pieces)
        return self._status.abandoned_seq != self._seq

    def on_raised(self, error: BaseException) -> None:
        self._declines = isinstance(error, Later)

    def serve(self) -> int:
        """Handle messages until the parent says to stop, and return the exit status."""
        while True:
            message = self._channel.receive()
            if message.kind == _RUN:
                self._run(message)
            elif message.kind == _RUN_AHEAD:
                if self._tokens.take(message.seq):
                    self._run_ahead(message)
            elif message.kind == MessageKind.INIT:
                settings: protocol.WorkerSettings = protocol.loads(message.body)
                set_worker_number(settings["number"])
                set_worker_title()
                failure = bootstrap.initialize(settings, self._life)
                if failure is not None:
                    body = pickle.dumps(failure)
                    self._channel.send(framing.encode(MessageKind.INIT_FAILED, body=body))
                    return 0
                self._channel.send(framing.encode(MessageKind.READY))
            elif message.kind == MessageKind.TEAR_DOWN:
                reply = drop_function(message.key)
                self._exit_if_forked(1)
                self._reply(message.seq, reply)
            elif message.kind == MessageKind.STOP:
                return 0
            else:
                self._handle_descriptors(message)
            del message  # or it would keep its batch until the next one comes

    def _run_ahead(self, message: framing.Message) -> None:
        declines, self._declines = self._declines, False
        if declines:  # what the parent sends next, it sends after it has read the `Later`
            self._reply(message.seq, (ReplyKind.NOT_STARTED,))
        else:
            self._run(message)

    def _reply(self, seq: int, reply: protocol.Reply) -> None:
        form, body, _ = encode_reply(reply)
        self._channel.send(framing.encode(_REPLY, form, seq, body=body))

    def _run(self, message: framing.Message) -> None:
        self._declines = False
        seq = self._seq = message.seq
        self._has_loaded = False
        try:
            buffers = message.buffers
            if message.block_id:
                buffers = self._views_of(message)
            parts = decode_batch(message.form, message.body, buffers)
            reply = run_batch(message.key, *parts, out_of_band=True, observer=self)
            if os.getpid() != self._pid:
                os._exit(0 if reply[0] == _DONE else 1)  # see `_exit_if_forked`, without a call
            form, body, buffers = encode_reply(reply)
            # Their buffers may be views of a block that could otherwise be reused.
            del reply, parts
            if self._peak_rss is not None:
                self._status.peak_rss = self._peak_rss()
            if not buffers and not self._blocks:
                self._channel.send(framing.encode(_REPLY, form, seq, b"", body))
                return
            are_bytes = all(type(buffer.obj) is bytes for buffer in buffers)
            block_id, sizes, inline = self._store_results(buffers, message)
        except (MemoryError, _NoBlockError) as exc:  # not user code's: the worker goes on
            error = OSError(*exc.args) if isinstance(exc, OSError) else exc
            failure = encode_exception(Codec(worker=True), error)
            form, body, inline = encode_reply((ReplyKind.RAISED, failure))
            block_id, are_bytes, sizes = 0, False, ()
        pieces = framing.encode(
            _REPLY, form, seq, b"", body, block_id, 0, sizes, inline, are_bytes=are_bytes
        )
        self._channel.send(pieces)

    def _views_of(self, message: framing.Message) -> list[memoryview]:
        """Return the buffers of a batch, which are in a block."""
        if message.block_id not in self._blocks:
            msg = (
                "the batch could not be received: this worker process has no file descriptors left"
            )
            raise _NoBlockError(errno.EMFILE, msg)
        try:
            return self._blocks[message.block_id].views(message.sizes)
        except OSError as exc:  # it cannot be mapped
            raise _NoBlockError(exc.errno, f"the batch could not be received: {exc}") from exc

    def _exit_if_forked(self, code: int) -> None:
        """End a process that user code forked and that returned: the channel is its parent's."""
        if os.getpid() != self._pid:
            os._exit(code)

    def _store_results(
        self, results: list[memoryview], message: framing.Message
    ) -> tuple[int, Sequence[int], Sequence[bytes | memoryview]]:
        """Put large results where the parent reads them, and report the blocks that are in use.

        Args:
            results: The large buffers; emptied here.
            message: The batch.

        Returns:
            The id of the block that they are in, their sizes, and what goes in the message.
        """
        sizes = [len(result) for result in results]
        inline: Sequence[bytes | memoryview] = []
        given, target = message.block_id, message.result_block_id
        if given and self._blocks[given].contains(results, message.sizes):
            block_id = given  # user code has changed its batch in place
        else:
            block_id, inline = self._store_in_block(results, target)
        results.clear()  # before the blocks are looked at: they may be views of one
        in_use = [name for name, block in self._blocks.items() if not block.has_no_views()]
        if block_id in in_use:  # user code holds the results and may change them during the read
            block_id, inline = self._store_in_block(self._blocks[block_id].views(sizes), target)
        if in_use:
            self._channel.send(framing.encode(MessageKind.BLOCKS_IN_USE, body=pickle.dumps(in_use)))
        return block_id, sizes if block_id else (), inline

    def _store_in_block(self, results: list[memoryview], target: int) -> tuple[int, list[bytes]]:
        """Copy large results into a block.

        Returns:
            Its id and nothing; or 0 and what goes in the message.
        """
        need = shared_memory.bytes_needed(map(len, results))
        if need >= SHM_THRESHOLD:
            if target not in self._blocks or self._blocks[target].size < need:
                target = self._request_block(need)
            if target:
                with contextlib.suppress(OSError):  # the system cannot back it after all
                    self._blocks[target].write(results)
                    return target, []
        return 0, [bytes(result) for result in results]

    def _request_block(self, need: int) -> int:
        """Return the id of a block for results, or 0 if the parent has none."""
        self._channel.send(framing.encode(MessageKind.NEED_BLOCK, sizes=(need,)))
        others: list[framing.Message] = []
        while (message := self._channel.receive()).kind != MessageKind.NEED_BLOCK:
            if message.kind in _OF_DESCRIPTORS:
                self._handle_descriptors(message)
            else:
                others.append(message)
        self._channel.give_back(others)
        return message.block_id if message.block_id in self._blocks else 0

    def _handle_descriptors(self, message: framing.Message) -> None:
        """Handle a message about blocks or the tracker."""
        descriptors = self._channel.descriptors
        if message.kind == MessageKind.ADD_BLOCK:
            if descriptors:
                block = shared_memory.SharedBlock(descriptors.popleft(), message.sizes[0])
                self._blocks[message.block_id] = block
            else:  # user code has used up all that a process may have
                block_id = message.block_id
                self._channel.send(framing.encode(MessageKind.FREE_BLOCK, block_id=block_id))
        elif message.kind == MessageKind.FREE_BLOCK:
            if message.block_id in self._blocks:
                self._blocks.pop(message.block_id).close()
        elif message.kind == MessageKind.TRACKER and descriptors:
            bootstrap.join_tracker(descriptors.popleft())
