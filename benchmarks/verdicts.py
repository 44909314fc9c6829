"""Where we lose, and the goals (pure): who did better than we, and which bounds are not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.children import OURS
from benchmarks.figures import Facts, called, compared, figure, median, of_its_question, ratio, table, title
from benchmarks.questions import GOALS, QUESTIONS, Goal
from benchmarks.tables import BASELINES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def losses(found: Sequence[Facts], *, to_baselines: bool = True) -> str:
    """Everyone who did better than we, the worst first, a line for each question; and every goal that was missed.

    Args:
        found: What was measured.
        to_baselines: Whether baselines and limits are named too.
    """
    worse: dict[tuple[str, str], list[tuple[dict[str, float], Facts]]] = {}
    for facts in found:
        for name in facts["rivals"]:
            ratios = ratio(facts, name)
            if ratios is None or ratios["median"] <= 1 or not QUESTIONS[facts["question"]].is_race:
                continue
            if to_baselines or name not in BASELINES:
                worse.setdefault((facts["question"], name), []).append((ratios, facts))
    lines = []
    for (question, name), cases in sorted(worse.items(), key=lambda one: -max(ratios["median"] for ratios, _ in one[1])):
        ratios, facts = max(cases, key=lambda case: case[0]["median"])
        asked = sum("spread" in one["rivals"].get(name, {}) for one in found if one["question"] == question)
        times = f"{figure(facts['measure'], median(facts, name))}, ours {figure(facts['measure'], median(facts, OURS))}"
        who = f"{called(name, facts['rivals'][name])} {QUESTIONS[question].better}"
        often = "" if asked == 1 else f" in {len(cases)} of {asked} cases, by most"
        noise = ", which may be noise" if ratios["q1"] <= 1 and len(facts["rivals"][name]["data"][facts["measure"]]) > 1 else ""
        where = f" ({of_its_question(facts)})" if of_its_question(facts) else ""
        lines.append(f"- {QUESTIONS[question].title}: {who}{often}{where}: {times}; ours / it {compared(ratios)}{noise}.")
    missed = [f"- {text}: {value}, where the goal is {bound}." for text, value, bound, met in _held_against(found) if not met]
    return "\n".join([*lines, *missed]) or "Nowhere in these figures."


def goals(found: Sequence[Facts]) -> str:
    """The goals and what was measured."""
    rows = [(text, value, bound, "yes" if met else "**no**") for text, value, bound, met in _held_against(found)]
    return table(("figure", "measured", "goal", "met"), rows)


def _held_against(found: Sequence[Facts]) -> Iterator[tuple[str, str, str, bool]]:
    """Each figure that has a goal: what it is, its value, the bound, and whether it is met."""
    for goal in GOALS:
        for facts in found:
            load = facts["load"]
            if facts["question"] == goal.question and all(load.get(key) == value for key, value in goal.where.items()):
                yield from _one_held_against(goal, facts)


def _one_held_against(goal: Goal, facts: Facts) -> Iterator[tuple[str, str, str, bool]]:
    measure = goal.measure or facts["measure"]
    name = ", ".join([title(facts), goal.figure] if goal.figure and goal.rival else [title(facts)])
    if goal.rival is None:
        value = median(facts, OURS, measure)
        what, written, bound = (
            (f"{name}: {goal.figure}" if goal.figure else name),
            figure(measure, value),
            figure(measure, goal.bound),
        )
    else:
        ratios = ratio(facts, goal.rival, measure) if goal.rival in facts["rivals"] else None
        if ratios is None:
            return
        value = ratios["median"]
        what, written, bound = f"{name}: ours / {goal.rival}", f"{value:.2f}", f"{goal.bound:.2f}"
    met = value >= goal.bound if goal.at_least else value <= goal.bound
    yield what, written, f"at {'least' if goal.at_least else 'most'} {bound}", met
