"""One question, put to all rivals in turn, round by round; pytest-benchmark keeps what we answered, and the rest beside it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks.children import OURS
from benchmarks.environments import NotAvailableError
from benchmarks.modes import MODES
from benchmarks.spread import spread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pytest_benchmark.fixture import BenchmarkFixture

    Round = Callable[[], dict[str, float]]  # runs one round, and says what it measured
    Prepare = Callable[[], tuple[dict[str, str], Round]]  # makes a rival ready: its facts and its rounds

_T = TypeVar("_T")


class ReportedClock:
    """The timer that pytest-benchmark reads: it shows the time that our own process measured itself.

    So pytest-benchmark's statistics, its table and its ``compare`` are of the figure in question (seconds per item, say) and
    hold neither the pipe nor the preparation of a round.
    """

    __name__ = "reported"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


class Contest:
    """What a benchmark's test puts its question to.

    Args:
        benchmark: pytest-benchmark's fixture; its timer must be ``clock``.
        clock: What it reads.
        mode: How much is measured, one of `MODES`.
    """

    def __init__(self, benchmark: BenchmarkFixture, clock: ReportedClock, *, mode: str) -> None:
        self.mode = mode
        self._benchmark = benchmark
        self._clock = clock

    def pick(self, quick: _T, usual: _T, full: _T | None = None) -> _T:
        """What is to be used in this mode; in a full run what is usual, where nothing else is said."""
        by_mode = dict(zip(MODES, (quick, usual, usual if full is None else full), strict=True))
        return by_mode[self.mode]

    def names(self, nearest: Sequence[str], others: Sequence[str] = ()) -> list[str]:
        """Which rivals are asked: the nearest in every mode, the others in a full run."""
        return [*nearest, *self.pick((), (), others)]

    def run(
        self,
        rivals: Mapping[str, Prepare],
        *,
        measure: str,
        rounds: int | None = None,
        together: bool = False,
        **about: Any,
    ) -> None:
        """Run all rounds and record them.

        Args:
            rivals: By name, what gives the rival's facts and its rounds, or raises `NotAvailableError`. `OURS` must be one.
            measure: The measure that is compared, and that pytest-benchmark shows.
            rounds: Rounds of each rival; None: one in a quick run, five usually, nine in a full run.
            together: Whether all rivals have their round at the same time: only where none of them does anything.
            **about: What else to record: question, loop, load.
        """
        facts: dict[str, dict[str, Any]] = {}
        ready: dict[str, Round] = {}
        for name, prepare in rivals.items():
            try:
                known, one_round = prepare()
            except (NotAvailableError, RuntimeError) as exc:
                if name == OURS:
                    raise
                facts[name] = {"unavailable": str(exc)}
            else:
                facts[name] = dict(known)
                ready[name] = one_round
        kept: dict[str, list[dict[str, float]]] = {name: [] for name in ready}

        def one_of_each() -> None:
            self._clock.now = 0.0
            names = [*ready, *ready][len(kept[OURS]) % len(ready) :][: len(ready)]  # each is first in turn
            with ThreadPoolExecutor(len(names) if together else 1) as threads:
                answers = [(name, threads.submit(ready[name])) for name in names]
            for name, answer in answers:
                try:
                    kept[name].append(answer.result())
                except (NotAvailableError, RuntimeError) as exc:
                    if name == OURS:
                        raise
                    facts[name] = {"unavailable": str(exc)}
                    del ready[name], kept[name]

        def show_ours() -> None:
            self._clock.now = kept[OURS][-1][measure]

        rounds = rounds or self.pick(1, 5, 9)
        self._benchmark.pedantic(show_ours, setup=one_of_each, rounds=rounds)  # type: ignore[no-untyped-call]  # it has no types
        self._benchmark.extra_info.update(about, mode=self.mode, measure=measure, rivals=_merged(facts, kept, measure))


def _merged(facts: dict[str, dict[str, Any]], kept: dict[str, list[dict[str, float]]], measure: str) -> dict[str, Any]:
    """Facts, rounds and spreads of each rival, and the ratios of our time to its own, round by round."""
    ours = [one[measure] for one in kept[OURS]]
    for name, rounds in kept.items():
        columns = {key: [one[key] for one in rounds] for key in rounds[0] if all(key in one for one in rounds)}
        facts[name]["data"] = columns
        facts[name]["spread"] = {key: spread(column) for key, column in columns.items()}
        facts[name]["ours_to_it"] = spread([own / other for own, other in zip(ours, columns[measure], strict=True)])
    return facts
