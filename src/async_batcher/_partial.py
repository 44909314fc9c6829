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
    """A file that is written beside its place until it is whole.

    Args:
        name: As the user gave it.

    Attributes:
        name: As above.
        path: Its place.
        partial: Where it is until then.
        journal: Where a journal of it is.

    Raises:
        OutputError: It is a directory.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path(os.path.realpath(name))  # a link stays, and what it leads to is replaced
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.journal = self.path.with_name(f"{self.path.name}.journal")
        self._file: IO[bytes] | None = None
        self._is_new = False
        self._size = 0
        if self.path.is_dir() or name.endswith(os.sep):
            msg = f"{name!r} is a directory"
            raise OutputError(msg)

    def open(self) -> int:
        """Open what is beside the place, or begin it; says how large it is.

        Raises:
            OutputError: Another run writes there, or it cannot be opened.
        """
        if self._file is None:
            self._file, self._is_new = open_locked(self.partial, self.name)
        return os.fstat(self._file.fileno()).st_size

    def cut(self, size: int) -> None:
        """Go on after so many bytes, and drop what comes after them."""
        assert self._file is not None  # noqa: S101 - it has been opened
        try:
            self._file.truncate(size)
        except OSError as exc:
            raise OutputError(cannot_be_written(self.name, exc), status=1) from exc
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

    def check(self) -> None:
        """Raise unless what has been written is still there.

        Raises:
            OutputError: It has been removed or replaced, or it is not as large as it was.
        """
        if not self.is_intact():
            msg = f"{str(self.partial)!r} has been removed or changed while it was written"
            raise OutputError(msg, status=1)

    def is_intact(self) -> bool:
        """Whether what has been written is still there, and nothing else."""
        assert self._file is not None  # noqa: S101 - it has been opened
        mine = os.fstat(self._file.fileno())
        try:
            return os.path.samestat(mine, self.partial.stat()) and mine.st_size == self._size
        except OSError:
            return False

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

    def remove(self, *, only_if_new: bool) -> None:
        """It is not wanted; if this run has begun it, or in any case."""
        if self._is_new or not only_if_new:
            with contextlib.suppress(OSError):
                self.partial.unlink()


def open_locked(path: Path, name: str) -> tuple[IO[bytes], bool]:
    """Open a file that no other run has open, unbuffered; says whether it is new.

    Raises:
        OutputError: One has, or it cannot be opened.
    """
    while True:
        try:
            try:
                descriptor, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
            except FileExistsError:
                descriptor, is_new = os.open(path, os.O_RDWR), False
        except FileNotFoundError as exc:
            if path.parent.is_dir():  # another run has removed it in between
                continue
            raise OutputError(cannot_be_written(name, exc)) from exc
        except OSError as exc:
            raise OutputError(cannot_be_written(name, exc)) from exc
        file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            _lock(file)
        except BlockingIOError as exc:
            file.close()
            msg = f"another run is writing {name!r}"
            raise OutputError(msg) from exc
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, is_new
        file.close()  # another run has finished in between, and moved or removed it


def _lock(file: IO[bytes]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems have no locks
        pass


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
    """That a file cannot be written, in words."""
    if isinstance(exc, FileNotFoundError):
        return f"{name!r} cannot be written: there is no such folder"
    return f"{name!r} cannot be written: {exc.strerror or exc}"
