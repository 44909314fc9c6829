"""Where results go: a journal from which files are written at the end, or a stream.

::

    write()  --> a transaction in OUTPUT.journal
    finish() --> OUTPUT.partial and ERRORS.partial are written from the journal, and renamed;
                 the journal is removed

Rules:

- The journal has all that is finished. However the process ends, a later run continues from it.
- The partial files are locked while the run lives: no two runs write the same output, or the same
  errors. Windows, and some network file systems, have no such locks.
- Finished results are thrown away only at the user's request, and so are files of other programs.
- The line of an item that failed is written to the errors file, or to the output if there is none.
- An output that is complete is marked, so that `resume` does not begin its run anew.
"""

from __future__ import annotations

import contextlib
from typing import IO, TYPE_CHECKING, NamedTuple

from async_batcher.cli._errors import CommandError
from async_batcher.cli.map.atomic_file import AtomicFile, write_all
from async_batcher.cli.map.completed import CompletedRun, find_completed
from async_batcher.cli.map.journal import Journal, RunProgress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from async_batcher.cli._signals import Interruptible
    from async_batcher.cli.map.journal import RunHeader


class FinishedItem(NamedTuple):
    line_number: int  # in the input; in a directory, the number of the file
    line: bytes  # a result or a record of the item; of one that failed it may be empty
    has_failed: bool


class ResumableOutput:
    """Results in a file, errors in another one or nowhere, and a journal of both until the end."""

    is_terminal = False

    def __init__(self, output: str, errors: str | None) -> None:
        self._output = AtomicFile(output)
        self._errors = None if errors is None else AtomicFile(errors)
        self._files: list[AtomicFile] = []  # that are open; the output comes last
        self._journal = _journal_of(self._output)
        self._is_started = False
        try:
            self._output.open()
            self._files.append(self._output)
            self._journal.open()
        except CommandError:
            self.close()
            raise

    @property
    def progress(self) -> RunProgress:
        return self._journal.progress

    @property
    def conflict(self) -> str | None:
        """Say what a new run would throw away. None: nothing."""
        journal = self._journal
        if journal.problem is not None:
            path = str(journal.path)
            return f"{path!r} is there already, and {journal.problem}; --restart overwrites it"
        if not journal.has_content:
            return None
        items = f"{journal.progress.done:,} items of {self._output.name!r}"
        ways = f"they are in {self.partial!r}, and --restart throws them away"
        if self.can_be_resumed:
            ways = "--resume goes on after them, --restart begins anew"
        return f"a run that was interrupted has finished {items}: {ways}"

    @property
    def partial(self) -> str:
        """Where the results are after a run that ended early and cannot be resumed."""
        return str(self._output.partial)

    @property
    def journal(self) -> str:
        """Where finished results are kept until the run ends."""
        return f"{self._output.name}.journal"

    @property
    def can_be_resumed(self) -> bool:
        """Tell whether the input can be read again."""
        return self._journal.header is not None and bool(self._journal.header.input)

    def start(self, header: RunHeader, *, overwrites: bool = False) -> None:
        """Begin a run."""
        header = self._with_errors(header)
        self._open_errors(header, "--restart overwrites it", overwrites=overwrites)
        self._journal.remove()
        self._is_started = True
        self._journal.create(header)

    def resume(self, header: RunHeader) -> CompletedRun | None:
        """Continue after what is finished; start if nothing is.

        Returns:
            The run, if it is complete: nothing has been started. Otherwise None.
        """
        journal, header = self._journal, self._with_errors(header)
        if not journal.has_content:
            # A header without results is of a run that was killed: the output is an older one.
            completed = self._completed(header) if journal.header is None else None
            if completed is None:
                self.start(header)
            return completed
        difference: str | None
        if journal.header is None:
            difference = f"{str(journal.path)!r} {journal.problem}"
        else:
            difference = journal.header.difference(header, has_failures=self.progress.failed > 0)
        if difference is not None:
            msg = f"{self._output.name!r} cannot be resumed: {difference}; --restart begins anew"
            raise CommandError(msg)
        if self._is_renamed:
            if not self._holds_results():
                changed = "was finished, and has been changed since"
                msg = f"{self._output.name!r} {changed}; --restart begins anew"
                raise CommandError(msg)
            return None
        self._open_errors(header, "name another file")
        self._is_started = True
        journal.update(header, is_exported=False)
        return None

    def write(self, items: Sequence[FinishedItem], _: Interruptible | None = None) -> None:
        """Write results and errors. When this returns, their items are finished."""
        self._journal.write(items)

    def finish(self) -> None:
        """Put the files in their places. If the process ends in between, `resume` leads here."""
        journal = self._journal
        if not self._is_renamed:
            self._export()
            for file in self._files:
                file.check()
            assert journal.header is not None  # noqa: S101 - it has been started, or resumed
            completed = CompletedRun(journal.header, self.progress.done, self.progress.failed)
            completed.mark(self._output.fileno())
            for file in self._files:
                file.flush()
            journal.update(journal.header, is_exported=True)
            for file in self._files:
                file.commit()
        journal.remove()
        self._is_started = False

    def close(self) -> None:
        """Close the files.

        What is finished stays in the journal, and is in the partial files too if it cannot be
        resumed. If nothing is finished, no file stays.
        """
        # results in the journal  journal      partial files
        # none, not started       is left      are removed if they are new: rejected, or finished
        # none, started           is removed   are removed
        # some, can be resumed    stays        are removed if they are new, or started and not
        #                                      complete
        # some, cannot be         stays        are written, unless they are complete
        journal = self._journal
        has_results = journal.header is not None and journal.has_content
        is_rescued = has_results and not (journal.is_exported or self.can_be_resumed)
        try:
            if is_rescued:
                self._export()
            elif self._is_started and not has_results:
                with contextlib.suppress(OSError):
                    journal.remove()
        finally:
            for file in self._files:
                is_unneeded = not journal.is_exported if self._is_started else file.is_new
                file.close(discards=is_unneeded and not is_rescued)
            journal.close()

    @property
    def _is_renamed(self) -> bool:
        """Whether a run has put the files in their places, and was killed just then.

        `is_new` tells that the partial file was gone, so it had been renamed.
        """
        return self._journal.is_exported and self._output.is_new

    def _holds_results(self) -> bool:
        lines = self._lines_of(self._output)
        with contextlib.suppress(FileNotFoundError), self._output.path.open("rb") as file:
            return all(file.read(len(some)) == some for some in lines) and not file.read(1)
        return False

    def _completed(self, header: RunHeader) -> CompletedRun | None:
        """Return the run of which the output is all. None: there is no output.

        Raises:
            CommandError: The output is of another run or program, or has been changed.
        """
        path, name = self._output.path, repr(self._output.name)
        completed = find_completed(path)
        if completed is None:
            if not path.exists() or not path.stat().st_size:
                return None
            msg = f"{name} exists, and there is no interrupted run to resume"
        elif difference := completed.header.difference(header, has_failures=completed.failed > 0):
            msg = f"{name} cannot be resumed: {difference}"
        else:
            return completed
        msg = f"{msg}; --restart begins anew"
        raise CommandError(msg)

    def _with_errors(self, header: RunHeader) -> RunHeader:
        return header._replace(errors=None if self._errors is None else str(self._errors.path))

    def _open_errors(self, header: RunHeader, hint: str, *, overwrites: bool = False) -> None:
        """Open the errors file, and check that both partial files may be overwritten."""
        before = self._journal.header
        if self._errors is not None:
            self._errors.open()
            self._files.insert(0, self._errors)
        for file in self._files:
            is_known = before is not None and (
                file is self._output or before.errors == header.errors
            )
            if not (overwrites or is_known):
                file.check_is_empty(hint)

    def _export(self) -> None:
        """Write the partial files."""
        for file in self._files:
            file.clear()
            for lines in self._lines_of(file):
                file.append(lines)

    def _lines_of(self, file: AtomicFile) -> Iterator[bytes]:
        is_all = self._errors is None
        return self._journal.lines(failed=None if is_all else file is self._errors)


class StreamOutput:
    """Results to a file that is open; errors to a file that is renamed at the end, or nowhere.

    ``output`` is unbuffered, is called ``name`` in messages, and is not closed.
    """

    def __init__(self, output: IO[bytes], name: str, errors: str | None) -> None:
        self.progress = RunProgress()
        self.is_terminal = output.isatty()
        self._output = output
        self._name = name
        self._errors = None if errors is None else AtomicFile(errors)
        if self._errors is not None:
            self._errors.open()
            try:
                self._errors.check_is_empty("name another file")
            except CommandError:
                self._errors.close()
                raise

    def write(self, items: Sequence[FinishedItem], interruptible: Interruptible) -> None:
        """Write errors, and then results, whose reader may block until the run is interrupted.

        Raises:
            BrokenPipeError: The reader has closed the pipe.
        """
        lines = [item.line for item in items]
        if self._errors is not None:
            lines = [item.line for item in items if not item.has_failed]
            self._errors.append(b"".join(item.line for item in items if item.has_failed))
        with interruptible():
            write_all(self._output, b"".join(lines), self._name)
        self.progress.done += len(items)
        self.progress.failed += sum(item.has_failed for item in items)

    def finish(self) -> None:
        if self._errors is not None:
            self._errors.check()

    def close(self) -> None:
        """Rename the errors file, also after an interruption: the results have been written."""
        if self._errors is not None:
            if self._errors.is_intact():  # otherwise `finish` has raised
                self._errors.commit()
            self._errors.close()


def _journal_of(file: AtomicFile) -> Journal:
    return Journal(file.path.with_name(f"{file.path.name}.journal"), file.name)


def files_of(name: str, *, has_journal: bool) -> list[Path]:
    """List the files that results, or errors, of that name are written to."""
    part = AtomicFile(name)
    return [part.path, part.partial, *(_journal_of(part).files if has_journal else [])]
