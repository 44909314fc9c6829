"""``--quick`` and ``--full``, the rivals' processes, and results that name neither host, user nor path."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import machine
from benchmarks.children import Children
from benchmarks.contest import Contest, ReportedClock
from benchmarks.modes import MODES, is_measured, loads
from benchmarks.rows import by_library

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_benchmark.fixture import BenchmarkFixture

    from benchmarks.contest import Prepare, Round

_CLOCK = pytest.StashKey[ReportedClock]()
_TIMEOUT = 3600.0  # seconds for one benchmark; pyproject's 60 are for tests


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--quick`` and ``--full``."""
    mode = {"action": "store_const", "dest": "mode", "default": "usual"}
    parser.addoption("--quick", const="quick", help="one short round of little: shows that the benchmarks work", **mode)
    parser.addoption("--full", const="full", help="all loads and all rivals, for a night", **mode)


def pytest_configure(config: pytest.Config) -> None:
    """One clock for all."""
    config.stash[_CLOCK] = ReportedClock()
    for mode in MODES:
        config.addinivalue_line("markers", f"{mode}: measured from a {mode} run on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not measured in this mode."""
    mode = config.getoption("mode")
    is_kept = [is_measured(mode, [mark.name for mark in item.iter_markers()]) for item in items]
    config.hook.pytest_deselected(items=[item for item, kept in zip(items, is_kept, strict=True) if not kept])
    items[:] = [item for item, kept in zip(items, is_kept, strict=True) if kept]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Have pytest-benchmark read our clock where a contest does, and allow for the time that a benchmark takes."""
    if Path(__file__).parent in item.path.parents:
        if "contest" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=item.config.stash[_CLOCK]))
        item.add_marker(pytest.mark.timeout(_TIMEOUT))


@pytest.fixture(params=loads(quick=["asyncio"], usual=["uvloop"]))
def loop(request: pytest.FixtureRequest) -> str:
    """Each event loop."""
    if request.param == "uvloop" and importlib.util.find_spec("uvloop") is None:
        pytest.skip("uvloop is not installed")
    return str(request.param)


@pytest.fixture(scope="session")
def children() -> Iterator[Children]:
    """The rivals' processes."""
    with Children() as processes:
        yield processes


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Contest:
    """What a question is put to."""
    return Contest(benchmark, request.config.stash[_CLOCK], mode=request.config.getoption("mode"))


@pytest.fixture
def ask(children: Children, loop: str) -> Callable[..., Prepare]:
    """How to put a question to a rival on this loop: ``ask(rival, question, load)``, for `Contest.run`."""

    def prepare(rival: str, question: str, load: dict[str, Any]) -> tuple[dict[str, str], Round]:
        child = children.get(rival, loop)
        return child.facts, functools.partial(child.ask, question, load)

    return functools.partial(functools.partial, prepare)


def pytest_benchmark_generate_machine_info() -> dict[str, object]:
    """Only what matters to the figures."""
    return machine.describe()


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """A row for each library."""
    output_json["benchmarks"] = [row for benchmark in output_json["benchmarks"] for row in by_library(benchmark, _summary)]


def _summary(seconds: Sequence[float]) -> dict[str, Any]:
    from pytest_benchmark.stats import Stats

    stats: Any = Stats()  # type: ignore[no-untyped-call]  # it has no types
    for one in seconds:
        stats.update(one)
    return dict(stats.as_dict())


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """The commit, and not what its folder or branch is called; the results that are being written are no change of it."""
    for name in ("project", "branch", "error"):
        commit_info.pop(name, None)
    command = ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/plots"]
    root = Path(__file__).parent.parent
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if finished.returncode == 0:
        commit_info["dirty"] = bool(finished.stdout)
