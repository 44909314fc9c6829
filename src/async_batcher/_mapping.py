"""A run of ``async-batcher map``: from items of an input, through batches, to results in an output.

::

    items --_unfinished, in a thread--> Stream --> batches --> workers: Job --> answers, all that are ready --_take--> output
                 |                                                                                              ^
                 `-------------------- where each item came from, until its answer is there -------------------'

Rules:

- The parent moves bytes: items are decoded, and results encoded, in the workers (`_formats.Job`).
- Each turn writes what is ready at once, and with it that it is finished, before the next.
- The first failure ends the run, unless failures are isolated and it is an item's own.
- The first Ctrl-C, or SIGTERM, ends it by force. Whatever ends it, what is finished stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any, Literal

from async_batcher._batching.isolation import is_retryable
from async_batcher._batching.sources import make_source
from async_batcher._formats import Failure, close, decode, encode, place
from async_batcher._interrupts import Interrupts
from async_batcher._output import Files
from async_batcher._progress import display
from async_batcher._serialization.exception_copy import remote_traceback
from async_batcher._serialization.exception_text import one_line
from async_batcher.loops import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from async_batcher import BatchedFunction
    from async_batcher._formats import Format
    from async_batcher._output import Direct, Interruptible


class MapError(Exception):
    """It cannot be done, or has failed; the message is one line for the user.

    Attributes:
        status: The exit status of the command.
    """

    def __init__(self, message: str, *, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class Mapping:
    """A run.

    Args:
        batcher: Runs batches of raw items.
        items: The items of the input, with their line numbers; those that are finished are among them.
        output: Where results go; it knows what is finished.
        form: What an item is.
        total: How many items there are; None: not known.
        is_ordered: Whether results are written in the order of their items.
        isolates: Whether an item that fails does not end the run.
        errors: The file that failures are written to; None: they are told on standard error.
        is_shown: Whether the user may see how far it is.
        has_changed: Says whether the input is not what it was when its items were counted; None: they were not.
        ignored: Signals that stay ignored.
    """

    def __init__(
        self,
        batcher: BatchedFunction[bytes, Any],
        items: Iterator[tuple[int, bytes]],
        output: Files | Direct,
        form: Format,
        *,
        total: int | None,
        is_ordered: bool,
        isolates: bool,
        errors: str | None,
        is_shown: bool,
        has_changed: Callable[[], bool] | None,
        ignored: frozenset[int],
    ) -> None:
        self._batcher = batcher
        self._items = items
        self._output = output
        self._form = form
        self._total = total
        self._is_ordered = is_ordered
        self._isolates = isolates
        self._errors = errors
        self._has_changed = has_changed
        self._ignored = ignored
        progress = output.progress
        self._display = display(total, progress.done, progress.failed, is_shown=is_shown)
        self._places: dict[int, tuple[int, int, bytes]] = {}  # by place in the stream: number of the item, line, and raw

    def run(self, loop: Literal["auto", "asyncio", "uvloop"]) -> int:
        """Run to the end.

        Returns:
            The exit status: 1 where items have failed, 128 and its number after a signal.

        Raises:
            MapError: It has failed.
            OutputError: The output cannot be written.
            BrokenPipeError: Nobody reads it any more.
        """
        progress = self._output.progress
        with contextlib.closing(self._display), _without_log():
            signal_number = None if self._is_finished() else run(self._main(), loop=loop)
        if signal_number is not None:
            msg = f"interrupted{self._what_remains()}"
            raise MapError(msg, status=128 + signal_number)
        if self._has_changed is not None and (progress.done != self._total or self._has_changed()):
            msg = f"the input has changed since the run began{self._what_remains()}"
            raise MapError(msg, status=1)
        self._output.finish()
        if progress.failed:
            where = "" if self._errors is None else f"; see {self._errors}"
            self._display.say(f"async-batcher: {progress.failed:,} of {progress.done:,} items failed{where}")
        return 1 if progress.failed else 0

    def _is_finished(self) -> bool:
        return self._output.progress.is_whole or self._output.progress.done == self._total

    async def _main(self) -> int | None:
        """Run; the number of the signal that ended it."""
        with Interrupts(self._ignored) as interrupts:
            try:
                await self._run(interrupts)
            except (asyncio.CancelledError, KeyboardInterrupt):
                if interrupts.number is None:
                    raise
            return interrupts.number

    async def _run(self, interrupts: Interrupts) -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._batcher)
            except Exception as exc:  # of the user's set-up, or no worker can be started
                raise MapError(one_line(exc), status=1) from exc
            source = make_source(self._unfinished(), in_thread=True)
            stream = self._batcher._stream(source, ordered=self._is_ordered)  # noqa: SLF001 - of this package
            await stack.enter_async_context(stream)
            while answers := await stream.get():
                self._take(answers, interrupts.raised)

    def _unfinished(self) -> Iterator[bytes]:
        """The items that are not finished; read in a thread of its own."""
        finished = self._output.progress.finished
        known = len(finished)
        index = 0
        try:
            for number, (line, raw) in enumerate(self._items):
                if number < known and finished[number]:
                    continue
                self._places[index] = (number, line, raw)
                index += 1
                yield raw
        except OSError as exc:
            msg = f"the input cannot be read any further: {exc.strerror or exc}"
            raise MapError(msg, status=1) from exc
        finally:
            close(self._items)

    def _take(self, answers: list[tuple[int, Any]], interruptible: Interruptible) -> None:
        """Write the answers, and that their items are finished.

        Raises:
            KeyboardInterrupt: A signal came while somebody kept it waiting.
            MapError: One has failed, and that ends the run; after those that have not.
        """
        results: list[bytes] = []
        errors: list[bytes] = []
        done: list[int] = []
        failed = 0
        fatal: str | None = None
        for index, answer in answers:
            number, line, raw = self._places.pop(index)
            if type(answer) is bytes:
                results.append(answer)
            elif self._isolates and (isinstance(answer, Failure) or is_retryable(answer, on_loop=False)):
                failed += 1
                errors.append(self._told(line, raw, _failure_of(answer), interruptible))
            else:
                fatal = fatal or self._reason(line, raw, answer)
                if self._is_ordered:
                    break
                continue
            done.append(number)
        if done:
            output = b"".join(result + b"\n" for result in results)
            self._output.write(output, b"".join(error + b"\n" for error in errors if error), done, failed, interruptible)
            with interruptible():
                self._display.show(self._output.progress.done, self._output.progress.failed)
        if fatal is not None:
            msg = f"{fatal}{self._what_remains()}"
            raise MapError(msg, status=1)

    def _told(self, line: int, raw: bytes, failure: Failure, interruptible: Interruptible) -> bytes:
        """Tell of an item that has failed: its line for the errors file, or one on standard error."""
        if self._errors is None:
            with interruptible():
                self._display.say(f"async-batcher: {place(line, raw, self._form)}: {failure.error}")
            return b""
        text = os.fsdecode(raw) if self._form == "files" else raw.decode(errors="replace")
        item = text if self._form == "files" else decode(raw, self._form)
        error = {"line": line, "item": item, "error": failure.error, "traceback": failure.traceback}
        told = None if isinstance(item, Failure) else encode(error)
        if not isinstance(told, bytes):  # what was read cannot be written: no JSON, or a NaN
            told = encode({**error, "item": text})
        assert isinstance(told, bytes)  # noqa: S101 - text and numbers are JSON
        return told

    def _reason(self, line: int, raw: bytes, answer: Failure | BaseException) -> str:
        """Why the run ends."""
        if isinstance(answer, Failure):
            return f"{place(line, raw, self._form)}: {answer.error}"
        if not is_retryable(answer, on_loop=False):
            return one_line(answer)
        if self._isolates or self._batcher.max_batch_size == 1:
            return f"{place(line, raw, self._form)}: {one_line(answer)}"
        return f"{place(line, raw, self._form)}, with its batch: {one_line(answer)}; --isolate finds the guilty item"

    def _what_remains(self) -> str:
        """What is left of a run that ends too early, for its last message."""
        if not isinstance(self._output, Files):
            return ""
        done = self._output.progress.done
        if not done:
            return "; nothing was finished"
        if self._output.can_be_resumed:
            return f"; {done:,} items are finished, and --resume goes on after them"
        return f"; the results of {done:,} items are in {self._output.partial!r}"


def _failure_of(answer: Failure | BaseException) -> Failure:
    if isinstance(answer, Failure):
        return answer
    remote = remote_traceback(answer)
    return Failure(one_line(answer), "" if remote is None else str(remote).lstrip("\n"))


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Have the library say nothing of batches that fail: the command does."""
    logger = logging.getLogger("async_batcher")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
