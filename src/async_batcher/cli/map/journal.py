"""The journal of a run: an SQLite database with all results so far, from which a run is resumed.

::

    run      one row: the arguments of the command, and whether the output has been exported
    results  one row for each finished item: its place in the order of writing, from 0; the number
             of its line in the input; whether it failed; its line in the output or in the errors
             file, which may be empty; a checksum

Rules:

- A write is one transaction. An item is finished when its row is committed, so a crash leaves a
  journal that is true.
- A row does not count if its checksum does not match, nor does any row after it: the rows that
  count are in the order of writing.
- The database is locked for as long as it is open, unless its file system has no locks.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from async_batcher.cli._errors import CommandError
from async_batcher.cli.map.atomic_file import change_then_close

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

VERSION = 3

_APPLICATION_ID = int.from_bytes(b"abjo")  # in the database's header
_SCHEMA = (
    "PRAGMA journal_mode = WAL",
    "BEGIN",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
    "CREATE TABLE run (description, checksum)",
    "CREATE TABLE results (sequence INTEGER PRIMARY KEY, line_number, failed, line, checksum)",
)
_CONNECTION = (
    "PRAGMA locking_mode = EXCLUSIVE",
    "PRAGMA synchronous = NORMAL",  # readable after a power failure
    # Pages, some 64 MB. A checkpoint waits for the disk, and the event loop for the checkpoint.
    "PRAGMA wal_autocheckpoint = 16384",
    "PRAGMA schema_version",  # the first read takes the lock
)
_LINES_AT_ONCE = 64  # as many results as a batch has by default

# Result codes of SQLite for a file that is not a database, or a damaged one.
_UNREADABLE = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class RunHeader(NamedTuple):
    """The arguments of a run, which must be the same when it is resumed."""

    input: str  # a digest of it; empty if it cannot be read twice
    target: str
    format: str
    each: bool
    unordered: bool
    errors: str | None = None  # path of the file; it may change until an item has failed
    records: bool = False

    def difference(self, other: RunHeader, *, has_failures: bool) -> str | None:
        """Say how another run differs. None: it can go on after this one."""
        if self.input != other.input:
            return "the input has changed"
        if self.target != other.target:
            return f"the function was {self.target!r}"
        if self.format != other.format:
            return f"it was run with --format {self.format}"
        for name in ("each", "unordered", "records"):
            if (was := getattr(self, name)) != getattr(other, name):
                return f"it was run {'with' if was else 'without'} --{name}"
        if has_failures and self.errors != other.errors:
            if self.errors is not None:
                return f"its errors go to {self.errors!r}"
            return "its errors are in the output" if self.records else "its errors were not kept"
        return None


class RunProgress:
    """How far a run is.

    Attributes:
        finished: 1 at the line number of each finished item. Items beyond its end are not finished.
        done: Number of finished items.
        failed: Number of finished items that failed.
    """

    def __init__(self) -> None:
        self.finished = bytearray()
        self.done = self.failed = 0

    def finish(self, line_number: int, failed: int) -> None:
        if line_number >= len(self.finished):
            self.finished.extend(bytes(line_number + 1 - len(self.finished)))
        self.finished[line_number] = 1
        self.done += 1
        self.failed += failed


class Journal:
    """A journal at ``path``, for an output that the user calls ``name``.

    Attributes:
        header: The header of the run. None: there is no journal, or it cannot be read.
        progress: The items that the journal has results of.
        problem: Why a file at the path cannot be used. None: it can, or there is none.
        is_exported: Whether both files have been written, and only need to be renamed.
    """

    header: RunHeader | None
    problem: str | None

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self._name = name
        self._database: sqlite3.Connection | None = None
        self._forget()

    @property
    def files(self) -> list[Path]:
        """The database, and what SQLite may have beside it."""
        return [
            self.path.with_name(self.path.name + end) for end in ("", "-wal", "-shm", "-journal")
        ]

    @property
    def has_content(self) -> bool:
        """Whether there is anything to lose."""
        return self.problem is not None or self.progress.done > 0

    def open(self) -> None:
        """Open and read the journal if there is one."""
        while self._database is None and self.path.exists():
            try:
                self._read(self._connect())
            except (ValueError, TypeError, sqlite3.Error) as exc:
                self.close()
                if isinstance(exc, sqlite3.Error) and not self._is_damage(exc):
                    raise self._error(exc, status=2) from exc
                self._forget()
                self.problem = "is not a journal, or is damaged"
                return
            if not self.path.exists():  # another run has finished, and removed it meanwhile
                self.close()
                self._forget()

    def create(self, header: RunHeader) -> None:
        """Begin a journal where there is none."""
        self.header = header
        try:
            database = self._connect()
            with database:  # commits
                for statement in _SCHEMA:
                    database.execute(statement)
                database.execute("INSERT INTO run VALUES (?, ?)", self._description())
        except sqlite3.Error as exc:
            raise self._error(exc) from exc

    def write(self, lines: Iterable[tuple[int, bytes, bool]]) -> None:
        """Commit items: the line number, the line, and whether it failed, of each."""
        rows = []
        for sequence, (line_number, line, has_failed) in enumerate(lines, self.progress.done):
            row = (sequence, line_number, int(has_failed), line)
            rows.append((*row, _checksum(*row)))
        with self._transaction() as database:
            database.executemany("INSERT INTO results VALUES (?, ?, ?, ?, ?)", rows)
        for _, line_number, failed, _, _ in rows:
            self.progress.finish(line_number, failed)

    def lines(self, *, failed: bool | None = None) -> Iterator[bytes]:
        """Read the lines of the items that failed, of the others, or of all, a few at a time."""
        with self._transaction() as database:
            query = "SELECT line FROM results WHERE failed = ifnull(?, failed) ORDER BY sequence"
            rows = database.execute(query, (failed,))
            while some := rows.fetchmany(_LINES_AT_ONCE):
                yield b"".join(line for (line,) in some)

    def update(self, header: RunHeader, *, is_exported: bool) -> None:
        """Commit the header, and whether the files are written; drop rows that do not count."""
        self.header, self.is_exported = header, is_exported
        with self._transaction() as database:
            database.execute("DELETE FROM results WHERE sequence >= ?", (self.progress.done,))
            statement = "UPDATE run SET (description, checksum) = (?, ?)"
            database.execute(statement, self._description())

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

        def unlink() -> None:
            for path in files:
                path.unlink(missing_ok=True)

        change_then_close(unlink, self.close)
        self._forget()

    def close(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):  # a full disk
                database.close()

    def _forget(self) -> None:
        self.header = None
        self.progress = RunProgress()
        self.problem = None
        self.is_exported = False

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
        for statement in _CONNECTION:
            self._database.execute(statement)
        return self._database

    def _read(self, database: sqlite3.Connection) -> None:
        """Raise ValueError or sqlite3.Error if the file is not a journal, or damaged."""
        names = ("application_id", "user_version", "schema_version", "quick_check")
        values = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in names]
        application, version, schema, check = values
        if application == schema == 0:
            return  # a run was killed before it began
        if application != _APPLICATION_ID or check != "ok":
            raise ValueError
        if version != VERSION:
            self.problem = f"is a journal of version {version}, not {VERSION}"
            return
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("DELETE FROM run WHERE 0")  # fails if it cannot be written
        ((text, checksum),) = database.execute("SELECT description, checksum FROM run").fetchall()
        if type(text) is not str or crc32(text.encode()) != checksum:
            raise ValueError
        description = json.loads(text)
        self.is_exported = description.pop("exported")
        self.header = RunHeader(**description)
        rows = database.execute("SELECT * FROM results ORDER BY sequence")
        for sequence, (*row, checksum) in enumerate(rows):
            if sequence != row[0] or type(row[3]) is not bytes or _checksum(*row) != checksum:
                break
            self.progress.finish(row[1], row[2])

    def _is_damage(self, exc: sqlite3.Error) -> bool:
        code = _code_of(exc)
        # A file that may be written is read-only to SQLite if a damaged header says so.
        is_altered = code == sqlite3.SQLITE_READONLY and os.access(self.path, os.W_OK)
        return is_altered or code in _UNREADABLE

    def _description(self) -> tuple[str, int]:
        assert self.header is not None  # noqa: S101 - it has been created, or opened
        text = json.dumps({**self.header._asdict(), "exported": self.is_exported})
        return text, crc32(text.encode())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        assert self._database is not None  # noqa: S101 - it has been created, or opened
        try:
            with self._database as database:  # commits, or rolls back
                database.execute("BEGIN")
                yield database
        except sqlite3.Error as exc:
            raise self._error(exc) from exc

    def _error(self, exc: sqlite3.Error, status: int = 1) -> CommandError:
        if _code_of(exc) == sqlite3.SQLITE_BUSY:
            return CommandError(f"another run is writing {self._name!r}")
        return CommandError(f"{str(self.path)!r} cannot be written: {exc}", status=status)


def _code_of(exc: sqlite3.Error) -> int:
    return getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _checksum(sequence: int, line_number: int, failed: int, line: bytes) -> int:
    return crc32(line, crc32(f"{sequence!r} {line_number!r} {failed!r}".encode()))
