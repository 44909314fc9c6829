"""The pages show what was measured, and the saved results name no host, user or path."""

from __future__ import annotations

import getpass
import json
import re
import socket
from typing import TYPE_CHECKING, Any

import pytest
from benchmarks.harness.machine import ROOT
from benchmarks.harness.sampling import spread
from benchmarks.libraries.names import (
    ADAPTERS,
    AGAIN,
    BARE_LOOP_AHEAD,
    BEST_OF_GRID,
    BY_HAND,
    IMPORT_ASYNCIO,
    IMPORTABLE,
    INLINE,
    LISTED,
    ONE_BY_ONE,
    OURS,
    OURS_IN_THREADS,
    PROCESSES_BY_HAND,
)
from benchmarks.report import executors, plots, render
from benchmarks.report.axes import COLORS
from benchmarks.report.break_even import break_even, break_evens
from benchmarks.report.metrics import GOALS, METRICS
from benchmarks.report.results import Record, read, rows_by_library
from benchmarks.report.summary import HEADLINES, summary
from benchmarks.report.tables import topic_table
from benchmarks.report.text import figure, seconds, with_quartiles
from benchmarks.report.topics import MAX_COLUMNS, MAX_ROWS, TOPICS
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.report.results import Results

FILES = sorted(render.RESULTS.glob("*.json"))
ELSEWHERE = sorted(render.ELSEWHERE.glob("*.json"))
PAGE, FULL_PAGE = render.PAGES[0], render.PAGES[1]
MAX_PAGE_LINES = 280  # of BENCHMARK.md, so that people finish it
ON_EACH_FILE = pytest.mark.parametrize("path", [*FILES, *ELSEWHERE], ids=lambda path: path.stem)


def _info(
    medians: dict[str, float],
    scenario: str = "clients",
    measure: str = "seconds_per_item",
    **load: Any,
) -> dict[str, Any]:
    """What is recorded of one benchmark with one round of each library."""
    libraries: dict[str, Any] = {}
    for name, value in medians.items():
        libraries[name] = {
            "version": "1.0",
            "data": {measure: [value]},
            "spread": {measure: spread([value])},
            "ours_to_it": spread([medians[OURS] / value]),
        }
    return {
        "question": scenario,
        "loop": "asyncio",
        "measure": measure,
        "mode": "usual",
        "rivals": libraries,
        "load": {"clients": 64, **load} if scenario == "clients" else load,
    }


def _results(*infos: dict[str, Any]) -> dict[str, Results]:
    return {"made": {"benchmarks": [{"extra_info": info} for info in infos]}}


def _block(name: str, *infos: dict[str, Any]) -> str:
    page = f"before\n<!-- begin made.{name} -->\nstale\n<!-- end made.{name} -->\nafter\n"
    rendered = render.render(page, _results(*infos))
    assert rendered.startswith("before\n")
    assert rendered.endswith("\nafter\n")
    assert "stale" not in rendered
    assert render.render(rendered, _results(*infos)) == rendered
    return rendered


# --- What is published


@pytest.mark.parametrize("path", render.PAGES, ids=lambda path: path.name)
def test_pages_agree_with_the_saved_results(path: Path) -> None:
    """Every generated figure is what ``python -m benchmarks.report`` makes of the results."""
    page = path.read_text(encoding="utf-8")
    assert "<!-- begin " in page
    assert render.render(page, render.load(), render.load(render.ELSEWHERE)) == page
    assert render.main(["--check"]) == 0


def test_a_stale_page_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A figure that was typed does not pass ``--check``, which writes nothing."""
    page = tmp_path / "page.md"
    typed = "<!-- begin none.losses -->\n- no library is faster\n<!-- end none.losses -->\n"
    page.write_text(typed, encoding="utf-8")
    monkeypatch.setattr(render, "PAGES", (page,))
    assert render.main(["--check"]) == 1
    assert "page.md" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == typed


def test_every_scenario_is_on_the_pages() -> None:
    """BENCHMARK.md has a plot and a table of each suite, the other page all tables and losses."""
    page, full = PAGE.read_text(encoding="utf-8"), FULL_PAGE.read_text(encoding="utf-8")
    measured = {path.stem for path in FILES}
    assert set(TOPICS) == set(render.NAMES)
    for name in render.NAMES:
        assert f"<!-- begin {name}.topic -->" in page
        assert (f"](benchmarks/plots/{name}.svg)" in page) == (name in measured), name
        assert f"<!-- begin {name}.losses -->" in full
    assert "<!-- begin all.goals -->" in full
    of_pool = {row.scenario for row in TOPICS["pool"].rows} | {"batch_of_one", "batch_gap"}
    assert "<!-- begin pool.tables -->" in full
    for scenario in set(METRICS) - of_pool:
        assert re.search(rf"<!-- begin \w+\.{scenario} -->", full), scenario
    assert measured <= {*render.NAMES, "executors"}
    for path in ELSEWHERE:
        assert f"<!-- begin {path.stem}.machine -->" in full
    assert not {path.stem for path in ELSEWHERE} & set(render.NAMES)


def test_benchmark_md_can_be_read_to_its_end() -> None:
    """It is short, starts with the executors, and has small tables below the summary."""
    page = PAGE.read_text(encoding="utf-8")
    assert len(page.splitlines()) <= MAX_PAGE_LINES
    marks = re.findall(r"<!-- begin (\S+) -->", page)
    assert marks[:3] == ["executors.executors", "all.summary", "all.losses_outside_noise"]
    command = "$ pytest benchmarks/test_executors.py --benchmark-group-by=group"
    assert page.index(command) < page.index("<!-- begin executors.executors -->")
    for name in render.NAMES:
        block = page.partition(f"<!-- begin {name}.topic -->")[2].partition("<!-- end ")[0]
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len(lines) <= MAX_ROWS + 2, name
        assert all(line.count(" | ") < MAX_COLUMNS for line in lines), name


@pytest.mark.parametrize("path", render.PAGES[:2], ids=lambda path: path.parent.name)
def test_the_pages_use_the_vocabulary(path: Path) -> None:
    """A page says library, ratio and break-even."""
    page = path.read_text(encoding="utf-8").lower()
    prose = re.sub(r"<!--.*?-->|\]\(.*?\)|`[^`\n]*`", "", page)  # without marks and paths
    for word in (r"rivals?\b", r"ours / ", r"crossing", r"its? / "):
        assert not re.search(rf"\b{word}", prose), word


@ON_EACH_FILE
def test_saved_results_name_no_host_no_user_and_no_path(path: Path) -> None:
    """The results describe the kind of the machine, and are not of a quick run."""
    text = path.read_text(encoding="utf-8")
    results = json.loads(text)
    assert set(results["commit_info"]) == {"id", "time", "author_time", "dirty"}
    assert set(results["machine_info"]) == {
        "processor", "cores", "memory_gib", "system", "release", "machine",
        "python_implementation", "python_version", "start_method", "libraries",
    }  # fmt: skip
    modes = {one["extra_info"].get("mode") for one in results["benchmarks"]}
    assert modes <= ({None} if path.stem == "executors" else {"usual", "full"})
    strings = set(re.findall(r'"((?:[^"\\]|\\.)*)"', text))
    assert not {socket.gethostname(), getpass.getuser(), str(ROOT)} & strings
    paths = [one for one in strings if one.startswith(("/", "~"))]
    assert not paths + [one for one in strings if "/home/" in one or ":\\\\" in one]


@ON_EACH_FILE
def test_published_figures_have_five_rounds(path: Path) -> None:
    """Except for the scenario that counts what a thousand kills leave behind."""
    for record in read([json.loads(path.read_text(encoding="utf-8"))]):
        assert record.scenario == "kills" or len(record.rounds(OURS)) >= 5, record.title


@pytest.mark.leaves_things  # matplotlib keeps its fonts open
def test_every_plot_is_drawn_from_the_saved_results(tmp_path: Path) -> None:
    """Each suite has a plot that names the results from which it was drawn."""
    assert set(plots.PLOTS) == set(render.NAMES)
    pytest.importorskip("matplotlib")
    files = render.load()
    plots.draw(files, tmp_path)
    for name in set(files) - {"executors"}:
        seal = plots.seal(files[name])
        for folder in (tmp_path, render.PLOTS_FOLDER):
            assert seal in (folder / f"{name}.svg").read_text(encoding="utf-8")


@pytest.mark.leaves_things  # matplotlib keeps its fonts open
@pytest.mark.parametrize("name", sorted({path.stem for path in FILES} - {"executors"}))
def test_plots_can_be_read(name: str) -> None:
    """A title, no bar on a logarithmic axis, a mark for each entry of the legend, known colors."""
    pytest.importorskip("matplotlib")
    results = render.load()[name]
    drawn = plots.plot(name, results)
    assert drawn.get_suptitle() == TOPICS[name].title
    for axes in drawn.axes:
        assert axes.get_xscale() == "linear" or not axes.patches
        assert axes.get_yscale() == "linear"
        for one in axes.get_legend_handles_labels()[0]:
            points = one.lines[0] if hasattr(one, "lines") else one
            assert len(points.get_xdata()) > 0
    shown = {label for axes in drawn.axes for label in axes.get_legend_handles_labels()[1]}
    for axes in drawn.axes:
        shown |= {label.get_text() for label in axes.get_yticklabels() if axes.patches}
    assert shown - {""} <= set(COLORS)


def test_each_library_has_a_color_of_its_own() -> None:
    """Only two names of one library, and the two baselines without batches, share one."""
    sharing: dict[str, list[str]] = {}
    for name, color in COLORS.items():
        sharing.setdefault(color, []).append(name.removesuffix(" by hand"))
    assert [set(one) for one in sharing.values() if len(set(one)) > 1] == [{BY_HAND, INLINE}]


# --- What the report makes of results


def test_another_machine_counts_only_where_it_is_named() -> None:
    """Blocks of all results leave it out."""
    page = "<!-- begin {0}.losses -->\n<!-- end {0}.losses -->\n"
    here, there = (
        _results(_info({OURS: ours, "aiodataloader": 2e-6}))["made"] for ours in (1e-6, 4e-6)
    )
    files, elsewhere = {"here": here}, {"there": there}
    assert "aiodataloader" not in render.render(page.format("all"), files, elsewhere)
    assert "aiodataloader" in render.render(page.format("there"), files, elsewhere)


def test_losses_name_the_faster_libraries() -> None:
    """With both figures; a slower library is not among them."""
    medians = {OURS: 4e-6, "aiodataloader": 2e-6, "async-batcher 0.2.2": 40e-6}
    losses = _block("losses", _info(medians))
    assert (
        "aiodataloader 1.0 is faster (clients: 64, asyncio): "
        "2.00 us, ours 4.00 us, ratio 2.00 (2.00 to 2.00)." in losses
    )
    assert "ratio to aiodataloader: 2.00, where the goal is at most 1.00." in losses
    assert "0.2.2" not in losses


def test_losses_show_the_worst_of_several_cases() -> None:
    """A library that is faster in several cases has one line."""
    cases = ((1, 3e-6), (64, 9e-6), (1024, 1e-7))
    infos = [_info({OURS: ours, "aiodataloader": 1e-6}, clients=count) for count, ours in cases]
    worst = "in 2 of 3 cases; the worst (clients: 64, asyncio): 1.00 us, ours 9.00 us"
    assert f"aiodataloader 1.0 is faster {worst}" in _block("losses", *infos)


def test_a_baseline_is_no_library_that_is_ahead() -> None:
    """It is listed beside its scenario only."""
    info = _info({OURS: 4e-6, "bare futures": 2e-6})
    assert "bare futures 1.0 is faster" in _block("losses", info)
    assert "Nowhere in these figures." in _block("losses_outside_noise", info)


def test_losses_outside_the_noise_have_a_row_for_each_measure() -> None:
    """With the worst case, and every library that is ahead in some case."""
    cases = ((1, 3e-6), (64, 9e-6), (1024, 1e-7))
    others = {"aiodataloader": 1e-6, "batched": 4e-6}
    infos = [_info({OURS: ours, **others}, clients=count) for count, ours in cases]
    *_, row = _block("losses_outside_noise", *infos).splitlines()[:-2]
    assert row == (
        "| clients one by one: time per item | clients: 64, asyncio | 9.00 us "
        "| aiodataloader 1.0: 1.00 us | 9.00 (9.00 to 9.00) "
        "| aiodataloader: 2 of 3 cases, batched: 1 of 3 cases |"
    )


def test_losses_that_may_be_noise_are_left_out() -> None:
    """Three of four rounds have to be slower."""
    info = _info({OURS: 2e-6, "aiodataloader": 1e-6})
    info["rivals"]["aiodataloader"]["ours_to_it"]["q1"] = 0.99
    assert "Nowhere in these figures." in _block("losses_outside_noise", info)
    assert "which may be noise" in _block("losses", info)


def test_measures_on_the_page_count_as_losses() -> None:
    """A pool may start sooner, and the program with it later."""
    info = _info({OURS: 1.0, "pebble": 2.0}, "start", "first_seconds")
    for name, value in ((OURS, 3.0), ("pebble", 2.0)):
        info["rivals"][name]["data"]["program_seconds"] = [value]
        info["rivals"][name]["spread"]["program_seconds"] = spread([value])
    block = _block("losses_outside_noise", info)
    assert "| start of a pool: from the start of the interpreter | asyncio | 3.00 s |" in block
    assert "| pebble 1.0: 2.00 s | 1.50 (1.50 to 1.50) |" in block
    assert "to the first result" not in block


def test_the_summary_names_who_is_ahead() -> None:
    """Or that neither is, where the quartiles include 1; it compares with the best library."""

    def row(ours: float) -> str:
        others = {"aiodataloader": 2e-6, "batched": 9e-6, "no batching": 1e-7, ONE_BY_ONE: 1e-7}
        info = _info({OURS: ours, **others})
        files = {"front_end": _results(info)["made"]}
        (written,) = summary(files).splitlines()[2:]
        return written

    its = "front end, 64 clients | {} | aiodataloader: 2.00 us | {} | {} |"
    assert its.format("1.00 us", "0.50 (0.50 to 0.50)", "**async_batcher**") in row(1e-6)
    assert its.format("2.00 us", "1.00 (1.00 to 1.00)", "neither") in row(2e-6)
    assert its.format("4.00 us", "2.00 (2.00 to 2.00)", "aiodataloader") in row(4e-6)


def test_a_missed_goal_is_counted_with_its_scenario() -> None:
    """And the page says so where all are met."""
    assert "Of 2 goals of the project, 1 are missed (clients one by one: 1)." in _block(
        "missed_goals", _info({OURS: 4e-6, "aiodataloader": 2e-6, "async-batcher 0.2.2": 40e-6})
    )
    assert "All 1 goals of the project are met." in _block(
        "missed_goals", _info({OURS: 1e-6, "aiodataloader": 2e-6})
    )


def test_no_loss_is_stated() -> None:
    """The page says so where no library is faster."""
    medians = {OURS: 1e-6, "aiodataloader": 2e-6, "async-batcher 0.2.2": 40e-6}
    assert "Nowhere in these figures." in _block("losses", _info(medians))


@pytest.mark.parametrize("scenario", ["clients", "idle"])
def test_a_library_that_cannot_run_is_listed_with_the_reason(scenario: str) -> None:
    """In both kinds of table; it does not count as slower."""
    measure = {"clients": "seconds_per_item", "idle": "cpu_seconds"}[scenario]
    info = _info({OURS: 1e-6, "aiodataloader": 2e-6}, scenario, measure, place="coroutine")
    info["rivals"]["async-batcher 0.2.2"] = {"unavailable": "pip install failed"}
    line = "- Not in the table: async-batcher 0.2.2: pip install failed."
    assert line in _block(scenario, info)
    assert "0.2.2" not in _block("goals", info)


def test_a_goal_holds_for_the_loads_that_it_names() -> None:
    """Each payload has its own bound."""
    medians = {OURS: 0.2, "ProcessPoolExecutor": 1.0}
    info = _info(medians, "round_trip", "seconds", payload="1 MB array")
    (row,) = [line for line in _block("goals", info).splitlines() if "round trip" in line]
    what = "round trip, 1 MB array, asyncio: ratio to ProcessPoolExecutor"
    assert row == f"| {what} | 0.20 | at most 0.15 | **no** |"
    cells = "200 ms (200 to 200) | 1.00 s (1.00 to 1.00) | 0.20 (0.20 to 0.20)"
    assert f"| 1 MB array | asyncio | {cells} |" in _block("round_trip", info)


def test_a_goal_may_be_a_lower_bound() -> None:
    """Busy cores are good, and a measure that is not compared has its own ratio."""
    medians = {OURS: 0.9, "ProcessPoolExecutor": 0.5}
    info = _info(medians, "cores_busy", "busy", batch_ms=1.0, in_flight=2, workers=2)
    info["measure"] = "seconds_per_batch"
    rows = [line for line in _block("goals", info).splitlines() if "busy cores" in line]
    assert [row.split(" | ")[1:] for row in rows] == [
        ["90%", "at least 85%", "yes |"],
        ["1.80", "at least 1.50", "yes |"],
    ]
    info["load"]["in_flight"] = 4
    assert "busy cores" not in _block("goals", info)


def test_a_second_measurement_of_this_project_stands_beside_its_goals() -> None:
    """It shows the noise, and is no library of its own."""
    medians = {OURS: 0.9, BARE_LOOP_AHEAD: 1.0, AGAIN: 0.6}
    load = {"batch_ms": 1.0, "in_flight": 4, "workers": 2}
    info = _info(medians, "cores_busy", "busy", **load)
    (row,) = [line for line in _block("goals", info).splitlines() if BARE_LOOP_AHEAD in line]
    assert row.split(" | ")[1:] == ["0.90", "at least 0.97", "**no**", "1.50 (1.50 to 1.50) |"]
    assert AGAIN not in _block("losses", info) + _block("cores_busy", info)
    del info["rivals"][AGAIN]
    assert "A / A" not in _block("goals", info)


def test_goals_headlines_and_topics_name_scenarios_and_libraries_that_are_measured() -> None:
    """A misspelt name would silently drop the goal."""
    libraries = {
        *(*ADAPTERS, BARE_LOOP_AHEAD, BEST_OF_GRID, IMPORT_ASYNCIO, IMPORTABLE, INLINE, LISTED),
        *(OURS_IN_THREADS, PROCESSES_BY_HAND),
    }
    named = [(one.scenario, one.against) for one in GOALS]
    named += [(one.scenario, one.against) for one in HEADLINES]
    for topic in TOPICS.values():
        named += [(row.scenario, row.against) for row in topic.rows]
        named += [(topic.rows[0].scenario, name) for name in topic.libraries]
    for scenario, library in named:
        assert scenario in METRICS
        assert library in (None, *libraries)


def test_the_table_of_a_topic_compares_with_the_best_library() -> None:
    """A column for each library of the topic; a row that was not measured is left out."""
    infos = [
        _info({OURS: ours, "pebble": 0.4, "loky": 0.5}, "round_trip", "seconds", payload=payload)
        for payload, ours in (("1 MB array", 0.2), ("not shown", 0.3))
    ]
    head, _, *rows = topic_table(TOPICS["trips"], [Record(info) for info in infos]).splitlines()
    assert head.startswith("| payload | **async_batcher** | ProcessPoolExecutor | loky | pebble |")
    figures = "200 ms | - | 500 ms | 400 ms | 0.50 (0.50 to 0.50) |"
    assert rows == [f"| 1 MB array | {figures}"]


def test_the_pool_has_a_plot_and_a_table_once_it_is_measured() -> None:
    """Each row names its limit, and the ratio of two measurements of this project."""
    medians = {OURS: 0.9, BARE_LOOP_AHEAD: 1.0, AGAIN: 0.6}
    load = {"batch_ms": 1.0, "in_flight": 4, "workers": 2}
    busy = _info(medians, "cores_busy", "busy", **load)
    script = _info({OURS: 0.9, IMPORTABLE: 0.9, AGAIN: 0.9}, "script_busy", "busy", **load)
    page = "<!-- begin pool.topic -->\n<!-- end pool.topic -->\n"
    assert "\nNot measured.\n" in render.render(page, {})
    block = render.render(page, {"pool": _results(busy, script)["made"]})
    assert "](benchmarks/plots/pool.svg)\n\n| figure |" in block
    ratios = "90% | bare loop, two per worker | 100% | 0.90 (0.90 to 0.90) | 1.50 (1.50 to 1.50) |"
    assert f"| busy cores, 1 ms | {ratios}" in block
    assert "| busy cores, function of a script, 1 ms | 90% | importable function |" in block


def test_the_table_of_executors_has_a_row_for_each() -> None:
    """The median time per item on asyncio, and a dash where an executor was not measured."""

    def entry(name: str, kind: str, item_us: int, loop: str = "asyncio") -> dict[str, Any]:
        return {
            "params": {"loop": loop, "kind": kind, "item_us": item_us, "name": name},
            "extra_info": {"items": 100},
            "stats": {"median": 0.2 if loop == "asyncio" else 9.0},
        }

    entries = [entry(name, "GIL held", 10) for name in executors.LABELS]
    entries += [entry("process", "GIL held", 10, "uvloop"), entry("thread", "GIL released", 200)]
    page = "<!-- begin executors.executors -->\n<!-- end executors.executors -->\n"
    assert "\nNot measured.\n" in render.render(page, {})
    block = render.render(page, {"executors": {"benchmarks": entries}})
    assert "| executor | 10 us, GIL held | 200 us, GIL released |" in block
    assert '| `executor="thread"` | 2.00 ms | 2.00 ms |' in block
    assert '| `executor="process"` (a `WorkerPool`) | 2.00 ms | - |' in block


def test_the_executors_of_the_table_are_measured() -> None:
    """A name or a load that the benchmark does not have would silently be left out."""
    source = (ROOT / "benchmarks" / "test_executors.py").read_text(encoding="utf-8")
    for name in executors.LABELS:
        assert f'"{name}": lambda' in source
    for kind, item_us in executors.COLUMNS:
        assert f'"{kind}"' in source
        assert re.search(rf"{item_us:_}: \(", source)


def test_a_library_that_measured_zero_has_no_ratio() -> None:
    """Its figure is shown, and the rest of the page too."""
    info = _info({OURS: 1.0, "pebble": 1.0}, "killed", "back_seconds")
    for name, value in ((OURS, 1), ("pebble", 0)):
        info["rivals"][name]["data"]["failed_calls"] = [value]
        info["rivals"][name]["spread"]["failed_calls"] = spread([value])
    assert Record(info).ratio("pebble", "failed_calls") is None
    rows = topic_table(TOPICS["failures"], [Record(info)]).splitlines()
    assert "| failed calls | 1 | - | - | 0 | - |" in rows


def test_what_is_not_measured_is_stated() -> None:
    """A page can be rendered before all of it is measured."""
    blocks = ("none.machine", "made.clients")
    page = "".join(f"<!-- begin {one} -->\n<!-- end {one} -->\n" for one in blocks)
    assert render.render(page, {"made": {"benchmarks": []}}).count("Not measured.") == 2


def test_an_unknown_mark_is_an_error() -> None:
    """A misspelt mark would leave a stale block."""
    with pytest.raises(KeyError):
        _block("nothing", _info({OURS: 1e-6}))


# --- Break-even


def test_the_break_even_lies_between_two_loads() -> None:
    """From twice the time at 1 us to half of it at 100 us, the logarithmic middle is 10 us."""
    assert break_even([(1e-6, 2.0), (100e-6, 0.5)]) == pytest.approx(10e-6)
    assert break_even([(1e-6, 0.9), (2e-6, 0.5)]) == 0.0
    assert break_even([(1e-6, 2.0), (2e-6, 1.0)]) is None
    # A ratio below 1 that rises above it again does not count.
    expected = pytest.approx(8**0.5 * 1e-6)
    assert break_even([(1e-6, 0.5), (2e-6, 2.0), (4e-6, 0.5)]) == expected


def test_break_evens_name_threads_and_a_direct_call() -> None:
    """From which load processes are faster, at which only, or that they never are."""

    def line(*cases: tuple[int, float, float]) -> str:
        return break_evens(
            [
                Record(
                    _info(
                        {OURS: 1.0, OURS_IN_THREADS: threads, INLINE: inline},
                        "crossing",
                        job="python",
                        item_us=item_us,
                    )
                )
                for item_us, threads, inline in cases
            ]
        )

    assert line((1, 2.0, 0.5), (100, 2.0, 2.0)) == (
        "- For work that holds the GIL, processes are faster than threads from 1.00 us of work per "
        "item (the smallest load), and than a direct call on the event loop from 10.0 us of work "
        "per item."
    )
    found = line((1, 2.0, 0.5), (100, 0.5, 0.5))
    assert "than threads only at 1.00 us, and than a direct call" in found
    assert found.endswith("on the event loop at no load that was measured.")


@given(st.lists(st.floats(0.01, 0.99) | st.floats(1.01, 100.0), min_size=1, max_size=8))
def test_ratios_after_the_break_even_are_below_one(ratios: list[float]) -> None:
    """And the last ratio before it is not."""
    points = [(10.0**position, ratio) for position, ratio in enumerate(ratios)]
    at = break_even(points)
    if at is None:
        assert ratios[-1] >= 1
        return
    assert all(ratio < 1 for work, ratio in points if work > at * 1.001)
    if at > 0:
        assert [ratio for work, ratio in points if work <= at * 1.001][-1] >= 1 - 1e-9


# --- Text


def test_times_have_three_digits_and_a_suitable_unit() -> None:
    """The quartiles have the median's unit."""
    values = (1.5, 0.0123, 1.234e-6, 0.0)
    assert [seconds(value) for value in values] == ["1.50 s", "12.3 ms", "1.23 us", "0.00 us"]
    time = {"median": 0.0011, "q1": 0.0009, "q3": 0.02}
    assert with_quartiles("seconds", time) == "1.10 ms (0.90 to 20.0)"
    assert figure("busy", 0.768) == "77%"
    memory = {"median": 12.3e6, "q1": 12e6, "q3": 13e6}
    assert with_quartiles("worker_bytes", memory) == "12.3 MB (12.0 MB to 13.0 MB)"


# --- Rows for pytest-benchmark's own tables


def test_each_library_has_a_row_in_the_group_of_its_case() -> None:
    """This project's row keeps the record; a library that could not run has no row."""
    info = _info({OURS: 4e-6, "aiodataloader": 2e-6})
    info["rivals"]["batched"] = {"unavailable": "pip install failed"}
    entry = {"name": "test_clients[asyncio-64]", "fullname": "suite::test", "group": None}
    ours, other = rows_by_library(
        {**entry, "extra_info": info, "stats": {"median": 4e-6}},
        lambda rounds: {"median": max(rounds)},
    )
    assert [ours["name"], other["name"]] == [OURS, "aiodataloader"]
    assert ours["group"] == other["group"] == "clients one by one, clients: 64, asyncio"
    assert [ours["stats"]["median"], other["stats"]["median"]] == [4e-6, 2e-6]
    assert ours["fullname"] == entry["fullname"] != other["fullname"]
    assert [record.info for record in read([{"benchmarks": [ours, other]}])] == [info]
    alone: dict[str, Any] = {**entry, "extra_info": {}}
    assert rows_by_library(alone, spread) == [alone]


@ON_EACH_FILE
def test_saved_results_give_a_row_for_each_library(path: Path) -> None:
    """So `pytest-benchmark compare` can show them all, and none twice."""
    benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    interleaved = [one for one in benchmarks if "rivals" in one["extra_info"]]
    rows = [row for one in interleaved for row in rows_by_library(one, lambda _: {})]
    records = read([{"benchmarks": interleaved}])
    expected = [(record.title, name) for record in records for name in record.measured()]
    assert sorted((row["group"], row["name"]) for row in rows) == sorted(expected)
    assert len({row["fullname"] for row in rows}) == len(rows)


def test_the_short_benchmark_is_short() -> None:
    """A reader has a minute for it, and README.md has its command."""
    folder = ROOT / "benchmarks"
    assert len((folder / "test_executors.py").read_text(encoding="utf-8").splitlines()) <= 80
    assert "executors" not in render.NAMES
    command = "pytest benchmarks/test_executors.py --benchmark-group-by=group"
    assert command in (folder / "README.md").read_text(encoding="utf-8")
