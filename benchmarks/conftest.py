"""Options, the processes of libraries, and results without a name of a host, user or path."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.harness import machine
from benchmarks.harness.child_process import LibraryProcesses
from benchmarks.harness.interleave import InterleavedRun, ReportedClock
from benchmarks.harness.sizes import MODES, is_measured, loads
from benchmarks.libraries.names import ON_REQUEST
from benchmarks.report.goals import goal_rows
from benchmarks.report.results import Record, rows_by_library
from benchmarks.report.text import aligned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_benchmark.fixture import BenchmarkFixture

    from benchmarks.harness.interleave import Prepare, Round

_CLOCK = pytest.StashKey[ReportedClock]()
_RECORDS = pytest.StashKey["list[Record]"]()
BENCHMARK_TIMEOUT = 3600.0  # seconds; pyproject.toml's 60 are for tests


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--quick``, ``--full`` and ``--with``."""
    mode = {"action": "store_const", "dest": "mode", "default": "usual"}
    parser.addoption("--quick", const="quick", help="one short round of each benchmark", **mode)
    parser.addoption("--full", const="full", help="all loads and libraries, for a night", **mode)
    parser.addoption(
        "--with",
        action="append",
        default=[],
        dest="requested",
        choices=ON_REQUEST,
        help="measure this library too",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the clock and the list of records, and register the marks of the modes."""
    config.stash[_CLOCK] = ReportedClock()
    config.stash[_RECORDS] = []
    for mode in MODES:
        config.addinivalue_line("markers", f"{mode}: measured from a {mode} run on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is not measured in this mode."""
    mode = config.getoption("mode")
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        marks = [mark.name for mark in item.iter_markers()]
        (kept if is_measured(mode, marks) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_itemcollected(item: pytest.Item) -> None:
    """Set the clock of interleaved runs, and the timeout."""
    if Path(__file__).parent in item.path.parents:
        if "interleaved" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=item.config.stash[_CLOCK]))
        item.add_marker(pytest.mark.timeout(BENCHMARK_TIMEOUT))


@pytest.fixture(params=loads(quick=["asyncio"], usual=["uvloop"]))
def loop(request: pytest.FixtureRequest) -> str:
    """The name of each event loop."""
    if request.param == "uvloop" and importlib.util.find_spec("uvloop") is None:
        pytest.skip("uvloop is not installed")
    return str(request.param)


@pytest.fixture(scope="session")
def processes() -> Iterator[LibraryProcesses]:
    """The processes of libraries."""
    with LibraryProcesses() as started:
        yield started


@pytest.fixture
def interleaved(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture
) -> Iterator[InterleavedRun]:
    """The interleaved run of a benchmark, which is recorded for the summary."""
    config = request.config
    yield InterleavedRun(
        benchmark,
        config.stash[_CLOCK],
        mode=config.getoption("mode"),
        requested=config.getoption("requested"),
    )
    if benchmark.extra_info:
        config.stash[_RECORDS].append(Record(benchmark.extra_info))


@pytest.fixture
def prepare(processes: LibraryProcesses, loop: str) -> Callable[..., Prepare]:
    """``prepare(library, scenario, load)`` is what `InterleavedRun.run` takes for a library."""

    def facts_and_round(
        library: str, scenario: str, load: dict[str, Any]
    ) -> tuple[dict[str, str], Round]:
        process = processes.get(library, loop)
        return process.facts, functools.partial(process.run_round, scenario, load)

    return functools.partial(functools.partial, facts_and_round)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the goals of what was measured."""
    records = config.stash[_RECORDS]
    head, *rows = goal_rows(records)
    if rows:
        terminalreporter.section("goals")
        for line in aligned([head, *rows]):
            terminalreporter.write_line(line)


def pytest_benchmark_generate_machine_info() -> dict[str, object]:
    """Describe the machine by what matters to the figures."""
    return machine.describe()


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Add a row for each library."""
    output_json["benchmarks"] = [
        row
        for benchmark in output_json["benchmarks"]
        for row in rows_by_library(benchmark, _summary)
    ]


def _summary(seconds: Sequence[float]) -> dict[str, Any]:
    from pytest_benchmark.stats import Stats

    stats: Any = Stats()  # type: ignore[no-untyped-call]  # it has no types
    for one in seconds:
        stats.update(one)
    return dict(stats.as_dict())


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """Drop the names of folder and branch. Results that are being written are no changes."""
    for name in ("project", "branch", "error"):
        commit_info.pop(name, None)
    written = [":!benchmarks/results", ":!benchmarks/plots"]
    finished = subprocess.run(  # noqa: S603 - our own command
        ["git", "status", "--porcelain", "--", ".", *written],  # noqa: S607
        cwd=machine.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode == 0:
        commit_info["dirty"] = bool(finished.stdout)
