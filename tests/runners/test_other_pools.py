"""What the README says of other pools: each cell of its tables is what a pool does here.

Each case is a program of its own, since some pools leave processes behind.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.support import worker_functions as work
from tests.support.polling import block_until
from tests.support.scripts import ROOT, environment, is_alive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals, forkserver"),
]

EVENTS = {  # by the first cell of their row
    "A worker is killed": "killed",
    "A batch hangs": "hangs",
    "An item cannot be pickled": "unpicklable",
    "A caller is cancelled": "cancelled",
    "The program is killed": "program_killed",
}
POOLS = ("async_batcher", "ProcessPoolExecutor", "loky", "pebble")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _cells() -> Iterator[tuple[str, str, str]]:
    """Yield event, pool and cell of the README's table, as far as the machine has the pool."""
    for line in README.partition("## What happens when")[2].partition("\n## ")[0].splitlines():
        event, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if event in EVENTS:
            for pool, cell in zip(POOLS, cells, strict=True):
                yield EVENTS[event], pool, cell


CELLS = list(_cells())


def _observe(pool: str, event: str, folder: Path) -> str:
    """Run the program; return what it prints, or what becomes of its worker."""
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.support.other_pools", pool, event, str(folder)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        if event == "program_killed":
            block_until(lambda: work.noted(folder, "pid"))
            program.kill()
            program.wait()
            return _worker_after_kill(pool, folder)
        output, errors = program.communicate(timeout=2 * work.DEADLINE)
        assert output or program.returncode == -signal.SIGKILL, errors
        return output.strip()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()


def _worker_after_kill(pool: str, folder: Path) -> str:
    (pid,) = map(int, work.noted(folder, "pid"))
    if pool == "async_batcher":
        block_until(lambda: not is_alive(pid))
        assert not work.noted(folder, "end")
        return "Its workers are ended"
    (folder / "go").touch()
    block_until(lambda: work.noted(folder, "end"))
    return "Its busy workers run on"


def test_the_table_has_a_row_for_each_event() -> None:
    """And a cell for each pool."""
    assert [(event, pool) for event, pool, _ in CELLS] == [
        (event, pool) for event in EVENTS.values() for pool in POOLS
    ]


@pytest.mark.parametrize(
    ("event", "pool", "cell"), CELLS, ids=[f"{event}-{pool}" for event, pool, _ in CELLS]
)
def test_what_happens(tmp_path: Path, event: str, pool: str, cell: str) -> None:
    """The README says what is observed; what follows a semicolon there may be an option."""
    if pool in ("loky", "pebble"):
        pytest.importorskip(pool)
    said, _, option = cell.partition("; with ")
    assert _observe(pool, event, tmp_path) == said
    if option:
        (name,) = re.findall(r"`(cancel_abandoned)=True`: it is ended", option)
        folder = tmp_path / "option"
        folder.mkdir()
        assert _observe(f"{pool}, {name}", event, folder) == "It is ended"


@pytest.mark.parametrize(("event", "expected"), [("killed", ""), ("hangs", "It runs on")])
def test_threads(tmp_path: Path, event: str, expected: str) -> None:
    """A crash ends the program, which prints nothing; a call that hangs cannot be ended."""
    assert _observe("threads", event, tmp_path) == expected
