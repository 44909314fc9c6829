"""The journal of a run: an SQLite database that says which items are finished.

::

    run     one row: what must be the same to resume, the errors file, whether all is finished
    writes  one row for each write: ranges of items, the sizes of the output files, a checksum

Rules:

- Items are numbered from 0. A range leaves out its end. Sizes are those after the write.
- A write is one transaction. It is committed after the bytes that it describes have been written,
  so a crash leaves a journal that is true; `ResumableOutput` drops the bytes that it does not name.
- A checksum covers the row, the bytes that the write added, and the write before. A write whose
  checksum does not match the files does not count, nor does any write after it.
- The database is locked for as long as it is open.
"""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
from typing import IO, TYPE_CHECKING, NamedTuple
from zlib import crc32

from async_batcher.cli._errors import CommandError

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 1

_APPLICATION_ID = int.from_bytes(b"abjo")  # in the header of the database: it is a journal
_SCHEMA = (
    "PRAGMA page_size = 1024",  # a write is a small row, and logs a page
    "PRAGMA journal_mode = WAL",
    "BEGIN",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
    "CREATE TABLE run (description, checksum)",
    "CREATE TABLE writes (number INTEGER PRIMARY KEY, done, failed, output, errors, checksum)",
)
_WRITES = "SELECT number, done, failed, output, errors, checksum FROM writes ORDER BY number"
_SET_RUN = "UPDATE run SET (description, checksum) = (?, ?)"
_CHECKED_BYTES = 1 << 20  # that are read at a time

# Result codes of SQLite that say that a file is no database, or a damaged one.
_UNREADABLE = (
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_READONLY,
)


class RunHeader(NamedTuple):
    """What must be the same for a run to be resumed: the arguments of the command.

    ``input`` is a digest of the input; empty if the input cannot be read twice.
    """

    input: str
    target: str
    format: str
    each: bool
    unordered: bool

    def difference(self, other: RunHeader) -> str | None:
        """Say how another run differs. None if it does not."""
        if self.input != other.input:
            return "the input has changed"
        if self.target != other.target:
            return f"the function was {self.target!r}"
        if self.format != other.format:
            return f"it was run with --format {self.format}"
        for name in ("each", "unordered"):
            if (was := getattr(self, name)) != getattr(other, name):
                return f"it was run {'with' if was else 'without'} --{name}"
        return None


class RunProgress:
    """What of a run is finished.

    Attributes:
        finished: 1 for each item that is finished. Items beyond its end are not.
        done: Number of finished items.
        failed: How many of them failed.
        output: Size of the output, in bytes.
        errors: Size of the errors file, in bytes.
        last_write: Number of the last write.
        is_verified: Whether all writes of a journal match the files.
    """

    def __init__(self) -> None:
        self.finished = bytearray()
        self.done = self.failed = self.output = self.errors = self.last_write = 0
        self.is_verified = False

    def finish(self, ranges: list[list[int]]) -> None:
        for start, end in ranges:
            if end > len(self.finished):
                self.finished.extend(bytes(end - len(self.finished)))
            self.finished[start:end] = b"\1" * (end - start)
            self.done += end - start


class Journal:
    """A journal beside ``path``, for an output that the user calls ``name``.

    Attributes:
        header: The header of the run. None: there is no journal, or none that can be read.
        version: The version of the journal.
        errors_file: Where errors are written. None: nowhere.
        is_complete: Whether all items are finished, and the files only need to be renamed.
        is_foreign: Whether there is a file that cannot be read as a journal.
        done: How many items are finished, by a journal that was opened; unchecked.
        failed: How many of them failed.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.header: RunHeader | None = None
        self.version = VERSION
        self.errors_file: str | None = None
        self.is_complete = self.is_foreign = False
        self.done = self.failed = 0
        self._name = name
        self._database: sqlite3.Connection | None = None
        self._checksum = 0  # of the last write

    @property
    def files(self) -> list[Path]:
        """The database, and what SQLite may have beside it."""
        return [
            self.path.with_name(self.path.name + end) for end in ("", "-wal", "-shm", "-journal")
        ]

    def open(self) -> None:
        """Open the journal if there is one, and read what run it is.

        Raises:
            CommandError: Another run has the journal open, or it cannot be opened.
        """
        while self._database is None and self.path.exists():
            try:
                self._read(self._connect())
            except (ValueError, TypeError, sqlite3.Error) as exc:
                self.close()
                if isinstance(exc, sqlite3.Error) and _code_of(exc) not in _UNREADABLE:
                    raise self._error(exc, status=2) from exc
                self.header, self.is_foreign = None, True
                return
            if not self.path.exists():  # another run has finished, and removed it meanwhile
                self.close()
                self.header = None

    def create(self, header: RunHeader, errors_file: str | None) -> None:
        """Begin a journal where there is none."""
        self.header, self.errors_file = header, errors_file
        try:
            database = self._connect()
            for statement in _SCHEMA:
                database.execute(statement)
            database.execute("INSERT INTO run VALUES (?, ?)", self._description())
            database.execute("COMMIT")
        except sqlite3.Error as exc:
            raise self._error(exc) from exc

    def replay(self, output: IO[bytes], errors: IO[bytes] | None = None) -> RunProgress:
        """Add up all writes, as far as they match the files, which are read from the beginning."""
        progress = RunProgress()
        self._checksum = 0
        rows = self._execute(_WRITES)
        with contextlib.suppress(ValueError, TypeError):
            for number, done, failed, output_size, errors_size, expected in rows:
                row = (done, failed, output_size, errors_size)
                checksum = _checksum_of_row(row, self._checksum)
                checksum = _continue(checksum, output, output_size - progress.output)
                checksum = _continue(
                    checksum, errors or io.BytesIO(), errors_size - progress.errors
                )
                if checksum != expected:
                    break
                progress.finish(json.loads(done))
                progress.failed += failed
                progress.output, progress.errors, progress.last_write = (
                    output_size,
                    errors_size,
                    number,
                )
                self._checksum = checksum
            else:
                progress.is_verified = True
        return progress

    def record(
        self, done: list[int], failed: int, output: tuple[int, bytes], errors: tuple[int, bytes]
    ) -> None:
        """Commit that items are finished; of both files the size, and the bytes that were added."""
        row = (json.dumps(to_ranges(done)), failed, output[0], errors[0])
        checksum = _checksum_of_row(row, self._checksum)
        self._checksum = crc32(errors[1], crc32(output[1], checksum))
        self._execute("INSERT INTO writes VALUES (NULL, ?, ?, ?, ?, ?)", (*row, self._checksum))

    def truncate(self, last_write: int) -> None:
        """Drop all writes after one."""
        self._execute("DELETE FROM writes WHERE number > ?", (last_write,))

    def update(self, errors_file: str | None, *, is_complete: bool) -> None:
        """Commit where errors are written, and whether all is finished; that is flushed to disk."""
        self.errors_file, self.is_complete = errors_file, is_complete
        if is_complete:
            self._execute("PRAGMA synchronous = FULL")
        self._execute(_SET_RUN, self._description())

    def remove(self) -> None:
        """Remove the journal, and close it."""
        if self._database is None:
            files = self.files
        else:
            # The lock must outlive the file, and a database that is closed must not remove the
            # write-ahead log by its name: another run may have begun a journal by then.
            files = [self.path]
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("PRAGMA journal_mode = DELETE")
        for path in files:
            path.unlink(missing_ok=True)
        self.close()
        self.header, self.is_foreign, self.is_complete = None, False, False
        self._checksum = self.done = self.failed = 0

    def close(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):  # a full disk
                database.close()

    def _connect(self) -> sqlite3.Connection:
        uri = self.path.absolute().as_uri()
        try:
            return self._connect_to(uri)
        except sqlite3.OperationalError as exc:
            if _code_of(exc) != sqlite3.SQLITE_IOERR:
                raise
            self.close()
            return self._connect_to(f"{uri}?nolock=1")  # a network file system without locks

    def _connect_to(self, uri: str) -> sqlite3.Connection:
        self._database = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)
        self._database.text_factory = lambda data: data.decode(errors="replace")  # if damaged
        for statement in (
            "PRAGMA locking_mode = EXCLUSIVE",
            "PRAGMA synchronous = NORMAL",  # readable after a power failure
            "PRAGMA schema_version",  # is read, which takes the lock
        ):
            self._database.execute(statement)
        return self._database

    def _read(self, database: sqlite3.Connection) -> None:
        """Raise ValueError or sqlite3.Error if the file is no journal, or a damaged one."""
        names = ("application_id", "user_version", "schema_version", "quick_check")
        values = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in names]
        application, version, schema, check = values
        if application == schema == 0:
            return  # a run was killed before it began
        if application != _APPLICATION_ID or check != "ok":
            msg = "not a journal, or damaged"
            raise ValueError(msg)
        self.version = version
        if version != VERSION:
            return
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("DELETE FROM run WHERE 0")  # fails if it cannot be written
        ((text, checksum),) = database.execute("SELECT description, checksum FROM run").fetchall()
        if crc32(text.encode()) != checksum:
            msg = "damaged"
            raise ValueError(msg)
        description = json.loads(text)
        self.errors_file, self.is_complete = (
            description.pop("errors_file"),
            description.pop("complete"),
        )
        self.header = RunHeader(**description)
        rows = database.execute(_WRITES)
        with contextlib.suppress(ValueError, TypeError):  # those after a damaged write do not count
            for _, done, failed, *_ in rows:
                self.done += sum(end - start for start, end in json.loads(done))
                self.failed += failed

    def _description(self) -> tuple[str, int]:
        assert self.header is not None  # noqa: S101 - it has been created, or opened
        state = {"errors_file": self.errors_file, "complete": self.is_complete}
        text = json.dumps(self.header._asdict() | state)
        return text, crc32(text.encode())

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        assert self._database is not None  # noqa: S101 - it has been created, or opened
        try:
            return self._database.execute(statement, values)
        except sqlite3.Error as exc:
            raise self._error(exc) from exc

    def _error(self, exc: sqlite3.Error, status: int = 1) -> CommandError:
        if _code_of(exc) == sqlite3.SQLITE_BUSY:
            return CommandError(f"another run is writing {self._name!r}")
        return CommandError(f"{str(self.path)!r} cannot be written: {exc}", status=status)


def to_ranges(numbers: list[int]) -> list[list[int]]:
    """Sort numbers into ranges, each of which leaves out its end."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number:
            ranges[-1][1] += 1
        else:
            ranges.append([number, number + 1])
    return ranges


def _code_of(exc: sqlite3.Error) -> int:
    return getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _checksum_of_row(row: tuple[object, ...], checksum: int) -> int:
    return crc32(repr(row).encode(), checksum)


def _continue(checksum: int, file: IO[bytes], count: int) -> int:
    """Continue a checksum over the next bytes of a file, if there are so many."""
    while count > 0:
        data = file.read(min(count, _CHECKED_BYTES))
        if not data:
            msg = "a file is too short"
            raise ValueError(msg)
        checksum = crc32(data, checksum)
        count -= len(data)
    return checksum
