"""How fast this machine is, so that loads can give an item's work in seconds."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import cast

from benchmarks.harness.machine import ROOT


@functools.cache
def speeds() -> dict[str, float]:
    """Return steps per second of each sized workload, measured once in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scenarios.workloads"]
    finished = subprocess.run(  # noqa: S603 - our own command
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return cast("dict[str, float]", json.loads(finished.stdout))


def steps(workload: str, seconds: float) -> int:
    """Return how many steps take ``seconds`` on an idle core; at least one."""
    return max(1, round(seconds * speeds()[workload]))
