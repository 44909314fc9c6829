"""The command ``async-batcher map --records``: results that can be matched with items."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest

import async_batcher
from async_batcher.cli._worker_function import ItemFailure
from async_batcher.cli.map.journal import RunHeader
from async_batcher.cli.map.lines import failure_record, result_record
from async_batcher.cli.map.output import FinishedItem, ResumableOutput, StreamOutput
from tests.support.map_command import lines_of, run

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="pipes, signals and terminals of POSIX"
)

PACKAGE = str(Path(async_batcher.__file__).parent)


@pytest.mark.slow
@pytest.mark.usefixtures("work")
def test_a_record_for_each_item() -> None:
    """A record has the line of its item and the result, or the error with its traceback."""
    given = '"a"\n\n"raise"\n[1,\n"set"\n"b"\n'
    status, output, said = run("work:poison", "--each", "--isolate", "--records", given=given)
    assert (status, said) == (1, "async-batcher: 3 of 5 items failed\n")
    records = [json.loads(line) for line in output.splitlines()]
    assert records[::4] == [{"line": 1, "result": "a"}, {"line": 6, "result": "b"}]
    assert [(record["line"], record["error"].partition(":")[0]) for record in records[1:4]] == [
        (3, "KeyError"),
        (4, "not JSON"),
        (5, "the result is not JSON"),
    ]
    assert all(record.keys() == {"line", "error", "traceback"} for record in records[1:4])
    assert "in poison\n" in records[1]["traceback"]
    assert PACKAGE not in records[1]["traceback"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--unordered"]])
def test_records_whose_errors_go_to_their_own_file(work: Path, options: list[str]) -> None:
    """With ``--errors``, records are of the other items only."""
    arguments = ["--isolate", "--errors", "bad", "--records", "-o", "out", *options]
    status, _, said = run("work:poison", "--each", *arguments, given='"a"\n"raise"\n"b"\n')
    assert (status, said) == (1, "async-batcher: 1 of 3 items failed; see bad\n")
    records = sorted(lines_of(work / "out"), key=lambda record: record["line"])
    assert records == [{"line": 1, "result": "a"}, {"line": 3, "result": "b"}]
    assert [(error["line"], error["item"]) for error in lines_of(work / "bad")] == [(2, "raise")]


@pytest.mark.slow
def test_records_are_the_default_for_files(work: Path) -> None:
    """A record of a file has its path; ``--no-records`` writes results alone."""
    (work / "list").write_text("\nnone\nwork.py\n")
    arguments = ["work:size", "list", "--format", "files", "--isolate", "-o", "out"]
    size = (work / "work.py").stat().st_size
    status, _, said = run(*arguments)
    assert (status, said) == (1, "async-batcher: 1 of 2 items failed; see out\n")
    error = "cannot be read: No such file or directory"
    assert lines_of(work / "out") == [
        {"line": 2, "path": "none", "error": error, "traceback": ""},
        {"line": 3, "path": "work.py", "result": size},
    ]
    status, _, said = run(*arguments, "--no-records")
    assert (status, lines_of(work / "out")) == (1, [size])
    assert said == f"async-batcher: none: {error}\nasync-batcher: 1 of 2 items failed\n"


def test_a_path_that_is_not_utf_8() -> None:
    """It comes back by `os.fsencode`, from records of results and of failures."""
    raw = b'a"\xff\xc3\xa9'
    for record in (
        result_record((7, raw), b"[1, 2]", "files"),
        failure_record((7, raw), ItemFailure("wrong"), "files"),
    ):
        assert (record.count(b"\n"), record[-1:]) == (1, b"\n")
        value = json.loads(record)
        assert (value.pop("line"), os.fsencode(value.pop("path"))) == (7, raw)
        assert value in ({"result": [1, 2]}, {"error": "wrong", "traceback": ""})


@pytest.mark.parametrize("errors", [None, "bad"])
@pytest.mark.parametrize("is_stream", [True, False])
def test_where_lines_of_failed_items_go(
    tmp_path: Path, is_stream: bool, errors: str | None
) -> None:
    """To the errors file if there is one, otherwise to the output, in the order of the items."""
    items = [FinishedItem(n, b"%d\n" % n, has_failed=n % 2 == 0) for n in range(1, 5)]
    path = None if errors is None else str(tmp_path / errors)
    output: ResumableOutput | StreamOutput
    with (tmp_path / "out").open("wb", buffering=0) as file:
        if is_stream:
            output = StreamOutput(file, "out", path)
            output.write(items, contextlib.nullcontext)
        else:
            output = ResumableOutput(str(tmp_path / "out"), path)
            output.start(RunHeader("", "work:mean", "jsonl", each=False, unordered=False))
            output.write(items)
        output.finish()
        output.close()
    assert (tmp_path / "out").read_bytes() == (b"1\n3\n" if errors else b"1\n2\n3\n4\n")
    assert path is None or Path(path).read_bytes() == b"2\n4\n"


def test_records_that_failed_and_errors_kept_later() -> None:
    """Failures that are in the output cannot be moved to an errors file by a later run."""
    header = RunHeader("", "work:mean", "jsonl", each=False, unordered=False, records=True)
    other = header._replace(errors="bad")
    assert header.difference(other, has_failures=True) == "its errors are in the output"
    assert header.difference(other, has_failures=False) is None
