"""The command ``async-batcher map`` in the tests: a module of the user's, and runs of the command."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_batcher import cli
from async_batcher.cli.map.fingerprint import read_fingerprint
from async_batcher.cli.map.journal import Journal, RunHeader
from async_batcher.cli.map.output import FinishedItem, ResumableOutput
from tests.support import scripts

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

# The user's module. ``begun`` tells the test of each item that a worker begins, through a named
# pipe. While there is a file "hold", a run of ``told`` does not come to its end.
WORK = """
import os, re, sys, time
from async_batcher import AsyncBatcher, batched

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
    while item >= 60 and os.path.exists("hold"):
        time.sleep(0.01)
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

loaded = []

def load():
    loaded.append("a model")
    yield
    with open("torn_down", "w") as file:
        file.write("a model")

def use(batch):
    assert loaded == ["a model"]
    return batch

with_a_model = batched(use, setup_worker=load)
words, broken = Words(r"\\w+"), Words("(")
"""


def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to a folder with the user's module; forget the module afterwards."""
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
    """Write a file with the numbers from 0, one on each line, and return its name."""
    (folder / "in.jsonl").write_text("".join(f"{n}\n" for n in range(count)))
    return "in.jsonl"


def command(*arguments: object) -> list[str]:
    """Return the command line, with 2 workers."""
    return [sys.executable, "-m", "async_batcher", "map", *map(str, arguments), "--workers", "2"]


def environment() -> dict[str, str]:
    """Return an environment that shows every warning."""
    return {**scripts.environment(), "PYTHONWARNINGS": "always", "PYTHONDONTWRITEBYTECODE": "1"}


def run(*arguments: object, given: str | bytes = b"") -> tuple[int, str, str]:
    """Run the command to its end; return the exit status, the output and the standard error."""
    given = given.encode() if isinstance(given, str) else given
    done = subprocess.run(
        command(*arguments), input=given, capture_output=True, env=environment(), check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run the command in this process, up to the start of workers; return status and error."""
    try:
        status: Any = cli.main(["map", *map(str, arguments)])
    except SystemExit as exc:
        status = exc.code
    output = capsys.readouterr()
    assert output.out == ""
    return status, output.err


def interrupt_run(source: str, *items: FinishedItem) -> None:
    """Leave what an interrupted run of ``work:mean`` over a file leaves."""
    digest = read_fingerprint(source, "jsonl").digest
    with contextlib.closing(ResumableOutput("out", None)) as output:
        output.start(RunHeader(digest, "work:mean", "jsonl", each=False, unordered=False))
        output.write(items)


def files_in(folder: Path) -> set[str]:
    """Return the names of the files that the tests have not put there."""
    return {path.name for path in folder.iterdir()} - {"work.py", "begun", "hold", "in.jsonl"}


def lines_of(path: Path) -> list[Any]:
    """Return the values of a file of JSON Lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class Running:
    """A run whose workers report which items they begin.

    Args:
        arguments: Arguments of the command.
        options: Options for `subprocess.Popen`.
    """

    def __init__(self, *arguments: object, **options: Any) -> None:
        """Start the command, and wait until an item has begun."""
        self.process = subprocess.Popen(
            command(*arguments),
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **options},
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
        self._events = Path("begun").open()  # noqa: SIM115 - until the end

    def items(self, count: int | None = None) -> list[int]:
        """Wait until so many more items have begun, or the run ends; None waits for its end."""
        read = iter(self._events.readline, "")
        return [
            int(line)
            for _, line in zip(range(sys.maxsize if count is None else count), read, strict=False)
        ]

    def end(self, number: int) -> tuple[int, str, list[int]]:
        """Signal the process group; return exit status, standard error, and the items begun."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        items = self.items()
        self._events.close()
        said = self.process.communicate()[1].decode()
        return self.process.returncode, said, items


def finished(folder: Path) -> set[int]:
    """Return the items that the journal has as finished; none if there is no journal."""
    with contextlib.closing(Journal(folder / "out.journal", "out")) as journal:
        journal.open()
        return {
            line - 1 for line, is_finished in enumerate(journal.progress.finished) if is_finished
        }
