"""Inputs and files of any bytes: an error of one line, never a wrong result."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from async_batcher.cli._errors import CommandError
from async_batcher.cli._items import Format, item_label, open_items, split_lines
from async_batcher.cli._worker_function import ItemFailure, decode, encode
from async_batcher.cli.map.completed import CompletedRun, find_completed
from async_batcher.cli.map.fingerprint import read_fingerprint
from async_batcher.cli.map.lines import error_line, failure_record, result_record
from tests.cli.test_map_journal import HEADER, is_bad, opened, result, write
from tests.support.damage import damaged, with_one_byte_changed

FORMATS: tuple[Format, ...] = get_args(Format)
# Bytes that mean something to a reader, among others.
PIECES = st.sampled_from(
    [
        *(b"\n", b"\r", b"\r\n", b"\0", b" ", b"\x0c", b"\x1c", b"\x85", b"\xff"),
        *(b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xe2\x80\xa8"),  # a mark, a surrogate, U+2028
        *(b'"', b"{", b"[" * 5000, b"1e999", b"NaN", b"9" * 5000, b'"\\ud800"'),
    ]
)
CONTENT = st.lists(PIECES | st.binary(max_size=20), max_size=12).map(b"".join)


def pieces_of(content: bytes, steps: list[int]) -> list[bytes]:
    """Cut it into pieces of those sizes, which repeat."""
    pieces = []
    place = turn = 0
    while place < len(content):
        step = steps[turn % len(steps)]
        pieces.append(content[place : place + step])
        place += step
        turn += 1
    return pieces


@given(CONTENT, st.lists(st.integers(1, 20), min_size=1, max_size=6))
@example(b"a\r\r\nb\r\r", [1])
def test_lines_of_any_bytes(content: bytes, steps: list[int]) -> None:
    """They are what LF separates, wherever a read ends; nothing else ends a line."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    expected = [line.removesuffix(b"\r") for line in lines]
    assert list(split_lines(pieces_of(content, steps))) == expected


@given(CONTENT, st.sampled_from(FORMATS), st.text(max_size=20))
def test_the_lines_that_are_written(content: bytes, form: Format, error: str) -> None:
    """Each is one line of JSON with the number of its item, of any item."""
    for item in enumerate(split_lines([content]), 1):
        if form != "lines" and not item[1].strip():
            continue
        value = decode(item[1], form)
        if isinstance(value, ItemFailure):
            assert value.error
            assert "\n" not in value.error
        elif form == "lines":
            assert value.encode() == item[1]
        result = encode(value)
        lines = [error_line(item, ItemFailure(error), form)]
        lines.append(failure_record(item, ItemFailure(error), form))
        if isinstance(result, bytes):
            lines.append(result_record(item, result, form))
        for line in lines:
            assert line.endswith(b"\n")
            assert line.count(b"\n") == 1
            assert json.loads(line)["line"] == item[0]
        assert all(json.loads(line)["error"] == error for line in lines[:2])
        assert item_label(item, form)


@settings(max_examples=50)
@given(CONTENT, st.data(), st.sampled_from(FORMATS))
def test_a_fingerprint_of_any_bytes(content: bytes, data: st.DataObject, form: Format) -> None:
    """It counts the items, and changes with the content."""
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        path.write_bytes(content)
        before = read_fingerprint(file.name, form)
        assert before.items == len(list(open_items(file.name, form)))
        assert read_fingerprint(file.name, form) == before
        changed = data.draw(damaged(content))
        path.write_bytes(changed)
        assert (read_fingerprint(file.name, form).digest == before.digest) == (changed == content)


@settings(max_examples=50)
@given(st.data())
def test_a_damaged_mark_of_a_complete_run(data: st.DataObject) -> None:
    """The run is not known, or what is said of it is true."""
    run = CompletedRun(HEADER, done=1200, failed=17)
    with tempfile.NamedTemporaryFile() as file:
        run.mark(file.fileno())
        path = Path(file.name)
        if find_completed(path) is None:
            pytest.skip("no extended attributes")
        mark = os.getxattr(path, "user.async_batcher.run")
        changed = data.draw(damaged(mark) | st.binary(max_size=100) | st.just(b"[" * 60_000))
        with contextlib.suppress(OSError):  # it is larger than the file system allows
            os.setxattr(path, "user.async_batcher.run", changed)
        assert find_completed(path) in (None, run)


# The journal.

FILES = ["out.journal", "out.journal-wal", "out.journal-shm", "out.partial", "bad.partial"]


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.booleans(), st.data())
def test_any_bytes_in_the_files_of_a_run(
    sizes: list[int], is_killed: bool, data: st.DataObject
) -> None:
    """A resumed run has all items, each once, or is rejected with the reason."""
    count = sum(sizes) + 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        left: dict[Path, bytes] = {}
        with opened(folder) as output:
            output.start(HEADER)
            done = 0
            for size in sizes:
                write(output, list(range(done, done + size)))
                done += size
            if is_killed:
                left = {path: path.read_bytes() for path in folder.iterdir()}
        for path, content in left.items():
            path.write_bytes(content)
        journal = folder / "out.journal"
        if data.draw(st.booleans()):
            journal.write_bytes(data.draw(with_one_byte_changed(journal.read_bytes())))
        else:
            names = data.draw(st.sets(st.sampled_from(FILES), min_size=1))
            for path in sorted(folder / name for name in names):
                content = path.read_bytes() if path.exists() else b""
                path.write_bytes(data.draw(damaged(content) | st.binary(max_size=200)))
        try:
            with opened(folder) as output:
                output.resume(HEADER)
                finished = [
                    item
                    for item in range(count)
                    if bytes(output.progress.finished[item : item + 1]) == b"\1"
                ]
                assert finished == list(range(len(finished))), (
                    "the first ones, as they were written"
                )
                assert output.progress.done == len(finished)
                assert output.progress.failed == sum(map(is_bad, finished))
                write(output, list(range(len(finished), count)))
                output.finish()
        except CommandError as exc:
            reasons = "is not a journal, or is damaged|is there already|journal of version"
            assert re.search(reasons, str(exc))
            return
        for file, bad in (("out", False), ("bad", True)):
            expected = b"".join(result(item) for item in range(count) if is_bad(item) is bad)
            assert (folder / file).read_bytes() == expected
