"""The command ``async-batcher``, used as a user would, and what its demo is made of."""

from __future__ import annotations

import ast
import asyncio.base_events
import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import _demo, cli
from async_batcher._analysis import Answer, Report, Stopped, analyse, analyse_batch
from async_batcher._comparison import Comparison, Files, Run
from async_batcher.exceptions import WorkerDiedError
from tests.support import scripts
from tests.support.terminal import OnTerminal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OF_JSON = ("__init__.py", "decoder.py", "encoder.py", "scanner.py", "tool.py")
MODES = ("without batching", "threads", "processes")


# What is in a file.


def report_of(folder: Path, source: str | bytes) -> Report:
    """The report on a file with that source."""
    file = folder / "source.py"
    file.write_bytes(source if isinstance(source, bytes) else source.encode())
    return analyse(str(file))


@pytest.mark.parametrize(
    ("source", "functions", "classes", "branches", "most_complex", "complexity"),
    [
        ("", 0, 0, 0, "", 0),
        ("if x: pass\nelif y: pass\nelse: pass", 0, 0, 2, "", 0),
        ("def f(): pass", 1, 0, 0, "f", 1),
        ("async def f():\n  async for x in y: pass\n  async with z: pass", 1, 0, 1, "f", 2),
        ("class A:\n  class B:\n    def f(self): return 1 if x else 2", 1, 2, 1, "A.B.f", 2),
        ("def f():\n  if x: pass\n  def g():\n    while x:\n      if y: pass", 2, 0, 3, "f.g", 3),
        ("def f():\n  class A:\n    def g(self): x or y", 2, 1, 1, "f.A.g", 2),
        ("def f(): return lambda x: x and y and z", 1, 0, 2, "f", 3),
        ("h = lambda x: x or y", 0, 0, 1, "", 0),
        ("def f(): return [x for x in y for z in x if x if z]", 1, 0, 4, "f", 5),
        ("def f(): return {x: x for x in y}, {x for x in y}, (x for x in y)", 1, 0, 3, "f", 4),
        ("def f(x):\n  match x:\n    case 1 if y: pass\n    case _: pass", 1, 0, 2, "f", 3),
        ("def f():\n  try: pass\n  except A: pass\n  except B: pass\n  else: pass\n  finally: pass", 1, 0, 2, "f", 3),
        ("def f():\n  for x in y: pass\n  else: pass\n  assert x\n  with y: pass", 1, 0, 1, "f", 2),
        ("def f(a=x or y): pass", 1, 0, 1, "f", 2),
        ("def a(): x or y\ndef b(): x or y", 2, 0, 2, "a", 2),
    ],
)  # fmt: skip
def test_what_is_in_a_file(
    tmp_path: Path, source: str, functions: int, classes: int, branches: int, most_complex: str, complexity: int
) -> None:
    """Functions, classes and branches are counted, and of functions that are equally complex the first is named."""
    report = report_of(tmp_path, source)
    assert report[1:] == (True, functions, classes, branches, most_complex, complexity)


def test_a_coding_cookie_is_followed(tmp_path: Path) -> None:
    """A file is read in the encoding that it names."""
    assert report_of(tmp_path, b"# -*- coding: latin-1 -*-\ndef caf\xe9(): pass\n").most_complex == "caf\xe9"


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
def test_a_file_that_cannot_be_parsed_is_an_answer(tmp_path: Path, source: str | bytes) -> None:
    """Whatever is in it, there is a report."""
    assert report_of(tmp_path, source) == Report(str(tmp_path / "source.py"), is_parsed=False)


def test_a_file_that_is_gone_is_an_answer(tmp_path: Path) -> None:
    """So is one that cannot be read."""
    assert not analyse(str(tmp_path / "gone.py")).is_parsed


def test_a_batch_tells_what_it_took(tmp_path: Path) -> None:
    """Each answer has the size of its batch and an equal share of its processor time."""
    path = report_of(tmp_path, "def f(): pass").path
    one, other = analyse_batch([path, path])
    assert one == other
    assert (one.report, one.batch_size) == (analyse(path), 2)
    assert one.cpu_seconds > 0


def test_a_batch_can_be_stopped_between_files(tmp_path: Path) -> None:
    """A thread that is told to stop does so before its next file."""
    told = iter([False, True])
    with pytest.raises(Stopped):
        analyse_batch([str(tmp_path / "a.py"), str(tmp_path / "b.py"), str(tmp_path / "c.py")], lambda: next(told))
    assert not list(told)


# Which files.


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the package json, and what may be in the way: 9 Python files; one cannot be parsed, one makes the parser warn."""
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


def test_a_parser_that_mixes_up_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python's parser fails since another thread uses it too, the file is parsed again: it is no worse than others."""
    file = tmp_path / "fine.py"
    file.write_text("def f(): pass")
    original, failures = ast.parse, iter([SystemError, SystemError])

    def parse(source: bytes) -> ast.Module:
        for error in failures:
            raise error
        return original(source)

    monkeypatch.setattr("async_batcher._analysis.ast.parse", parse)
    assert analyse(str(file)).functions == 1


def test_which_files_are_analysed(folder: Path) -> None:
    """Every regular ``.py`` file below a folder, in order, and their size."""
    files = _demo.find_files(str(folder))
    names = [os.path.relpath(path, folder) for path in files.paths]
    assert names == [
        "broken.py",
        "empty.py",
        *(f"json{os.sep}{name}" for name in OF_JSON),
        f"site-packages{os.sep}other.py",
        "warns.py",
    ]
    assert files.size == sum(Path(path).stat().st_size for path in files.paths)


@pytest.mark.slow
def test_the_standard_library_is_without_what_was_installed() -> None:
    """Of the standard library every file, tests too, but no package that was installed."""
    files = _demo.find_files(None)
    names = {os.path.relpath(path, files.root) for path in files.paths}
    assert files.root == sysconfig.get_path("stdlib")
    assert {"ast.py", os.path.join("json", "decoder.py")} <= names  # noqa: PTH118 - they are text
    assert not any("-packages" in name for name in names)


# How the modes compare.


def _run(mode: str, seconds: float, *answers: tuple[Report, int]) -> Run:
    return Run(mode, 0.5, seconds, [Answer(report, size, 0.25) for report, size in answers])


A = Report("/files/a.py", is_parsed=True, functions=3, classes=1, branches=5, most_complex="f", complexity=4)
B = Report("/files/b/c.py", is_parsed=True, functions=2, classes=2, branches=9, most_complex="A.g", complexity=10)
C = Report("/files/d.py", is_parsed=False)
FILES = Files("/files", [A.path, B.path, C.path], 3_000_000)


def _comparison(*runs: Run) -> Comparison:
    return Comparison(FILES, list(runs), cores=2, workers=2, tasks=128, max_batch_size=8, loop="asyncio")


def test_the_figures_of_a_comparison() -> None:
    """Each number is what its name says."""
    figures = _comparison(_run("threads", 3.0, (A, 2), (B, 2), (C, 1)), _run("processes", 1.5, (A, 3), (B, 3), (C, 3))).figures()
    assert figures["modes"] == [
        {
            "mode": "threads", "start_seconds": 0.5, "seconds": 3.0, "files_per_second": 1.0, "speed_over_threads": 1.0,
            "cpu_seconds": 0.75, "cores_used_percent": 12.5, "batches": 2, "mean_batch_size": 1.5,
        },
        {
            "mode": "processes", "start_seconds": 0.5, "seconds": 1.5, "files_per_second": 2.0, "speed_over_threads": 2.0,
            "cpu_seconds": 0.75, "cores_used_percent": 25.0, "batches": 1, "mean_batch_size": 3.0,
        },
    ]  # fmt: skip
    assert figures["analysis"] == {
        "functions": 5,
        "classes": 3,
        "branches": 14,
        "unparsable_files": 1,
        "most_complex": {"path": os.path.join("b", "c.py"), "function": "A.g", "complexity": 10},  # noqa: PTH118 - it is text
    }


def test_answers_that_differ_are_told() -> None:
    """A difference names the modes and the file; what a batch took is none."""
    one = _run("threads", 1.0, (A, 2), (B, 2), (C, 1))
    assert _comparison(one, _run("processes", 2.0, (A, 3), (B, 3), (C, 3))).difference() is None
    difference = _comparison(one, _run("processes", 1.0, (A, 2), (B._replace(branches=8), 2), (C, 1))).difference()
    assert difference is not None
    assert "'threads' and 'processes'" in difference
    assert B.path in difference
    assert A.path not in difference


# The command, in this process.


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["demo", "--path", "no/such/folder"], "there is no folder 'no/such/folder'"),
        (["demo", "--path", __file__], "is not a folder"),
        (["demo", "--workers", "0"], "--workers: must be a number from 1, not '0'"),
        (["demo", "--workers", "-1"], "--workers: must be a number from 1, not '-1'"),
        (["demo", "--workers", "two"], "--workers: must be a number from 1, not 'two'"),
        (["demo", "--max-batch-size", "0"], "--max-batch-size: must be a number from 1, not '0'"),
        (["demo", "--loop", "curio"], "--loop: invalid choice: 'curio'"),
        (["demo", "--nonsense"], "--nonsense"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    """And the exit status is 2."""
    try:
        status: Any = cli.main(arguments)
    except SystemExit as exc:
        status = exc.code
    output = capsys.readouterr()
    assert (status, output.out) == (2, "")
    assert output.err.startswith("async-batcher: ")
    assert complaint in output.err
    assert output.err.count("\n") == 1


def test_a_folder_without_python_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, with exit status 2."""
    (tmp_path / "notes.txt").touch()
    assert cli.main(["demo", "--path", str(tmp_path)]) == 2
    assert capsys.readouterr() == ("", f"async-batcher: there is no Python file in {str(tmp_path)!r}\n")


def test_uvloop_is_asked_for_but_not_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert cli.main(["demo", "--path", str(folder), "--loop", "uvloop"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "uvloop is not installed; pip install" in output.err
    assert output.err.count("\n") == 1


def test_without_a_command_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Which names the commands."""
    assert cli.main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_it_knows_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    """That of the installed package."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"async-batcher {version('async-batcher')}\n"


@contextlib.asynccontextmanager
async def _wrong(*_: object) -> AsyncIterator[_demo.Ask]:
    async def ask(path: str) -> Answer:
        return Answer(Report(path, is_parsed=True, functions=1_000_000), 1, 0.0)

    yield ask


@contextlib.asynccontextmanager
async def _dying(*_: object) -> AsyncIterator[_demo.Ask]:
    async def ask(path: str) -> Answer:
        raise WorkerDiedError(path)

    yield ask


@pytest.mark.parametrize(("mode", "complaint"), [(_wrong, "different answers"), (_dying, "broken.py")])
def test_a_failure_is_said_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: Any, complaint: str
) -> None:
    """Where the answers differ or a worker dies, no table is printed, and the exit status is 1."""
    monkeypatch.setattr(_demo, "_MODES", {"threads": _demo._in_threads, "wrong": mode})
    assert cli.main(["demo", "--path", str(folder)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert complaint in output.err
    assert output.err.count("\n") == 1


# The command as a user runs it.


@pytest.fixture(name="environment", scope="module")
def _environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where every warning is shown, and modules are compiled once, whatever the Python."""
    environment = {
        **scripts.environment(),
        "PYTHONWARNINGS": "always",
        "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("cache")),
    }
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"):
        environment.pop(name, None)
    return environment


def _demo_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "async_batcher", "demo", *map(str, arguments)]


def _numbers(line: str) -> list[float]:
    return [float(word.replace(",", "")) for word in line.split() if word[0].isdigit()]


@pytest.mark.slow
def test_the_table(folder: Path, environment: dict[str, str]) -> None:
    """A row for each mode with all its figures, and what was found; in a pipe nothing but that, no bar and no warning."""
    command = _demo_command("--path", folder, "--workers", 2, "--max-batch-size", 2)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603 - of ours
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    header = next(line for line in lines if "files/s" in line)
    assert header.split("  ")[0] == ""
    assert [name.strip() for name in header.split("  ") if name.strip()] == [
        "files", "MB", "seconds", "files/s", "over threads", "cores used", "batches", "mean size",
    ]  # fmt: skip
    rows = lines[lines.index(header) + 1 :][:3]
    for mode, row in zip(MODES, rows, strict=True):
        assert row.startswith(mode)
        files, _, _, _, over_threads, _, batches, mean_size = _numbers(row.removeprefix(mode))
        assert batches * mean_size == pytest.approx(files, abs=0.1 * files)
        assert (files, batches) == (9, 9) if mode == "without batching" else files == 9 > batches
        assert over_threads == 1.0 or mode != "threads"
    assert "files that cannot be parsed: 1" in done.stdout
    assert "The most complex function: " in done.stdout
    assert "\r" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "auto"])
def test_json(folder: Path, environment: dict[str, str], loop: str) -> None:
    """One object, whose numbers agree with each other and with what is in the files."""
    command = _demo_command("--path", folder, "--workers", 1, "--max-batch-size", 4, "--loop", loop, "--json")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603 - of ours
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    reports = [analyse(path) for path in _demo.find_files(str(folder)).paths]
    assert figures["files"] == len(reports) == 9
    assert (figures["workers"], figures["max_batch_size"]) == (1, 4)
    assert figures["loop"] in ("asyncio", "asyncio" if loop == "asyncio" else "uvloop")
    analysis = figures["analysis"]
    assert analysis["functions"] == sum(report.functions for report in reports) > 0
    assert analysis["classes"] == sum(report.classes for report in reports) > 0
    assert analysis["branches"] == sum(report.branches for report in reports) > 0
    assert analysis["unparsable_files"] == 1
    assert analysis["most_complex"]["complexity"] == max(report.complexity for report in reports)
    modes = {mode["mode"]: mode for mode in figures["modes"]}
    assert tuple(modes) == MODES
    for mode in modes.values():
        assert mode["files_per_second"] * mode["seconds"] == pytest.approx(9)
        assert mode["speed_over_threads"] * mode["seconds"] == pytest.approx(modes["threads"]["seconds"])
        assert mode["cores_used_percent"] * mode["seconds"] * figures["cores"] == pytest.approx(100 * mode["cpu_seconds"])
        assert mode["batches"] * mode["mean_batch_size"] == pytest.approx(9)
    assert modes["without batching"]["mean_batch_size"] == 1
    assert modes["threads"]["mean_batch_size"] == modes["processes"]["mean_batch_size"] == 3  # 4 and 4 and 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a pipe of POSIX")
def test_a_reader_that_leaves(folder: Path, environment: dict[str, str]) -> None:
    """Output that nobody reads ends the command without a word."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(  # noqa: S603 - of ours
        _demo_command("--path", folder), stdout=theirs, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written(folder: Path, environment: dict[str, str]) -> None:
    """A full disk is said in one line."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(  # noqa: S603 - of ours
            _demo_command("--path", folder), stdout=full, stderr=subprocess.PIPE, env=environment, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"async-batcher: ")
    assert done.stderr.count(b"\n") == 1


on_terminal = pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")


@pytest.mark.slow
@on_terminal
def test_the_bar_on_a_terminal(folder: Path, environment: dict[str, str]) -> None:
    """On a terminal one line is rewritten for each mode, and gone at the end; the table is not part of it."""
    with contextlib.closing(OnTerminal(_demo_command("--path", folder, "--workers", 1), environment)) as program:
        assert program.end() == 0
    shown = program.shown.decode()
    for mode in MODES:
        assert f"\r\x1b[K{mode}: starting" in shown
        assert f"\r\x1b[K{mode}: [{'-' * 24}]   0%  0 of 9 files" in shown
    assert "\n" not in shown
    assert shown.endswith("\r\x1b[K")
    assert b"files/s" in program.output
    assert b"\r" not in program.output


@pytest.mark.slow
@on_terminal
def test_json_has_no_bar(folder: Path, environment: dict[str, str]) -> None:
    """With ``--json`` nothing is shown."""
    with contextlib.closing(OnTerminal(_demo_command("--path", folder, "--workers", 1, "--json"), environment)) as program:
        assert program.end() == 0
    assert program.shown == b""


@pytest.fixture(name="much", scope="module")
def _much(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """A folder that keeps any mode busy for many seconds, once all modules have been compiled."""
    folder = tmp_path_factory.mktemp("much")
    for number in range(500):
        (folder / f"file_{number}.py").symlink_to(asyncio.base_events.__file__)
    few = tmp_path_factory.mktemp("few")
    (few / "empty.py").touch()
    subprocess.run(_demo_command("--path", few), capture_output=True, env=environment, check=True)  # noqa: S603 - of ours
    return folder


@pytest.mark.slow
@on_terminal
@pytest.mark.parametrize("stage", ["starting", "0 of 500 files"])
@pytest.mark.parametrize("mode", MODES)
def test_ctrl_c(much: Path, environment: dict[str, str], mode: str, stage: str) -> None:
    """It ends whatever runs, with status 130; nothing is printed, and no process is left."""
    text = f"""
import sys
from async_batcher import _demo, cli
_demo._MODES = {{{mode!r}: _demo._MODES[{mode!r}]}}
sys.exit(cli.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", text, "demo", "--path", str(much)]
    with contextlib.closing(OnTerminal(command, environment)) as program:
        program.wait_for(stage.encode())
        program.press_ctrl_c()
        status = program.end()
    assert (status, program.output) == (130, b"")
    assert b"Traceback" not in program.shown
    assert b"\n" not in program.shown


@pytest.mark.slow
@on_terminal
def test_ctrl_c_with_all_modes(much: Path, environment: dict[str, str]) -> None:
    """The same with the command itself."""
    with contextlib.closing(OnTerminal(_demo_command("--path", much), environment)) as program:
        program.wait_for(b"0 of 500 files")
        program.press_ctrl_c()
        assert program.end() == 130
    assert program.output == b""
    assert b"\n" not in program.shown
