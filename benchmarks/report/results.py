"""Records of benchmarks, read from files of pytest-benchmark (pure).

The keys of the files are older than the names in the code. This module and
`benchmarks.harness.interleave`, which writes them, are the only ones that know them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.harness.sampling import spread
from benchmarks.libraries.names import AGAIN, BASELINES, DISTRIBUTION, OURS
from benchmarks.report.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

Results: TypeAlias = dict[str, Any]  # a file of pytest-benchmark
Files: TypeAlias = "Mapping[str, Results]"


class Record:
    """One benchmark: a scenario under one load, and what each library measured.

    Args:
        extra_info: What `InterleavedRun` has recorded.

    Attributes:
        info: The argument.
        scenario: A key of `METRICS`.
        metric: How the pages present it.
        loop: The event loop.
        measure: The measure that is compared.
        mode: How much was measured.
        load: The load.
        libraries: By name, what was recorded of each library.
    """

    def __init__(self, extra_info: Mapping[str, Any]) -> None:
        self.info = extra_info
        self.scenario: str = extra_info["question"]
        self.metric = METRICS[self.scenario]
        self.loop: str = extra_info["loop"]
        self.measure: str = extra_info["measure"]
        self.mode: str = extra_info["mode"]
        self.load: dict[str, Any] = extra_info["load"]
        self.libraries: dict[str, dict[str, Any]] = extra_info["rivals"]

    @property
    def title(self) -> str:
        """The scenario and the case."""
        return ", ".join([self.metric.title, *([self.case] if self.case else [])])

    @property
    def case(self) -> str:
        """Which benchmark of its scenario it is."""
        loop = [] if self.loop == "none" else [self.loop]
        return ", ".join([*(part.phrase(self.load) for part in self.metric.parts), *loop])

    def measured(self) -> list[str]:
        """Return the libraries that have measured something, each once."""
        known = self.libraries.items()
        return [name for name, its in known if "spread" in its and name != AGAIN]

    def reasons(self) -> list[tuple[str, str]]:
        """Return the libraries that could not run, each with the reason."""
        known = self.libraries.items()
        return [(name, its["unavailable"]) for name, its in known if "unavailable" in its]

    def rounds(self, name: str, measure: str | None = None) -> list[float]:
        """Return what a library measured in each round."""
        return list(self.libraries[name]["data"][measure or self.measure])

    def spread(self, name: str, measure: str | None = None) -> dict[str, float] | None:
        """Return the spread of a library's rounds, or None if it has not measured that."""
        known = self.libraries.get(name, {}).get("spread", {})
        found: dict[str, float] | None = known.get(measure or self.measure)
        return found

    def median(self, name: str, measure: str | None = None) -> float:
        """Return the median of a library's rounds."""
        return float(self.libraries[name]["spread"][measure or self.measure]["median"])

    def ratio(self, name: str, measure: str | None = None) -> dict[str, float] | None:
        """Return the spread of the ratios of our rounds to a library's, or None without any.

        A library that measured 0 has no ratio.
        """
        if self.spread(name, measure) is None:
            return None
        if measure in (None, self.measure):
            return dict(self.libraries[name]["ours_to_it"])
        ours, its = self.rounds(OURS, measure), self.rounds(name, measure)
        if not all(its):
            return None
        return spread([own / other for own, other in zip(ours, its, strict=True)])

    def named(self, name: str) -> str:
        """Write a library's name with its version, and this project's in bold."""
        known = self.libraries[name]
        version = known.get("version", "-")
        if name == OURS:
            return f"**{OURS} {version}**"
        # Other names of this project, and names that hold the version, go without it.
        has_version = version not in ("-", *name.split())
        is_ours = known.get("distribution") == DISTRIBUTION
        return f"{name} {version}" if has_version and not is_ours else name


def read(files: Iterable[Results], scenario: str | None = None) -> list[Record]:
    """Return the records of some files, in the order in which they ran."""
    found = [benchmark["extra_info"] for one in files for benchmark in one["benchmarks"]]
    return [
        Record(info)
        for info in found
        if "question" in info and scenario in (None, info["question"])
    ]


def in_order(records: Sequence[Record]) -> list[Record]:
    """Sort by scenario and load: numbers by size, other values by first appearance."""
    seen: list[Any] = []

    def rank(value: Any) -> float:
        if isinstance(value, int | float):
            return value
        if value not in seen:
            seen.append(value)
        return seen.index(value)

    def key(record: Record) -> list[float]:
        values = [record.load.get(part.key) for part in record.metric.parts]
        return [rank(record.scenario), *map(rank, values), rank(record.loop)]

    return sorted(records, key=key)


def all_measured(records: Iterable[Record], *, baselines_last: bool = False) -> list[str]:
    """Return every library that has measured something, this project first."""
    names = dict.fromkeys(name for record in records for name in record.measured())
    last = BASELINES if baselines_last else ()
    return sorted(names, key=lambda name: (name in last, name != OURS))


def rows_by_library(
    benchmark: dict[str, Any], summarize: Callable[[Sequence[float]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return a row for each library, which `pytest-benchmark compare` shows as a group.

    Args:
        benchmark: An entry of a results file. One that is not of an interleaved run is returned
            as its own row.
        summarize: Returns pytest-benchmark's statistics of the rounds: min, max, mean and so on.
    """
    info = benchmark["extra_info"]
    if "rivals" not in info:
        return [benchmark]
    record = Record(info)
    ours = {**benchmark, "group": record.title, "name": OURS}
    rows = [ours]
    for name in record.measured():
        if name != OURS:
            version = record.libraries[name].get("version", "-")
            rows.append(
                {
                    **ours,
                    "name": name,
                    "fullname": f"{benchmark['fullname']}[{name}]",
                    "extra_info": {"library": name, "version": version, "mode": record.mode},
                    "stats": {**summarize(record.rounds(name)), "iterations": 1},
                }
            )
    return rows
