"""The count of calls that one item makes."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest
from benchmarks.harness import hops
from benchmarks.harness.hops import CallCounter


def test_calls_are_counted_by_folder() -> None:
    """Only functions below the folder count, each call once."""

    def called() -> None:
        statistics.median([1.0])

    here, library = CallCounter(str(Path(__file__).parent)), CallCounter(statistics.__file__)
    for counter in (here, library):
        counter.start()
        for _ in range(3):
            called()
        counter.stop()
        called()
    assert here.counts == {called.__code__: 3}
    assert library.counts[statistics.median.__code__] == 3
    assert called.__code__ not in library.counts


@pytest.mark.slow
def test_hops_of_the_working_tree(capsys: pytest.CaptureFixture[str]) -> None:
    """An item makes few calls, in both processes, and the working tree as many as itself."""
    assert hops.main([]) == 0
    line = capsys.readouterr().out
    parent, worker, total = map(float, re.findall(r"\d+\.\d", line.partition(": ")[2]))
    assert parent > 10
    assert worker > 5
    assert total <= 75
    assert total == pytest.approx(parent + worker, abs=0.11)
    assert hops.main([".", "."]) == 0
    ratio = capsys.readouterr().out.splitlines()[-1].removeprefix("ratio: ")
    assert float(ratio) == pytest.approx(1.0, abs=0.02)


def test_an_unknown_revision_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is 2."""
    assert hops.main(["no-such-revision", "."]) == 2
    assert "no-such-revision" in capsys.readouterr().err
