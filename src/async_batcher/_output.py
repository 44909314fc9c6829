"""Where results go: files that can be taken up again after whatever end, or a stream.

::

    write(results, errors, items) --> OUTPUT.partial, then ERRORS.partial, then a record in OUTPUT.journal
    finish() --> "whole" in the journal --> ERRORS.partial becomes ERRORS --> OUTPUT.partial becomes OUTPUT --> no journal

Rules:

- The journal (`_journal.py`) is written last, so whenever the process ends, what it says is true; what it does not say is cut
  off by `Files.resume`, and done again.
- All files are locked for as long as the run lives: no two runs write the same output, or the same errors.
- What is finished is thrown away only when the user says so, and so are files that are not this command's.
"""

from __future__ import annotations

import contextlib
import os
from typing import IO, TYPE_CHECKING, Protocol

from async_batcher._journal import VERSION, Progress, is_torn, record, replay, seal
from async_batcher._partial import OutputError, Part, open_locked, write_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TypeAlias

    from async_batcher._journal import Header

    Interruptible: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]


class Output(Protocol):
    """Takes results.

    Attributes:
        progress: What is finished.
        is_terminal: Whether results are shown to the user.
    """

    progress: Progress
    is_terminal: bool

    def write(
        self, output: bytes, errors: bytes, done: list[int], failed: int, interruptible: Interruptible = contextlib.nullcontext
    ) -> None:
        """Write results and errors of items that are finished with it.

        Args:
            output: Results, one to a line.
            errors: What is told of items that have failed, one to a line.
            done: The numbers of all these items.
            failed: How many of them have failed.
            interruptible: Entered where writing may wait for somebody to read, and nowhere else.
        """

    def finish(self) -> None:
        """All items are finished: put everything in its place."""

    def close(self) -> None:
        """Let go of it, finished or not."""


class Files:
    """Output and errors in files, with a journal.

    Args:
        output: Where the results are to be in the end.
        errors: Where the errors are to be; None: they are not kept.

    Attributes:
        progress: What is finished.

    Raises:
        OutputError: Another run writes there, or it cannot be written.
    """

    is_terminal = False

    def __init__(self, output: str, errors: str | None) -> None:
        self._output = Part(output)
        self._errors = None if errors is None else Part(errors)
        self._path = self._output.journal
        self._journal, self._is_new = open_locked(self._path, output)
        self._is_begun = False
        with self._path.open("rb") as journal:
            self.progress = replay(journal)
        with self._path.open("rb") as journal:
            first, rest = journal.readline(), journal.read(1)
        self._is_foreign = self.progress.header is None and bool(first) and (bool(rest) or not is_torn(first))

    @property
    def objection(self) -> str | None:
        """Why it cannot be begun unless the user says that what is there may be thrown away; None: there is nothing."""
        if self._is_foreign:
            return f"{str(self._path)!r} is there already, and is no journal that can be read; --restart overwrites it"
        if not self.has_something:
            return None
        ways = "--resume goes on after them, --restart begins anew" if self.can_be_resumed else "--restart throws them away"
        return f"a run that was interrupted has finished {self.progress.done:,} items of {self._output.name!r}: {ways}"

    @property
    def partial(self) -> str:
        """Where the results are until they are whole."""
        return str(self._output.partial)

    @property
    def can_be_resumed(self) -> bool:
        """Whether its input can be read again."""
        return self.progress.header is not None and bool(self.progress.header.input)

    @property
    def has_something(self) -> bool:
        """Whether there is something that a new beginning would throw away."""
        header = self.progress.header
        is_of_another_version = header is not None and header.version != VERSION
        return self.progress.done > 0 or self.progress.is_whole or self._is_foreign or is_of_another_version

    def begin(self, header: Header, *, overwrites: bool = False) -> None:
        """Begin anew, where nothing is that would be lost, or where it may be.

        Raises:
            OutputError: There is a partial file that is not of this run.
        """
        for part in self._parts():  # all, before anything is thrown away
            if part.open() and not (overwrites or self._knows(part)):
                msg = f"{str(part.partial)!r} is there already, of another run or program; remove it, or --restart overwrites it"
                raise OutputError(msg)
        self.progress = Progress()
        self._is_foreign = False
        self._is_begun = True
        self._journal.seek(0)
        self._journal.truncate()
        for part in self._parts():
            part.cut(0)
        self._note({"header": header._asdict()})
        self._note_errors_file()

    def resume(self, header: Header) -> None:
        """Go on after what is finished; begin where nothing is.

        Raises:
            OutputError: It is not the same run.
        """
        told = self.progress
        if not self.has_something:
            self.begin(header)
            return
        difference = "it has no journal that can be read" if told.header is None else told.header.difference(header)
        if difference is None and told.failed and told.errors_file != self._errors_name():
            difference = f"its errors are in {told.errors_file!r}" if told.errors_file else "its errors were not kept"
        if difference is not None:
            msg = f"{self._output.name!r} cannot be resumed: {difference}; --restart begins anew"
            raise OutputError(msg)
        with contextlib.ExitStack() as files:
            written = [files.enter_context(part.written(or_in_place=told.is_whole)) for part in self._parts()]
            self.progress = replay(files.enter_context(self._path.open("rb")), *written)
        if self.progress.is_whole:
            return
        if told.is_whole and any(part.is_in_place() for part in self._parts()):
            msg = f"{self._output.name!r} was finished, and has been changed since; --restart begins anew"
            raise OutputError(msg)
        for part in self._parts():
            if part.open() and not self._knows(part):
                msg = f"{str(part.partial)!r} is there already, of another run or program; remove it, or name another file"
                raise OutputError(msg)
        self._is_begun = True
        self._journal.truncate(self.progress.end)
        self._journal.seek(self.progress.end)
        for part, size in zip(self._parts(), (self.progress.output, self.progress.errors), strict=False):
            part.cut(size)
        if self.progress.errors_file != self._errors_name():
            if self.progress.errors_file is not None:  # none has been written there
                Part(self.progress.errors_file).remove(only_if_new=False)
            self._note_errors_file()

    def write(
        self,
        output: bytes,
        errors: bytes,
        done: list[int],
        failed: int,
        interruptible: Interruptible = contextlib.nullcontext,  # noqa: ARG002 - a file waits for nobody
    ) -> None:
        """Write results and errors; when it returns, those items are finished."""
        sizes = (self._output.append(output), 0 if self._errors is None else self._errors.append(errors))
        line = record(done, failed, (sizes[0], output), (sizes[1], errors if self._errors is not None else b""))
        write_all(self._journal, line, self._path)
        self.progress.done += len(done)
        self.progress.failed += failed

    def finish(self) -> None:
        """All items are finished: put everything in its place; after an end in between, `resume` leads here again."""
        if not self.progress.is_whole:
            for part in self._parts():
                part.check()
                part.flush()
            self._note({"whole": True})
            os.fsync(self._journal.fileno())
        for part in reversed(self._parts()):
            part.put_in_place()
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it; where nothing is finished, nothing of this run is left."""
        with self._journal:
            for part in self._parts():
                part.close()
                if not self.has_something:
                    part.remove(only_if_new=not self._is_begun)
            if not self.has_something and (self._is_begun or self._is_new):
                with contextlib.suppress(OSError):
                    self._path.unlink()

    def _knows(self, part: Part) -> bool:
        """Whether the journal that was there speaks of a partial file."""
        if self.progress.header is None:
            return False
        return part is self._output or self.progress.errors_file == self._errors_name()

    def _parts(self) -> list[Part]:
        return [self._output] if self._errors is None else [self._output, self._errors]

    def _errors_name(self) -> str | None:
        return None if self._errors is None else str(self._errors.path)

    def _note_errors_file(self) -> None:
        self._note({"errors_file": self._errors_name()})

    def _note(self, entry: dict[str, object]) -> None:
        self.progress.follow(entry)
        write_all(self._journal, seal(entry), self._path)


def files_of(name: str, *, has_journal: bool) -> list[Path]:
    """The files that results, or errors, of that name are written to."""
    part = Part(name)
    return [part.path, part.partial, *([part.journal] if has_journal else [])]


class Direct:
    """Output to something that is open already; errors in a file that is put in its place at the end, or nowhere.

    Args:
        output: Unbuffered; it is not closed.
        name: What it is called.
        errors: Where the errors are to be.
    """

    def __init__(self, output: IO[bytes], name: str, errors: str | None) -> None:
        self._output = output
        self._name = name
        self.is_terminal = output.isatty()
        self._errors = None if errors is None else Part(errors)
        if self._errors is not None and self._errors.open():
            self._errors.close()
            msg = f"{str(self._errors.partial)!r} is there already, of another run or program; remove it, or name another file"
            raise OutputError(msg)
        self.progress = Progress()

    def write(
        self, output: bytes, errors: bytes, done: list[int], failed: int, interruptible: Interruptible = contextlib.nullcontext
    ) -> None:
        """Write errors and results.

        Raises:
            BrokenPipeError: Nobody reads them any more.
        """
        if self._errors is not None:
            self._errors.append(errors)  # first: a reader may keep the results waiting until the run is interrupted
        with interruptible():
            write_all(self._output, output, self._name)
        self.progress.done += len(done)
        self.progress.failed += failed

    def finish(self) -> None:
        """All results have been written."""
        if self._errors is not None:
            self._errors.check()

    def close(self) -> None:
        """Put the errors in their place; those of a run that has ended early belong to the results that were written."""
        if self._errors is not None:
            if self._errors.is_intact():  # else `finish` has said so
                self._errors.put_in_place()
            self._errors.close()
