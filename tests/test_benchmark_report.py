"""BENCHMARK.md says what was measured, and the saved results give nobody away."""

from __future__ import annotations

import getpass
import json
import re
import socket
from typing import TYPE_CHECKING, Any

import pytest
from benchmarks import plots, report
from benchmarks.children import OURS, SCRIPTS
from benchmarks.questions import GOALS, QUESTIONS

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.figures import Results

FILES = sorted(report.RESULTS.glob("*.json"))


def _results(medians: dict[str, float], question: str = "clients", measure: str = "seconds_per_item", **load: Any) -> Results:
    """A file with one question in it, one round each."""
    rivals: dict[str, Any] = {}
    for name, value in medians.items():
        spread = dict.fromkeys(("min", "q1", "median", "q3", "max"), value)
        rivals[name] = {
            "version": "1.0",
            "data": {measure: [value]},
            "spread": {measure: spread},
            "ours_to_it": dict.fromkeys(spread, medians[OURS] / value),
        }
    facts = {"question": question, "loop": "asyncio", "measure": measure, "quick": False, "rivals": rivals, "load": load}
    return {"benchmarks": [{"extra_info": facts}]}


def _block(name: str, results: Results) -> str:
    page = f"before\n<!-- begin made.{name} -->\nstale\n<!-- end made.{name} -->\nafter\n"
    rendered = report.render(page, {"made": results})
    assert rendered.startswith("before\n")
    assert rendered.endswith("\nafter\n")
    assert "stale" not in rendered
    assert report.render(rendered, {"made": results}) == rendered
    return rendered


def test_the_page_agrees_with_the_saved_results() -> None:
    """Every figure in BENCHMARK.md is what `python -m benchmarks.report` makes of the saved results."""
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.render(page, report.load()) == page
    assert report.main(["--check"]) == 0


def test_every_saved_file_has_its_place_on_the_page() -> None:
    """No results are saved that the page does not show."""
    page = report.PAGE.read_text(encoding="utf-8")
    assert FILES
    for path in FILES:
        assert f"<!-- begin {path.stem}.losses -->" in page
        assert f"<!-- begin {path.stem}.machine -->" in page


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_saved_results_name_no_host_no_user_and_no_path(path: Path) -> None:
    """What is published holds the machine's kind, and not whose it is."""
    text = path.read_text(encoding="utf-8")
    results = json.loads(text)
    assert set(results["commit_info"]) == {"id", "time", "author_time", "dirty"}
    assert set(results["machine_info"]) == {
        "processor", "cores", "memory_gib", "system", "release", "machine", "python_implementation", "python_version",
    }  # fmt: skip
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    assert not {socket.gethostname(), getpass.getuser(), str(report.ROOT)} & set(strings)
    assert not [string for string in strings if string.startswith(("/", "~")) or "/home/" in string or ":\\\\" in string]


def test_who_is_faster_is_named_first() -> None:
    """A rival that is faster than us stands among the losses, with both figures; one that is slower does not."""
    losses = _block("losses", _results({OURS: 4e-6, "aiodataloader": 2e-6, "async-batcher 0.2.2": 40e-6}))
    assert "aiodataloader 1.0 is faster, with a median of 2.00 us, ours 4.00 us; ours / it 2.00 (2.00 to 2.00)." in losses
    assert "ours / aiodataloader: 2.00, where the goal is at most 1.00." in losses
    assert "0.2.2" not in losses


def test_no_loss_is_said_as_well() -> None:
    """When nobody is faster the page says so."""
    losses = _block("losses", _results({OURS: 1e-6, "aiodataloader": 2e-6, "async-batcher 0.2.2": 40e-6}))
    assert "Nowhere in these figures." in losses


def test_a_rival_that_is_not_available_is_shown_with_the_reason() -> None:
    """It is neither left out nor counted as slower."""
    results = _results({OURS: 1e-6, "aiodataloader": 2e-6})
    results["benchmarks"][0]["extra_info"]["rivals"]["async-batcher 0.2.2"] = {"unavailable": "pip install failed"}
    assert "| async-batcher 0.2.2 | not available: pip install failed |" in _block("clients", results)
    assert "0.2.2" not in _block("goals", results)


def test_a_goal_holds_for_the_loads_that_it_names() -> None:
    """Each payload has a bound of its own, and is called by its name."""
    results = _results({OURS: 0.2, "ProcessPoolExecutor": 1.0}, "round_trip", "seconds", payload="1 MB array")
    (row,) = [line for line in _block("goals", results).splitlines() if "round trip" in line]
    assert row == "| round trip, 1 MB array, asyncio: ours / ProcessPoolExecutor | 0.20 | at most 0.15 | **no** |"
    assert "| 1 MB array | asyncio | **async_batcher 1.0** | 200 ms |" in _block("round_trip", results)


def test_a_goal_may_be_a_least() -> None:
    """Cores that are kept busy are good, the more the better; a measure that is not the compared one has its own ratio."""
    results = _results({OURS: 0.9, "ProcessPoolExecutor": 0.5}, "cores_busy", "busy", batch_ms=1.0, in_flight=2)
    facts = results["benchmarks"][0]["extra_info"]
    facts["measure"] = "seconds_per_batch"
    assert [line.split(" | ")[1:] for line in _block("goals", results).splitlines() if "two cores" in line] == [
        ["0.90", "at least 0.85", "yes |"],
        ["1.80", "at least 1.50", "yes |"],
    ]
    facts["load"]["in_flight"] = 4
    assert "two cores" not in _block("goals", results)


def test_every_goal_is_of_a_question_that_the_page_knows() -> None:
    """A goal has a title, and the rival that it names is one of ours."""
    for goal in GOALS:
        assert goal.question in QUESTIONS
        assert goal.question in report.BLOCKS
        assert goal.rival is None or goal.rival in {*SCRIPTS, "import asyncio"}


@pytest.mark.leaves_things  # matplotlib keeps its fonts open
def test_every_plot_is_on_the_page(tmp_path: Path) -> None:
    """It is saved beside the results, shown on the page, and can be drawn anew."""
    page = report.PAGE.read_text(encoding="utf-8")
    names = set(plots.PLOTS) & set(report.load())
    assert names
    for name in names:
        assert f"](benchmarks/plots/{name}.svg)" in page
        assert (report.PLOTS_FOLDER / f"{name}.svg").is_file()
    pytest.importorskip("matplotlib")
    plots.draw(report.load(), tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == names


def test_an_unknown_mark_is_an_error() -> None:
    """A mark that names nothing is not passed over."""
    with pytest.raises(KeyError):
        _block("nothing", _results({OURS: 1e-6}))
