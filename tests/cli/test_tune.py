"""The command ``async-batcher tune``: functions that work, fail, hang or crash, and its output."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import cli
from async_batcher.cli._errors import CommandError
from async_batcher.cli.tune.command import _read
from tests.support import scripts
from tests.support.terminal import OnTerminal

if TYPE_CHECKING:
    from pathlib import Path

on_terminal = pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")

FUNCTIONS = """
import os
import time
from pathlib import Path

from async_batcher import batched


def nothing(batch):
    return batch


def sleeps(batch):
    time.sleep(0.005 * len(batch))  # releases the GIL; so long that a trip to a worker does not count
    return batch


def count(text):
    return sum(i % 7 for i in range(1000 * len(text)))


def crashes(batch):
    if "three" in batch:
        os.kill(os.getpid(), 9)
    return batch


def hangs(batch):
    if "three" in batch:
        Path("pid").write_text(str(os.getpid()))
        time.sleep(1000)
    return batch


def raises(batch):
    if "three" in batch:
        raise ValueError("not\\n3")
    return batch


def raises_for_many(batch):
    if len(batch) > 1:
        raise ValueError("too many")
    return batch


def fail():
    raise OSError("no model")


ready = False


def get_ready():
    global ready
    ready = True


def needs_set_up(batch):
    assert ready
    print("noise")
    return batch


set_up = batched(needs_set_up, setup_worker=get_ready)
not_set_up = batched(nothing, setup_worker=fail)
"""


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write functions, and items for them."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "items.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    (folder / "items.jsonl").write_text('"one"\n\n{"text": 2}\n')
    (folder / "bad.jsonl").write_text('"one"\n\n{"text": 2\n')
    (folder / "empty.txt").touch()
    return folder


def _command(
    function: str, *options: object, items: str = "items.txt", form: str = "lines"
) -> list[str]:
    arguments = [
        "-m",
        "async_batcher",
        "tune",
        f"functions:{function}",
        items,
        "--format",
        form,
        "--workers",
        "2",
    ]
    return [sys.executable, *arguments, *map(str, options)]


def _tune(
    folder: Path, function: str, *options: object, **kwargs: str
) -> subprocess.CompletedProcess[str]:
    command = _command(function, *options, **kwargs)
    return subprocess.run(
        command, cwd=folder, env=scripts.environment(), capture_output=True, text=True, check=False
    )


def _figures(folder: Path, function: str, *options: object, **kwargs: str) -> Any:
    done = _tune(folder, function, "--json", *options, **kwargs)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def _answers(folder: Path, code: str, items: list[str]) -> list[Any]:
    """Return the results of the generated code, run as a program of its own."""
    program = f"""
import asyncio

async def main():
    async with batcher:
        print(await asyncio.gather(*map(batcher, {items!r})))

asyncio.run(main())
"""
    path = os.pathsep.join([str(folder), scripts.environment()["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + program],
        env={**scripts.environment(), "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), code
    found: list[Any] = ast.literal_eval(done.stdout.splitlines()[-1])
    return found


# Functions that work.


@pytest.mark.slow
def test_a_function_that_does_nothing(folder: Path) -> None:
    """A function that is cheap is reported as such; the generated code works."""
    done = _tune(folder, "nothing", "--time", 5)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "functions:nothing on the first 5 items of items.txt"
    assert max(map(len, lines)) <= 80
    for way in ("1 thread", "2 threads", "2 processes"):  # of one process if it starts soon
        assert sum(line.startswith(f"{way}  ") for line in lines) == 1, done.stdout
    assert [line.split()[0] for line in lines if line.endswith("s") and "  " in line][-4:] == [
        "1",
        "4",
        "16",
        "256",
    ]
    assert "\nRecommended for throughput with 256 clients:\n" in done.stdout
    assert "- Called directly with lists of " in done.stdout
    head, start, code = done.stdout.partition("from async_batcher import batched\n")
    assert "batched(" not in head
    assert _answers(folder, start + code, ["a", "b"]) == ["a", "b"]


@pytest.mark.slow
def test_a_function_that_releases_the_gil(folder: Path) -> None:
    """If threads do as well as processes, the generated code uses threads."""
    figures = _figures(folder, "sleeps", "--time", 10, "--clients", "1,8")
    advice = figures["advice"]
    is_right = (advice["executor"], advice["max_workers"]) == ("thread", 2)
    assert is_right or figures["is_busy"], advice
    is_said = any("releases the GIL" in reason for reason in advice["why"])
    assert is_said != figures["is_busy"], "only what was measured well"
    assert _answers(folder, advice["code"], ["a", "b"]) == ["a", "b"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="of the extra [tune]")
def test_the_plot(folder: Path) -> None:
    """It shows each pool and what is recommended."""
    _figures(folder, "count", "--each", "--time", 5, "--clients", "4", "--plot", "plot.svg")
    drawing = ET.parse(folder / "plot.svg").getroot()  # noqa: S314 - of ours
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    texts = {
        "".join(element.itertext()).strip()
        for element in drawing.iter("{http://www.w3.org/2000/svg}text")
    }
    assert {"recommended", "1 thread", "functions:count with 4 clients", "max_batch_size"} <= texts


@pytest.mark.slow
def test_a_function_of_one_item_that_computes(folder: Path) -> None:
    """With ``--each``, the figures are complete, and the generated code works."""
    figures = _figures(
        folder, "count", "--each", "--time", 6, "--target-latency", 5, "--clients", "2, 16,2",
        "--loop", "asyncio",
    )  # fmt: skip
    assert (figures["items"], figures["loop"], figures["target_latency_seconds"]) == (
        5,
        "asyncio",
        5.0,
    )
    sizes = [cost["batch_size"] for cost in figures["costs"]]
    assert sizes == [1 << power for power in range(len(sizes))]
    assert figures["fit"]["fixed_seconds"] >= 0
    assert figures["fit"]["seconds_per_item"] >= 0
    points = figures["points"]
    tried = {(point["mode"], point["workers"]) for point in points}
    # One process is tried if it starts soon.
    assert tried | {("processes", 1)} == {
        ("threads", 1), ("threads", 2), ("processes", 1), ("processes", 2),
    }  # fmt: skip
    for point in points:
        assert point["items_per_second"] > 0
        assert point["p99_seconds"] >= point["p50_seconds"] > 0
    advice = figures["advice"]
    assert figures["clients"] == [2, 16]
    assert {load["clients"] for load in advice["loads"]} <= {2, 16}
    assert advice["meets_target"]
    assert figures["seconds"] < 60
    assert _answers(folder, advice["code"], ["a"]) == [sum(i % 7 for i in range(1000))]


@pytest.mark.slow
def test_a_batcher_with_a_set_up(folder: Path) -> None:
    """The set-up runs in each worker and in the generated code; printed text is not in the result."""
    done = _tune(folder, "set_up", "--json", "--time", 5, items="items.jsonl", form="jsonl")
    assert (done.returncode, done.stderr.replace("noise", "").strip()) == (0, "")
    assert "noise" in done.stderr
    figures = json.loads(done.stdout)
    assert figures["items"] == 2
    assert "setup_worker=set_up.setup_worker" in figures["advice"]["code"]
    assert _answers(folder, figures["advice"]["code"], ["a"]) == ["a"]


# Functions that fail.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", "functions:raises: line 3: ValueError: not 3"),
        ("raises_for_many", "each of them had passed alone: ValueError: too many"),
        ("crashes", "functions:crashes: line 3: worker process "),
        ("hangs", "functions:hangs: stuck at line 3, alone, for longer than 5 s allow"),
        ("not_set_up", "functions:not_set_up: a worker cannot be set up: OSError: no model"),
    ],
)
def test_a_function_that_fails(folder: Path, function: str, words: str) -> None:
    """One line names the failure and the item; the exit status is 1, and no worker is left."""
    done = _tune(
        folder, function, "--time", 5 if function == "hangs" else 100
    )  # which the others do not take
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("async-batcher: functions:")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    if function == "hangs":
        assert not scripts.is_alive(int((folder / "pid").read_text()))


# What cannot be done.


def _options(source: Path, form: str) -> Namespace:
    return Namespace(input=str(source), format=form)


def test_the_first_items_of_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only as many items are decoded as are used."""
    monkeypatch.setattr("async_batcher.cli.tune.command._MAX_ITEMS", 2)
    file = tmp_path / "items"
    file.write_bytes(b'\n{"a": 1}\n[2]\nnonsense\n')
    assert _read(_options(file, "jsonl")) == (["line 2", "line 3"], [{"a": 1}, [2]])
    assert _read(_options(file, "lines")) == (["line 1", "line 2"], ["", '{"a": 1}'])
    monkeypatch.setattr("async_batcher.cli.tune.command._MAX_ITEMS", 3)
    with pytest.raises(
        CommandError, match=r"^line 4: not JSON: Expecting value at column 1; --format lines takes"
    ):
        _read(_options(file, "jsonl"))
    with pytest.raises(CommandError, match=r"^there is no file '.*none'$"):
        _read(_options(tmp_path / "none", "jsonl"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["functions:nothing", "empty.txt"], "there is no item in empty.txt"),
        (["functions:nothing", "gone.txt"], "there is no file 'gone.txt'"),
        (["functions:nothing", "."], "--format files takes each file in it for an item"),
        (["functions:nothing", "bad.jsonl"], "line 3: not JSON: "),
        (["functions:gone", "items.jsonl"], "'functions' has no 'gone'"),
        (["functions", "items.jsonl"], "write MODULE:FUNCTION or FILE.py:FUNCTION"),
        (
            ["functions:nothing", "items.jsonl", "--time", "0"],
            "--time: must be a number of seconds, more than 0, not '0'",
        ),
        (
            ["functions:nothing", "items.jsonl", "--target-latency", "soon"],
            "--target-latency: must be a number of seconds",
        ),
        (
            ["functions:nothing", "items.jsonl", "--clients", "1,0"],
            "--clients: must be a number from 1, not '0'",
        ),
        (
            ["functions:nothing", "items.jsonl", "--workers", "0"],
            "--workers: must be a number from 1, not '0'",
        ),
        (
            ["functions:nothing", "items.jsonl", "--plot", "plot.pdf"],
            "must be a file whose name ends in .svg or .png",
        ),
        (
            ["functions:nothing", "items.jsonl", "--plot", "gone/plot.svg"],
            "there is no folder 'gone'",
        ),
        (["functions:nothing"], "INPUT"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    """Invalid requests exit with status 2 before anything is measured."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        status: Any = cli.main(["tune", *arguments])
    except SystemExit as exc:
        status = exc.code
    finally:
        sys.modules.pop("functions", None)
    output = capfd.readouterr()
    assert (status, output.out) == (2, "")
    assert output.err.startswith("async-batcher: ")
    assert complaint in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "option"), [("matplotlib", ["--plot", "plot.svg"]), ("uvloop", ["--loop", "uvloop"])]
)
def test_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    option: list[str],
) -> None:
    """The error names the package to install, before anything is measured."""
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["tune", "functions:nothing", "items.jsonl", *option]) == 2
    output = capsys.readouterr()
    assert f"{module} is not installed; pip install 'async-batcher[" in output.err
    assert output.err.count("\n") == 1


@pytest.mark.slow
def test_too_little_time(folder: Path) -> None:
    """If the time is too short to compare anything, the error says how much is needed."""
    (folder / "slow.py").write_text(
        "import time\n\ndef slow(batch):\n    time.sleep(1)\n    return batch\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "async_batcher", "tune", "slow.py:slow", "items.txt", "--format", "lines", "--time", "10"],
        cwd=folder, env=scripts.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "too long to compare anything within 10 s; allow --time " in done.stderr
    assert done.stderr.count("\n") == 1


# On a terminal.


has_tqdm = pytest.mark.skipif(importlib.util.find_spec("tqdm") is None, reason="of the extra [cli]")


@pytest.mark.slow
@has_tqdm
@on_terminal
def test_the_line_on_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line shows the current measurement and the time left, and is cleared at the end."""
    monkeypatch.chdir(folder)
    with contextlib.closing(
        OnTerminal(_command("raises", "--time", 100), scripts.environment())
    ) as program:
        assert program.end() == 1
    shown = program.shown.decode()
    assert "measuring: " in shown
    assert " s left" in shown
    assert shown.endswith("\rasync-batcher: functions:raises: line 3: ValueError: not 3\r\n")
    assert shown.count("\n") == 1
    assert program.output == b""


@pytest.mark.slow
@has_tqdm
@on_terminal
@pytest.mark.parametrize(
    ("function", "stage"),
    [("hangs", "line 3, alone"), ("sleeps", "2 threads"), ("sleeps", "2 processes")],
)
def test_ctrl_c(folder: Path, monkeypatch: pytest.MonkeyPatch, function: str, stage: str) -> None:
    """Ctrl-C ends any measurement with status 130 and one word; no process is left."""
    monkeypatch.chdir(folder)
    with contextlib.closing(
        OnTerminal(_command(function, "--time", 60), scripts.environment())
    ) as program:
        program.wait_for(stage.encode())
        program.press_ctrl_c()
        assert program.end() == 130
    assert program.output == b""
    assert program.shown.endswith(b"\rasync-batcher: interrupted\r\n")
    assert program.shown.count(b"\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a signal of POSIX")
def test_sigterm(folder: Path) -> None:
    """SIGTERM ends the command with status 143, and its worker that hangs."""
    (folder / "pid").unlink(missing_ok=True)
    os.mkfifo(folder / "told")
    (folder / "tells.py").write_text(
        textwrap.dedent("""
        import os, time
        from pathlib import Path

        def tells(batch):
            Path("told").write_text(str(os.getpid()))
            time.sleep(1000)
    """)
    )
    command = [
        sys.executable,
        "-m",
        "async_batcher",
        "tune",
        "tells:tells",
        "items.txt",
        "--format",
        "lines",
    ]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=scripts.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        pid = int((folder / "told").read_text())  # once it runs
        program.send_signal(signal.SIGTERM)
        assert program.communicate() == (b"", b"async-batcher: interrupted\n")
        assert program.returncode == 143
    assert not scripts.is_alive(pid)
