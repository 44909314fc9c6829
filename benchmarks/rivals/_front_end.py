"""The questions: each runs one round over a rival's `Front` and says what it measured, in seconds and counts.

A question checks the answers; a wrong one is an error, not a figure.
"""

from __future__ import annotations

import asyncio
import resource
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import _jobs
from _rival import check

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from _rival import Front

    Load = dict[str, Any]


async def clients(front: Front, load: Load) -> dict[str, float]:
    """Many clients that each await one item after another (a closed loop)."""
    process, count, job = front.process, load["items"], _jobs.find(load)
    items = [job.item(number) for number in range(load["clients"] * count)]
    expected = [job.answer(item) for item in items]
    await warm_up(front, load)

    async def client(first: int) -> list[Any]:
        answers = []
        for item in items[first : first + count]:
            answers.append(await process(item))  # noqa: PERF401 - as a client does
        return answers

    began, cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*[client(number * count) for number in range(load["clients"])])
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    check([answer for some in answers for answer in some] == expected)
    return {"seconds_per_item": seconds / len(items), "cpu_seconds_per_item": cpu / len(items)}


async def gather(front: Front, load: Load) -> dict[str, float]:
    """All items at once."""
    submit, items = front.submit, range(load["items"])
    await warm_up(front, load)
    began, cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*[submit(item) for item in items])
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    check(answers == list(items))
    return {"seconds_per_item": seconds / len(items), "cpu_seconds_per_item": cpu / len(items)}


async def many(front: Front, load: Load) -> dict[str, float]:
    """Very many items in one call, where a rival has one."""
    if front.many is None:
        return await gather(front, load)
    items = list(range(load["items"]))
    await warm_up(front, load)
    began, cpu = time.perf_counter(), time.process_time()
    answers = await front.many(items)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    check(answers == items)
    return {"seconds_per_item": seconds / len(items), "cpu_seconds_per_item": cpu / len(items)}


async def lone_item(front: Front, load: Load) -> dict[str, float]:
    """One item at a time in an idle program, and a bare timer of the same delay after each."""
    delay = load["max_queue_time"]
    await warm_up(front, load)
    waits, bare = [], []
    for item in range(load["pairs"]):
        began = time.perf_counter()
        answer = await front.process(item)
        waits.append(time.perf_counter() - began)
        check(answer == item)
        began = time.perf_counter()
        await _timer(delay)
        bare.append(time.perf_counter() - began)
    return {
        "wait_seconds": median(waits),
        "timer_seconds": median(bare),
        "excess_seconds": median(waits) - median(bare),
    }


async def stop(front: Front, load: Load) -> dict[str, float]:
    """The end of a batcher that has run one batch and is idle."""
    check(await front.process(1) == 1)
    await asyncio.sleep(load["settle"])
    began = time.perf_counter()
    await front.stop()
    return {"seconds": time.perf_counter() - began}


async def idle(front: Front, load: Load) -> dict[str, float]:
    """A while in which nothing happens: how often any thread of the process woke, and what it used."""
    check(await front.process(1) == 1)
    await asyncio.sleep(load["settle"])
    turns = _count_turns()
    before, began = resource.getrusage(resource.RUSAGE_SELF), turns()
    await asyncio.sleep(load["seconds"])
    after, ended = resource.getrusage(resource.RUSAGE_SELF), turns()
    measures = {
        "wakes": float(after.ru_nvcsw - before.ru_nvcsw),
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }
    if began is not None and ended is not None:
        measures["turns"] = float(ended - began)
    return measures


async def _timer(delay: float) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.call_at(loop.time() + delay, future.set_result, None)
    await future


def _count_turns() -> Callable[[], int | None]:
    """How often asyncio's loop has gone round, from now on; uvloop does not say."""
    selector: Any = getattr(asyncio.get_running_loop(), "_selector", None)
    if selector is None:
        return lambda: None
    select, count = selector.select, 0

    def counted(timeout: float | None = None) -> Any:
        nonlocal count
        count += 1
        return select(timeout)

    selector.select = counted  # the loop is this round's own
    return lambda: count


async def warm_up(front: Front, load: Load) -> None:
    """Some batches; and more of them for ``settle`` seconds after the first, in which the last worker of a pool starts."""
    job = _jobs.find(load)
    items = [job.item(number) for number in range(4 * load["max_batch_size"])]
    expected = [job.answer(item) for item in items]
    check(await _all([front.process(item) for item in items]) == expected)
    end = time.perf_counter() + load.get("settle", 0.0)
    while time.perf_counter() < end:
        check(await _all([front.process(item) for item in items]) == expected)


async def _all(awaitables: list[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*awaitables))
