"""A run of ``async-batcher map``: items of an input, through batches, to results in an output.

::

    items, in a thread --> AsyncBatcher.map --> batches --> workers: ItemProcessor
                                                                         |
    output <--_write-- groups: all results that are ready at once <-- results

Rules:

- The parent moves bytes: workers decode items and encode results.
- A group of results is written at once; that its items are finished is committed with it.
- The first failure ends the run, unless failures are isolated and the item has caused it.
- Standard error gets the traceback of the first failure, if no file has it; user code only.
- The first Ctrl-C, or SIGTERM, ends the run by force. What is finished stays.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.exception_text import one_line
from async_batcher.cli._errors import CommandError, counted, silenced_logger
from async_batcher.cli._items import input_name, item_label, read_error
from async_batcher.cli._signals import run_interruptible
from async_batcher.cli._terminal import ProgressReporter
from async_batcher.cli._worker_function import ISOLATE_HINT, BatchFailure, ItemFailure
from async_batcher.cli.map.lines import error_line, failure_record, result_record
from async_batcher.cli.map.output import FinishedItem, ResumableOutput
from async_batcher.exceptions import (
    BatcherStoppedError,
    PoolBrokenError,
    SerializationError,
    WorkerDiedError,
)

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import AsyncGenerator, Generator, Iterator

    from async_batcher import AsyncBatcher
    from async_batcher.cli._items import Item
    from async_batcher.cli._signals import Interruptible
    from async_batcher.cli.map.fingerprint import InputFingerprint
    from async_batcher.cli.map.output import StreamOutput

_BATCHES_AHEAD = 3  # per worker, as by default in `AsyncBatcher.map`


class MapRun:
    """A run over ``items``. Without a ``fingerprint`` their number is not known."""

    def __init__(
        self,
        batcher: AsyncBatcher[Item, Any],
        items: Generator[Item],
        output: ResumableOutput | StreamOutput,
        options: Namespace,
        fingerprint: InputFingerprint | None,
    ) -> None:
        self._batcher = batcher
        self._items = items
        self._output = output
        self._progress = output.progress
        self._options = options
        self._fingerprint = fingerprint
        self._has_traceback = False  # whether one has been printed
        self._reporter = ProgressReporter(
            None if fingerprint is None else fingerprint.items,
            done=self._progress.done,
            failed=self._progress.failed,
            unit="items",
            is_shown=not output.is_terminal,
            stays=True,
        )

    def run(self) -> int:
        """Run to the end.

        Returns:
            The exit status: 1 if items have failed.

        Raises:
            BrokenPipeError: The reader of the output has closed it.
        """
        progress, options, fingerprint = self._progress, self._options, self._fingerprint
        with contextlib.closing(self._reporter), silenced_logger():
            if fingerprint is None or progress.done != fingerprint.items:
                run_interruptible(self._run, options, hint=self._resume_hint)
        if fingerprint is not None and (
            progress.done != fingerprint.items or fingerprint.has_changed()
        ):
            # --resume would reject the changed input.
            hint = "; --restart begins anew" if isinstance(self._output, ResumableOutput) else ""
            msg = f"the input has changed since the run began{hint}"
            raise CommandError(msg, status=1)
        self._output.finish()
        if progress.failed:
            file = options.errors
            if file is None and options.records and isinstance(self._output, ResumableOutput):
                file = options.output
            where = "" if file is None else f"; see {file}"
            counts = f"{progress.failed:,} of {progress.done:,}"
            self._reporter.say(f"async-batcher: {counts} items failed{where}")
        return 1 if progress.failed else 0

    async def _run(self, interruptible: Interruptible) -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._batcher)
            except Exception as exc:  # the user's set-up failed, or no worker can be started
                raise CommandError(one_line(exc), status=1) from exc
            # With --each the size of the first batch says nothing about that of later ones.
            window = _BATCHES_AHEAD * self._batcher.concurrency * self._options.max_batch_size
            results = self._batcher.map(
                self._unfinished(),
                ordered=not self._options.unordered,
                window=window if self._options.each else None,
                return_exceptions=True,
                read_in_thread=True,
                pairs=True,
            )
            groups = await stack.enter_async_context(contextlib.aclosing(_groups(results)))
            async for group in groups:
                self._write(group, interruptible)

    def _unfinished(self) -> Iterator[Item]:
        """Iterate over the items that are not finished, in a thread."""
        finished = bytes(self._progress.finished)
        item = None
        try:
            with contextlib.closing(self._items):
                for item in self._items:
                    if item[0] >= len(finished) or not finished[item[0]]:
                        yield item
        except OSError as exc:
            if item is None:
                raise read_error(self._options.input, exc) from exc
            name = input_name(self._options.input)
            msg = f"{name} cannot be read any further: {exc.strerror or exc}"
            raise CommandError(msg, status=1) from exc

    def _write(self, group: list[tuple[Item, Any]], interruptible: Interruptible) -> None:
        """Write results, and commit that their items are finished.

        Raises:
            KeyboardInterrupt: A signal was received while a write blocked.
            CommandError: A failure ends the run. Other results have been written.
        """
        options = self._options
        done: list[FinishedItem] = []
        fatal: tuple[str, str] | None = None
        for item, result in group:
            if type(result) is bytes:
                is_record = options.records
                line = result_record(item, result, options.format) if is_record else result + b"\n"
                done.append(FinishedItem(item[0], line, has_failed=False))
            elif options.isolate and _is_items_fault(result):
                is_failure = isinstance(result, ItemFailure)  # of the item alone, in a worker
                failure = result if is_failure else ItemFailure(one_line(result))
                line = self._report(item, failure, interruptible)
                done.append(FinishedItem(item[0], line, has_failed=True))
            else:
                fatal = fatal or self._abort_reason(item, result)
                if not options.unordered:
                    break
        if done:
            self._output.write(done, interruptible)
            with interruptible():
                self._reporter.show(self._progress.done, self._progress.failed)
        if fatal is not None:
            reason, traceback = fatal
            msg = f"{reason}{self._resume_hint()}{self._first(traceback)}"
            raise CommandError(msg, status=1)

    def _report(self, item: Item, failure: ItemFailure, interruptible: Interruptible) -> bytes:
        """Return the line of a failed item; without a file for it, write to standard error."""
        form = self._options.format
        if self._options.errors is not None:
            return error_line(item, failure, form)
        if self._options.records:
            return failure_record(item, failure, form)
        text = f"{item_label(item, form)}: {failure.error}{self._first(failure.traceback)}"
        with interruptible():
            self._reporter.say(f"async-batcher: {text}")
        return b""

    def _first(self, traceback: str) -> str:
        """Return a traceback, on lines of its own, unless there has been one before."""
        if self._has_traceback or not traceback:
            return ""
        self._has_traceback = True
        return f"\n{traceback.rstrip()}"

    def _abort_reason(
        self, item: Item, result: ItemFailure | BatchFailure | BaseException
    ) -> tuple[str, str]:
        """Say why the run ends; the second value is the traceback, which may be empty."""
        label = item_label(item, self._options.format)
        if isinstance(result, ItemFailure):
            return f"{label}: {result.error}", result.traceback
        if isinstance(result, BatchFailure):
            (error, traceback), size, hint = result
        elif _is_items_fault(result):
            error, traceback = one_line(result), ""
            size = 1 if self._options.each else self._options.max_batch_size
            hint = ISOLATE_HINT if size > 1 else ""
        else:
            return one_line(result), ""
        batch = ", with its batch" if size > 1 else ""
        end = f"; {hint}" if hint else ""
        return f"{label}{batch}: {error}{end}", traceback

    def _resume_hint(self) -> str:
        """Say what a run that ends early leaves."""
        if not isinstance(self._output, ResumableOutput):
            return ""
        done = self._progress.done
        if not done:
            return "; nothing was finished"
        if self._output.can_be_resumed:
            finished = f"{counted(done, 'item')} {'is' if done == 1 else 'are'} finished"
            return f"; {finished} and kept in {self._output.journal!r}; --resume goes on from there"
        return f"; the results of {counted(done, 'item')} are in {self._output.partial!r}"


def _is_items_fault(result: ItemFailure | BatchFailure | BaseException) -> bool:
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
                ready.append(result)
                news.set()
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
