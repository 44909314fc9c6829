"""What a batcher with nothing to do costs, how soon it ends, how soon a pool begins, and what the import takes."""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.children import BATCHED, BY_HAND, NEAREST_POOLS, OLD, OTHER_POOLS, OUR_POOL, OURS, RAY_SERVE, Child, python_for
from benchmarks.interpreters import measure_import
from benchmarks.modes import loads

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.children import Children
    from benchmarks.contest import Contest, Round

MODULE = "async_batcher.batcher"
NOT_WANTED = {"uvloop", "cloudpickle", "multiprocessing", "numpy"}  # nobody who only imports the batcher needs them
LIMITS = {"max_batch_size": 64, "max_queue_time": 0.01, "workers": 2}
# Seconds before a batcher counts as idle: the second worker process is still starting when the first has answered.
SETTLE = {"process": 0.5}


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
@pytest.mark.parametrize("place", loads(quick=["coroutine", "process"], usual=["loop threads", "thread"]))
def test_stop(contest: Contest, ask: Any, loop: str, place: str) -> None:
    """`stop` of an idle batcher that has run one batch; with a pool, until its workers have ended."""
    load = {**LIMITS, "place": place, "settle": SETTLE.get(place, 0.1)}
    rivals = {rival: ask(rival, "stop", load) for rival in (OLD, BATCHED, *contest.pick((), (RAY_SERVE,)), OURS)}
    contest.run(rivals, measure="seconds", question="stop", loop=loop, load=load)


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
@pytest.mark.parametrize("place", loads(quick=["coroutine", "process"], full=["thread"]))
def test_idle(contest: Contest, ask: Any, loop: str, place: str) -> None:
    """How often a program with an idle batcher wakes, and what it burns; beside one without a batcher."""
    load = {**LIMITS, "place": place, "settle": SETTLE.get(place, 0.1), "seconds": contest.pick(0.3, 10.0)}
    rivals = {rival: ask(rival, "idle", load) for rival in (BY_HAND, OURS, OLD, BATCHED, *contest.pick((), (RAY_SERVE,)))}
    contest.run(rivals, measure="cpu_seconds", together=True, question="idle", loop=loop, load=load)


def _start(rival: str, load: dict[str, Any]) -> dict[str, float]:
    """In a process that has not had a pool before.

    Returns:
        What it answers, and ``program_seconds``: until the first answer, from before the interpreter starts.
    """
    began = time.perf_counter()
    child = Child(rival, "asyncio")
    try:
        running = time.perf_counter() - began
        answer = child.ask("start", load)
    finally:
        child.close()
    return {**answer, "program_seconds": running + answer["first_seconds"]}


def test_start(contest: Contest, children: Children) -> None:
    """From no pool to its first answer, and what memory a worker takes; each in a fresh process with its imports done."""
    load = {"workers": LIMITS["workers"]}

    def prepare(rival: str) -> tuple[dict[str, str], Round]:
        return children.get(rival, "asyncio").facts, functools.partial(_start, rival, load)

    rivals = {rival: functools.partial(prepare, rival) for rival in contest.names(NEAREST_POOLS, OTHER_POOLS)}
    rivals[OURS] = functools.partial(prepare, OUR_POOL)
    rounds = contest.pick(1, 5, 21)
    contest.run(rivals, measure="first_seconds", rounds=rounds, question="start", loop="asyncio", load=load)


def test_import(contest: Contest) -> None:
    """The import statement alone, and the whole process; neither uvloop nor cloudpickle is imported."""
    _, version, modules = measure_import(sys.executable, MODULE)
    assert not modules & NOT_WANTED

    def prepare(python: Path | str, module: str, version: str) -> tuple[dict[str, str], Round]:
        return {"version": version}, lambda: measure_import(python, module)[0]

    def prepare_old() -> tuple[dict[str, str], Round]:
        python = python_for(OLD, "asyncio")
        _, old_version, _ = measure_import(python, MODULE)
        assert old_version in OLD
        return prepare(python, MODULE, old_version)

    rivals = {
        "import asyncio": functools.partial(prepare, sys.executable, "asyncio", "-"),
        OLD: prepare_old,
        OURS: functools.partial(prepare, sys.executable, MODULE, version),
    }
    rounds = contest.pick(3, 21, 41)
    contest.run(rivals, measure="seconds", rounds=rounds, question="import", loop="none", load={"module": MODULE})
