"""The processes of libraries: one that hangs or exits is replaced."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
from benchmarks.harness import child_process
from benchmarks.harness.child_process import LibraryProcesses
from benchmarks.libraries.names import ADAPTERS

if TYPE_CHECKING:
    from pathlib import Path

ADAPTER = """
import sys, time
print("{}")
for line in sys.stdin:
    if "hang" in line:
        time.sleep(1000)
    if "exit" in line:
        sys.exit(3)
    print('{"seconds": 1.0}')
"""


@pytest.fixture(name="library")
def _library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a library that runs a round, hangs or exits, as the scenario says."""
    (tmp_path / "adapter_of_a_test.py").write_text(ADAPTER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(ADAPTERS, "obedient", "adapter_of_a_test")
    return "obedient"


@pytest.mark.parametrize(
    ("scenario", "message"),
    [("hang", "has not replied for "), ("exit", "has exited with status 3")],
)
def test_a_library_that_hangs_or_exits_gets_a_new_process(
    library: str, monkeypatch: pytest.MonkeyPatch, scenario: str, message: str
) -> None:
    """The round fails, the next one runs in a new process, and nothing of the old one is left."""
    with LibraryProcesses() as processes:
        process = processes.get(library, "asyncio")
        assert processes.get(library, "asyncio") is process
        assert process.run_round("work", {}) == {"seconds": 1.0}
        timeout = 0.05 if scenario == "hang" else 60.0
        monkeypatch.setattr(child_process, "_REPLY_TIMEOUT", timeout)
        with pytest.raises(RuntimeError, match=message):
            process.run_round(scenario, {})
        monkeypatch.setattr(child_process, "_REPLY_TIMEOUT", 60.0)
        other = processes.get(library, "asyncio")
        assert other is not process
        del process
        gc.collect()  # an open pipe would warn, which is an error
        assert other.run_round("work", {}) == {"seconds": 1.0}
