"""A file that is written beside its place, and renamed when it is complete."""

from __future__ import annotations

import contextlib
import os
import select
from pathlib import Path
from typing import IO, TYPE_CHECKING

from async_batcher.cli._errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable


class AtomicFile:
    """A file that has another name until it is complete, and is locked while it is open.

    On Windows, and on a file system without locks, it is not locked.

    Attributes:
        name: As the user gave it.
        path: Where the file is in the end. A symbolic link is kept, and its target replaced.
        partial: Where it is until then.
        is_new: Whether `open` has created it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path(os.path.realpath(name))
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.is_new = False
        self._size = 0
        self._file: IO[bytes] | None = None
        if self.path.is_dir() or name.endswith(os.sep):
            msg = f"{name!r} is a directory"
            raise CommandError(msg)

    def open(self) -> None:
        """Open the partial file, or create it."""
        while self._file is None:
            try:
                self._file, self.is_new = _open(self.partial)
            except OSError as exc:
                raise write_error(self.name, exc, status=2) from exc
            if not _lock(self._file):
                self.close()
                msg = f"another run is writing {self.name!r}"
                raise CommandError(msg)
            if not self._is_at_path():  # another run has renamed it in between
                self.close()
        self._size = os.fstat(self._file.fileno()).st_size

    def check_is_empty(self, hint: str) -> None:
        """Raise CommandError if anything was in the file; ``hint`` says what to do."""
        if self._size:
            there = f"{str(self.partial)!r} is there already, of another run or program"
            msg = f"{there}; remove it, or {hint}"
            raise CommandError(msg)

    def clear(self) -> None:
        try:
            self._opened.truncate(0)
            self._opened.seek(0)
        except OSError as exc:
            raise write_error(self.name, exc) from exc
        self._size = 0

    def append(self, data: bytes) -> None:
        write_all(self._opened, data, str(self.partial))
        self._size += len(data)

    def fileno(self) -> int:
        return self._opened.fileno()

    def check(self) -> None:
        """Raise CommandError unless what has been written is still there, and nothing else."""
        if not self.is_intact():
            msg = f"{str(self.partial)!r} has been removed or changed while it was written"
            raise CommandError(msg, status=1)

    def is_intact(self) -> bool:
        return self._is_at_path() and os.fstat(self._opened.fileno()).st_size == self._size

    def flush(self) -> None:
        os.fsync(self._opened.fileno())

    def commit(self) -> None:
        """Rename the partial file to the final name, and close it."""
        try:
            change_then_close(lambda: self.partial.replace(self.path), self.close)
        except OSError as exc:
            raise write_error(self.name, exc) from exc

    def close(self, *, discards: bool = False) -> None:
        """Close the partial file, and remove it if it is not wanted any longer."""
        file = self._file
        if file is not None:
            if discards and self._is_at_path():
                with contextlib.suppress(OSError):
                    change_then_close(self.partial.unlink, file.close)
            self._file = None
            file.close()

    @property
    def _opened(self) -> IO[bytes]:
        assert self._file is not None  # noqa: S101 - see `open`
        return self._file

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._opened.fileno()), self.partial.stat())
        except OSError:
            return False


def change_then_close(change: Callable[[], object], close: Callable[[], None]) -> None:
    """Rename or remove a file that is open, and close it.

    Closed first, it would lose its lock, and another run could open it before it is changed. Only
    if the system refuses, as Windows does for open files, it is closed before.
    """
    with contextlib.suppress(PermissionError):
        change()
        close()
        return
    close()
    change()


def _open(path: Path) -> tuple[IO[bytes], bool]:
    """Open a file without a buffer; the second value says whether it is new."""
    try:
        return path.open("xb", buffering=0), True
    except FileExistsError:
        return path.open("ab", buffering=0), False


def _lock(file: IO[bytes]) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a network file system without locks
        pass
    return True


def write_all(file: IO[bytes], data: bytes, name: str) -> None:
    """Write all of it, however little is accepted at a time."""
    rest = memoryview(data)
    try:
        while rest:
            try:
                rest = rest[os.write(file.fileno(), rest) :]
            except BlockingIOError:  # another process has made it non-blocking
                select.select([], [file], [])
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise write_error(name, exc) from exc


def write_error(name: str, exc: OSError, status: int = 1) -> CommandError:
    is_missing = isinstance(exc, FileNotFoundError)
    why = "there is no such folder" if is_missing else exc.strerror or exc
    return CommandError(f"{name!r} cannot be written: {why}", status=status)
