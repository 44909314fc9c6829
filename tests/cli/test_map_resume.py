"""The command ``async-batcher map``: interrupted and killed runs, and changes of its files."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from async_batcher.cli._errors import CommandError, counted
from async_batcher.cli.map.journal import RunHeader
from async_batcher.cli.map.output import FinishedItem, ResumableOutput, StreamOutput
from tests.support.map_command import (
    Running,
    command,
    environment,
    files_in,
    finished,
    interrupt_run,
    lines_of,
    numbers,
    run,
    run_here,
)
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="pipes, signals and terminals of POSIX"
)


# What happens to its files meanwhile.


@pytest.mark.parametrize("errors", [[], ["--isolate", "--errors", "bad"]])
@pytest.mark.parametrize("name", ["out.partial", "out.journal", "bad.partial"])
def test_files_of_others_are_left_alone(
    work: Path, capsys: pytest.CaptureFixture[str], name: str, errors: list[str]
) -> None:
    """A run is rejected if files of other programs have the names it would use; they stay."""
    (work / name).write_text("dear diary\n")
    source = numbers(work, 3)
    if name != "bad.partial" or errors:
        for target in ("work:mean", "work:none"):
            status, said = run_here(capsys, target, source, "-o", "out", *errors)
            assert status == 2
            assert name in said or target == "work:none"
        assert files_in(work) == {name}
    if name == "bad.partial" and errors:
        status, said = run_here(capsys, "work:mean", source, *errors)  # to standard output
        assert (status, "bad.partial' is there already" in said) == (2, True)
    assert (work / name).read_text() == "dear diary\n"


@pytest.mark.slow
def test_beginning_anew_over_files_of_others(work: Path) -> None:
    """``--restart`` overwrites files of other programs."""
    for name in ("out.partial", "out.journal"):
        (work / name).write_text("dear diary\n")
    assert run("work:mean", numbers(work, 3), "-o", "out", "--restart")[0] == 0
    assert lines_of(work / "out") == [3, 3, 3]
    assert files_in(work) == {"out"}


def test_beginning_anew_throws_nothing_away_before_it_can(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the errors file cannot be written, ``--restart`` discards nothing."""
    source = numbers(work, 2)
    interrupt_run(source, FinishedItem(1, b"1\n", has_failed=False))
    arguments = ["work:mean", source, "-o", "out", "--restart", "--isolate", "--errors", "none/bad"]
    assert run_here(capsys, *arguments)[0] == 2
    assert finished(work) == {0}


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_partial_file_that_is_gone(tmp_path: Path, how: str) -> None:
    """A removed or replaced partial file is reported and not renamed; a resumed run completes."""
    header = RunHeader("digest", "work:mean", "jsonl", each=False, unordered=False)
    partial = tmp_path / "out.partial"
    with contextlib.closing(ResumableOutput(str(tmp_path / "out"), None)) as files:
        files.start(header)
        files.write([FinishedItem(0, b"1\n", has_failed=False)])
        partial.unlink()
        if how == "replaced":
            partial.write_bytes(b"1\n")
        with pytest.raises(CommandError, match="has been removed or changed") as caught:
            files.finish()
        assert caught.value.status == 1
        assert partial.exists() == (how == "replaced")
    partial.unlink(missing_ok=True)
    assert {path.name for path in tmp_path.iterdir()} >= {"out.journal"}
    assert not (tmp_path / "out").exists()
    with contextlib.closing(ResumableOutput(str(tmp_path / "out"), None)) as files:
        files.resume(header)
        files.finish()
    assert (tmp_path / "out").read_bytes() == b"1\n"


def test_errors_that_were_replaced_are_not_put_in_their_place(tmp_path: Path) -> None:
    """A partial errors file of another program is not renamed."""
    (tmp_path / "bad").write_text("before")
    with (tmp_path / "out").open("wb", buffering=0) as file:
        direct = StreamOutput(file, "out", str(tmp_path / "bad"))
        direct.write([FinishedItem(0, b"{}\n", has_failed=True)], contextlib.nullcontext)
        (tmp_path / "bad.partial").unlink()
        (tmp_path / "bad.partial").write_text("of another program")
        with pytest.raises(CommandError, match="has been removed or changed"):
            direct.finish()
        direct.close()
    assert (tmp_path / "bad").read_text() == "before"
    assert (tmp_path / "bad.partial").read_text() == "of another program"


def test_errors_of_a_write_that_was_interrupted(tmp_path: Path) -> None:
    """Errors are kept if a signal interrupts the write of the results after them."""

    class Interrupted(contextlib.nullcontext[None]):
        def __enter__(self) -> None:
            raise KeyboardInterrupt

    with (tmp_path / "out").open("wb", buffering=0) as file:
        direct = StreamOutput(file, "out", str(tmp_path / "bad"))
        with pytest.raises(KeyboardInterrupt):
            direct.write([FinishedItem(0, b"{}\n", has_failed=True)], Interrupted)
        direct.close()
    assert (tmp_path / "bad").read_bytes() == b"{}\n"


def test_two_runs_never_write_the_same_errors(tmp_path: Path) -> None:
    """Runs with different outputs cannot share an errors file."""
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
def test_an_input_that_changes_meanwhile(work: Path, change: str) -> None:
    """A changed input is reported, and the output is not put in place; ``--restart`` runs anew."""
    source = work / numbers(work, 800)
    (work / "hold").touch()
    running = Running(
        "work:told",
        source,
        "-o",
        "out",
        "--each",
        "--max-batch-size",
        "1",
        "--isolate",
        "--errors",
        "bad",
    )
    running.items(1)
    if change == "cut":
        os.truncate(source, 100)
    else:
        with source.open("a") as file:
            file.write("40\n" * 40)
    (work / "hold").unlink()
    running.items()
    status, said, _ = running.end(signal.SIGCONT)
    assert status == 1
    assert "the input has changed since the run began" in said
    assert "--resume" not in said
    assert said.endswith("; --restart begins anew\n")
    assert not (work / "out").exists()
    assert (work / "out.journal").exists()
    assert run("work:mean", source, "-o", "out", "--resume")[0] == 2
    assert run("work:mean", source, "-o", "out", "--restart")[0] == 0


@pytest.mark.slow
def test_errors_of_a_run_to_standard_output(work: Path) -> None:
    """The errors file is put in place also if the run is interrupted."""
    numbers(work, 100)
    (work / "hold").touch()
    running = Running(
        "work:told", "in.jsonl", "--each", "--max-batch-size", "1", "--isolate", "--errors", "bad"
    )
    running.items(50)
    assert running.end(signal.SIGINT)[0] == 130
    assert files_in(work) == {"bad"}
    assert all(error["error"].startswith("ValueError: ") for error in lines_of(work / "bad"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1"])
def test_standard_output_by_another_name(work: Path, name: str) -> None:
    """The file behind ``/dev/stdout`` is appended to, without what the function prints."""
    numbers(work, 3)
    with (work / "log").open("wb") as log:
        log.write(b"before\n")
        log.flush()
        status = subprocess.run(
            command("work:double", "in.jsonl", "-o", name),
            stdout=log,
            env=environment(),
            check=False,
        ).returncode
    assert status == 0
    assert (work / "log").read_text() == "before\n0\n2\n4\n"


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", "0<&- 2>&-", "0<&- 1>&- 2>&-"])
def test_standard_streams_that_are_closed(work: Path, closed: str) -> None:
    """Printed text does not reach files that are opened in place of closed streams."""
    numbers(work, 3)
    where = "-o out" if "1>&-" in closed else "> out"
    done = subprocess.run(  # noqa: S602 - of ours
        f"{' '.join(command('work:double', 'in.jsonl'))} {where} {closed}",
        shell=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0
    assert lines_of(work / "out") == [0, 2, 4]
    assert files_in(work) == {"out"}


# Interrupted, killed, and taken up again.


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "options"), [(1, []), (2, ["--unordered", "--errors", "bad"])])
def test_killed_at_random_moments(work: Path, seed: int, options: list[str]) -> None:
    """However often a run is killed, no result is lost or doubled, and no finished item runs again."""
    chance = random.Random(seed)  # noqa: S311 - to be the same each time
    total = 100
    arguments = [
        "work:told",
        numbers(work, total),
        "-o",
        "out",
        "--each",
        "--isolate",
        "--max-batch-size",
        "3",
        *options,
    ]
    done: set[int] = set()
    kills = 0
    (work / "hold").touch()  # the first run is killed before it ends
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
        (work / "hold").unlink(missing_ok=True)
        if not (work / "out.journal").exists() and (work / "out").exists():
            break  # it was killed when all was done, and it had only to end
        now = finished(work)
        assert done <= now
        done = now
    else:
        assert run(*arguments, "--resume")[0] == 1
    assert kills
    good, bad = ([n for n in range(total) if (n % 7 == 3) is is_bad] for is_bad in (False, True))
    results = lines_of(work / "out")
    assert (sorted(results) if "--unordered" in options else results) == [n * n for n in good]
    if "--errors" in options:
        errors = lines_of(work / "bad")
        assert sorted((error["line"], error["item"], error["error"]) for error in errors) == [
            (n + 1, n, f"ValueError: {n}") for n in bad
        ]
    assert files_in(work) == {"out", *({"bad"} if "--errors" in options else ())}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "loop"), [(signal.SIGINT, 130, "asyncio"), (signal.SIGTERM, 143, "auto")]
)
def test_interrupted_while_a_batch_hangs_in_c(
    work: Path, number: int, status: int, loop: str
) -> None:
    """The run ends, and leaves its finished items to be resumed."""
    source = numbers(work, 6)
    running = Running(
        "work:endless", source, "-o", "out", "--each", "--max-batch-size", 1, "--loop", loop
    )
    while 3 not in running.items(1):
        pass
    ended, said, _ = running.end(number)
    done = len(finished(work))
    assert ended == status
    expected = (
        f"{counted(done, 'item')} {'is' if done == 1 else 'are'} finished and kept in 'out.journal'; --resume goes on from there"
        if done
        else "nothing was finished"
    )
    assert said == f"async-batcher: interrupted; {expected}\n"
    assert files_in(work) == ({"out.journal"} if done else set())


@pytest.mark.slow
def test_interrupted_while_the_input_blocks(work: Path) -> None:
    """The run ends and names the file with its results, as standard input cannot be resumed."""
    theirs, ours = os.pipe()
    os.write(ours, b"0\n1\n")
    running = Running("work:told", "-o", "out", "--each", stdin=theirs)
    os.close(theirs)
    assert sorted(running.items(2)) == [0, 1]
    status, said, _ = running.end(signal.SIGINT)
    os.close(ours)
    assert status == 130
    done = len(finished(work))
    left = (
        f"the results of {counted(done, 'item')} are in '{work / 'out.partial'}'"
        if done
        else "nothing was finished"
    )
    assert said == f"async-batcher: interrupted; {left}\n"


@pytest.mark.slow
@pytest.mark.parametrize("to", [["-o", "out"], []])
def test_interrupted_while_its_output_is_not_read(work: Path, to: list[str]) -> None:
    """The first Ctrl-C ends a run that blocks on writing failures to standard error."""
    (work / "in.jsonl").write_text("".join(f'"{"x" * 2000}{n}"\n' for n in range(200)))
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        command("work:fail_loudly", "in.jsonl", "--each", "--max-batch-size", "1", "--isolate", *to),
        stdout=subprocess.DEVNULL, stderr=theirs, env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + DEADLINE
        while select.select([], [theirs], [], 0)[1]:  # until the pipe is full
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)  # it writes: a signal just before a system call would not interrupt that
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(DEADLINE) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


@pytest.mark.slow
def test_interrupted_although_the_module_handles_signals(work: Path) -> None:
    """Ctrl-C works even if the user's module ignores SIGINT and leaves a thread running."""
    (work / "rude.py").write_text(
        "import signal, threading\nfrom work import endless\n"
        "if threading.current_thread() is threading.main_thread() and __name__ == 'rude':\n"
        "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
    )
    running = Running(
        "rude:endless", numbers(work, 6), "-o", "out", "--each", "--max-batch-size", 1
    )
    while 3 not in running.items(1):
        pass
    assert running.end(signal.SIGINT)[0] == 130


@pytest.mark.slow
def test_a_module_that_cannot_be_imported_in_a_worker(work: Path) -> None:
    """The error of the import ends the run, and no item is blamed."""
    (work / "here.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()} and os.getppid() != {os.getpid()}:\n    1 / 0\ndef f(batch): return batch\n"
    )
    status, _, said = run("here:f", numbers(work, 3), "-o", "out", "--isolate")
    assert (status, said.count("\n")) == (1, 1)
    assert (
        "async-batcher: PoolBrokenError: module 'here' cannot be imported in a worker: "
        "ZeroDivisionError: division by zero (" in said
    )


@pytest.mark.slow
def test_interrupted_while_the_output_blocks(work: Path) -> None:
    """The first Ctrl-C ends a run whose output is not read."""
    ours, theirs = os.pipe()
    running = Running(
        "work:large", numbers(work, 10), "--each", "--max-batch-size", 1, stdout=theirs
    )
    os.close(theirs)
    assert os.read(ours, 1) == b'"'  # it is writing the first result, which a pipe does not hold
    status, said, _ = running.end(signal.SIGINT)
    os.close(ours)
    assert (status, said) == (130, "async-batcher: interrupted\n")
