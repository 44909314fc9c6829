"""The memory of a worker, from /proc."""

from __future__ import annotations

import mmap
from pathlib import Path


def private_memory(pid: int | None, limit: int = 0) -> int:
    """Return the resident memory in bytes that a process shares with no other one.

    Memory that it could share counts as private up to ``limit``, since that is faster to find out.

    Raises:
        OSError, ValueError, LookupError: There is no such process, or no /proc.
    """
    folder = Path("/proc", str(pid))
    fields = (folder / "statm").read_text().split()
    anonymous = (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE
    if anonymous <= limit:
        return anonymous
    try:
        lines = (folder / "smaps_rollup").read_text().splitlines()
    except OSError:  # an old kernel, or a sandbox
        return anonymous
    private = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return min(anonymous, private * 1024)
