"""The pages say what was measured, and the saved results give nobody away."""

from __future__ import annotations

import getpass
import json
import re
import socket
from typing import TYPE_CHECKING, Any

import benchmarks
import pytest
from benchmarks import plots, report
from benchmarks.children import OURS, OURS_IN_THREADS, SCRIPTS
from benchmarks.crossings import crossing
from benchmarks.figures import answers, seconds, title, within
from benchmarks.headlines import HEADLINES
from benchmarks.questions import GOALS, QUESTIONS
from benchmarks.rows import by_library
from benchmarks.spread import spread
from benchmarks.tables import TABLES
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.figures import Results

FILES = sorted(report.RESULTS.glob("*.json"))
ELSEWHERE = sorted(report.ELSEWHERE.glob("*.json"))
BENCHMARKS = set(report.NAMES)


def _facts(
    medians: dict[str, float], question: str = "clients", measure: str = "seconds_per_item", **load: Any
) -> dict[str, Any]:
    """One benchmark, one round of each rival."""
    rivals: dict[str, Any] = {}
    for name, value in medians.items():
        rivals[name] = {
            "version": "1.0",
            "data": {measure: [value]},
            "spread": {measure: spread([value])},
            "ours_to_it": spread([medians[OURS] / value]),
        }
    load = {"clients": 64, **load} if question == "clients" else load
    return {"question": question, "loop": "asyncio", "measure": measure, "mode": "usual", "rivals": rivals, "load": load}


def _results(*found: dict[str, Any]) -> dict[str, Results]:
    return {"made": {"benchmarks": [{"extra_info": facts} for facts in found]}}


def _block(name: str, *found: dict[str, Any]) -> str:
    page = f"before\n<!-- begin made.{name} -->\nstale\n<!-- end made.{name} -->\nafter\n"
    rendered = report.render(page, _results(*found))
    assert rendered.startswith("before\n")
    assert rendered.endswith("\nafter\n")
    assert "stale" not in rendered
    assert report.render(rendered, _results(*found)) == rendered
    return rendered


# What is published.


@pytest.mark.parametrize("path", report.PAGES, ids=lambda path: path.name)
def test_the_pages_agree_with_the_saved_results(path: Path) -> None:
    """Every figure on a page is what `python -m benchmarks.report` makes of the saved results."""
    page = path.read_text(encoding="utf-8")
    assert "<!-- begin " in page
    assert report.render(page, report.load(), report.load(report.ELSEWHERE)) == page
    assert report.main(["--check"]) == 0


def test_a_stale_page_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure that was typed does not pass."""
    page = tmp_path / "page.md"
    page.write_text("<!-- begin nobody.losses -->\n- nobody is faster\n<!-- end nobody.losses -->\n", encoding="utf-8")
    monkeypatch.setattr(report, "PAGES", (page,))
    assert report.main(["--check"]) == 1
    assert "page.md" in capsys.readouterr().out
    assert "nobody is faster" in page.read_text(encoding="utf-8")


def test_every_question_has_its_place_on_the_page() -> None:
    """Nothing is measured that is not shown: each benchmark's plot, its losses, and the table of each question."""
    page = report.PAGES[0].read_text(encoding="utf-8")
    for name in BENCHMARKS:
        assert f"<!-- begin {name}.losses -->" in page
        assert f"](benchmarks/plots/{name}.svg)" in page
    assert set(TABLES) == set(QUESTIONS)
    for question in QUESTIONS:
        assert re.search(rf"<!-- begin \w+\.{question} -->", page), question
    assert {path.stem for path in FILES} <= BENCHMARKS
    for path in ELSEWHERE:
        assert f"<!-- begin {path.stem}.machine -->" in page
    assert not {path.stem for path in ELSEWHERE} & BENCHMARKS


@pytest.mark.parametrize("path", [*FILES, *ELSEWHERE], ids=lambda path: path.stem)
def test_saved_results_name_no_host_no_user_and_no_path(path: Path) -> None:
    """What is published holds the machine's kind, and not whose it is; and it is no quick run."""
    text = path.read_text(encoding="utf-8")
    results = json.loads(text)
    assert set(results["commit_info"]) == {"id", "time", "author_time", "dirty"}
    assert set(results["machine_info"]) == {
        "processor", "cores", "memory_gib", "system", "release", "machine", "python_implementation", "python_version",
        "start_method", "libraries",
    }  # fmt: skip
    assert all(benchmark["extra_info"]["mode"] != "quick" for benchmark in results["benchmarks"])
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    assert not {socket.gethostname(), getpass.getuser(), str(report.ROOT)} & set(strings)
    assert not [string for string in strings if string.startswith(("/", "~")) or "/home/" in string or ":\\\\" in string]


@pytest.mark.parametrize("path", [*FILES, *ELSEWHERE], ids=lambda path: path.stem)
def test_the_spread_of_five_rounds_is_shown(path: Path) -> None:
    """A figure has at least five rounds behind it, but for those that count what a thousand deaths leave behind."""
    for facts in answers([json.loads(path.read_text(encoding="utf-8"))]):
        if facts["question"] != "kills":
            assert len(facts["rivals"][OURS]["data"][facts["measure"]]) >= 5, title(facts)


@pytest.mark.leaves_things  # matplotlib keeps its fonts open
def test_every_plot_is_drawn_from_the_saved_results(tmp_path: Path) -> None:
    """There is one for each benchmark; it is saved beside the results, and says of which it was drawn."""
    assert set(plots.PLOTS) == BENCHMARKS
    pytest.importorskip("matplotlib")
    plots.draw(report.load(), tmp_path)
    for path in FILES:
        seal = plots.seal(report.load()[path.stem])
        for folder in (tmp_path, report.PLOTS_FOLDER):
            assert seal in (folder / f"{path.stem}.svg").read_text(encoding="utf-8")


# What is made of results.


def test_another_machine_is_shown_where_it_is_named() -> None:
    """And counts in nothing that is said of all."""
    page = "<!-- begin {0}.losses -->\n<!-- end {0}.losses -->\n"
    here, there = (_results(_facts({OURS: ours, "aiodataloader": 2e-6}))["made"] for ours in (1e-6, 4e-6))
    assert "aiodataloader" not in report.render(page.format("all"), {"here": here}, {"there": there})
    assert "aiodataloader" in report.render(page.format("there"), {"here": here}, {"there": there})


def test_who_is_faster_is_named_first() -> None:
    """A rival that is faster than us stands among the losses, with both figures; one that is slower does not."""
    losses = _block("losses", _facts({OURS: 4e-6, "aiodataloader": 2e-6, "async-batcher 0.2.2": 40e-6}))
    assert "aiodataloader 1.0 is faster (clients: 64, asyncio): 2.00 us, ours 4.00 us; ours / it 2.00 (2.00 to 2.00)." in losses
    assert "ours / aiodataloader: 2.00, where the goal is at most 1.00." in losses
    assert "0.2.2" not in losses


def test_the_worst_of_several_losses_is_told() -> None:
    """A rival that is faster in several cases is named once, with the case in which it is faster by most."""
    found = [
        _facts({OURS: ours, "aiodataloader": 1e-6}, clients=clients) for clients, ours in ((1, 3e-6), (64, 9e-6), (1024, 1e-7))
    ]
    losses = _block("losses", *found)
    assert "aiodataloader 1.0 is faster in 2 of 3 cases, by most (clients: 64, asyncio): 1.00 us, ours 9.00 us" in losses


def test_a_baseline_is_no_rival() -> None:
    """What nobody could use is named beside its question, and not among the rivals that are ahead."""
    facts = _facts({OURS: 4e-6, "bare futures": 2e-6})
    assert "bare futures 1.0 is faster" in _block("losses", facts)
    assert "Nowhere in these figures." in _block("rivals_ahead", facts)


def test_no_loss_is_said_as_well() -> None:
    """When nobody is faster the page says so."""
    losses = _block("losses", _facts({OURS: 1e-6, "aiodataloader": 2e-6, "async-batcher 0.2.2": 40e-6}))
    assert "Nowhere in these figures." in losses


@pytest.mark.parametrize("question", ["clients", "idle"])
def test_a_rival_that_cannot_is_shown_with_the_reason(question: str) -> None:
    """It is neither left out nor counted as slower; in both kinds of table."""
    measure = {"clients": "seconds_per_item", "idle": "cpu_seconds"}[question]
    facts = _facts({OURS: 1e-6, "aiodataloader": 2e-6}, question, measure, place="coroutine")
    facts["rivals"]["async-batcher 0.2.2"] = {"unavailable": "pip install failed"}
    assert "- Not in the table: async-batcher 0.2.2: pip install failed." in _block(question, facts)
    assert "0.2.2" not in _block("goals", facts)


def test_a_goal_holds_for_the_loads_that_it_names() -> None:
    """Each payload has a bound of its own, and is called by its name."""
    facts = _facts({OURS: 0.2, "ProcessPoolExecutor": 1.0}, "round_trip", "seconds", payload="1 MB array")
    (row,) = [line for line in _block("goals", facts).splitlines() if "round trip" in line]
    assert row == "| round trip, 1 MB array, asyncio: ours / ProcessPoolExecutor | 0.20 | at most 0.15 | **no** |"
    assert "| 1 MB array | asyncio | 200 ms (200 to 200) | 1.00 s (1.00 to 1.00) | 0.20 (0.20 to 0.20) |" in _block(
        "round_trip", facts
    )


def test_a_goal_may_be_a_least() -> None:
    """Cores that are kept busy are good, the more the better; a measure that is not the compared one has its own ratio."""
    facts = _facts({OURS: 0.9, "ProcessPoolExecutor": 0.5}, "cores_busy", "busy", batch_ms=1.0, in_flight=2, workers=2)
    facts["measure"] = "seconds_per_batch"
    assert [line.split(" | ")[1:] for line in _block("goals", facts).splitlines() if "the cores" in line] == [
        ["0.90", "at least 0.85", "yes |"],
        ["1.80", "at least 1.50", "yes |"],
    ]
    facts["load"]["in_flight"] = 4
    assert "the cores" not in _block("goals", facts)


def test_goals_and_headlines_are_of_questions_that_are_asked() -> None:
    """Each has a title, and the rival that it names takes part."""
    rivals = {*SCRIPTS, "import asyncio", OURS_IN_THREADS}
    for goal in GOALS:
        assert goal.question in QUESTIONS
        assert goal.rival is None or goal.rival in rivals
    for headline in HEADLINES:
        assert headline.question in QUESTIONS
        assert headline.rival in rivals


def test_what_is_not_measured_is_said_to_be_so() -> None:
    """A page can be rendered before anything is measured, and after a part of it was."""
    page = "<!-- begin nobody.machine -->\n<!-- end nobody.machine -->\n<!-- begin made.clients -->\n<!-- end made.clients -->\n"
    assert report.render(page, {"made": {"benchmarks": []}}).count("Not measured.") == 2


def test_an_unknown_mark_is_an_error() -> None:
    """A mark that names nothing is not passed over."""
    with pytest.raises(KeyError):
        _block("nothing", _facts({OURS: 1e-6}))


# Where two curves cross.


def test_the_crossing_lies_between_two_loads() -> None:
    """On logarithmic scales: from twice the time at 1 us to half of it at 100 us is equal at 10 us."""
    assert crossing([(1e-6, 2.0), (100e-6, 0.5)]) == pytest.approx(10e-6)
    assert crossing([(1e-6, 0.9), (2e-6, 0.5)]) == 0.0
    assert crossing([(1e-6, 2.0), (2e-6, 1.0)]) is None
    assert crossing([(1e-6, 0.5), (2e-6, 2.0), (4e-6, 0.5)]) == pytest.approx(8**0.5 * 1e-6)  # it was ahead before, not for good


@given(st.lists(st.floats(0.01, 0.99) | st.floats(1.01, 100.0), min_size=1, max_size=8))
def test_from_the_crossing_on_processes_are_ahead(ratios: list[float]) -> None:
    """Every load after it has a ratio below 1, and the last before it has not."""
    points = [(10.0**place, ratio) for place, ratio in enumerate(ratios)]
    at = crossing(points)
    if at is None:
        assert ratios[-1] >= 1
    else:
        assert all(ratio < 1 for work, ratio in points if work > at * 1.001)
        assert at == 0 or [ratio for work, ratio in points if work <= at * 1.001][-1] >= 1 - 1e-9


# How figures are written.


def test_a_time_is_written_in_a_unit_that_suits() -> None:
    """Three digits; the quartiles in the median's unit."""
    assert [seconds(value) for value in (1.5, 0.0123, 1.234e-6, 0.0)] == ["1.50 s", "12.3 ms", "1.23 us", "0.00 us"]
    assert within("seconds", {"median": 0.0011, "q1": 0.0009, "q3": 0.02}) == "1.10 ms (0.90 to 20.0)"
    assert within("worker_bytes", {"median": 12.3e6, "q1": 12e6, "q3": 13e6}) == "12.3 MB (12.0 MB to 13.0 MB)"


# Rows for pytest-benchmark's own tables.


def test_each_library_has_a_row_of_its_own() -> None:
    """In the group of its scenario, under its name; ours keeps what was recorded, and one that was not there has none."""
    facts = _facts({OURS: 4e-6, "aiodataloader": 2e-6})
    facts["rivals"]["batched"] = {"unavailable": "pip install failed"}
    entry = {"name": "test_clients[asyncio-64]", "fullname": "front_end::test_clients", "group": None, "extra_info": facts}
    ours, other = by_library({**entry, "stats": {"median": 4e-6}}, lambda seconds: {"median": max(seconds)})
    assert [ours["name"], other["name"]] == [OURS, "aiodataloader"]
    assert ours["group"] == other["group"] == "clients one by one, clients: 64, asyncio"
    assert ours["stats"]["median"] == 4e-6
    assert other["stats"]["median"] == 2e-6
    assert ours["fullname"] == entry["fullname"] != other["fullname"]
    assert answers([{"benchmarks": [ours, other]}]) == [facts]
    alone = {**entry, "extra_info": {}}
    assert by_library(alone, spread) == [alone]


@pytest.mark.parametrize("path", [*FILES, *ELSEWHERE], ids=lambda path: path.stem)
def test_results_have_a_row_for_each_library(path: Path) -> None:
    """So that `pytest-benchmark compare` shows what the batcher is compared with; no row is there twice."""
    results = json.loads(path.read_text(encoding="utf-8"))
    made = [row for benchmark in results["benchmarks"] for row in by_library(benchmark, lambda _: {})]
    rows = [(row["group"], row["name"]) for row in made]
    wanted = [(title(facts), name) for facts in answers([results]) for name, its in facts["rivals"].items() if "data" in its]
    assert sorted(rows) == sorted(wanted)
    assert len({row["fullname"] for row in made}) == len(rows)


def test_the_benchmark_apart_is_short() -> None:
    """It is to be read by someone with a minute; it stands on no page, and its command is in the package's docstring."""
    text = (report.ROOT / "benchmarks" / "test_executors.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert "executors" not in BENCHMARKS
    assert "pytest benchmarks/test_executors.py --benchmark-group-by=group" in (benchmarks.__doc__ or "")
