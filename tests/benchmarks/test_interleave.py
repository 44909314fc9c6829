"""Interleaved runs, with libraries that are functions; and which loads each mode measures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from benchmarks.harness.interleave import InterleavedRun, ReportedClock
from benchmarks.harness.sizes import MODES, is_measured, loads
from benchmarks.libraries.base import NotAvailableError
from benchmarks.libraries.names import OURS, RAY_SERVE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from benchmarks.harness.interleave import Prepare


class FakeFixture:
    """Stands for pytest-benchmark's: times each round by the given clock."""

    def __init__(self, clock: ReportedClock) -> None:
        self._clock = clock
        self.extra_info: dict[str, Any] = {}
        self.seconds: list[float] = []

    def pedantic(
        self, function: Callable[[], None], *, setup: Callable[[], None], rounds: int
    ) -> None:
        """Run the rounds."""
        for _ in range(rounds):
            setup()
            began = self._clock()
            function()
            self.seconds.append(self._clock() - began)


class Scene:
    """An interleaved run, and the order in which the libraries had their rounds."""

    def __init__(self, mode: str = "usual", requested: Collection[str] = ()) -> None:
        clock = ReportedClock()
        self.fixture = FakeFixture(clock)
        fixture: Any = self.fixture
        self.interleaved = InterleavedRun(fixture, clock, mode=mode, requested=requested)
        self.order: list[str] = []

    def library(self, name: str, *rounds: float | Exception) -> Prepare:
        """Return a library whose rounds take these times, or fail."""
        left = iter(rounds)

        def run_round() -> dict[str, float]:
            self.order.append(name)
            took = next(left)
            if isinstance(took, Exception):
                raise took
            return {"seconds": took}

        return lambda: ({"version": "1"}, run_round)

    def run(self, rounds: int | None = None, **libraries: Prepare) -> dict[str, Any]:
        """Return what is recorded of each library."""
        others = {name: prepare for name, prepare in libraries.items() if name != "ours"}
        self.interleaved.run(
            {**others, OURS: libraries["ours"]},
            measure="seconds",
            rounds=rounds,
            scenario="clients",
        )
        recorded: dict[str, Any] = self.fixture.extra_info["rivals"]
        return recorded


def test_each_library_is_first_in_turn() -> None:
    """No library always follows the same other one."""
    scene = Scene()
    scene.run(
        3,
        a=scene.library("a", 1, 1, 1),
        b=scene.library("b", 1, 1, 1),
        ours=scene.library("ours", 1, 1, 1),
    )
    assert scene.order == ["a", "b", "ours", "b", "ours", "a", "ours", "a", "b"]


def test_ratios_are_of_rounds() -> None:
    """No ratio shows a slow round of the machine; pytest-benchmark gets this project's times."""
    scene = Scene()
    recorded = scene.run(3, a=scene.library("a", 2, 4, 2), ours=scene.library("ours", 1, 2, 1))
    names = ("min", "q1", "median", "q3", "max")
    assert recorded["a"]["ours_to_it"] == dict.fromkeys(names, 0.5)
    assert scene.fixture.seconds == [1, 2, 1]
    assert recorded["a"]["data"] == {"seconds": [2, 4, 2]}


def test_libraries_that_cannot_run_or_fail_are_recorded_with_the_reason() -> None:
    """At the start or in the middle; the others go on."""

    def missing() -> Any:
        msg = "pip install failed"
        raise NotAvailableError(msg)

    scene = Scene()
    recorded = scene.run(
        3,
        a=missing,
        b=scene.library("b", 1, RuntimeError("b has exited")),
        c=scene.library("c", 1, 1, 1),
        ours=scene.library("ours", 1, 1, 1),
    )
    assert recorded["a"] == {"unavailable": "pip install failed"}
    assert recorded["b"] == {"unavailable": "b has exited"}
    assert recorded["c"]["data"] == {"seconds": [1, 1, 1]}


def test_a_failure_of_this_project_fails_the_benchmark() -> None:
    """A wrong result of this project raises."""
    scene = Scene()
    with pytest.raises(RuntimeError, match="a wrong result"):
        scene.run(
            2,
            a=scene.library("a", 1, 1),
            ours=scene.library("ours", 1, RuntimeError("a wrong result")),
        )


@pytest.mark.parametrize(("mode", "rounds"), [("quick", 1), ("usual", 5), ("full", 9)])
def test_the_mode_sets_the_rounds(mode: str, rounds: int) -> None:
    """Published figures have at least five."""
    scene = Scene(mode)
    scene.run(None, ours=scene.library("ours", *[1.0] * rounds))
    assert len(scene.order) == rounds
    assert scene.fixture.extra_info["mode"] == mode
    assert scene.interleaved.pick(1, 2) == min(rounds, 2)
    expected = ["near", "far"] if mode == "full" else ["near"]
    assert scene.interleaved.names(["near"], ["far"]) == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_large_library_is_measured_on_request_only(mode: str) -> None:
    """Ray's environment is made only where ``--with`` names it."""
    assert Scene(mode).interleaved.names(["near", RAY_SERVE]) == ["near"]
    requested = Scene(mode, [RAY_SERVE])
    assert requested.interleaved.names(["near", RAY_SERVE]) == ["near", RAY_SERVE]


def test_each_mode_includes_the_modes_before_it(pytestconfig: pytest.Config) -> None:
    """A value without a mark is measured in every mode."""
    for mode in MODES:
        pytestconfig.addinivalue_line("markers", f"{mode}: as in the benchmarks")
    values = loads(quick=["a"], usual=["b", ("c", 1)], full=["d"])
    marks = [[mark.name for mark in getattr(value, "marks", ())] for value in values]
    expected = [("a",), ("b",), ("c", 1), ("d",)]
    assert [getattr(value, "values", (value,)) for value in values] == expected
    measured = {mode: [is_measured(mode, names) for names in marks] for mode in MODES}
    assert measured == {
        "quick": [True, False, False, False],
        "usual": [True, True, True, False],
        "full": [True, True, True, True],
    }
