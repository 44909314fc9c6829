"""How fast this machine is, so that an item's work can be given in seconds."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import cast

from benchmarks.children import RIVALS


@functools.cache
def speeds() -> dict[str, float]:
    """Steps in a second of each job of a known size, at its fastest; measured once, in a process of its own."""
    finished = subprocess.run([sys.executable, str(RIVALS / "_jobs.py")], capture_output=True, text=True, timeout=60, check=True)  # noqa: S603 - our own script
    return cast("dict[str, float]", json.loads(finished.stdout))


def steps(job: str, seconds: float) -> int:
    """How many steps of a job take that long, on one core that has nothing else to do; at least one."""
    return max(1, round(seconds * speeds()[job]))
