"""What happens to a call in a worker process: this project, the standard pool, loky and pebble.

``python -m tests.support.other_pools POOL EVENT FOLDER`` makes the event happen to a pool of two
workers and prints what was observed, in the words of the README's table.
"""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_batcher import batched
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

WORKERS = 2
TIMEOUT = 0.2  # seconds; the time limit of a call that hangs


class Pool:
    """A pool whose calls run a batch function.

    Args:
        submit: Calls a batch function with a batch; takes a time limit if the pool has one.
        unit: What the pool runs.
        has_time_limit: Whether a call can have a time limit.
        ends_cancelled: Whether a running call ends when its caller is cancelled.
    """

    def __init__(
        self,
        submit: Callable[..., Awaitable[Any]],
        unit: str = "call",
        *,
        has_time_limit: bool = False,
        ends_cancelled: bool = False,
    ) -> None:
        self.submit = submit
        self.unit = unit
        self.has_time_limit = has_time_limit
        self.ends_cancelled = ends_cancelled


def open_pool(name: str) -> Pool:
    """Open a pool of two workers, by its name in the README."""
    context = multiprocessing.get_context("forkserver")
    if name.startswith("async_batcher"):
        return _batcher(cancel_abandoned=name.endswith("cancel_abandoned"))
    if name == "pebble":
        import pebble

        processes = pebble.ProcessPool(WORKERS, context=context)

        def schedule(function: Any, batch: Any, timeout: float | None = None) -> Any:
            future = processes.schedule(function, args=[batch], timeout=timeout)
            return asyncio.wrap_future(future)

        return Pool(schedule, has_time_limit=True, ends_cancelled=True)
    executor: Any
    if name == "threads":
        executor = ThreadPoolExecutor(WORKERS)
    elif name == "loky":
        import loky

        executor = loky.ProcessPoolExecutor(WORKERS)
    else:
        executor = ProcessPoolExecutor(WORKERS, mp_context=context)
    return Pool(lambda function, batch: asyncio.wrap_future(executor.submit(function, batch)))


def _batcher(*, cancel_abandoned: bool) -> Pool:
    batchers: dict[Any, Any] = {}

    def submit(function: Any, batch: Any, timeout: float | None = None) -> Any:
        if function not in batchers:
            batchers[function] = batched(
                function,
                executor="process",
                max_workers=WORKERS,
                max_batch_size=len(batch),
                max_queue_time=0,
                batch_timeout=timeout,
                cancel_abandoned=cancel_abandoned,
            )
        return asyncio.ensure_future(batchers[function].process_many(batch, return_exceptions=True))

    return Pool(submit, "batch", has_time_limit=True, ends_cancelled=cancel_abandoned)


def note_end(folder: Path, batch: list[Any]) -> list[Any]:
    """Note the process id, wait for the file "go", and note the end."""
    work.note(folder, "pid", str(os.getpid()))
    work.wait_for(folder / "go")
    work.note(folder, "end")
    return batch


async def killed(pool: Pool, folder: Path) -> str:
    """Kill one of two busy workers while another call waits."""
    function = functools.partial(note_end, folder)
    running = [asyncio.ensure_future(pool.submit(function, [n])) for n in range(WORKERS)]
    await wait_until(lambda: len(work.noted(folder, "pid")) == WORKERS)
    waiting = [asyncio.ensure_future(pool.submit(function, [n])) for n in range(WORKERS)]
    os.kill(int(work.noted(folder, "pid")[0]), signal.SIGKILL)
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    (folder / "go").touch()
    failed = await _failures(*running, *waiting)
    try:
        broken = await _failures(pool.submit(function, [9]))
    except Exception:  # noqa: BLE001 - each pool has its own error
        broken = 1
    if broken:
        assert failed == 2 * WORKERS
        return f"Every {pool.unit} fails; the pool is broken"
    assert failed == 1
    return f"Its {pool.unit} fails; the worker is replaced"


async def hangs(pool: Pool, folder: Path) -> str:
    """Run a call for longer than its time limit."""
    function = functools.partial(note_end, folder)
    if pool.has_time_limit:
        assert await _failures(pool.submit(function, [1], timeout=TIMEOUT)) == 1
    else:
        call = pool.submit(function, [1])
        await wait_until(lambda: work.noted(folder, "pid"))
        await _failures(asyncio.wait_for(call, TIMEOUT))
    await _end(folder, is_ended=pool.has_time_limit)
    return "It is ended at its time limit" if pool.has_time_limit else "It runs on"


async def unpicklable(pool: Pool, folder: Path) -> str:  # noqa: ARG001 - as the others
    """Send a batch of which one item is a lock."""
    try:
        results = await pool.submit(work.same, [1, threading.Lock()])
    except Exception:  # noqa: BLE001 - each pool has its own error
        observed = f"The {pool.unit} fails"
    else:
        assert results[0] == 1
        assert isinstance(results[1], Exception)
        observed = "Only that item fails"
    assert await pool.submit(work.same, [2]) == [2]
    return observed


async def cancelled(pool: Pool, folder: Path) -> str:
    """Cancel the caller of a call that runs."""
    call = asyncio.ensure_future(pool.submit(functools.partial(note_end, folder), [1]))
    await wait_until(lambda: work.noted(folder, "pid"))
    call.cancel()
    await _end(folder, is_ended=pool.ends_cancelled)
    return "It is ended" if pool.ends_cancelled else "It runs on"


async def program_killed(pool: Pool, folder: Path) -> None:
    """Run a call, and wait to be killed."""
    await pool.submit(functools.partial(note_end, folder), [1])


async def _failures(*calls: Any) -> int:
    """Return how many calls failed."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    inner = [result[0] if isinstance(result, list) else result for result in results]
    return sum(isinstance(result, BaseException) for result in inner)


async def _end(folder: Path, *, is_ended: bool) -> None:
    """Check that the worker has exited, or that it completes its call after all."""
    if is_ended:
        await wait_for_exit(map(int, work.noted(folder, "pid")))
        assert not work.noted(folder, "end")
    else:
        (folder / "go").touch()
        await wait_until(lambda: work.noted(folder, "end"))


async def main(name: str, event: str, folder: Path) -> None:
    """Print what is observed, and leave the rest to the exit of the process."""
    print(await globals()[event](open_pool(name), folder), flush=True)
    # Pools whose workers hang or were killed may wait for them in their exit handlers.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
