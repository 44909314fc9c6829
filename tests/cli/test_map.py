"""The command ``async-batcher map``, used as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher.cli._terminal import progress_line
from async_batcher.cli.map.fingerprint import fingerprint
from async_batcher.cli.map.journal import RunHeader
from async_batcher.cli.map.output import FinishedItem, ResumableOutput
from tests.support.map_command import (
    command,
    environment,
    files_in,
    lines_of,
    numbers,
    run,
    run_here,
    work_folder,
)
from tests.support.terminal import OnTerminal

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="pipes, signals and terminals of POSIX"
)


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the user's module."""
    yield from work_folder(tmp_path, monkeypatch)


# What it does.


@pytest.mark.slow
def test_lines_of_json_through_a_pipe(folder: Path) -> None:
    """One line for each item, in order; what the function prints is not among them, and there is no
    bar.
    """
    given = "\ufeff1\r\n\r\n2\n" + "".join(f"{n}\n" for n in range(3, 400)) + "400"
    status, output, said = run("work:double", "--max-batch-size", 7, given=given)
    assert (status, [json.loads(line) for line in output.splitlines()]) == (
        0,
        [2 * n for n in range(1, 401)],
    )
    assert said.replace("a word on the way", "").strip() == ""
    assert files_in(folder) == set()


@pytest.mark.slow
def test_the_files_of_a_directory(folder: Path) -> None:
    """Each is an item; run by the console script, whose own folder is not the one that modules are
    looked for in.
    """
    (folder / "data").mkdir()
    for n in range(3):
        (folder / "data" / f"{n}.bin").write_bytes(bytes(n))
    (folder / "elsewhere").mkdir()
    script = folder / "elsewhere" / "async-batcher"
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
    assert (folder / "sizes").read_text() == "0\n1\n2\n"
    assert files_in(folder) == {"data", "elsewhere", "sizes"}


@pytest.mark.slow
def test_lines_of_text_and_a_batcher(folder: Path) -> None:
    """A batcher's own process_batch and set-up are used; where that fails it is no item's fault,
    and ends the run.
    """
    assert run("work:words", "--format", "lines", given="one two\n\nthree") == (0, "2\n0\n1\n", "")
    status, output, said = run("work:broken", "--format", "lines", "--isolate", given="one two")
    assert (status, output) == (1, "")
    assert "a worker cannot be set up: " in said
    assert said.count("\n") == 1
    assert files_in(folder) == set()


@pytest.mark.slow
def test_a_set_up_that_tears_down(folder: Path) -> None:
    """What follows its yield is run when the worker stops."""
    assert run("work:with_a_model", "--workers", 1, given="1\n2\n") == (0, "1\n2\n", "")
    assert (folder / "torn_down").read_text() == "a model"


@pytest.mark.slow
def test_bad_items_fail_alone(folder: Path) -> None:
    """Whatever they do to the function, to the worker or to the result: each is told with its line,
    and the rest is done.
    """
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
        1,
        "--max-batch-size",
        4,
        given=given,
    )
    assert (status, said) == (1, "async-batcher: 6 of 10 items failed; see bad\n")
    assert (folder / "out").read_text() == '"a"\n"b"\n"c"\n"d"\n'
    bad = lines_of(folder / "bad")
    assert [(error["line"], error["item"], error["error"].partition(":")[0]) for error in bad] == [
        (3, "die", "WorkerDiedError"),
        (5, "raise", "KeyError"),
        (6, "hang", "BatchTimeoutError"),
        (7, "set", "the result is not JSON"),
        (9, "[1,", "not JSON"),
        (10, "NaN", "the result is not JSON"),
    ]
    assert "in poison" in bad[1]["traceback"]
    assert files_in(folder) == {"out", "bad"}


@pytest.mark.slow
def test_the_first_failure_ends_the_run_which_goes_on_with_resume(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says which and why; what is finished stays, and goes only into the same run over the
    same input.
    """
    source = numbers(folder, 20)
    arguments = ("work:fail_at_5", source, "-o", "out", "--max-batch-size", 2)
    status, _, said = run(*arguments)
    assert status == 1
    assert said == (
        "async-batcher: line 5, with its batch: ValueError: five; --isolate finds the guilty item; "
        "4 items are finished, and --resume goes on after them\n"
    )
    assert files_in(folder) == {"out.journal"}

    finished = "a run that was interrupted has finished 4 items of 'out': --resume goes on after them, --restart begins anew"
    assert run_here(capsys, *arguments) == (2, f"async-batcher: {finished}\n")
    refusal = "async-batcher: 'out' cannot be resumed: {}; --restart begins anew\n"
    assert run_here(capsys, "work:size", *arguments[1:], "--resume") == (
        2,
        refusal.format("the function was 'work:fail_at_5'"),
    )
    with (folder / source).open("a") as file:
        file.write("20\n")
    assert run_here(capsys, *arguments, "--resume") == (2, refusal.format("the input has changed"))
    numbers(folder, 20)

    status, _, said = run(*arguments, "--resume", "--isolate")
    assert (status, said) == (
        1,
        "async-batcher: line 6: ValueError: five\nasync-batcher: 1 of 20 items failed\n",
    )
    assert lines_of(folder / "out") == [n for n in range(20) if n != 5]
    assert files_in(folder) == {"out"}


@pytest.mark.slow
def test_beginning_anew(folder: Path) -> None:
    """``--restart`` throws away what was there, and ``--resume`` begins where there is nothing."""
    source = numbers(folder, 5)
    with contextlib.closing(ResumableOutput("out", None)) as files:
        files.start(
            RunHeader(
                fingerprint(source, "jsonl").digest,
                "work:mean",
                "jsonl",
                each=False,
                unordered=False,
            )
        )
        files.write([FinishedItem(1, b'"old"\n', has_failed=False)])
    assert run("work:mean", source, "-o", "out", "--restart") == (0, "", "")
    assert (folder / "out").read_text() == "5\n" * 5
    assert run("work:mean", source, "-o", "out", "--resume") == (0, "", "")
    assert files_in(folder) == {"out"}


def test_nothing_is_left_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where all items are finished, to resume puts the output in its place without a worker; so
    does an empty input.
    """
    source = numbers(folder, 2)
    with contextlib.closing(ResumableOutput("out", None)) as files:
        files.start(
            RunHeader(
                fingerprint(source, "jsonl").digest,
                "work:mean",
                "jsonl",
                each=False,
                unordered=False,
            )
        )
        files.write(
            [FinishedItem(2, b"1\n", has_failed=False), FinishedItem(1, b"", has_failed=True)]
        )
    assert run_here(capsys, "work:mean", source, "-o", "out", "--resume") == (
        1,
        "async-batcher: 1 of 2 items failed\n",
    )
    assert (folder / "out").read_text() == "1\n"
    numbers(folder, 0)
    assert run_here(capsys, "work:mean", source, "-o", "out", "--isolate", "--errors", "bad") == (
        0,
        "",
    )
    assert (folder / "out").read_text() == (folder / "bad").read_text() == ""
    assert files_in(folder) == {"out", "bad"}


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
        ("work:size begun -o out --resume", "'begun' is no regular file"),
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
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, complaint: str
) -> None:
    """With exit status 2, before anything is run; no file is left."""
    numbers(folder, 3)
    (folder / "wrong.py").write_text("1 / 0")
    for other in ("x.partial", "x.journal"):
        (folder / other).write_text("not to be lost\n")
    status, said = run_here(capsys, *arguments.split())
    assert status == 2
    assert said.startswith("async-batcher: ")
    assert complaint in said
    assert said.count("\n") == 1
    assert files_in(folder) == {"wrong.py", "x.partial", "x.journal"}
    assert {(folder / other).read_text() for other in ("x.partial", "x.journal")} == {
        "not to be lost\n"
    }
    assert lines_of(folder / "in.jsonl") == [0, 1, 2]


def test_uvloop_is_asked_for_but_not_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    status, said = run_here(capsys, "work:size", numbers(folder, 1), "--loop", "uvloop")
    assert status == 2
    assert "uvloop is not installed; pip install" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stream", "said"),
    [("0<&-", "standard input is closed"), ("1>&-", "standard output is closed")],
)
def test_a_stream_that_is_closed(folder: Path, stream: str, said: str) -> None:
    """It is not taken for another file that has its number."""
    numbers(folder, 3)
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
def test_a_reader_that_leaves(folder: Path) -> None:
    """Output that is not read ends the command without a message."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        command("work:mean", numbers(folder, 3)),
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment(),
        check=False,
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written(folder: Path) -> None:
    """A full disk is said in one line."""
    source = numbers(folder, 3)
    assert run("work:mean", source, "-o", "/dev/full") == (
        1,
        "",
        "async-batcher: '/dev/full' cannot be written: No space left on device\n",
    )


# On a terminal.


@pytest.mark.slow
@pytest.mark.parametrize("has_tqdm", [True, False])
def test_how_far_it_is(folder: Path, has_tqdm: bool) -> None:
    """A bar with tqdm, lines of text without: items done, how fast, and failures; errors stand in
    lines of their own.
    """
    if has_tqdm:
        pytest.importorskip("tqdm")
    else:
        (folder / "tqdm.py").write_text("raise ImportError")
    source = numbers(folder, 20)
    arguments = command("work:fail_at_5", source, "-o", "out", "--isolate", "--max-batch-size", 4)
    with contextlib.closing(OnTerminal(arguments, environment(), folder)) as program:
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
    """What was finished before an interruption counts, but not for the speed, nor for the time that
    is left.
    """
    assert progress_line(*figures) == line
