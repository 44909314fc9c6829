"""How many CPU cores this process may use."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

_ROOT = Path("/")


def cpu_count(root: Path = _ROOT) -> int:
    """Count the cores of this process: CPU affinity and, on Linux, the cgroup CPU quota.

    A quota of 1.5 cores counts as two: one process too many costs little, one too few leaves a
    part of the quota unused. ``root`` is the folder that holds ``proc`` and ``sys``.
    """
    cores = os.cpu_count() or 1
    with contextlib.suppress(OSError):  # a sandbox refuses it
        if hasattr(os, "process_cpu_count"):  # Python 3.13
            cores = os.process_cpu_count() or 1
        elif hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
    quota = _cgroup_quota(root)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _cgroup_quota(root: Path) -> float | None:
    # https://docs.kernel.org/admin-guide/cgroup-v2.html ("cpu.max"), and the kernel's
    # scheduler/sched-bwc.rst for v1. Every ancestor's quota counts. In a container the path may not
    # exist below the mount; then the mount itself is the group.
    quotas: list[float] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts, read = [root / "sys/fs/cgroup"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = (
                [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup/cpu"],
                _quota_v1,
            )
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
