"""One scenario, run by all libraries in interleaved rounds: A B C, B C A, C A B.

Noise of the machine so affects all libraries equally. pytest-benchmark gets this project's times;
the rounds of every library are recorded beside them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks.harness.sampling import spread
from benchmarks.harness.sizes import MODES
from benchmarks.libraries.base import NotAvailableError
from benchmarks.libraries.names import ON_REQUEST, OURS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from pytest_benchmark.fixture import BenchmarkFixture

    Round = Callable[[], dict[str, float]]  # runs one round and returns its measures
    Prepare = Callable[[], tuple[dict[str, str], Round]]  # returns a library's facts and its round

_T = TypeVar("_T")


class ReportedClock:
    """The timer that pytest-benchmark reads, set to the time that this project's process measured.

    So the statistics, tables and ``compare`` of pytest-benchmark are of the measure in question,
    such as seconds per item, and include neither the pipe nor the preparation of a round.
    """

    __name__ = "reported"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now


class InterleavedRun:
    """Runs a benchmark's rounds and records them.

    Args:
        benchmark: pytest-benchmark's fixture. Its timer must be ``clock``.
        clock: The clock that shows this project's times.
        mode: How much is measured, one of `MODES`.
        requested: Libraries of `ON_REQUEST` that are measured too.
    """

    def __init__(
        self,
        benchmark: BenchmarkFixture,
        clock: ReportedClock,
        *,
        mode: str,
        requested: Collection[str] = (),
    ) -> None:
        self.mode = mode
        self._benchmark = benchmark
        self._clock = clock
        self._requested = requested

    def pick(self, quick: _T, usual: _T, full: _T | None = None) -> _T:
        """Return the value for this mode. None for ``full`` means the usual value."""
        by_mode = dict(zip(MODES, (quick, usual, usual if full is None else full), strict=True))
        return by_mode[self.mode]

    def names(self, always: Sequence[str], full: Sequence[str] = ()) -> list[str]:
        """Return the libraries to measure: those of a full run too, and what was requested."""
        names = [*always, *self.pick((), (), full)]
        return [name for name in names if name not in ON_REQUEST or name in self._requested]

    def run(
        self,
        libraries: Mapping[str, Prepare],
        *,
        measure: str,
        scenario: str,
        rounds: int | None = None,
        together: bool = False,
        **about: Any,
    ) -> None:
        """Run all rounds and record them.

        Args:
            libraries: By name, a function that returns the library's facts and its round, or
                raises `NotAvailableError`. `OURS` must be one of the names.
            measure: The measure that is compared, and that pytest-benchmark shows.
            scenario: The name of the scenario.
            rounds: Rounds of each library. None means one in a quick run, five in the usual run,
                nine in a full run.
            together: Whether all libraries run at the same time, for scenarios that only wait.
            **about: What else to record: loop and load.
        """
        facts: dict[str, dict[str, Any]] = {}
        ready: dict[str, Round] = {}
        for name, prepare in libraries.items():
            try:
                known, run_round = prepare()
            except (NotAvailableError, RuntimeError) as exc:
                if name == OURS:
                    raise
                facts[name] = {"unavailable": str(exc)}
            else:
                facts[name] = dict(known)
                ready[name] = run_round
        kept: dict[str, list[dict[str, float]]] = {name: [] for name in ready}

        def run_one_of_each() -> None:
            self._clock.now = 0.0
            # Each library is first in turn, so that none always follows the same other one.
            names = [*ready, *ready][len(kept[OURS]) % len(ready) :][: len(ready)]
            with ThreadPoolExecutor(len(names) if together else 1) as threads:
                futures = [(name, threads.submit(ready[name])) for name in names]
            for name, future in futures:
                try:
                    kept[name].append(future.result())
                except (NotAvailableError, RuntimeError) as exc:
                    if name == OURS:
                        raise
                    facts[name] = {"unavailable": str(exc)}
                    del ready[name], kept[name]

        def report_ours() -> None:
            self._clock.now = kept[OURS][-1][measure]

        self._benchmark.pedantic(  # type: ignore[no-untyped-call]  # it has no types
            report_ours, setup=run_one_of_each, rounds=rounds or self.pick(1, 5, 9)
        )
        # The keys are those of the committed results.
        self._benchmark.extra_info.update(
            about,
            question=scenario,
            mode=self.mode,
            measure=measure,
            rivals=_merged(facts, kept, measure),
        )


def _merged(
    facts: dict[str, dict[str, Any]], kept: dict[str, list[dict[str, float]]], measure: str
) -> dict[str, Any]:
    """Return each library's facts, rounds and spreads, and the ratios of our rounds to its own."""
    ours = [one[measure] for one in kept[OURS]]
    for name, rounds in kept.items():
        common = [key for key in rounds[0] if all(key in one for one in rounds)]
        columns = {key: [one[key] for one in rounds] for key in common}
        ratios = [own / other for own, other in zip(ours, columns[measure], strict=True)]
        facts[name]["data"] = columns
        facts[name]["spread"] = {key: spread(column) for key, column in columns.items()}
        facts[name]["ours_to_it"] = spread(ratios)
    return facts
