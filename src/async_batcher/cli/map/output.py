"""Where results go: files that a later run can continue, or a stream.

::

    write()  --> OUTPUT.partial, then ERRORS.partial, then a transaction in OUTPUT.journal
    finish() --> "complete" in the journal --> both files are renamed --> the journal is removed

Rules:

- The journal is written last. What it says is true whenever the process ends. What it does not say
  is cut off by `ResumableOutput.resume`, and done again.
- All files are locked while the run lives: no two runs write the same output, or the same errors.
- Finished results are thrown away only at the user's request, and so are files of other programs.
"""

from __future__ import annotations

import contextlib
from typing import IO, TYPE_CHECKING

from async_batcher.cli._errors import CommandError
from async_batcher.cli.map.atomic_file import AtomicFile, write_all
from async_batcher.cli.map.journal import VERSION, Journal, RunProgress

if TYPE_CHECKING:
    from pathlib import Path

    from async_batcher.cli._signals import Interruptible
    from async_batcher.cli.map.journal import RunHeader


class ResumableOutput:
    """Results in a file, errors in another one or nowhere, and a journal.

    Attributes:
        progress: What is finished; known once it has been started or resumed.

    Raises:
        CommandError: Another run is writing there, or it cannot be written.
    """

    is_terminal = False

    def __init__(self, output: str, errors: str | None) -> None:
        self.progress = RunProgress()
        self._output = AtomicFile(output)
        self._parts = [self._output, *([] if errors is None else [AtomicFile(errors)])]
        self._errors_name = None if errors is None else str(self._parts[1].path)
        self._journal = _journal_of(self._output)
        self._is_started = self._is_finished = False
        self._output.open()
        try:
            self._journal.open()
        except CommandError:
            self._output.discard_if_new()
            raise
        if self.is_complete:  # then a partial file that is new is none: it has been renamed
            self._output.discard_if_new()

    @property
    def is_complete(self) -> bool:
        """Whether all items were finished, and the files only need to be renamed."""
        return self._journal.is_complete

    @property
    def conflict(self) -> str | None:
        """Say what a new run would throw away. None: nothing."""
        journal, path = self._journal, str(self._journal.path)
        overwritten = "--restart overwrites it"
        if journal.is_foreign:
            return f"{path!r} is there already, and is no journal that can be read; {overwritten}"
        if journal.version != VERSION:
            version = f"version {journal.version}, not {VERSION}"
            return f"{path!r} is a journal of {version}; {overwritten}"
        if not self.has_progress:
            return None
        ways = "--restart throws them away"
        if self.can_be_resumed:
            ways = "--resume goes on after them, --restart begins anew"
        items = f"{journal.done:,} items of {self._output.name!r}"
        return f"a run that was interrupted has finished {items}: {ways}"

    @property
    def partial(self) -> str:
        """Where the results are until they are complete."""
        return str(self._output.partial)

    @property
    def can_be_resumed(self) -> bool:
        """Tell whether the input can be read again."""
        return self._journal.header is not None and bool(self._journal.header.input)

    @property
    def has_progress(self) -> bool:
        """Tell whether there is anything that a new run would throw away."""
        journal = self._journal
        if journal.is_foreign or journal.version != VERSION or journal.is_complete:
            return True
        return (self.progress.done if self._is_started else journal.done) > 0

    def start(self, header: RunHeader, *, overwrites: bool = False) -> None:
        """Begin a run.

        Raises:
            CommandError: There are partial files that the journal does not name, and they are not
                to be overwritten.
        """
        self._open_parts("--restart overwrites it", overwrites=overwrites)
        self._journal.remove()
        for part in self._parts:
            part.truncate(0)
        self._is_started = True
        self._journal.create(header, self._errors_name)

    def resume(self, header: RunHeader) -> None:
        """Continue after what is finished; start if nothing is.

        Raises:
            CommandError: The run that was interrupted was another one.
        """
        journal = self._journal
        if not self.has_progress:
            self.start(header)
            return
        if (difference := self._difference(header)) is not None:
            msg = f"{self._output.name!r} cannot be resumed: {difference}; --restart begins anew"
            raise CommandError(msg)
        with contextlib.ExitStack() as stack:
            files = [part.open_for_check(or_committed=self.is_complete) for part in self._parts]
            self.progress = journal.replay(*map(stack.enter_context, files))
        if self.is_complete and self.progress.is_verified:
            return
        if self.is_complete and any(part.is_committed() for part in self._parts):
            changed = "was finished, and has been changed since"
            msg = f"{self._output.name!r} {changed}; --restart begins anew"
            raise CommandError(msg)
        self._open_parts("name another file")
        self._is_started = True
        journal.truncate(self.progress.last_write)
        for part, size in zip(
            self._parts, (self.progress.output, self.progress.errors), strict=False
        ):
            part.truncate(size)
        if journal.errors_file not in (None, self._errors_name):  # nothing was written there
            AtomicFile(str(journal.errors_file)).remove()
        journal.update(self._errors_name, is_complete=False)

    def write(
        self,
        output: bytes,
        errors: bytes,
        done: list[int],
        failed: int,
        _: Interruptible = contextlib.nullcontext,
    ) -> None:
        """Write results and errors. When this returns, their items are finished.

        Args:
            output: Results, one on each line.
            errors: Descriptions of items that have failed, one on each line.
            done: The numbers of all these items.
            failed: How many of them have failed.
        """
        errors = errors if self._errors_name else b""
        written = list(zip((output, errors), self._parts, strict=False))
        sizes = [part.append(data) for data, part in written] + [0]
        self._journal.record(done, failed, (sizes[0], output), (sizes[1], errors))
        self.progress.done += len(done)
        self.progress.failed += failed

    def finish(self) -> None:
        """Rename the files. If the process ends in between, `resume` leads here again."""
        if not self.is_complete:
            for part in self._parts:
                part.check()
                part.flush()
            self._journal.update(self._errors_name, is_complete=True)
        for part in reversed(self._parts):
            part.commit()
        self._journal.remove()
        self._is_finished = True

    def close(self) -> None:
        """Close the files. Leave none if nothing is finished."""
        if not self._is_started:
            for part in self._parts:
                part.discard_if_new()
        elif not (self._is_finished or self.has_progress):
            for part in self._parts:
                part.remove()
            with contextlib.suppress(OSError):
                self._journal.remove()
        for part in self._parts:
            part.close()
        self._journal.close()

    def _difference(self, header: RunHeader) -> str | None:
        """Say why the run that was interrupted is not the one of a header."""
        journal = self._journal
        if journal.version != VERSION:
            return f"its journal is of version {journal.version}, not {VERSION}"
        if journal.header is None:
            return "it has no journal that can be read"
        difference = journal.header.difference(header)
        if difference is None and journal.failed and journal.errors_file != self._errors_name:
            before = journal.errors_file
            return f"its errors are in {before!r}" if before else "its errors were not kept"
        return difference

    def _open_parts(self, hint: str, *, overwrites: bool = False) -> None:
        """Open all files, before anything is thrown away."""
        journal = self._journal
        for part in self._parts:
            is_named = part is self._output or journal.errors_file == self._errors_name
            is_known = journal.header is not None and is_named
            if part.open() and not (overwrites or is_known):
                raise _unknown_file(part, hint)


class StreamOutput:
    """Results to a file that is open; errors to a file that is renamed in the end, or nowhere.

    ``output`` is unbuffered, is called ``name`` in messages, and is not closed.
    """

    def __init__(self, output: IO[bytes], name: str, errors: str | None) -> None:
        self.progress = RunProgress()
        self.is_terminal = output.isatty()
        self._output = output
        self._name = name
        self._errors = None if errors is None else AtomicFile(errors)
        if self._errors is not None and self._errors.open():
            self._errors.close()
            raise _unknown_file(self._errors, "name another file")

    def write(
        self,
        output: bytes,
        errors: bytes,
        done: list[int],
        failed: int,
        interruptible: Interruptible = contextlib.nullcontext,
    ) -> None:
        """Write errors and results; see `ResumableOutput.write`.

        Raises:
            BrokenPipeError: The reader has closed the pipe.
        """
        if self._errors is not None:
            # First: the reader may block the results until the run is interrupted.
            self._errors.append(errors)
        with interruptible():
            write_all(self._output, output, self._name)
        self.progress.done += len(done)
        self.progress.failed += failed

    def finish(self) -> None:
        if self._errors is not None:
            self._errors.check()

    def close(self) -> None:
        """Rename the errors file, also after an interruption: the results have been written."""
        if self._errors is not None:
            if self._errors.is_intact():  # otherwise `finish` has raised
                self._errors.commit()
            self._errors.close()


def _unknown_file(part: AtomicFile, hint: str) -> CommandError:
    there = f"{str(part.partial)!r} is there already, of another run or program"
    return CommandError(f"{there}; remove it, or {hint}")


def _journal_of(part: AtomicFile) -> Journal:
    return Journal(part.path.with_name(f"{part.path.name}.journal"), part.name)


def files_of(name: str, *, has_journal: bool) -> list[Path]:
    """List the files that results, or errors, of that name are written to."""
    part = AtomicFile(name)
    return [part.path, part.partial, *(_journal_of(part).files if has_journal else [])]
