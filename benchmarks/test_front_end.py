"""What an item costs on its way through the front end, with batches that do nothing, and what memory very many of them take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.children import BATCHED, BY_HAND, OLD, ONE_BY_ONE, OURS, RAY_SERVE, STREAMED
from benchmarks.modes import loads

if TYPE_CHECKING:
    from benchmarks.contest import Contest

LIMITS = ("bare futures", BY_HAND)
NEAREST = (OLD, "aiodataloader", BATCHED)
LOAD = {"place": "coroutine", "max_batch_size": 64, "max_queue_time": 0.01}


def _far(contest: Contest) -> tuple[str, ...]:
    """Who is not asked in a quick run: its environment takes most of a minute to make."""
    return contest.pick((), (RAY_SERVE,))


@pytest.mark.parametrize("clients", loads(quick=[64], usual=[1, 1024]))
def test_clients(contest: Contest, ask: Any, loop: str, clients: int) -> None:
    """Clients that each await one item after another; a single one waits for no window, which would be all that is seen."""
    items = {1: contest.pick(50, 250, 500), 64: contest.pick(20, 100, 200), 1024: contest.pick(2, 4, 12)}[clients]
    load = {**LOAD, "clients": clients, "items": items, "max_queue_time": 0.0 if clients == 1 else LOAD["max_queue_time"]}
    rivals = {rival: ask(rival, "clients", load) for rival in (*LIMITS, *NEAREST, *_far(contest), OURS)}
    contest.run(rivals, measure="seconds_per_item", rounds=contest.pick(1, 9, 21), question="clients", loop=loop, load=load)


def test_gather(contest: Contest, ask: Any, loop: str) -> None:
    """One gather over many items: our `submit` against what each rival has for it."""
    load = {**LOAD, "items": contest.pick(1_280, 2_560, 6_400)}
    rivals = {rival: ask(rival, "gather", load) for rival in (*LIMITS, *NEAREST, *_far(contest), OURS)}
    contest.run(rivals, measure="seconds_per_item", rounds=contest.pick(1, 9, 21), question="gather", loop=loop, load=load)


def test_many(contest: Contest, ask: Any, loop: str) -> None:
    """One call for 100,000 items, or what a rival has for it."""
    load = {**LOAD, "items": contest.pick(5_000, 100_000)}
    rivals = {rival: ask(rival, "many", load) for rival in contest.names(NEAREST, [RAY_SERVE])}
    rivals[ONE_BY_ONE] = ask(OURS, "gather", load)
    rivals[OURS] = ask(OURS, "many", load)
    contest.run(rivals, measure="seconds_per_item", question="many", loop=loop, load=load)


def test_lone_item(contest: Contest, ask: Any, loop: str) -> None:
    """A lone item waits for its window, and not for longer: beside a bare timer of the same delay, one after the other."""
    load = {**LOAD, "pairs": contest.pick(10, 20, 40)}
    rivals = {rival: ask(rival, "lone_item", load) for rival in (OLD, BATCHED, *_far(contest), OURS)}
    contest.run(rivals, measure="wait_seconds", question="lone_item", loop=loop, load=load)


@pytest.mark.parametrize("loop", loads(quick=["asyncio"], full=["uvloop"]), indirect=True)
def test_stream(contest: Contest, ask: Any, loop: str) -> None:
    """Very many items from a generator, whose results are consumed one by one; and the same with all of them at once."""
    load = {**LOAD, "items": contest.pick(40_000, 1_000_000)}
    rivals = {
        "process_many, all at once": ask(STREAMED, "stream", {**load, "whole": True}),
        OURS: ask(STREAMED, "stream", {**load, "whole": False}),
    }
    contest.run(rivals, measure="seconds_per_item", question="stream", loop=loop, load=load)
