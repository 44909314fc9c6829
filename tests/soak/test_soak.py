"""The soak itself, for a few seconds; see `__main__`."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.soak.items import DeedError, forget_files, note_run
from tests.soak.ledger import Ledger
from tests.support.scripts import environment

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_soak_of_a_few_seconds() -> None:
    """Nothing is lost, wrong, run twice or left behind, and the report says so."""
    command = [sys.executable, "-m", "tests.soak", "0.08", "--seed", "3"]
    command += ["--loop", "asyncio", "--method", "forkserver"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("asyncio, forkserver, seed 3\n")
    words = done.stdout.split()
    for name in ("lost", "wrong", "twice", "behind", "errors"):
        assert words[words.index(name) + 1] == "0"


def test_what_a_ledger_finds(tmp_path: Path) -> None:
    """Results of other items, errors without a cause, and items that ran twice."""
    ledger = Ledger()
    items = [(number, "", number, "") for number in range(5)]
    for item in items:
        ledger.begin(item)
    ledger.end(items[0], (0, 0))
    assert ledger.wrong == []
    ledger.end(items[1], (2, 2))
    ledger.end(items[2], (2, 3))
    ledger.end(items[3], DeedError(4))
    ledger.end(items[4], ValueError())
    assert len(ledger.wrong) == 4
    ledger.begin((5, "", 5, ""), may_rerun=True)
    runs = tmp_path / "runs"
    runs.touch()
    for number in (0, 5, 1, 5, 1):
        note_run(number, str(runs))
    forget_files()
    assert ledger.run_twice(str(runs)) == ["item 1 ran 2 times"]
