"""A file that is written beside its place, and put there when it is whole."""

from __future__ import annotations

import contextlib
import io
import os
import select
from pathlib import Path
from typing import IO


class OutputError(Exception):
    """The output cannot be written, or not in this way; the message is one line.

    Attributes:
        status: The exit status of the command.
    """

    def __init__(self, message: str, *, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class Part:
    """A file that is written beside its place until it is whole."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path(os.path.realpath(name))  # a link stays, and what it leads to is replaced
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self._file: IO[bytes] | None = None
        self._size = 0
        if self.path.is_dir():
            msg = f"{name!r} is a directory"
            raise OutputError(msg)

    def open(self, size: int) -> None:
        """Go on after so many bytes."""
        try:
            self._file = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            self._file.truncate(size)
        except OSError as exc:
            raise OutputError(cannot_be_written(self.name, exc)) from exc
        self._file.seek(size)
        self._size = size

    def written(self, *, or_in_place: bool) -> IO[bytes]:
        """What has been written, to be read: beside its place, or perhaps in it."""
        for path in (self.partial, self.path) if or_in_place else (self.partial,):
            with contextlib.suppress(FileNotFoundError):
                return path.open("rb")
        return io.BytesIO()

    def append(self, data: bytes) -> int:
        """Write, and say how large it is then."""
        assert self._file is not None  # noqa: S101 - it has been opened
        if data:
            write_all(self._file, data, self.partial)
            self._size += len(data)
        return self._size

    def flush(self) -> None:
        """Have it survive the machine's end, too."""
        assert self._file is not None  # noqa: S101 - it has been opened
        os.fsync(self._file.fileno())

    def is_in_place(self) -> bool:
        """Whether it has been put in its place."""
        return not self.partial.exists()

    def put_in_place(self) -> None:
        """It is whole."""
        try:
            self.partial.replace(self.path)
        except FileNotFoundError:  # it has been done
            pass
        except OSError as exc:
            raise OutputError(cannot_be_written(self.name, exc), status=1) from exc

    def close(self) -> None:
        """Leave it where it is."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """It is not wanted."""
        self.partial.unlink(missing_ok=True)


def write_all(file: IO[bytes], data: bytes, name: object) -> None:
    """Write, whatever part of it is taken at a time."""
    rest = memoryview(data)
    try:
        while rest:
            try:
                rest = rest[os.write(file.fileno(), rest) :]
            except BlockingIOError:  # somebody has made it non-blocking
                select.select([], [file], [])
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise OutputError(cannot_be_written(str(name), exc), status=1) from exc


def cannot_be_written(name: str, exc: OSError) -> str:
    if isinstance(exc, FileNotFoundError):
        return f"{name!r} cannot be written: there is no such folder"
    return f"{name!r} cannot be written: {exc.strerror or exc}"
