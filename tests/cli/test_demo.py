"""The command ``async-batcher demo``: its analysis of a file, its comparison, and whole runs."""

from __future__ import annotations

import ast
import asyncio.base_events
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import cli
from async_batcher.cli import demo
from async_batcher.cli.demo import (
    FileResult,
    ModeResult,
    Workload,
    analyse_batch,
    count_definitions,
    describe,
    find_files,
)
from async_batcher.exceptions import WorkerDiedError
from tests.support import scripts
from tests.support.terminal import OnTerminal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OF_JSON = ("__init__.py", "decoder.py", "encoder.py", "scanner.py", "tool.py")
MODES = ("without batching", "threads", "processes")


# What is in a file.


def counts_of(folder: Path, source: str | bytes) -> tuple[bool, int, int]:
    """Count what a file with that source defines."""
    file = folder / "source.py"
    file.write_bytes(source if isinstance(source, bytes) else source.encode())
    return count_definitions(str(file))


@pytest.mark.parametrize(
    ("source", "functions", "classes"),
    [
        ("", 0, 0),
        ("def f(): pass", 1, 0),
        ("async def f():\n  async for x in y: pass", 1, 0),
        ("class A:\n  class B:\n    def f(self): return lambda: 1", 1, 2),
        ("def f():\n  if x:\n    def g(): pass", 2, 0),
        ("h = lambda x: x", 0, 0),
        (b"# -*- coding: latin-1 -*-\ndef caf\xe9(): pass\n", 1, 0),
    ],
)
def test_what_is_in_a_file(
    tmp_path: Path, source: str | bytes, functions: int, classes: int
) -> None:
    """Functions, methods and classes are counted at any depth, in the encoding the file declares."""
    assert counts_of(tmp_path, source) == (True, functions, classes)


@pytest.mark.parametrize(
    "source",
    [
        "def",
        "print 'two'",
        "x = 1\0",
        b"x = '\xff'",
        "# coding: no-such-encoding",
        "(" * 1000 + ")" * 1000,
        "-" * 20_000 + "1",
    ],
    ids=["syntax", "python 2", "null byte", "not utf-8", "encoding", "parentheses", "too deep"],
)
def test_a_file_that_cannot_be_parsed_is_counted_as_such(
    tmp_path: Path, source: str | bytes
) -> None:
    """Invalid source raises nothing, and defines nothing."""
    assert counts_of(tmp_path, source) == (False, 0, 0)


def test_a_missing_file_counts_as_one_that_cannot_be_parsed(tmp_path: Path) -> None:
    """A file that was removed after it was found raises nothing."""
    assert count_definitions(str(tmp_path / "missing.py")) == (False, 0, 0)


def test_a_parser_that_mixes_up_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is parsed again if the parser failed because another thread used it, too."""
    file = tmp_path / "fine.py"
    file.write_text("def f(): pass")
    original, failures = ast.parse, iter([SystemError, SystemError])

    def parse(source: bytes) -> ast.Module:
        for error in failures:
            raise error
        return original(source)

    monkeypatch.setattr("async_batcher.cli.demo.ast.parse", parse)
    assert count_definitions(str(file)) == (True, 1, 0)


def test_results_share_the_cost_of_their_batch(tmp_path: Path) -> None:
    """Each result has the size of its batch and an equal share of its CPU time."""
    file = tmp_path / "source.py"
    file.write_text("def f(): pass")
    one, other = analyse_batch([str(file), str(file)])
    assert one == other
    assert one[:5] == (str(file), True, 1, 0, 2)
    assert one.cpu_seconds > 0


# Which files.


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 9 Python files, one invalid and one with a warning, and files to leave out."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "json").mkdir()
    for name in OF_JSON:
        shutil.copy(Path(json.__file__).with_name(name), folder / "json" / name)
    (folder / "broken.py").write_text("def")
    (folder / "warns.py").write_text("x = '\\d'\n")
    (folder / "empty.py").touch()
    (folder / "not_python.txt").write_text("def")
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "other.py").write_text("class A: pass")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "cached.py").touch()
    (folder / "folder.py").mkdir()
    (folder / "dangling.py").symlink_to("nowhere")
    return folder


def test_which_files_are_analysed(folder: Path) -> None:
    """Every regular ``.py`` file below the folder is found, in order, with the total size."""
    _, paths, size = find_files(str(folder))
    names = [os.path.relpath(path, folder) for path in paths]
    assert names == [
        "broken.py",
        "empty.py",
        *(f"json{os.sep}{name}" for name in OF_JSON),
        f"site-packages{os.sep}other.py",
        "warns.py",
    ]
    assert size == sum(Path(path).stat().st_size for path in paths)


@pytest.mark.slow
def test_the_standard_library_is_without_what_was_installed() -> None:
    """Installed packages below the folder of the standard library are left out."""
    root, paths, _ = find_files(None)
    names = {os.path.relpath(path, root) for path in paths}
    assert root == sysconfig.get_path("stdlib")
    assert {"ast.py", os.path.join("json", "decoder.py")} <= names  # noqa: PTH118 - they are text
    assert not any("-packages" in name for name in names)


# How the modes compare.


A = ("/files/a.py", True, 3, 1)
B = ("/files/b/c.py", True, 2, 2)
C = ("/files/d.py", False, 0, 0)


def _mode(mode: str, seconds: float, *sizes: int) -> ModeResult:
    results = [FileResult(*file, size, 0.25) for file, size in zip((A, B, C), sizes, strict=True)]
    return ModeResult(mode, 0.5, seconds, results)


def test_the_figures_of_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number in the table is what its column says."""
    monkeypatch.setattr(demo, "cpu_count", lambda: 2)
    load = Workload("/files", [A[0], B[0], C[0]], 3_000_000, workers=2, max_batch_size=8)
    lines = describe([_mode("threads", 3.0, 2, 2, 1), _mode("processes", 1.5, 3, 3, 3)], load)
    assert lines[0] == "3 tasks, each with one file at a time; 2 workers on 2 cores"
    assert [line.split() for line in lines[3:5]] == [
        ["threads", "3", "3.0", "3.00", "1", "1.00", "x", "12", "%", "2", "1.5"],
        ["processes", "3", "3.0", "1.50", "2", "2.00", "x", "25", "%", "1", "3.0"],
    ]
    assert lines[-2:] == [
        "The same results from each: 5 functions, 3 classes; files that cannot be parsed: 1.",
        "Start-up, not counted above: threads 0.50 s, processes 0.50 s.",
    ]


# The command, in this process.


def test_a_folder_without_python_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line of error, and exit status 2."""
    (tmp_path / "notes.txt").touch()
    assert cli.main(["demo", "--path", str(tmp_path)]) == 2
    assert capsys.readouterr() == (
        "",
        f"async-batcher: there is no Python file in {str(tmp_path)!r}\n",
    )


@contextlib.asynccontextmanager
async def _wrong(*_: object) -> AsyncIterator[Any]:
    async def process(path: str) -> FileResult:
        return FileResult(path, True, 1_000_000, 0, 1, 0.0)  # noqa: FBT003 - a row

    yield process


@contextlib.asynccontextmanager
async def _crashing(*_: object) -> AsyncIterator[Any]:
    async def process(path: str) -> FileResult:
        raise WorkerDiedError(path)

    yield process


@pytest.mark.parametrize(
    ("mode", "complaint"), [(_wrong, "different results: "), (_crashing, "broken.py")]
)
def test_a_failure_is_said_in_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: Any,
    complaint: str,
) -> None:
    """If results differ or a worker crashes, no table is printed, and the exit status is 1."""
    original = demo.open_mode
    monkeypatch.setattr(
        demo, "open_mode", lambda name, load: (mode if name == "threads" else original)(name, load)
    )
    monkeypatch.delitem(demo.MODES, "processes")
    assert cli.main(["demo", "--path", str(folder)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert complaint in output.err
    assert output.err.count("\n") == 1


# The command as a user runs it.


@pytest.fixture(name="environment", scope="module")
def _environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment that shows every warning, with a bytecode cache of its own."""
    environment = {
        **scripts.environment(),
        "PYTHONWARNINGS": "always",
        "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("cache")),
    }
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"):
        environment.pop(name, None)
    return environment


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "async_batcher", "demo", *map(str, arguments)]


def _numbers(line: str) -> list[float]:
    return [float(word.replace(",", "")) for word in line.split() if word[0].isdigit()]


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "auto"])
def test_the_table(folder: Path, environment: dict[str, str], loop: str) -> None:
    """The table has a row for each mode; a pipe gets no bar, and no warning is printed."""
    command = _command("--path", folder, "--workers", 1, "--max-batch-size", 4, "--loop", loop)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].endswith((", asyncio", ", asyncio" if loop == "asyncio" else ", uvloop"))
    header = next(line for line in lines if "files/s" in line)
    assert header.split("  ")[0] == ""
    assert [name.strip() for name in header.split("  ") if name.strip()] == [
        "files", "MB", "seconds", "files/s", "over threads", "cores used", "batches", "mean size",
    ]  # fmt: skip
    rows = lines[lines.index(header) + 1 :][:3]
    for mode, row in zip(MODES, rows, strict=True):
        assert row.startswith(mode)
        files, _, _, _, over_threads, _, batches, mean_size = _numbers(row.removeprefix(mode))
        assert (files, batches, mean_size) == (
            (9, 9, 1) if mode == "without batching" else (9, 3, 3)
        )  # 4 and 4 and 1
        assert over_threads == 1.0 or mode != "threads"
    counts = [count_definitions(path) for path in find_files(str(folder))[1]]
    _, functions, classes = (sum(column) for column in zip(*counts, strict=True))
    assert (
        f"The same results from each: {functions} functions, {classes} classes; files that cannot be parsed: 1."
        in lines
    )
    assert "\r" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a pipe of POSIX")
def test_a_reader_that_closes_the_pipe(folder: Path, environment: dict[str, str]) -> None:
    """The command ends without a message if the reader of its output has closed the pipe."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        _command("--path", folder),
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
        check=False,
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written(folder: Path, environment: dict[str, str]) -> None:
    """A full disk is reported in one line."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            _command("--path", folder),
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"async-batcher: ")
    assert done.stderr.count(b"\n") == 1


on_terminal = pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
has_tqdm = pytest.mark.skipif(importlib.util.find_spec("tqdm") is None, reason="of the extra [cli]")


@pytest.mark.slow
@has_tqdm
@on_terminal
def test_the_bar_on_a_terminal(folder: Path, environment: dict[str, str]) -> None:
    """Each mode rewrites one line of the terminal, which is cleared before the table is printed."""
    with contextlib.closing(
        OnTerminal(_command("--path", folder, "--workers", 1), environment)
    ) as program:
        assert program.end() == 0
    shown = program.shown.decode()
    for mode in MODES:
        assert f"{mode}: starting" in shown
        assert f"\r{mode}:   0%|" in shown
        assert "| 0/9 [" in shown
    assert "\n" not in shown
    assert shown.endswith("\r")
    assert b"files/s" in program.output
    assert b"\r" not in program.output


@pytest.fixture(name="much", scope="module")
def _much(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """Return a folder that keeps any mode busy for many seconds; all modules are compiled."""
    folder = tmp_path_factory.mktemp("much")
    for number in range(500):
        (folder / f"file_{number}.py").symlink_to(asyncio.base_events.__file__)
    few = tmp_path_factory.mktemp("few")
    (few / "empty.py").touch()
    subprocess.run(_command("--path", few), capture_output=True, env=environment, check=True)
    return folder


@pytest.mark.slow
@has_tqdm
@on_terminal
@pytest.mark.parametrize("stage", ["starting", "| 0/500 ["])
@pytest.mark.parametrize("mode", MODES)
def test_ctrl_c(much: Path, environment: dict[str, str], mode: str, stage: str) -> None:
    """Ctrl-C ends any mode with status 130 and one word; no process is left."""
    text = f"""
import sys
from async_batcher import cli
from async_batcher.cli import demo
demo.MODES = {{{mode!r}: demo.MODES[{mode!r}]}}
sys.exit(cli.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", text, "demo", "--path", str(much)]
    with contextlib.closing(OnTerminal(command, environment)) as program:
        program.wait_for(stage.encode())
        program.press_ctrl_c()
        status = program.end()
    assert (status, program.output) == (130, b"")
    assert program.shown.endswith(b"\rasync-batcher: interrupted\r\n")
    assert program.shown.count(b"\n") == 1


@pytest.mark.slow
@has_tqdm
@on_terminal
def test_ctrl_c_with_all_modes(much: Path, environment: dict[str, str]) -> None:
    """Ctrl-C ends the command itself in the same way."""
    with contextlib.closing(OnTerminal(_command("--path", much), environment)) as program:
        program.wait_for(b"| 0/500 [")
        program.press_ctrl_c()
        assert program.end() == 130
    assert program.output == b""
    assert program.shown.endswith(b"\rasync-batcher: interrupted\r\n")
