"""A run of ``async-batcher map``: items of an input, through batches, to results in an output.

::

    items --_unfinished, in a thread--> AsyncBatcher.map --> batches --> workers: ItemProcessor
                 |                                                             |
                 |-- _origins: where each item came from --.                results
                                                           v                   |
    output <--_write-- groups: all results that are ready at once <--_groups---'

Rules:

- The parent moves bytes: workers decode items and encode results.
- A group of results is written at once, and committed with it that its items are finished.
- The first failure ends the run, unless failures are isolated and the item has caused it.
- The first Ctrl-C, or SIGTERM, ends the run by force. What is finished stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

from async_batcher.cli._errors import CommandError, one_line, silenced_logger
from async_batcher.cli._item_processor import ItemFailure, decode, encode
from async_batcher.cli._items import close_generator, item_label
from async_batcher.cli._signals import run_interruptible
from async_batcher.cli._terminal import ProgressReporter
from async_batcher.cli.map.output import FinishedItem, ResumableOutput
from async_batcher.exceptions import (
    BatcherStoppedError,
    PoolBrokenError,
    SerializationError,
    WorkerDiedError,
)

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import AsyncGenerator, Iterator

    from async_batcher import AsyncBatcher
    from async_batcher.cli._signals import Interruptible
    from async_batcher.cli.map.fingerprint import InputFingerprint
    from async_batcher.cli.map.output import StreamOutput


class MapRun:
    """A run over ``items``, with their line numbers; ``found`` is the fingerprint of the input."""

    def __init__(
        self,
        batcher: AsyncBatcher[bytes, Any],
        items: Iterator[tuple[int, bytes]],
        output: ResumableOutput | StreamOutput,
        options: Namespace,
        found: InputFingerprint | None,
    ) -> None:
        self._batcher = batcher
        self._items = items
        self._output = output
        self._progress = output.progress
        self._options = options
        self._found = found
        self._total = None if found is None else found.items
        # Number and line of the items that were read and not written, by their bytes. Equal items
        # are interchangeable. A thread adds to it.
        self._origins: defaultdict[bytes, deque[tuple[int, int]]] = defaultdict(deque)
        self._origins_lock = threading.Lock()
        self._reporter = ProgressReporter(
            self._total,
            done=self._progress.done,
            failed=self._progress.failed,
            unit="items",
            is_shown=not output.is_terminal,
            stays=True,
        )

    def run(self, ignored: frozenset[int]) -> int:
        """Run to the end, with signals that stay ignored.

        Returns:
            The exit status: 1 if items have failed.

        Raises:
            CommandError: The run has failed, or a signal has ended it.
            BrokenPipeError: The reader of the output has closed it.
        """
        progress, options = self._progress, self._options
        with contextlib.closing(self._reporter), silenced_logger():
            if progress.done != self._total:
                run_interruptible(
                    self._run, loop=options.loop, ignored=ignored, hint=self._resume_hint
                )
        if self._found is not None and (progress.done != self._total or self._found.has_changed()):
            msg = f"the input has changed since the run began{self._resume_hint()}"
            raise CommandError(msg, status=1)
        self._output.finish()
        if progress.failed:
            where = "" if options.errors is None else f"; see {options.errors}"
            counts = f"{progress.failed:,} of {progress.done:,}"
            self._reporter.say(f"async-batcher: {counts} items failed{where}")
        return 1 if progress.failed else 0

    async def _run(self, interruptible: Interruptible) -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._batcher)
            except Exception as exc:  # the user's set-up failed, or no worker can be started
                raise CommandError(one_line(exc), status=1) from exc
            results = self._batcher.map(
                self._unfinished(),
                ordered=not self._options.unordered,
                return_exceptions=True,
                read_in_thread=True,
                pairs=True,
            )
            groups = await stack.enter_async_context(contextlib.aclosing(_groups(results)))
            async for group in groups:
                self._write(group, interruptible)

    def _unfinished(self) -> Iterator[bytes]:
        """Iterate over the items that are not finished, in a thread."""
        finished = self._progress.finished
        known = len(finished)
        try:
            for number, (line, raw) in enumerate(self._items):
                if number < known and finished[number]:
                    continue
                with self._origins_lock:
                    self._origins[raw].append((number, line))
                yield raw
        except OSError as exc:
            msg = f"the input cannot be read any further: {exc.strerror or exc}"
            raise CommandError(msg, status=1) from exc
        finally:
            close_generator(self._items)

    def _write(self, group: list[tuple[bytes, Any]], interruptible: Interruptible) -> None:
        """Write results, and commit that their items are finished.

        Raises:
            KeyboardInterrupt: A signal was received while a write blocked.
            CommandError: A failure ends the run. Other results have been written.
        """
        done: list[FinishedItem] = []
        fatal: str | None = None
        for raw, result in group:
            number, line = self._origin(raw)
            if type(result) is bytes:
                done.append(FinishedItem(number, result + b"\n", has_failed=False))
            elif self._options.isolate and _is_items_fault(result):
                described = self._report(line, raw, result, interruptible)
                done.append(FinishedItem(number, described, has_failed=True))
            else:
                fatal = fatal or self._abort_message(line, raw, result)
                if not self._options.unordered:
                    break
        if done:
            self._output.write(done, interruptible)
            with interruptible():
                self._reporter.show(self._progress.done, self._progress.failed)
        if fatal is not None:
            msg = f"{fatal}{self._resume_hint()}"
            raise CommandError(msg, status=1)

    def _origin(self, raw: bytes) -> tuple[int, int]:
        """Return number and line of an item whose result is written."""
        with self._origins_lock:
            origins = self._origins[raw]
            origin = origins.popleft()
            if not origins:
                del self._origins[raw]
            return origin

    def _report(
        self,
        line: int,
        raw: bytes,
        result: ItemFailure | BaseException,
        interruptible: Interruptible,
    ) -> bytes:
        """Describe a failed item: in a line of the errors file, or on standard error."""
        form = self._options.format
        failure = ItemFailure(one_line(result)) if isinstance(result, BaseException) else result
        if self._options.errors is None:
            with interruptible():
                self._reporter.say(f"async-batcher: {item_label(line, raw, form)}: {failure.error}")
            return b""
        text = os.fsdecode(raw) if form == "files" else raw.decode(errors="replace")
        item = text if form == "files" else decode(raw, form)
        error = {"line": line, "item": item, **failure._asdict()}
        described = None if isinstance(item, ItemFailure) else encode(error)
        if not isinstance(described, bytes):  # an item that is not JSON, or NaN
            described = encode({**error, "item": text})
        assert isinstance(described, bytes)  # noqa: S101 - text and numbers are JSON
        return described + b"\n"

    def _abort_message(self, line: int, raw: bytes, result: ItemFailure | BaseException) -> str:
        """Say why the run ends."""
        label = item_label(line, raw, self._options.format)
        if isinstance(result, ItemFailure):
            return f"{label}: {result.error}"
        if not _is_items_fault(result):
            return one_line(result)
        if self._options.isolate or self._options.max_batch_size == 1:
            return f"{label}: {one_line(result)}"
        return f"{label}, with its batch: {one_line(result)}; --isolate finds the guilty item"

    def _resume_hint(self) -> str:
        """Say what a run that ends early leaves."""
        if not isinstance(self._output, ResumableOutput):
            return ""
        done = self._progress.done
        if not done:
            return "; nothing was finished"
        if self._output.can_be_resumed:
            return f"; {done:,} items are finished, and --resume goes on after them"
        return f"; the results of {done:,} items are in {self._output.partial!r}"


def _is_items_fault(result: ItemFailure | BaseException) -> bool:
    """Tell whether an item may have caused a failure, as the batcher's isolation does."""
    if isinstance(result, WorkerDiedError):
        return result.may_have_run
    return not isinstance(result, BatcherStoppedError | PoolBrokenError | SerializationError)


async def _groups(results: AsyncGenerator[Any, None]) -> AsyncGenerator[list[Any], None]:
    """Group results: those that are ready when the event loop turns come together."""
    ready: list[Any] = []
    news = asyncio.Event()

    async def collect() -> None:
        try:
            async for result in results:
                if not ready:
                    news.set()
                ready.append(result)
        finally:
            news.set()

    collecting = asyncio.create_task(collect())
    try:
        while not collecting.done() or ready:
            await news.wait()
            news.clear()
            group = ready.copy()
            ready.clear()
            if group:
                yield group
        await collecting
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
