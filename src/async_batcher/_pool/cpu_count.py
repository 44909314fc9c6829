"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_ROOT = Path("/")


def cpu_count(root: Path = _ROOT) -> int:
    """Cores that this process may use: its CPU affinity, and on Linux the CPU quota of its control groups (v1 and v2).

    A quota of one core and a half counts as two: a process more than the quota costs little, a process less leaves a part of
    it unused.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.

    Returns:
        At least 1.
    """
    if hasattr(os, "process_cpu_count"):  # from Python 3.13; respects affinity and PYTHON_CPU_COUNT
        cores = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _cgroup_quota(root)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _cgroup_quota(root: Path) -> float | None:
    # https://docs.kernel.org/admin-guide/cgroup-v2.html ("cpu.max") and the kernel's scheduler/sched-bwc.rst for v1. The quota
    # of every ancestor counts. Inside a container the path may not exist below the mount; then the mount itself is the group.
    quotas: list[float] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts, read = [root / "sys/fs/cgroup"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup/cpu"], _quota_v1
        else:
            continue
        for mount in mounts:
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                quota = read(folder)
                if quota is not None:
                    quotas.append(quota)
                if folder == mount:
                    break
    return min(quotas, default=None)


def _quota_v2(folder: Path) -> float | None:
    limit, _, period = _read(folder / "cpu.max").strip().partition(" ")
    return _ratio(limit, period)


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _ratio(limit: str, period: str) -> float | None:
    try:
        quota = int(limit) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return None
    return quota if quota > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
