"""The comparison of two commits: its statistics, pairs and checkouts."""

from __future__ import annotations

import json
import random
import signal
import statistics
from pathlib import Path

import pytest
from benchmarks.harness import checkouts, compare
from benchmarks.harness.cases import CASES
from benchmarks.harness.checkouts import checked_out, run_against
from benchmarks.harness.compare import Pairs, measure, pair_order, row
from benchmarks.harness.machine import ROOT
from benchmarks.harness.sampling import bootstrap_interval

# --- Statistics


def test_the_interval_of_equal_values_is_their_value() -> None:
    """Also of a single value."""
    assert bootstrap_interval([1.5]) == (1.5, 1.5)
    assert bootstrap_interval([1.5] * 15) == (1.5, 1.5)


@pytest.mark.parametrize(("level", "interval"), [(0.4, (1.0, 1.0)), (0.6, (0.0, 2.0))])
def test_the_interval_has_the_exact_quantiles(level: float, interval: tuple[float, float]) -> None:
    """A resample of 0, 1, 2 has the median 0 with probability 7/27, and 2 as often."""
    assert bootstrap_interval([0.0, 1.0, 2.0], level=level) == interval


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    """In at least 85 of 100 samples of 15 values, at a level of 95 %."""
    chance = random.Random(1)  # noqa: S311 - no secret
    samples = [[chance.gauss(1.0, 0.1) for _ in range(15)] for _ in range(100)]
    intervals = [bootstrap_interval(sample, resamples=200) for sample in samples]
    assert sum(low <= 1.0 <= high for low, high in intervals) >= 85
    assert statistics.median(high - low for low, high in intervals) < 0.15


# --- Pairs


def test_pairs_alternate_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A B, then B A, each followed by a pair of A with itself; one run of each to warm up."""
    a, b = Path("a"), Path("b")
    order = []

    def run(_: str, source: Path) -> float:
        order.append(source.name)
        return {"a": 2.0, "b": 1.0}[source.name]

    monkeypatch.setattr(compare, "_run", run)
    pairs = measure("many", [a, b], 2)
    assert "".join(order) == "ab" + "ab" + "aa" + "ba" + "aa"
    assert pairs == Pairs([2.0, 2.0], [1.0, 1.0], [1.0, 1.0])
    assert pairs.ratios == [0.5, 0.5]
    assert [pair_order(number) for number in range(3)] == [(0, 1), (1, 0), (0, 1)]


def test_a_row_has_medians_ratios_and_the_direction() -> None:
    """Times are better if lower, shares of busy cores if higher."""
    pairs = Pairs([2e-6, 2e-6], [1e-6, 1e-6], [1.0, 1.0])
    ratios = ["0.500 (0.500 to 0.500)", "1.000 (1.000 to 1.000)"]
    assert row(CASES["many"], pairs) == [
        "process_many, per item", "2.00 us", "1.00 us", *ratios, "lower",
    ]  # fmt: skip
    shares = Pairs([0.8], [0.4], [1.0])
    assert row(CASES["busy_1ms"], shares)[1:] == ["0.80", "0.40", *ratios, "higher"]


@pytest.mark.slow
def test_the_working_tree_is_compared_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """One pair of the shortest case gives one row with positive ratios."""
    assert compare.main([".", ".", "--pairs", "1", "--only", "many"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert found[3].split() == ["case", "A", "B", "B", "/", "A", "A", "/", "A", "better"]
    (line,) = found[4:]
    assert line.startswith("process_many, per item")
    assert line.endswith("lower")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_case_runs(name: str) -> None:
    """It checks its results and prints one figure."""
    pytest.importorskip("numpy")
    figure = json.loads(run_against(ROOT / "src", "-m", "benchmarks.harness.cases", name))
    assert 0 < figure < (1 if CASES[name].unit == "s" else 1.2)


# --- Checkouts


NEEDS_GIT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git repository")


@pytest.mark.parametrize("revision", [".", pytest.param("HEAD", marks=NEEDS_GIT)])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_checkout_is_deleted_after_an_error(revision: str, error: type[BaseException]) -> None:
    """While it exists, it has the package."""
    folders: list[Path] = []

    def fail() -> None:
        with checked_out([revision]) as (source,):
            folders.append(source)
            assert (source / "async_batcher" / "__init__.py").is_file()
            raise error

    with pytest.raises(error):
        fail()
    assert [folder.parents[1].exists() for folder in folders] == [False]


def test_a_checkout_is_deleted_at_a_signal() -> None:
    """SIGTERM ends the program in good order, and its handler is restored."""
    before = signal.getsignal(signal.SIGTERM)
    folders: list[Path] = []

    def terminate() -> None:
        with checked_out(["."]) as (source,):
            folders.append(source)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit):
        terminate()
    assert [folder.parents[1].exists() for folder in folders] == [False]
    assert signal.getsignal(signal.SIGTERM) is before


@NEEDS_GIT
@pytest.mark.parametrize("revision", ["no-such-revision", "--output=elsewhere"])
def test_an_unknown_revision_is_reported(revision: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is 2, and an option for git is no revision."""
    assert compare.main(["--", ".", revision]) == 2
    assert revision in capsys.readouterr().err


def test_a_failed_program_is_reported() -> None:
    """With the end of its standard error."""
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_against(ROOT / "src", "-c", "1 / 0")


def test_a_program_that_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed when its time is over."""
    monkeypatch.setattr(checkouts, "RUN_TIMEOUT", 0.1)
    with pytest.raises(RuntimeError, match="has not ended after 0 s"):
        run_against(ROOT / "src", "-c", "import time; time.sleep(1000)")


def test_another_copy_of_the_package_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A comparison never measures an installed copy by mistake."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="is imported from"):
        checkouts.check_source()
