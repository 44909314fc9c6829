"""The command ``async-batcher map``, used as a user would; interrupted and killed, and taken up again."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import cli
from async_batcher.cli._errors import CommandError
from async_batcher.cli._terminal import progress_line
from async_batcher.cli.map.fingerprint import fingerprint
from async_batcher.cli.map.journal import Journal, RunHeader, RunProgress
from async_batcher.cli.map.output import ResumableOutput, StreamOutput
from tests.support import scripts
from tests.support.terminal import OnTerminal
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes, signals and terminals of POSIX")

# The user's module. ``begun`` tells the test of each item that a worker begins, through a named pipe.
WORK = """
import os, re, sys
from async_batcher import AsyncBatcher

pipe = None

def begun(item):
    global pipe
    if pipe is None:
        pipe = os.open("begun", os.O_WRONLY)
    os.write(pipe, b"%d\\n" % item)

def double(batch):
    print("a word on the way")
    return [2 * n for n in batch]

def mean(batch):
    return [len(batch)] * len(batch)

def fail_at_5(batch):
    if 5 in batch:
        raise ValueError("five")
    return batch

def size(batch):
    return [len(data) for data in batch]

def poison(item):
    if item == "die":
        os._exit(3)
    if item == "hang":
        sum(range(10**15))
    if item == "raise":
        raise KeyError(item)
    if item == "set":
        return {1}
    return item

def told(item):
    begun(item)
    if item % 7 == 3:
        raise ValueError(item)
    return item * item

def endless(item):
    begun(item)
    if item == 3:
        sum(range(10**15))
    return item

def fail_loudly(item):
    raise ValueError(item)

def large(item):
    begun(item)
    return "x" * 1_000_000

class Words(AsyncBatcher):
    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern
    def setup_worker(self):
        self.compiled = re.compile(self.pattern)
    def process_batch(self, batch):
        return [len(self.compiled.findall(text)) for text in batch]

words, broken = Words(r"\\w+"), Words("(")
"""


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the user's module; what is imported from it is forgotten."""
    (tmp_path / "work.py").write_text(WORK)
    os.mkfifo(tmp_path / "begun")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name == "work":
            del sys.modules[name]


def numbers(folder: Path, count: int) -> str:
    """Write a file with the numbers from 0, and say how it is called."""
    (folder / "in.jsonl").write_text("".join(f"{n}\n" for n in range(count)))
    return "in.jsonl"


def command(*arguments: object) -> list[str]:
    """The command as a user types it, with 2 workers."""
    return [sys.executable, "-m", "async_batcher", "map", *map(str, arguments), "--workers", "2"]


def environment() -> dict[str, str]:
    """Where every warning is shown."""
    return {**scripts.environment(), "PYTHONWARNINGS": "always", "PYTHONDONTWRITEBYTECODE": "1"}


def run(*arguments: object, given: str | bytes = b"") -> tuple[int, str, str]:
    """Run it to its end: exit status, output, and what it said."""
    given = given.encode() if isinstance(given, str) else given
    done = subprocess.run(  # noqa: S603 - of ours
        command(*arguments), input=given, capture_output=True, env=environment(), check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run it in this process, where it ends before there are any workers; exit status and what it said."""
    try:
        status: Any = cli.main(["map", *map(str, arguments)])
    except SystemExit as exc:
        status = exc.code
    output = capsys.readouterr()
    assert output.out == ""
    return status, output.err


def files_in(folder: Path) -> set[str]:
    """What there is but for what the tests have put there."""
    return {path.name for path in folder.iterdir()} - {"work.py", "begun", "in.jsonl"}


def lines_of(path: Path) -> list[Any]:
    """What the lines of a file are."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# What it does.


@pytest.mark.slow
def test_lines_of_json_through_a_pipe(folder: Path) -> None:
    """One line for each item, in order; what the function prints is not among them, and there is no bar."""
    given = "\ufeff1\r\n\r\n2\n" + "".join(f"{n}\n" for n in range(3, 400)) + "400"
    status, output, said = run("work:double", "--max-batch-size", 7, given=given)
    assert (status, [json.loads(line) for line in output.splitlines()]) == (0, [2 * n for n in range(1, 401)])
    assert said.replace("a word on the way", "").strip() == ""
    assert files_in(folder) == set()


@pytest.mark.slow
def test_the_files_of_a_directory(folder: Path) -> None:
    """Each is an item; run by the console script, whose own folder is not the one that modules are looked for in."""
    (folder / "data").mkdir()
    for n in range(3):
        (folder / "data" / f"{n}.bin").write_bytes(bytes(n))
    (folder / "elsewhere").mkdir()
    script = folder / "elsewhere" / "async-batcher"
    script.write_text("import sys\nfrom async_batcher.cli import main\nsys.exit(main())")
    arguments = ["map", "work:size", "--format", "files", "data", "-o", "sizes", "--loop", "asyncio"]
    subprocess.run([sys.executable, str(script), *arguments], env=environment(), check=True)  # noqa: S603 - of ours
    assert (folder / "sizes").read_text() == "0\n1\n2\n"
    assert files_in(folder) == {"data", "elsewhere", "sizes"}


@pytest.mark.slow
def test_lines_of_text_and_a_batcher(folder: Path) -> None:
    """A batcher's own process_batch and set-up are used; where that fails it is no item's fault, and ends the run."""
    assert run("work:words", "--format", "lines", given="one two\n\nthree") == (0, "2\n0\n1\n", "")
    status, output, said = run("work:broken", "--format", "lines", "--isolate", given="one two")
    assert (status, output) == (1, "")
    assert "a worker cannot be set up: " in said
    assert said.count("\n") == 1
    assert files_in(folder) == set()


@pytest.mark.slow
def test_bad_items_fail_alone(folder: Path) -> None:
    """Whatever they do to the function, to the worker or to the result: each is told with its line, and the rest is done."""
    items = ["a", "die", "b", "raise", "hang", "set", "c"]
    given = "\n".join(["", *map(json.dumps, items), "[1,", "NaN", '"d"'])
    status, _, said = run(
        "work:poison", "--each", "--isolate", "--errors", "bad", "-o", "out", "--timeout", 1, "--max-batch-size", 4, given=given
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
def test_the_first_failure_ends_the_run_which_goes_on_with_resume(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says which and why; what is finished stays, and goes only into the same run over the same input."""
    source = numbers(folder, 20)
    arguments = ("work:fail_at_5", source, "-o", "out", "--max-batch-size", 2)
    status, _, said = run(*arguments)
    assert status == 1
    assert said == (
        "async-batcher: line 5, with its batch: ValueError: five; --isolate finds the guilty item; "
        "4 items are finished, and --resume goes on after them\n"
    )
    assert files_in(folder) == {"out.partial", "out.journal"}

    finished = "a run that was interrupted has finished 4 items of 'out': --resume goes on after them, --restart begins anew"
    assert run_here(capsys, *arguments) == (2, f"async-batcher: {finished}\n")
    refusal = "async-batcher: 'out' cannot be resumed: {}; --restart begins anew\n"
    assert run_here(capsys, "work:size", *arguments[1:], "--resume") == (2, refusal.format("the function was 'work:fail_at_5'"))
    with (folder / source).open("a") as file:
        file.write("20\n")
    assert run_here(capsys, *arguments, "--resume") == (2, refusal.format("the input has changed"))
    numbers(folder, 20)

    status, _, said = run(*arguments, "--resume", "--isolate")
    assert (status, said) == (1, "async-batcher: line 6: ValueError: five\nasync-batcher: 1 of 20 items failed\n")
    assert lines_of(folder / "out") == [n for n in range(20) if n != 5]
    assert files_in(folder) == {"out"}


@pytest.mark.slow
def test_beginning_anew(folder: Path) -> None:
    """``--restart`` throws away what was there, and ``--resume`` begins where there is nothing."""
    source = numbers(folder, 5)
    with contextlib.closing(ResumableOutput("out", None)) as files:
        files.start(RunHeader(fingerprint(source, "jsonl").digest, "work:mean", "jsonl", each=False, unordered=False))
        files.write(b'"old"\n', b"", [0], 0)
    assert run("work:mean", source, "-o", "out", "--restart") == (0, "", "")
    assert (folder / "out").read_text() == "5\n" * 5
    assert run("work:mean", source, "-o", "out", "--resume") == (0, "", "")
    assert files_in(folder) == {"out"}


def test_nothing_is_left_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where all items are finished, to resume puts the output in its place without a worker; so does an empty input."""
    source = numbers(folder, 2)
    with contextlib.closing(ResumableOutput("out", None)) as files:
        files.start(RunHeader(fingerprint(source, "jsonl").digest, "work:mean", "jsonl", each=False, unordered=False))
        files.write(b"1\n", b"", [1, 0], 1)
    assert run_here(capsys, "work:mean", source, "-o", "out", "--resume") == (1, "async-batcher: 1 of 2 items failed\n")
    assert (folder / "out").read_text() == "1\n"
    numbers(folder, 0)
    assert run_here(capsys, "work:mean", source, "-o", "out", "--isolate", "--errors", "bad") == (0, "")
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
        ("work:size in.jsonl --timeout 0", "--timeout: must be a number of seconds, more than 0, not '0'"),
        ("work:size in.jsonl --timeout soon", "--timeout: must be a number of seconds, not 'soon'"),
        ("work:size in.jsonl --max-queue-time -1", "--max-queue-time: must be a number of seconds, not '-1'"),
        ("work:size in.jsonl --max-queue-time nan", "--max-queue-time: must be a number of seconds, not 'nan'"),
        ("work:size in.jsonl --errors bad", "--errors needs --isolate"),
        ("work:size in.jsonl --isolate --errors /dev/null", "--errors needs a file, not '/dev/null'"),
        ("work:size in.jsonl --isolate --errors -", "--errors needs a file, not '-'"),
        ("work:size in.jsonl -o out --resume --restart", "not allowed with argument --resume"),
        ("work:size in.jsonl --resume", "--resume needs -o OUTPUT"),
        ("work:size in.jsonl --restart -o /dev/null", "--restart needs -o OUTPUT, a file"),
        ("work:size -o out --resume", "--resume needs INPUT"),
        ("work:size begun -o out --resume", "'begun' is no regular file"),
        ("work:size in.jsonl -o .", "'.' is a directory"),
        ("work:size in.jsonl -o none/out", "'none/out' cannot be written: there is no such folder"),
        ("work:size in.jsonl -o out --isolate --errors none/bad", "'none/bad' cannot be written: there is no such folder"),
        ("work:size in.jsonl -o ./in.jsonl", "'in.jsonl' is the input, and would be written to"),
        ("work:size x.partial -o x", "'x.partial' is the input, and would be written to"),
        ("work:size x.journal -o x --restart", "'x.journal' is the input, and would be written to"),
        ("work:size in.jsonl -o out --isolate --errors ./out", "results and errors would both be written to"),
        ("work:size in.jsonl -o out --isolate --errors out.partial", "results and errors would both be written to"),
        ("work:size in.jsonl -o out --isolate --errors out.journal", "results and errors would both be written to"),
        ("work:size in.jsonl -o out.partial --isolate --errors out", "results and errors would both be written to"),
        ("work:size in.jsonl -o out/", "'out/' is a directory"),
        (f"work:size {'n' * 300}", f"{'n' * 300}'"),
        (f"work:size in.jsonl -o {'n' * 300}", "File name too long"),
        ("work:size . --format files -o out", "would be in the input directory"),
        ("work:siez in.jsonl -o out", "'work' has no 'siez'; did you mean 'size'?"),
        ("none:f in.jsonl -o out", "module 'none' cannot be imported: No module named 'none' (tried: "),
        ("wrong.py:f in.jsonl -o out", "module 'wrong' cannot be imported: ZeroDivisionError: division by zero ("),
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
    assert {(folder / other).read_text() for other in ("x.partial", "x.journal")} == {"not to be lost\n"}
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
@pytest.mark.parametrize(("stream", "said"), [("0<&-", "standard input is closed"), ("1>&-", "standard output is closed")])
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
    """Output that nobody reads ends the command without a word."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(  # noqa: S603 - of ours
        command("work:mean", numbers(folder, 3)), stdout=theirs, stderr=subprocess.PIPE, env=environment(), check=False
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
def test_how_far_it_is(folder: Path, has_tqdm: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """A bar with tqdm, lines of text without: items done, how fast, and failures; errors stand in lines of their own."""
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
        ((1500, 3000, 500, 2.0, "items", 2), "1,500 of 3,000 items, 250.0 items/s, 0:00:06 left, 2 failed"),
        ((10, 100_010, 1, 1.0, "files", None), "10 of 100,010 files, 1.0 files/s, 27:46:40 left"),
        ((10, 10, 10, 5.0, "items", 10), "10 of 10 items, 2.0 items/s, 10 failed"),
    ],
)
def test_a_line_of_progress(figures: tuple[Any, ...], line: str) -> None:
    """What was finished before an interruption counts, but not for the speed, nor for the time that is left."""
    assert progress_line(*figures) == line


# What happens to its files meanwhile.


@pytest.mark.parametrize("errors", [[], ["--isolate", "--errors", "bad"]])
@pytest.mark.parametrize("name", ["out.partial", "out.journal", "bad.partial"])
def test_files_of_others_are_left_alone(folder: Path, capsys: pytest.CaptureFixture[str], name: str, errors: list[str]) -> None:
    """They stand where the run would write: it is refused, and they stay, also if it is refused for another reason."""
    (folder / name).write_text("dear diary\n")
    source = numbers(folder, 3)
    if name != "bad.partial" or errors:
        for target in ("work:mean", "work:none"):
            status, said = run_here(capsys, target, source, "-o", "out", *errors)
            assert status == 2
            assert name in said or target == "work:none"
        assert files_in(folder) == {name}
    if name == "bad.partial" and errors:
        status, said = run_here(capsys, "work:mean", source, *errors)  # to standard output
        assert (status, "bad.partial' is there already" in said) == (2, True)
    assert (folder / name).read_text() == "dear diary\n"


@pytest.mark.slow
def test_beginning_anew_over_files_of_others(folder: Path) -> None:
    """With --restart they are overwritten, as the message said."""
    for name in ("out.partial", "out.journal"):
        (folder / name).write_text("dear diary\n")
    assert run("work:mean", numbers(folder, 3), "-o", "out", "--restart")[0] == 0
    assert lines_of(folder / "out") == [3, 3, 3]
    assert files_in(folder) == {"out"}


def test_beginning_anew_throws_nothing_away_before_it_can(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is refused since its errors cannot be written leaves what was finished."""
    source = numbers(folder, 2)
    with contextlib.closing(ResumableOutput("out", None)) as files:
        files.start(RunHeader(fingerprint(source, "jsonl").digest, "work:mean", "jsonl", each=False, unordered=False))
        files.write(b"1\n", b"", [0], 0)
    arguments = ["work:mean", source, "-o", "out", "--restart", "--isolate", "--errors", "none/bad"]
    assert run_here(capsys, *arguments)[0] == 2
    assert finished(folder) == {0}


@pytest.mark.parametrize("how", ["removed", "replaced", "cut"])
def test_a_partial_file_that_is_gone(tmp_path: Path, how: str) -> None:
    """The run says so, and does not take it for done; to resume does it again."""
    header = RunHeader("digest", "work:mean", "jsonl", each=False, unordered=False)
    partial = tmp_path / "out.partial"
    with contextlib.closing(ResumableOutput(str(tmp_path / "out"), None)) as files:
        files.start(header)
        files.write(b"1\n", b"", [0], 0)
        if how == "cut":
            os.truncate(partial, 1)
        else:
            partial.unlink()
        if how == "replaced":
            partial.write_bytes(b"1\n")
        with pytest.raises(CommandError, match="has been removed or changed") as caught:
            files.finish()
        assert caught.value.status == 1
    assert {path.name for path in tmp_path.iterdir()} >= {"out.journal"}
    assert not (tmp_path / "out").exists()
    with contextlib.closing(ResumableOutput(str(tmp_path / "out"), None)) as files:
        files.resume(header)
        assert files.progress.done == (how == "replaced")


def test_errors_that_were_replaced_are_not_put_in_their_place(tmp_path: Path) -> None:
    """A file of somebody else's that stands where they were written stays there."""
    (tmp_path / "bad").write_text("before")
    with (tmp_path / "out").open("wb", buffering=0) as file:
        direct = StreamOutput(file, "out", str(tmp_path / "bad"))
        direct.write(b"", b"{}\n", [0], 1)
        (tmp_path / "bad.partial").unlink()
        (tmp_path / "bad.partial").write_text("of somebody else")
        with pytest.raises(CommandError, match="has been removed or changed"):
            direct.finish()
        direct.close()
    assert (tmp_path / "bad").read_text() == "before"
    assert (tmp_path / "bad.partial").read_text() == "of somebody else"


def test_errors_of_a_write_that_was_interrupted(tmp_path: Path) -> None:
    """They are put in their place: a signal is heeded where somebody may be waited for, and not between them and their count."""

    class Interrupted(contextlib.nullcontext[None]):
        def __enter__(self) -> None:
            raise KeyboardInterrupt

    with (tmp_path / "out").open("wb", buffering=0) as file:
        direct = StreamOutput(file, "out", str(tmp_path / "bad"))
        with pytest.raises(KeyboardInterrupt):
            direct.write(b"1\n", b"{}\n", [0, 1], 1, Interrupted)
        direct.close()
    assert (tmp_path / "bad").read_bytes() == b"{}\n"


def test_two_runs_never_write_the_same_errors(tmp_path: Path) -> None:
    """Whatever they write their results to."""
    header = RunHeader("digest", "work:mean", "jsonl", each=False, unordered=False)
    with (
        contextlib.closing(ResumableOutput(str(tmp_path / "one"), str(tmp_path / "bad"))) as one,
        contextlib.closing(ResumableOutput(str(tmp_path / "two"), str(tmp_path / "bad"))) as two,
    ):
        one.start(header)
        with pytest.raises(CommandError, match="another run is writing"):
            two.start(header)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("change", ["cut", "longer"])
def test_an_input_that_changes_meanwhile(folder: Path, change: str) -> None:
    """It is said, and the output is not put in its place as if it were whole."""
    source = folder / numbers(folder, 40)
    running = Running("work:told", source, "-o", "out", "--each", "--max-batch-size", "1", "--isolate", "--errors", "bad")
    running.items(1)
    if change == "cut":
        os.truncate(source, 100)
    else:
        with source.open("a") as file:
            file.write("40\n" * 40)
    running.items()
    status, said, _ = running.end(signal.SIGCONT)
    assert status == 1
    assert "the input has changed since the run began" in said
    assert not (folder / "out").exists()
    assert (folder / "out.partial").exists()


@pytest.mark.slow
def test_errors_of_a_run_to_standard_output(folder: Path) -> None:
    """They are in their place also if it ends early, as the results are."""
    numbers(folder, 100)
    running = Running("work:told", "in.jsonl", "--each", "--max-batch-size", "1", "--isolate", "--errors", "bad")
    running.items(50)
    assert running.end(signal.SIGINT)[0] == 130
    assert files_in(folder) == {"bad"}
    assert all(error["error"].startswith("ValueError: ") for error in lines_of(folder / "bad"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1"])
def test_standard_output_by_another_name(folder: Path, name: str) -> None:
    """Is standard output: what it leads to is not replaced, and what is printed does not get there."""
    numbers(folder, 3)
    with (folder / "log").open("wb") as log:
        log.write(b"before\n")
        log.flush()
        status = subprocess.run(  # noqa: S603 - of ours
            command("work:double", "in.jsonl", "-o", name), stdout=log, env=environment(), check=False
        ).returncode
    assert status == 0
    assert (folder / "log").read_text() == "before\n0\n2\n4\n"


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", "0<&- 2>&-", "0<&- 1>&- 2>&-"])
def test_standard_streams_that_are_closed(folder: Path, closed: str) -> None:
    """What is printed does not end up in the files that are opened in their place."""
    numbers(folder, 3)
    where = "-o out" if "1>&-" in closed else "> out"
    done = subprocess.run(  # noqa: S602 - of ours
        f"{' '.join(command('work:double', 'in.jsonl'))} {where} {closed}", shell=True, env=environment(), check=False
    )
    assert done.returncode == 0
    assert lines_of(folder / "out") == [0, 2, 4]
    assert files_in(folder) == {"out"}


# Interrupted, killed, and taken up again.


class Running:
    """A run whose workers tell which items they begin.

    Args:
        arguments: Of the command.
        options: For `subprocess.Popen`.
    """

    def __init__(self, *arguments: object, **options: Any) -> None:
        """Start it, and wait until an item is begun."""
        self.process = subprocess.Popen(  # noqa: S603 - of ours
            command(*arguments),
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **options},
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
        self._events = Path("begun").open()  # noqa: SIM115 - until the end

    def items(self, count: int | None = None) -> list[int]:
        """Wait until so many more items are begun; None: until no worker is left. Fewer if the run ends."""
        read = iter(self._events.readline, "")
        return [int(line) for _, line in zip(range(sys.maxsize if count is None else count), read, strict=False)]

    def end(self, number: int) -> tuple[int, str, list[int]]:
        """Send a signal to it and to all that it started: exit status, what it said, and the items begun meanwhile."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        items = self.items()
        self._events.close()
        said = self.process.communicate()[1].decode()
        return self.process.returncode, said, items


def finished(folder: Path) -> set[int]:
    """The items that are finished, as the files tell; none where there is no journal."""
    with contextlib.ExitStack() as stack:
        journal = Journal(folder / "out.journal", "out")
        stack.callback(journal.close)
        journal.open()
        files = []
        for name in ("out", "bad"):
            path = folder / f"{name}.partial"
            path = path if path.exists() else folder / name  # or it has just been renamed
            files.append(stack.enter_context(path.open("rb")) if path.exists() else io.BytesIO())
        progress = RunProgress() if journal.header is None else journal.replay(*files)
    return {item for item, is_finished in enumerate(progress.finished) if is_finished}


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "options"), [(1, []), (2, ["--unordered", "--errors", "bad"])])
def test_killed_at_random_moments(folder: Path, seed: int, options: list[str]) -> None:
    """However often it is killed: in the end nothing is missing or doubled, and nothing was done again that was finished."""
    chance = random.Random(seed)  # noqa: S311 - to be the same each time
    total = 100
    arguments = ["work:told", numbers(folder, total), "-o", "out", "--each", "--isolate", "--max-batch-size", "3", *options]
    done: set[int] = set()
    kills = 0
    while len(done) < total:
        running = Running(*arguments, *(["--resume"] if kills else []))
        begun = running.items(chance.randrange(1, 50))
        status, _, more = running.end(signal.SIGKILL)
        begun += more
        assert not done & set(begun)
        assert len(begun) == len(set(begun))
        if status in (0, 1):
            break
        assert status == -signal.SIGKILL
        kills += 1
        if not (folder / "out.journal").exists() and (folder / "out").exists():
            break  # it was killed when all was done, and it had only to end
        now = finished(folder)
        assert done <= now
        done = now
    else:
        assert run(*arguments, "--resume")[0] == 1
    assert kills
    good, bad = ([n for n in range(total) if (n % 7 == 3) is is_bad] for is_bad in (False, True))
    results = lines_of(folder / "out")
    assert (sorted(results) if "--unordered" in options else results) == [n * n for n in good]
    if "--errors" in options:
        errors = lines_of(folder / "bad")
        assert sorted((error["line"], error["item"], error["error"]) for error in errors) == [
            (n + 1, n, f"ValueError: {n}") for n in bad
        ]
    assert files_in(folder) == {"out", *({"bad"} if "--errors" in options else ())}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status", "loop"), [(signal.SIGINT, 130, "asyncio"), (signal.SIGTERM, 143, "auto")])
def test_interrupted_while_a_batch_hangs_in_c(folder: Path, number: int, status: int, loop: str) -> None:
    """It ends, and leaves what was finished to be resumed."""
    source = numbers(folder, 6)
    running = Running("work:endless", source, "-o", "out", "--each", "--max-batch-size", 1, "--loop", loop)
    while 3 not in running.items(1):
        pass
    ended, said, _ = running.end(number)
    done = len(finished(folder))
    assert ended == status
    expected = f"{done} items are finished, and --resume goes on after them" if done else "nothing was finished"
    assert said == f"async-batcher: interrupted; {expected}\n"
    assert files_in(folder) == ({"out.partial", "out.journal"} if done else set())


@pytest.mark.slow
def test_interrupted_while_the_input_blocks(folder: Path) -> None:
    """Nothing more comes on standard input: it ends all the same, and says where the results are, which cannot be resumed."""
    theirs, ours = os.pipe()
    os.write(ours, b"0\n1\n")
    running = Running("work:told", "-o", "out", "--each", stdin=theirs)
    os.close(theirs)
    assert sorted(running.items(2)) == [0, 1]
    status, said, _ = running.end(signal.SIGINT)
    os.close(ours)
    assert status == 130
    left = f"the results of 2 items are in '{folder / 'out.partial'}'" if finished(folder) else "nothing was finished"
    assert said == f"async-batcher: interrupted; {left}\n"


@pytest.mark.slow
@pytest.mark.parametrize("to", [["-o", "out"], []])
def test_interrupted_while_nobody_reads_what_it_says(folder: Path, to: list[str]) -> None:
    """It ends at the first Ctrl-C, though it is telling of failures, and has something to say at its end."""
    (folder / "in.jsonl").write_text("".join(f'"{"x" * 2000}{n}"\n' for n in range(200)))
    ours, theirs = os.pipe()
    process = subprocess.Popen(  # noqa: S603 - of ours
        command("work:fail_loudly", "in.jsonl", "--each", "--max-batch-size", "1", "--isolate", *to),
        stdout=subprocess.DEVNULL, stderr=theirs, env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + DEADLINE
        while select.select([], [theirs], [], 0)[1]:  # until the pipe is full
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(DEADLINE) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


@pytest.mark.slow
def test_interrupted_whatever_the_module_does_to_signals(folder: Path) -> None:
    """One that has SIGINT ignored, or leaves a thread that Python would wait for, keeps nobody from ending the run."""
    (folder / "rude.py").write_text(
        "import signal, threading\nfrom work import endless\n"
        "if threading.current_thread() is threading.main_thread() and __name__ == 'rude':\n"
        "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
    )
    running = Running("rude:endless", numbers(folder, 6), "-o", "out", "--each", "--max-batch-size", 1)
    while 3 not in running.items(1):
        pass
    assert running.end(signal.SIGINT)[0] == 130


@pytest.mark.slow
def test_a_module_that_cannot_be_imported_in_a_worker(folder: Path) -> None:
    """It is said as it would be here, and no item is blamed for it."""
    (folder / "here.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()} and os.getppid() != {os.getpid()}:\n    1 / 0\ndef f(batch): return batch\n"
    )
    status, _, said = run("here:f", numbers(folder, 3), "-o", "out", "--isolate")
    assert (status, said.count("\n")) == (1, 1)
    assert "module 'here' cannot be imported in a worker: ZeroDivisionError: division by zero (" in said


@pytest.mark.slow
def test_interrupted_while_the_output_blocks(folder: Path) -> None:
    """Nobody reads what it writes: it ends all the same."""
    ours, theirs = os.pipe()
    running = Running("work:large", numbers(folder, 10), "--each", "--max-batch-size", 1, stdout=theirs)
    os.close(theirs)
    assert os.read(ours, 1) == b'"'  # it is writing the first result, which a pipe does not hold
    status, said, _ = running.end(signal.SIGINT)
    os.close(ours)
    assert (status, said) == (130, "async-batcher: interrupted\n")
