"""The command ``async-batcher map``: results, failures, rejected arguments and progress."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher.cli import _items
from async_batcher.cli._terminal import progress_line
from async_batcher.cli._worker_function import EACH_HINT
from async_batcher.cli.map.output import FinishedItem
from tests.support.map_command import (
    command,
    environment,
    files_in,
    interrupt_run,
    lines_of,
    numbers,
    run,
    run_here,
)
from tests.support.terminal import OnTerminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="pipes, signals and terminals of POSIX"
)


# What it does.


@pytest.mark.slow
def test_lines_of_json_through_a_pipe(work: Path) -> None:
    """Each item gives one line, in order; printed text and progress stay out of the output."""
    given = "\ufeff1\r\n\r\n2\n" + "".join(f"{n}\n" for n in range(3, 400)) + "400"
    status, output, said = run("work:double", "--max-batch-size", 7, given=given)
    assert (status, [json.loads(line) for line in output.splitlines()]) == (
        0,
        [2 * n for n in range(1, 401)],
    )
    assert said.replace("a word on the way", "").strip() == ""
    assert files_in(work) == set()


@pytest.mark.slow
def test_the_files_of_a_directory(work: Path) -> None:
    """Each file is an item; the console script imports from the current folder, not from its own."""
    (work / "data").mkdir()
    for n in range(3):
        (work / "data" / f"{n}.bin").write_bytes(bytes(n))
    (work / "elsewhere").mkdir()
    script = work / "elsewhere" / "async-batcher"
    script.write_text("import sys\nfrom async_batcher.cli import main\nsys.exit(main())")
    arguments = [
        "map",
        "work:size",
        "--format",
        "files",
        "data",
        "-o",
        "sizes",
        "--loop",
        "asyncio",
    ]
    subprocess.run([sys.executable, str(script), *arguments], env=environment(), check=True)
    assert lines_of(work / "sizes") == [
        {"line": n + 1, "path": f"data/{n}.bin", "result": n} for n in range(3)
    ]
    assert files_in(work) == {"data", "elsewhere", "sizes"}


@pytest.mark.slow
def test_lines_of_text_and_a_batcher(work: Path) -> None:
    """A batcher's function and set-up are used; a failed set-up ends the run."""
    assert run("work:words", "--format", "lines", given="one two\n\nthree") == (0, "2\n0\n1\n", "")
    status, output, said = run("work:broken", "--format", "lines", "--isolate", given="one two")
    assert (status, output) == (1, "")
    assert "a worker cannot be set up: " in said
    assert said.count("\n") == 1
    assert files_in(work) == set()


@pytest.mark.slow
def test_a_set_up_that_tears_down(work: Path) -> None:
    """The tear-down of a generator set-up runs when the worker stops."""
    assert run("work:with_a_model", "--workers", 1, given="1\n2\n") == (0, "1\n2\n", "")
    assert (work / "torn_down").read_text() == "a model"


@pytest.mark.slow
def test_bad_items_fail_alone(work: Path) -> None:
    """Invalid lines and results, crashes, timeouts and exceptions are reported with their lines."""
    items = ["a", "die", "b", "raise", "hang", "set", "c"]
    given = "\n".join(["", *map(json.dumps, items), "[1,", "NaN", '"d"'])
    status, _, said = run(
        "work:poison",
        "--each",
        "--isolate",
        "--errors",
        "bad",
        "-o",
        "out",
        "--timeout",
        3,
        "--max-batch-size",
        4,
        given=given,
    )
    assert (status, said) == (1, "async-batcher: 6 of 10 items failed; see bad\n")
    assert (work / "out").read_text() == '"a"\n"b"\n"c"\n"d"\n'
    bad = lines_of(work / "bad")
    assert [(error["line"], error["item"], error["error"].partition(":")[0]) for error in bad] == [
        (3, "die", "WorkerDiedError"),
        (5, "raise", "KeyError"),
        (6, "hang", "BatchTimeoutError"),
        (7, "set", "the result is not JSON"),
        (9, "[1,", "not JSON"),
        (10, "NaN", "the result is not JSON"),
    ]
    assert "in poison" in bad[1]["traceback"]
    assert files_in(work) == {"out", "bad"}


@pytest.mark.slow
def test_the_first_failure_ends_the_run_which_goes_on_with_resume(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished results stay, and only the same run over the same input may continue them."""
    source = numbers(work, 20)
    arguments = ("work:fail_at_5", source, "-o", "out", "--max-batch-size", 2)
    status, _, said = run(*arguments)
    assert status == 1
    assert said.startswith(
        "async-batcher: line 5, with its batch: ValueError: five; --isolate finds the failing item; "
        "4 items are finished and kept in 'out.journal'; --resume goes on from there\n"
    )
    assert files_in(work) == {"out.journal"}

    finished = "a run that was interrupted has finished 4 items of 'out': --resume goes on after them, --restart begins anew"
    assert run_here(capsys, *arguments) == (2, f"async-batcher: {finished}\n")
    refusal = "async-batcher: 'out' cannot be resumed: {}; --restart begins anew\n"
    assert run_here(capsys, "work:size", *arguments[1:], "--resume") == (
        2,
        refusal.format("the function was 'work:fail_at_5'"),
    )
    with (work / source).open("a") as file:
        file.write("20\n")
    assert run_here(capsys, *arguments, "--resume") == (2, refusal.format("the input has changed"))
    numbers(work, 20)

    status, _, said = run(*arguments, "--resume", "--isolate")
    assert status == 1
    assert said.startswith("async-batcher: line 6: ValueError: five\n")
    assert said.endswith("\nasync-batcher: 1 of 20 items failed\n")
    assert lines_of(work / "out") == [n for n in range(20) if n != 5]
    assert files_in(work) == {"out"}


@pytest.mark.slow
def test_beginning_anew(work: Path) -> None:
    """``--restart`` discards finished results; ``--resume`` starts a run if there are none."""
    source = numbers(work, 5)
    interrupt_run(source, FinishedItem(1, b'"old"\n', has_failed=False))
    assert run("work:mean", source, "-o", "out", "--restart") == (0, "", "")
    assert (work / "out").read_text() == "5\n" * 5
    (work / "out").unlink()
    assert run("work:mean", source, "-o", "out", "--resume") == (0, "", "")
    assert (work / "out").read_text() == "5\n" * 5
    assert files_in(work) == {"out"}


def test_nothing_is_left_to_do(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with nothing left to process writes its output without starting a worker."""
    source = numbers(work, 2)
    interrupt_run(
        source, FinishedItem(2, b"1\n", has_failed=False), FinishedItem(1, b"", has_failed=True)
    )
    assert run_here(capsys, "work:mean", source, "-o", "out", "--resume") == (
        1,
        "async-batcher: 1 of 2 items failed\n",
    )
    assert (work / "out").read_text() == "1\n"
    numbers(work, 0)
    assert run_here(capsys, "work:mean", source, "-o", "out", "--isolate", "--errors", "bad") == (
        0,
        "",
    )
    assert (work / "out").read_text() == (work / "bad").read_text() == ""
    assert files_in(work) == {"out", "bad"}


# What it says of the first failure.


@pytest.mark.slow
@pytest.mark.usefixtures("work")
def test_the_first_failure_of_a_run_has_its_traceback() -> None:
    """It is below the line that reports the failure, once, and only of user code."""
    status, output, said = run("work:fail_loudly", "--each", "--isolate", given="7\n8\n")
    assert (status, output) == (1, "")
    first, *traceback, second, summary = said.splitlines()
    assert first == "async-batcher: line 1: ValueError: 7"
    assert (traceback[0], traceback[-1]) == ("Traceback (most recent call last):", "ValueError: 7")
    assert [line for line in traceback if "  File " in line] == [
        line for line in traceback if line.endswith("in fail_loudly")
    ]
    assert second == "async-batcher: line 2: ValueError: 8"
    assert summary == "async-batcher: 2 of 2 items failed"


@pytest.mark.slow
@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("options", [[], ["--each"]])
def test_a_failure_that_ends_the_run_has_its_traceback(options: list[str]) -> None:
    """It is below the message, whether a batch or an item failed, and only of user code."""
    status, _, said = run("work:fail_loudly", *options, given="7\n")
    assert status == 1
    assert said.startswith("async-batcher: line 1: ValueError: ")
    assert said.splitlines()[1] == "Traceback (most recent call last):"
    assert said.count("  File ") == said.count("in fail_loudly\n") == 1


@pytest.mark.slow
def test_a_function_over_one_item_that_gets_a_list(work: Path) -> None:
    """The message proposes ``--each``, not isolation, with which each item would fail."""
    (work / "here.py").write_text("def f(n):\n    return n + 1\n")
    status, _, said = run("here:f", given="1\n2\n")
    assert status == 1
    assert said.splitlines()[0].endswith(f"; {EACH_HINT}")
    assert "--isolate" not in said


# What it does not.


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("", "the following arguments are required: MODULE:FUNCTION"),
        ("work:size in.jsonl more", "unrecognized arguments: more"),
        ("work:size none", "there is no file 'none'"),
        ("work:size .", "'.' is a directory; --format files"),
        ("work:size in.jsonl --format csv", "--format: invalid choice: 'csv'"),
        ("work:size in.jsonl --workers 0", "--workers: must be a number from 1, not '0'"),
        (
            "work:size in.jsonl --timeout 0",
            "--timeout: must be a number of seconds, more than 0, not '0'",
        ),
        ("work:size in.jsonl --timeout soon", "--timeout: must be a number of seconds, not 'soon'"),
        (
            "work:size in.jsonl --max-queue-time -1",
            "--max-queue-time: must be a number of seconds, not '-1'",
        ),
        (
            "work:size in.jsonl --max-queue-time nan",
            "--max-queue-time: must be a number of seconds, not 'nan'",
        ),
        ("work:size in.jsonl --errors bad", "--errors needs --isolate"),
        (
            "work:size in.jsonl --isolate --errors /dev/null",
            "--errors needs a file, not '/dev/null'",
        ),
        ("work:size in.jsonl --isolate --errors -", "--errors needs a file, not '-'"),
        ("work:size in.jsonl -o out --resume --restart", "not allowed with argument --resume"),
        ("work:size in.jsonl --resume", "--resume needs -o OUTPUT"),
        ("work:size in.jsonl --restart -o /dev/null", "--restart needs -o OUTPUT, a file"),
        ("work:size -o out --resume", "--resume needs INPUT"),
        ("work:size begun -o out --resume", "'begun' is not a regular file"),
        ("work:size in.jsonl -o .", "'.' is a directory"),
        ("work:size in.jsonl -o none/out", "'none/out' cannot be written: there is no such folder"),
        (
            "work:size in.jsonl -o out --isolate --errors none/bad",
            "'none/bad' cannot be written: there is no such folder",
        ),
        ("work:size in.jsonl -o ./in.jsonl", "'in.jsonl' is the input, and would be written to"),
        ("work:size x.partial -o x", "'x.partial' is the input, and would be written to"),
        ("work:size x.journal -o x --restart", "'x.journal' is the input, and would be written to"),
        (
            "work:size in.jsonl -o out --isolate --errors ./out",
            "results and errors would both be written to",
        ),
        (
            "work:size in.jsonl -o out --isolate --errors out.partial",
            "results and errors would both be written to",
        ),
        (
            "work:size in.jsonl -o out --isolate --errors out.journal",
            "results and errors would both be written to",
        ),
        (
            "work:size in.jsonl -o out.partial --isolate --errors out",
            "results and errors would both be written to",
        ),
        ("work:size in.jsonl -o out/", "'out/' is a directory"),
        (f"work:size {'n' * 300}", f"{'n' * 300}'"),
        (f"work:size in.jsonl -o {'n' * 300}", "File name too long"),
        ("work:size . --format files -o out", "would be in the input directory"),
        ("work:siez in.jsonl -o out", "'work' has no 'siez'; did you mean 'size'?"),
        (
            "none:f in.jsonl -o out",
            "module 'none' cannot be imported: No module named 'none' (tried: ",
        ),
        (
            "wrong.py:f in.jsonl -o out",
            "module 'wrong' cannot be imported: ZeroDivisionError: division by zero (",
        ),
        ("work:size in.jsonl -o out --loop curio", "--loop: invalid choice: 'curio'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    work: Path, capsys: pytest.CaptureFixture[str], arguments: str, complaint: str
) -> None:
    """Invalid requests exit with status 2 before anything runs, and leave no file."""
    numbers(work, 3)
    (work / "wrong.py").write_text("1 / 0")
    for other in ("x.partial", "x.journal"):
        (work / other).write_text("not to be lost\n")
    status, said = run_here(capsys, *arguments.split())
    assert status == 2
    assert said.startswith("async-batcher: ")
    assert complaint in said
    assert said.count("\n") == 1
    assert files_in(work) == {"wrong.py", "x.partial", "x.journal"}
    assert {(work / other).read_text() for other in ("x.partial", "x.journal")} == {
        "not to be lost\n"
    }
    assert lines_of(work / "in.jsonl") == [0, 1, 2]


def test_uvloop_is_asked_for_but_not_installed(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the package to install."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    status, said = run_here(capsys, "work:size", numbers(work, 1), "--loop", "uvloop")
    assert status == 2
    assert "uvloop is not installed; pip install" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stream", "said"),
    [("0<&-", "standard input is closed"), ("1>&-", "standard output is closed")],
)
def test_a_stream_that_is_closed(work: Path, stream: str, said: str) -> None:
    """A closed standard stream is reported; a file that gets its number is not used instead."""
    numbers(work, 3)
    done = subprocess.run(  # noqa: S602 - of ours
        f"{' '.join(command('work:mean'))} {stream}",
        shell=True,
        input=b"1\n",
        capture_output=True,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith(f"async-batcher: {said}; name an ")


@pytest.mark.slow
def test_a_reader_that_leaves(work: Path) -> None:
    """The command ends without a message if the reader of its output has closed the pipe."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        command("work:mean", numbers(work, 3)),
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment(),
        check=False,
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a file that root cannot read either")
@pytest.mark.parametrize("options", [[], ["-o", "out"]])
def test_an_input_that_cannot_be_read(work: Path, options: list[str]) -> None:
    """It is rejected with status 2, whether it is read once or twice, and no file is left."""
    assert run("work:mean", "/proc/self/mem", *options) == (
        2,
        "",
        "async-batcher: '/proc/self/mem' cannot be read: Input/output error\n",
    )
    assert files_in(work) == set()


@pytest.mark.slow
@pytest.mark.usefixtures("work")
def test_an_input_that_cannot_be_read_to_its_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has begun, so the status is 1; the message names the input."""
    chunks = iter([b"1\n2\n"])

    def read(_: int) -> bytes:
        for chunk in chunks:
            return chunk
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(_items, "_read", read)
    status, said = run_here(capsys, "work:mean", "/dev/null", "-o", "out", "--workers", "1")
    assert status == 1
    assert said.startswith("async-batcher: '/dev/null' cannot be read any further: Input/output")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["-o", "out"]])
def test_a_directory_that_cannot_be_read(
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
) -> None:
    """It is rejected with status 2, whether it is read once or twice, and no file is left."""

    def walk(*_: object, onerror: Callable[[OSError], None]) -> Iterator[Any]:
        onerror(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        yield

    monkeypatch.setattr(os, "walk", walk)
    (work / "in").mkdir()
    status, said = run_here(capsys, "work:size", "in", "--format", "files", *options)
    assert (status, said) == (2, "async-batcher: 'in' cannot be read: Permission denied\n")
    assert files_in(work) - {"__pycache__"} == {"in"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written(work: Path) -> None:
    """A full disk is reported in one line."""
    source = numbers(work, 3)
    assert run("work:mean", source, "-o", "/dev/full") == (
        1,
        "",
        "async-batcher: '/dev/full' cannot be written: No space left on device\n",
    )


# On a terminal.


@pytest.mark.slow
@pytest.mark.parametrize("has_tqdm", [True, False])
def test_how_far_it_is(work: Path, has_tqdm: bool) -> None:
    """The terminal shows items done, rate and failures: a bar with tqdm, otherwise lines of text."""
    if has_tqdm:
        pytest.importorskip("tqdm")
    else:
        (work / "tqdm.py").write_text("raise ImportError")
    source = numbers(work, 20)
    arguments = command("work:fail_at_5", source, "-o", "out", "--isolate", "--max-batch-size", 4)
    with contextlib.closing(OnTerminal(arguments, environment(), work)) as program:
        assert program.end() == 1
    shown = program.shown.decode()
    if has_tqdm:
        assert "100%|" in shown
        assert "20/20 [" in shown
        assert "items/s, 1 failed]" in shown
    else:
        assert "20 of 20 items, " in shown
        assert " items/s, 1 failed\r\n" in shown
    assert "async-batcher: line 6: ValueError: five\r\n" in shown
    assert shown.endswith("async-batcher: 1 of 20 items failed\r\n")


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        ((0, None, 0, 0.0, "items", 0), "0 items, 0.0 items/s, 0 failed"),
        (
            (1500, 3000, 500, 2.0, "items", 2),
            "1,500 of 3,000 items, 250.0 items/s, 0:00:06 left, 2 failed",
        ),
        ((10, 100_010, 1, 1.0, "files", None), "10 of 100,010 files, 1.0 files/s, 27:46:40 left"),
        ((10, 10, 10, 5.0, "items", 10), "10 of 10 items, 2.0 items/s, 10 failed"),
    ],
)
def test_a_line_of_progress(figures: tuple[Any, ...], line: str) -> None:
    """Items finished by an earlier run count as done, but not for the rate or the time left."""
    assert progress_line(*figures) == line
