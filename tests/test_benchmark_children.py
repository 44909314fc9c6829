"""The processes of rivals: what becomes of one that hangs or ends."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
from benchmarks import children
from benchmarks.children import Children

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import sys, time
print("{}")
for line in sys.stdin:
    if "hang" in line:
        time.sleep(1000)
    if "end" in line:
        sys.exit(3)
    print('{"seconds": 1.0}')
"""


@pytest.fixture(name="rival")
def _rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that does as it is told."""
    path = tmp_path / "rival.py"
    path.write_text(SCRIPT)
    monkeypatch.setitem(children.SCRIPTS, "obedient", str(path))
    return "obedient"


@pytest.mark.parametrize(("told", "complaint"), [("hang", "has not answered for "), ("end", "has ended, with exit status 3")])
def test_another_takes_its_place(rival: str, monkeypatch: pytest.MonkeyPatch, told: str, complaint: str) -> None:
    """Who hangs or ends has failed that question; the next is put to a new process, and nothing is left of the old one."""
    with Children() as processes:
        child = processes.get(rival, "asyncio")
        assert processes.get(rival, "asyncio") is child
        assert child.ask("work", {}) == {"seconds": 1.0}
        monkeypatch.setattr(children, "_HANGS", 1.0 if told == "hang" else 60.0)
        with pytest.raises(RuntimeError, match=complaint):
            child.ask(told, {})
        monkeypatch.setattr(children, "_HANGS", 60.0)
        other = processes.get(rival, "asyncio")
        assert other is not child
        del child
        gc.collect()  # a pipe that was left open is an error here
        assert other.ask("work", {}) == {"seconds": 1.0}
