"""What a contest makes of its rounds, and which loads are measured when; with rivals that are functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from benchmarks.children import OURS
from benchmarks.contest import Contest, ReportedClock
from benchmarks.environments import NotAvailableError
from benchmarks.modes import MODES, is_measured, loads

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.contest import Prepare


class Fixture:
    """As pytest-benchmark's: calls the setup and the function for each round, and times it by the given clock."""

    def __init__(self, clock: ReportedClock) -> None:
        self._clock = clock
        self.extra_info: dict[str, Any] = {}
        self.seconds: list[float] = []

    def pedantic(self, function: Callable[[], None], *, setup: Callable[[], None], rounds: int) -> None:
        """Run them."""
        for _ in range(rounds):
            setup()
            began = self._clock()
            function()
            self.seconds.append(self._clock() - began)


class Scene:
    """A contest, and the order in which its rivals had their rounds."""

    def __init__(self, mode: str = "usual") -> None:
        clock = ReportedClock()
        self.fixture = Fixture(clock)
        self.contest = Contest(self.fixture, clock, mode=mode)  # type: ignore[arg-type]  # as far as it asks, it is one
        self.order: list[str] = []

    def rival(self, name: str, *rounds: float | Exception) -> Prepare:
        """One that takes so long in each of its rounds, or fails."""
        left = iter(rounds)

        def one_round() -> dict[str, float]:
            self.order.append(name)
            took = next(left)
            if isinstance(took, Exception):
                raise took
            return {"seconds": took}

        return lambda: ({"version": "1"}, one_round)

    def run(self, rounds: int | None = None, **rivals: Prepare) -> dict[str, Any]:
        """What was recorded of each rival."""
        others = {name: prepare for name, prepare in rivals.items() if name != "ours"}
        self.contest.run({**others, OURS: rivals["ours"]}, measure="seconds", rounds=rounds, question="clients")
        recorded: dict[str, Any] = self.fixture.extra_info["rivals"]
        return recorded


def test_each_rival_is_first_in_turn() -> None:
    """So that what comes after another is not always the same."""
    scene = Scene()
    scene.run(3, a=scene.rival("a", 1, 1, 1), b=scene.rival("b", 1, 1, 1), ours=scene.rival("ours", 1, 1, 1))
    assert scene.order == ["a", "b", "ours", "b", "ours", "a", "ours", "a", "b"]


def test_ratios_are_of_rounds() -> None:
    """A machine that is twice as slow in one round is so for all, and no ratio shows it; pytest-benchmark sees our own time."""
    scene = Scene()
    recorded = scene.run(3, a=scene.rival("a", 2, 4, 2), ours=scene.rival("ours", 1, 2, 1))
    assert recorded["a"]["ours_to_it"] == dict.fromkeys(("min", "q1", "median", "q3", "max"), 0.5)
    assert scene.fixture.seconds == [1, 2, 1]
    assert recorded["a"]["data"] == {"seconds": [2, 4, 2]}


def test_rivals_that_are_not_there_or_fail_are_told_with_the_reason() -> None:
    """At the start or in the middle; the others go on."""

    def missing() -> Any:
        msg = "pip install failed"
        raise NotAvailableError(msg)

    scene = Scene()
    recorded = scene.run(
        3,
        a=missing,
        b=scene.rival("b", 1, RuntimeError("b has ended")),
        c=scene.rival("c", 1, 1, 1),
        ours=scene.rival("ours", 1, 1, 1),
    )
    assert recorded["a"] == {"unavailable": "pip install failed"}
    assert recorded["b"] == {"unavailable": "b has ended"}
    assert recorded["c"]["data"] == {"seconds": [1, 1, 1]}


def test_a_failure_of_ours_fails() -> None:
    """Nothing is left of a figure that is not ours."""
    scene = Scene()
    with pytest.raises(RuntimeError, match="a wrong answer"):
        scene.run(2, a=scene.rival("a", 1, 1), ours=scene.rival("ours", 1, RuntimeError("a wrong answer")))


@pytest.mark.parametrize(("mode", "rounds"), [("quick", 1), ("usual", 5), ("full", 9)])
def test_rounds_go_by_the_mode(mode: str, rounds: int) -> None:
    """Five at least for what is published."""
    scene = Scene(mode)
    scene.run(None, ours=scene.rival("ours", *[1.0] * rounds))
    assert len(scene.order) == rounds
    assert scene.fixture.extra_info["mode"] == mode
    assert scene.contest.pick(1, 2) == min(rounds, 2)
    assert scene.contest.names(["near"], ["far"]) == ["near", "far"][: 2 if mode == "full" else 1]


def test_each_mode_measures_what_those_before_it_do(pytestconfig: pytest.Config) -> None:
    """And more; what is marked with no mode is measured in each."""
    for mode in MODES:
        pytestconfig.addinivalue_line("markers", f"{mode}: as the benchmarks have it")
    values = loads(quick=["a"], usual=["b", ("c", 1)], full=["d"])
    marks = [[mark.name for mark in getattr(value, "marks", ())] for value in values]
    assert [getattr(value, "values", (value,)) for value in values] == [("a",), ("b",), ("c", 1), ("d",)]
    measured = {mode: [is_measured(mode, names) for names in marks] for mode in MODES}
    assert measured == {
        "quick": [True, False, False, False],
        "usual": [True, True, True, False],
        "full": [True, True, True, True],
    }
