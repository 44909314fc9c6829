"""A file that is written beside its place, and renamed when it is complete."""

from __future__ import annotations

import contextlib
import io
import os
import select
from pathlib import Path
from typing import IO

from async_batcher.cli._errors import CommandError


class AtomicFile:
    """A file that has another name until it is complete, and is locked while it is open.

    Attributes:
        name: As the user gave it.
        path: Where the file is in the end. A symbolic link is kept, and its target replaced.
        partial: Where it is until then.
        size: How much of it has been written, in bytes.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path(os.path.realpath(name))
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.size = 0
        self._file: IO[bytes] | None = None
        self._is_new = False
        if self.path.is_dir() or name.endswith(os.sep):
            msg = f"{name!r} is a directory"
            raise CommandError(msg)

    def open(self) -> int:
        """Open the partial file, or create it; return its size.

        Raises:
            CommandError: Another run is writing it, or it cannot be opened.
        """
        while self._file is None:
            try:
                self._file, self._is_new = _open(self.partial)
            except FileNotFoundError as exc:
                if not self.partial.parent.is_dir():
                    raise write_error(self.name, exc, status=2) from exc
                continue  # another run has renamed it in between
            except OSError as exc:
                raise write_error(self.name, exc, status=2) from exc
            if not _lock(self._file):
                self.close()
                msg = f"another run is writing {self.name!r}"
                raise CommandError(msg)
            if not self._is_at_path():
                self.close()  # as above
        return os.fstat(self._file.fileno()).st_size

    def truncate(self, size: int) -> None:
        """Drop all but the first bytes; write after them."""
        try:
            self._opened.truncate(size)
        except OSError as exc:
            raise write_error(self.name, exc) from exc
        self._opened.seek(size)
        self.size = size

    def append(self, data: bytes) -> int:
        """Write, and return the size after that."""
        write_all(self._opened, data, str(self.partial))
        self.size += len(data)
        return self.size

    def open_for_check(self, *, or_committed: bool) -> IO[bytes]:
        """Open what has been written, for reading. An empty file if there is none."""
        for path in (self.partial, self.path) if or_committed else (self.partial,):
            with contextlib.suppress(FileNotFoundError):
                return path.open("rb")
        return io.BytesIO()

    def check(self) -> None:
        """Raise CommandError unless what has been written is still there, and nothing else."""
        if not self.is_intact():
            msg = f"{str(self.partial)!r} has been removed or changed while it was written"
            raise CommandError(msg, status=1)

    def is_intact(self) -> bool:
        return self._is_at_path() and os.fstat(self._opened.fileno()).st_size == self.size

    def flush(self) -> None:
        os.fsync(self._opened.fileno())

    def commit(self) -> None:
        """Rename the partial file to the final name, unless that has been done."""
        try:
            self.partial.replace(self.path)
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise write_error(self.name, exc) from exc

    def is_committed(self) -> bool:
        return not self.partial.exists()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def discard_if_new(self) -> None:
        """Close the partial file, and remove it if `open` has created it."""
        if self._is_new:
            self.remove()
            self._is_new = False
        self.close()

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.partial.unlink()

    @property
    def _opened(self) -> IO[bytes]:
        assert self._file is not None  # noqa: S101 - see `open`
        return self._file

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._opened.fileno()), self.partial.stat())
        except OSError:
            return False


def _open(path: Path) -> tuple[IO[bytes], bool]:
    """Open a file without a buffer; the second value says whether it is new."""
    try:
        descriptor, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        descriptor, is_new = os.open(path, os.O_RDWR), False
    return os.fdopen(descriptor, "r+b", buffering=0), is_new


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
