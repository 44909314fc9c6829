"""The number of cores that this process may use."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from async_batcher._pool.cpu_count import cpu_count

if TYPE_CHECKING:
    from pathlib import Path


def write(file: Path, text: str) -> None:
    """Write a file, and make its folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process allowed to use eight cores."""
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


V2 = {"proc/self/cgroup": "0::/a.slice/b.scope\n"}


V1 = {
    "proc/self/cgroup": "12:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n2:cpuset:/\n0::/init.scope\n"
}


V1_QUOTA = "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us"


V1_PERIOD = "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us"


ROOTS: dict[str, tuple[dict[str, str], int]] = {
    "no control groups": ({}, 8),
    "v2 without a limit": ({**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "max 100000\n"}, 8),
    "v2 without the controller": (V2, 8),
    "v2 two cores": ({**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "200000 100000\n"}, 2),
    "v2 one and a half": ({**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "150000 100000\n"}, 2),
    "v2 a tenth": ({**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "10000 100000\n"}, 1),
    "v2 another period": ({**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "150000 50000\n"}, 3),
    "v2 more than there are": (
        {**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "9900000 100000\n"},
        8,
    ),
    "v2 the limit is above": (
        {
            **V2,
            "sys/fs/cgroup/a.slice/b.scope/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a.slice/cpu.max": "300000 100000\n",
        },
        3,
    ),
    "v2 the smallest of all counts": (
        {
            **V2,
            "sys/fs/cgroup/a.slice/b.scope/cpu.max": "500000 100000\n",
            "sys/fs/cgroup/a.slice/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/cpu.max": "600000 100000\n",
        },
        4,
    ),
    "v2 in a container that sees only its own": (
        {**V2, "sys/fs/cgroup/cpu.max": "200000 100000\n"},
        2,
    ),
    "v2 at the root": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
        2,
    ),
    "v2 outside of its namespace": (
        {"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
        2,
    ),
    "v1 without a limit": ({**V1, V1_QUOTA: "-1\n", V1_PERIOD: "100000\n"}, 8),
    "v1 two cores": ({**V1, V1_QUOTA: "200000\n", V1_PERIOD: "100000\n"}, 2),
    "v1 two and a half": ({**V1, V1_QUOTA: "250000\n", V1_PERIOD: "100000\n"}, 3),
    "v1 mounted as cpu": (
        {
            "proc/self/cgroup": "3:cpuacct,cpu:/docker/x\n",
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "v1 the limit is above": (
        {
            **V1,
            V1_QUOTA: "-1\n",
            V1_PERIOD: "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "v1 cpuset is not cpu": (
        {
            "proc/self/cgroup": "2:cpuset:/x\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
        },
        8,
    ),
    "v1 a period of zero": ({**V1, V1_QUOTA: "200000\n", V1_PERIOD: "0\n"}, 8),
    "nonsense": ({"proc/self/cgroup": "what\n\n::::\n", "sys/fs/cgroup/cpu.max": "a b c\n"}, 8),
}


@pytest.mark.usefixtures("_eight_cores")
@pytest.mark.parametrize("kind", ROOTS)
def test_cpu_count_is_limited_by_control_groups(kind: str, tmp_path: Path) -> None:
    """Versions 1 and 2, the group and its parents; rounded up to whole cores."""
    files, cores = ROOTS[kind]
    for name, text in files.items():
        write(tmp_path / name, text)
    assert cpu_count(tmp_path) == cores


def test_cpu_count_is_limited_by_the_affinity() -> None:
    """It counts the cores that this process may use."""
    cores = cpu_count()
    assert 1 <= cores <= (os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        assert cores <= len(os.sched_getaffinity(0))


@pytest.mark.skipif(sys.version_info < (3, 13), reason="PYTHON_CPU_COUNT came with Python 3.13")
def test_an_unknown_cpu_count_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The system may not know the number of cores."""
    monkeypatch.setattr(os, "process_cpu_count", lambda: None)
    assert cpu_count(tmp_path) == 1
