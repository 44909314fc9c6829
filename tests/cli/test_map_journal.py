"""The journal of ``async-batcher map``: damaged files, and crashes at every point."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher.cli._errors import CommandError
from async_batcher.cli.map import journal
from async_batcher.cli.map.journal import VERSION, Journal, RunHeader
from async_batcher.cli.map.output import FinishedItem, ResumableOutput

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = RunHeader("digest", "module:function", "jsonl", each=False, unordered=True)


def result(item: int) -> bytes:
    """Return the line of an item; lengths vary."""
    return b"%d %s\n" % (item, b"x" * (item % 7))


def is_bad(item: int) -> bool:
    """Return whether an item fails."""
    return item % 5 == 3


def write(files: ResumableOutput, items: list[int]) -> None:
    """Finish items."""
    files.write([FinishedItem(item, result(item), is_bad(item)) for item in items])


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[ResumableOutput]:
    """Open the output in a folder, and close it at the end."""
    with contextlib.closing(ResumableOutput(str(folder / "out"), str(folder / "bad"))) as files:
        yield files


def names(folder: Path) -> set[str]:
    """Return the names of the files in a folder."""
    return {path.name for path in folder.iterdir()}


chunks_of_items = st.permutations(range(20)).flatmap(
    lambda items: st.lists(st.integers(0, 20), max_size=8).map(
        lambda cuts: [
            items[a:b]
            for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 20], strict=True)
            if a < b
        ]
    )
)


FILES = ["out.journal", "out.journal-wal", "out.partial", "bad.partial"]


def damage(data: st.DataObject, folder: Path) -> None:
    """Truncate one of the files, or change a byte in it."""
    file = folder / data.draw(st.sampled_from([name for name in FILES if (folder / name).exists()]))
    content = bytearray(file.read_bytes())
    if not content:
        return
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)


@contextlib.contextmanager
def killed_in_the_end(folder: Path) -> Iterator[ResumableOutput]:
    """Open the output, and leave the files as if the process were killed at the end."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(opened(folder))
        left = {path: path.read_bytes() for path in folder.iterdir()}
    for path, content in left.items():
        path.write_bytes(content)


@pytest.mark.slow
@settings(deadline=None)  # files
@given(chunks_of_items, st.booleans(), st.data())
def test_nothing_is_lost_and_nothing_doubled(
    chunks: list[list[int]], is_killed: bool, data: st.DataObject
) -> None:
    """After any damage, what counts as finished is exported whole, and each item once."""
    written = chunks[: data.draw(st.integers(0, len(chunks)))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (killed_in_the_end if is_killed else opened)(folder) as files:
            files.start(HEADER)
            for chunk in written:
                write(files, chunk)
        if written:
            damage(data, folder)
        with opened(folder) as files:
            try:
                files.resume(HEADER)
            except CommandError as exc:
                # The journal cannot be read at all: nothing is thrown away unless the user says so.
                assert re.search(
                    "is not a journal, or is damaged|is there already|journal of version", str(exc)
                )
                files.start(HEADER, overwrites=True)
            finished = [
                item
                for item in range(20)
                if bytes(files.progress.finished[item : item + 1]) == b"\1"
            ]
            assert files.progress.failed == sum(map(is_bad, finished))
            before = [item for chunk in written for item in chunk][: len(finished)]
            assert sorted(before) == finished
            rest = [item for item in range(20) if item not in finished]
            write(files, rest)
            files.finish()
        assert names(folder) == {"out", "bad"}
        for file, bad in (("out", False), ("bad", True)):
            expected = (result(item) for item in before + rest if is_bad(item) is bad)
            assert (folder / file).read_bytes() == b"".join(expected)


@pytest.mark.slow
@settings(deadline=None)  # files
@given(chunks_of_items, st.data())
def test_a_write_that_was_cut_off_takes_no_other_along(
    chunks: list[list[int]], data: st.DataObject
) -> None:
    """If the log ends at any byte, the complete writes count, and no other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "out.journal-wal"
        with killed_in_the_end(folder) as files:
            files.start(HEADER)
            sizes = [log.stat().st_size]
            for chunk in chunks:
                write(files, chunk)
                sizes.append(log.stat().st_size)
        cut = data.draw(st.integers(sizes[0], sizes[-1]))
        kept = sum(size <= cut for size in sizes) - 1
        os.truncate(log, cut)
        with opened(folder) as files:
            files.resume(HEADER)
            assert files.progress.done == sum(map(len, chunks[:kept]))


@pytest.mark.slow
def test_an_altered_header_of_the_database(tmp_path: Path) -> None:
    """After a change of any byte, the journal is rejected as unreadable, or all of it counts."""
    with opened(tmp_path) as files:
        files.start(HEADER)
        write(files, [0, 2])
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}
    refused = 0
    for place in range(100):
        for path in tmp_path.iterdir():
            path.unlink()
        for path, data in content.items():
            altered = bytearray(data)
            if path.name == "out.journal":
                altered[place] ^= 0xFF
            path.write_bytes(altered)
        with opened(tmp_path) as files:
            try:
                files.resume(HEADER)
                assert files.progress.done == 2
            except CommandError as exc:
                assert re.search("is not a journal, or is damaged|journal of version", str(exc))
                refused += 1
    assert 0 < refused < 100


@pytest.mark.parametrize("column", ["line_number", "failed", "line", "checksum"])
@pytest.mark.parametrize("value", ["1", "9000000000", "x'61'", "'x'", "'4'", "NULL"])
def test_a_write_that_was_altered_does_not_count(tmp_path: Path, column: str, value: str) -> None:
    """A changed row does not count, nor any after it; the rows before it do."""
    with opened(tmp_path) as files:
        files.start(HEADER)
        for item in (0, 2, 4, 6):
            write(files, [item])
    with contextlib.closing(
        sqlite3.connect(tmp_path / "out.journal", isolation_level=None)
    ) as database:
        database.execute(f"UPDATE results SET {column} = {value} WHERE sequence = 2")  # noqa: S608 - of ours
    with opened(tmp_path) as files:
        files.resume(HEADER)
        assert files.progress.done == 2
        files.finish()
    assert (tmp_path / "out").read_bytes() == result(0) + result(2)


@pytest.mark.parametrize("value", ["CAST(description AS BLOB)", "NULL", "5", "'{}'", "'['"])
def test_a_header_that_was_altered(tmp_path: Path, value: str) -> None:
    """The journal counts as damaged, and is left as it is."""
    with opened(tmp_path) as files:
        files.start(HEADER)
        write(files, [0])
    with contextlib.closing(
        sqlite3.connect(tmp_path / "out.journal", isolation_level=None)
    ) as database:
        database.execute(f"UPDATE run SET description = {value}")  # noqa: S608 - of ours
    with opened(tmp_path) as files, pytest.raises(CommandError, match="or is damaged"):
        files.resume(HEADER)
    assert "out.journal" in names(tmp_path)


@pytest.mark.parametrize("sequence", range(4))
def test_a_write_that_is_missing(tmp_path: Path, sequence: int) -> None:
    """Rows after a missing one do not count."""
    with opened(tmp_path) as files:
        files.start(HEADER)
        for item in (0, 2, 4, 6):
            write(files, [item])
    with contextlib.closing(
        sqlite3.connect(tmp_path / "out.journal", isolation_level=None)
    ) as database:
        database.execute("DELETE FROM results WHERE sequence = ?", (sequence,))
    with opened(tmp_path) as files:
        files.resume(HEADER)
        assert files.progress.done == sequence


class _KilledError(BaseException):
    pass


@pytest.mark.parametrize("survived", range(4))
def test_an_end_while_it_is_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    """A run that was killed between two renames is completed by ``--resume``, with nothing redone."""
    steps = iter([None] * survived)

    def step(original: Any) -> Any:
        def killed(*args: Any, **kwargs: Any) -> Any:
            for _ in steps:
                return original(*args, **kwargs)
            raise _KilledError

        return killed

    with opened(tmp_path) as files, monkeypatch.context() as patch:
        files.start(HEADER)
        write(files, list(range(10)))
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, step(getattr(Path, name)))
        if survived < 3:
            with pytest.raises(_KilledError):
                files.finish()
        else:
            files.finish()
            return
    assert "out.journal" in names(tmp_path)
    with opened(tmp_path) as files:
        assert files.conflict is not None
        files.resume(HEADER)
        assert files.progress.done == 10
        files.finish()
    assert names(tmp_path) == {"out", "bad"}
    assert (tmp_path / "out").read_bytes() == b"".join(
        result(i) for i in range(10) if not is_bad(i)
    )
    assert (tmp_path / "bad").read_bytes() == b"".join(result(i) for i in range(10) if is_bad(i))


def test_what_was_put_in_place_and_then_altered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output that was edited after a kill is neither accepted nor overwritten."""

    def killed(_: Path, **__: Any) -> None:
        raise _KilledError

    with opened(tmp_path) as files, monkeypatch.context() as patch:
        files.start(HEADER)
        write(files, [0, 1])
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(_KilledError):
            files.finish()
    (tmp_path / "out").write_text("edited")
    with opened(tmp_path) as files:
        assert files.conflict is not None
    with (
        opened(tmp_path) as files,
        pytest.raises(CommandError, match="has been changed since; --restart"),
    ):
        files.resume(HEADER)
    assert (tmp_path / "out").read_text() == "edited"
    assert names(tmp_path) == {"out", "bad", "out.journal"}


@pytest.mark.parametrize(
    ("header", "difference"),
    [
        (HEADER._replace(input="other"), "the input has changed"),
        (HEADER._replace(target="other:one"), "the function was 'module:function'"),
        (HEADER._replace(format="lines"), "it was run with --format jsonl"),
        (HEADER._replace(each=True), "it was run without --each"),
        (HEADER._replace(unordered=False), "it was run with --unordered"),
        (HEADER._replace(records=True), "it was run without --records"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, header: RunHeader, difference: str) -> None:
    """A run with other arguments is rejected with the difference, and no file changes."""
    with opened(tmp_path) as files:
        files.start(HEADER)
        write(files, [0, 1])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with opened(tmp_path) as files, pytest.raises(CommandError, match=difference):
        files.resume(header)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_journal_of_another_version_is_not_thrown_away(tmp_path: Path) -> None:
    """A journal of another version counts as content, and cannot be resumed."""
    with contextlib.closing(
        sqlite3.connect(tmp_path / "out.journal", isolation_level=None)
    ) as database:
        database.execute(f"PRAGMA application_id = {journal._APPLICATION_ID}")
        database.execute("PRAGMA user_version = 99")
        database.execute("CREATE TABLE other (x)")
    with opened(tmp_path) as files:
        assert f"is a journal of version 99, not {VERSION}; --restart overwrites it" in (
            files.conflict or ""
        )
        with pytest.raises(CommandError, match="is a journal of version 99"):
            files.resume(HEADER)
    assert "out.journal" in names(tmp_path)


def test_a_database_of_another_program_is_not_touched(tmp_path: Path) -> None:
    """Only ``--restart`` overwrites a database that is not a journal."""
    path = tmp_path / "out.journal"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("CREATE TABLE diary (dear)")
    before = path.read_bytes()
    with opened(tmp_path) as files:
        assert "and is not a journal, or is damaged; --restart overwrites it" in (
            files.conflict or ""
        )
        with pytest.raises(CommandError, match="journal' is not a journal"):
            files.resume(HEADER)
    assert path.read_bytes() == before
    assert names(tmp_path) == {"out.journal"}
    with opened(tmp_path) as files:
        files.start(HEADER, overwrites=True)
        write(files, [0])
    with opened(tmp_path) as files:
        files.resume(HEADER)
        assert files.progress.done == 1


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])  # while a run lasts; at its end
def test_a_journal_that_is_read_only_is_not_said_to_be_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """It is good: the message does not lead to ``--restart``, which would throw results away."""
    with opened(tmp_path) as files:
        files.start(HEADER)
        write(files, [0])
    path = tmp_path / "out.journal"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"PRAGMA journal_mode = {mode}")
    connect = sqlite3.connect

    def connect_read_only(name: str, **options: Any) -> sqlite3.Connection:
        uri = f"{name}{'&' if '?' in name else '?'}mode=ro"
        database: sqlite3.Connection = connect(uri, **options)
        return database

    # As for a user without the rights of root.
    monkeypatch.setattr(sqlite3, "connect", connect_read_only)
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    with pytest.raises(CommandError) as caught:
        ResumableOutput(str(tmp_path / "out"), None)
    assert str(caught.value).startswith(f"{str(path)!r} cannot be written: ")
    assert caught.value.status == 2


class _WithoutLocks(sqlite3.Connection):
    """A connection to a database on a file system without locks."""

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        """Fail where SQLite does."""
        if sql == "PRAGMA schema_version":
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_RDLOCK
            raise error
        return super().execute(sql, *args)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal works without locks if the file system has none."""
    connect = sqlite3.connect

    def connect_without_locks(path: str, **options: Any) -> sqlite3.Connection:
        return (
            connect(path, **options)
            if "nolock" in path
            else connect(path, factory=_WithoutLocks, **options)
        )

    monkeypatch.setattr(sqlite3, "connect", connect_without_locks)
    with killed_in_the_end(tmp_path) as files:
        files.start(HEADER)
        write(files, [0, 1])
    with opened(tmp_path) as files:
        files.resume(HEADER)
        assert files.progress.done == 2
        files.finish()
    assert names(tmp_path) == {"out", "bad"}


@pytest.mark.parametrize("statement", ["PRAGMA user_version", "PRAGMA journal_mode = WAL"])
def test_a_run_that_was_killed_before_it_began(tmp_path: Path, statement: str) -> None:
    """An empty journal is no conflict."""
    with contextlib.closing(
        sqlite3.connect(tmp_path / "out.journal", isolation_level=None)
    ) as database:
        database.execute(statement)
        (tmp_path / "out.journal").touch()
    with opened(tmp_path) as files:
        assert files.conflict is None
        files.start(HEADER)
        write(files, [0])
    with opened(tmp_path) as files:
        assert files.conflict is not None


def test_a_journal_is_locked_while_it_is_open(tmp_path: Path) -> None:
    """A second journal cannot be opened; the lock is its own, not that of the partial file."""
    with opened(tmp_path) as files:
        files.start(HEADER)
        write(files, [0])
        other = Journal(tmp_path / "out.journal", "out")
        with pytest.raises(CommandError, match=r"^another run is writing 'out'$"):
            other.open()


def test_errors_may_be_kept_from_now_on_as_long_as_there_were_none(tmp_path: Path) -> None:
    """A run may be resumed with ``--errors`` until an item has failed."""
    with contextlib.closing(ResumableOutput(str(tmp_path / "out"), None)) as files:
        files.start(HEADER)
        files.write([FinishedItem(0, b"0\n", has_failed=False)])
    with opened(tmp_path) as files:
        files.resume(HEADER)
        write(files, [3])
    with (
        contextlib.closing(ResumableOutput(str(tmp_path / "out"), None)) as files,
        pytest.raises(CommandError, match=r"its errors go to '.*bad'"),
    ):
        files.resume(HEADER)
    with opened(tmp_path) as files:
        files.resume(HEADER)
        files.finish()
    assert (tmp_path / "out").read_bytes() == b"0\n"
    assert (tmp_path / "bad").read_bytes() == result(3)


def test_errors_that_were_to_be_kept_elsewhere(tmp_path: Path) -> None:
    """The errors file may change until an item has failed; the old one leaves nothing."""
    with opened(tmp_path) as files:
        files.start(HEADER)
        files.write([FinishedItem(0, b"0\n", has_failed=False)])
    with contextlib.closing(
        ResumableOutput(str(tmp_path / "out"), str(tmp_path / "worse"))
    ) as files:
        files.resume(HEADER)
        files.finish()
    assert names(tmp_path) == {"out", "worse"}


def test_two_runs_never_write_the_same(tmp_path: Path) -> None:
    """A second run is rejected while the first one has the files open."""
    with opened(tmp_path) as files:
        files.start(HEADER)
        with pytest.raises(CommandError, match="another run is writing"), opened(tmp_path):
            pass
        write(files, [0])
    with opened(tmp_path) as files:
        assert files.conflict is not None


def test_nothing_finished_leaves_nothing(tmp_path: Path) -> None:
    """A run that finished nothing, or was rejected, leaves no files."""
    with opened(tmp_path) as files:
        files.start(HEADER)
    assert names(tmp_path) == set()
    with pytest.raises(CommandError, match="there is no such folder"):
        ResumableOutput(str(tmp_path / "none" / "out"), None)
    with pytest.raises(CommandError, match="is a directory"):
        ResumableOutput(str(tmp_path), None)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files as Linux lists them")
@pytest.mark.parametrize("finishes", [True, False])
def test_a_system_that_keeps_files_in_place_while_they_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finishes: bool
) -> None:
    """Files are renamed and removed as usual if that needs them closed, as on Windows."""
    replace, unlink = Path.replace, Path.unlink

    def check(path: Path) -> None:
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # that of the listing
                if descriptor.readlink() == path:
                    raise PermissionError

    def replace_if_closed(path: Path, target: Path) -> Path:
        check(path)
        return replace(path, target)

    def unlink_if_closed(path: Path, *, missing_ok: bool = False) -> None:
        check(path)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "replace", replace_if_closed)
    monkeypatch.setattr(Path, "unlink", unlink_if_closed)
    with opened(tmp_path) as files:
        files.start(HEADER)
        if finishes:
            write(files, [0, 3])
            files.finish()
    assert names(tmp_path) == ({"out", "bad"} if finishes else set())


def test_a_link_stays_and_leads_to_the_output(tmp_path: Path) -> None:
    """A symbolic link is kept, and its target is replaced."""
    (tmp_path / "link").symlink_to("there")
    with contextlib.closing(ResumableOutput(str(tmp_path / "link"), None)) as files:
        files.start(HEADER)
        files.write([FinishedItem(0, b"0\n", has_failed=False)])
        files.finish()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_bytes() == b"0\n"


def test_results_that_cannot_be_resumed_are_in_the_partial_file(tmp_path: Path) -> None:
    """If the input cannot be read again, an interrupted run leaves its results, and says where."""
    header = HEADER._replace(input="")
    with opened(tmp_path) as files:
        files.start(header)
        write(files, [0, 3])
    (tmp_path / "out.partial").unlink()
    for _ in range(2):
        with opened(tmp_path) as files:
            assert "out.partial', and --restart throws them away" in (files.conflict or "")
        assert (tmp_path / "out.partial").read_bytes() == result(0)
    assert (tmp_path / "bad.partial").read_bytes() == result(3)
    with opened(tmp_path) as files:
        files.start(HEADER, overwrites=True)
    assert names(tmp_path) == set()
