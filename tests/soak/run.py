"""One soak: pools, one after another, that many callers use while faults of all kinds happen."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import logging
import os
import random
import resource
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_batcher import AsyncBatcher, Limit, WorkerPool, batched, isolate, retry
from async_batcher.exceptions import (
    BatcherStoppedError,
    BatchTimeoutError,
    PoolBrokenError,
    WorkerDiedError,
)
from tests.conftest import descendants
from tests.soak import items as work
from tests.soak.ledger import Ledger
from tests.support.worker_pools import parent_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from tests.soak.items import Item

ROUND_SECONDS = 10.0  # of one pool
PATIENCE = 60.0  # seconds after which a caller is lost; none waits longer on purpose
_CLIENTS = 12
_CLEAN_UP_SECONDS = 30.0


class Use:
    """What a process uses of the system."""

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory = pages * resource.getpagesize() / 1e6  # MB
        self.descriptors = len(list(Path("/proc/self/fd").iterdir()))
        self.threads = threading.active_count()
        self.children = len(descendants())

    def leaked_since(self, before: Use) -> str:
        """Say what there is more of than before, memory apart."""
        names = ("descriptors", "threads", "children")
        more = {name: getattr(self, name) - getattr(before, name) for name in names}
        return ", ".join(f"{count} {name}" for name, count in more.items() if count > 0)


class Totals:
    """What all rounds of a soak have come to.

    Attributes:
        calls: Items that were given to pools.
        outcomes: How they ended.
        faults: What happened, by kind.
        troubles: What should not happen: calls that were lost or got something wrong, items that
            ran twice, what a pool left behind, internal errors; by kind.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.troubles: dict[str, list[str]] = {
            name: [] for name in ("lost", "wrong", "run twice", "left behind", "internal errors")
        }

    def add(self, ledger: Ledger, path: Path) -> None:
        """Add the calls of a round."""
        self.calls += ledger.calls
        self.outcomes += ledger.outcomes
        self.faults += ledger.faults
        self.troubles["lost"] += ledger.lost
        self.troubles["wrong"] += ledger.wrong
        self.troubles["run twice"] += ledger.run_twice(str(path))


class _ErrorLog(logging.Handler):
    """Collects what is logged as an error that should not happen."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.CRITICAL or record.name == "asyncio":
            self._found.append(self.format(record))


class Soak:
    """Rounds of calls and faults; a seed decides which.

    Args:
        seed: The seed.
        method: The start method of workers.
        folder: For files that note which items have run.
    """

    def __init__(self, seed: int, method: str, folder: Path) -> None:
        self.totals = Totals()
        self.uses: list[Use] = []  # at the start, and after each round
        self._random = random.Random(seed)  # noqa: S311 - no secrets
        self._method = method
        self._folder = folder
        self._numbers = itertools.count(1)

    async def run(self, seconds: float) -> None:
        """Run rounds for so many seconds."""
        loop = asyncio.get_running_loop()
        found = self.totals.troubles["internal errors"]
        loop.set_exception_handler(lambda _, context: found.append(repr(context)))
        handler = _ErrorLog(found)
        loggers = [logging.getLogger(name) for name in ("async_batcher", "asyncio")]
        for logger in loggers:
            logger.addHandler(handler)
            logger.propagate = False
        self.uses.append(Use())
        end = time.monotonic() + seconds
        try:
            while (left := end - time.monotonic()) > 0:
                path = self._folder / f"runs-{len(self.uses)}"
                path.touch()
                this = Round(self._random.random(), self._method, str(path), self._numbers)
                await this.run(min(left, ROUND_SECONDS))
                self.totals.add(this.ledger, path)
                path.unlink()
                self.uses.append(await self._cleaned_up())
        finally:
            for logger in loggers:
                logger.removeHandler(handler)

    async def _cleaned_up(self) -> Use:
        """Wait until nothing of a pool is left, and return what is used then."""
        before = self.uses[min(1, len(self.uses) - 1)]  # some is never freed, from the first
        deadline = time.monotonic() + _CLEAN_UP_SECONDS
        while True:
            await asyncio.sleep(0.05)
            use = Use()
            leaked = use.leaked_since(before)
            if len(self.uses) == 1:
                return use
            if not leaked:
                return use
            if time.monotonic() > deadline:
                self.totals.troubles["left behind"].append(leaked)
                return use


class Round:
    """One pool, its batchers, callers and faults."""

    def __init__(self, seed: float, method: str, path: str, numbers: Iterator[int]) -> None:
        self.ledger = Ledger()
        self._random = random.Random(seed)  # noqa: S311 - no secrets
        self._method = method
        self._path = path
        self._numbers = numbers
        self._is_over = False
        choose = self._random.choice
        self._pool = WorkerPool(
            choose([1, 2, 3]),
            mp_context=method,
            max_tasks_per_child=choose([None, None, 1, 4, 30]),
            max_memory_per_child=choose([None, None, None, 60_000_000]),
        )
        self._isolating: set[AsyncBatcher[Item, Any] | None] = set()
        # Shared by batchers, and passed on to those that replace them.
        self._rate = Limit(by=work.cost_of, rate=(300, 0.1))
        self._batchers: list[AsyncBatcher[Item, Any]] = [self._new_batcher() for _ in range(4)]
        self._background: set[asyncio.Task[None]] = set()

    def _new_batcher(self) -> AsyncBatcher[Item, Any]:
        choose = self._random.choice
        retried = retry(WorkerDiedError, BatchTimeoutError, attempts=3, backoff=0.001, budget=None)
        policies = choose([[], [], [], [isolate()], [retried, isolate()]])
        functions = [work.run_batch, work.yield_batch, work.put_off_batch, work.yield_or_put_off]
        # One that retries crashes would count them as attempts.
        function = choose(functions[:2] if len(policies) == 2 else functions)
        options: dict[str, Any] = {}
        if choose([False, False, True]):
            options = {"key": work.key_of, "key_concurrency": choose([None, 1, 2])}
        if choose([False, False, True]):
            options["limits"] = [choose([self._rate, Limit(by=work.cost_of, per_batch=9)])]
        batcher: AsyncBatcher[Item, Any] = batched(
            function,
            executor=self._pool,
            setup_worker=choose([None, work.set_up]),
            max_batch_size=choose([1, 4, 16]),
            max_queue_time=choose([0, 0.001, 0.01]),
            batch_timeout=work.BATCH_TIMEOUT,
            on_failure=policies,
            cancel_abandoned=choose([False, True]),
            **options,
        )
        if policies:
            self._isolating.add(batcher)
        return batcher

    async def run(self, seconds: float) -> None:
        """Call for so many seconds, then wait for all calls, and stop."""
        clients = [asyncio.create_task(self._client()) for _ in range(_CLIENTS)]
        troubles = asyncio.create_task(self._trouble())
        await asyncio.sleep(seconds)
        self._is_over = True
        await asyncio.gather(*clients, troubles, *self._background)
        force = self._random.random() < 0.3
        await self._in_time("stop", self._stop_all(force=force))

    async def _stop_all(self, *, force: bool) -> None:
        for batcher in self._batchers:
            await batcher.stop(force=force)
        await self._pool.stop(force=force)

    async def _in_time(self, what: str, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Await something that must end soon, however it ends."""
        task = asyncio.ensure_future(coroutine)
        await asyncio.wait([task], timeout=PATIENCE)
        if not task.done():
            self.ledger.lost.append(f"{what} while the pool is {self._pool!r}: {self._events()}")
            task.cancel()
        elif not task.cancelled():
            error = task.exception()
            if not isinstance(error, BatcherStoppedError | PoolBrokenError | OSError | None):
                self.ledger.wrong.append(f"{what} raised {error!r}")

    def _events(self) -> str:
        return str(self._pool.debug_state().get("events", [])[-40:])

    # --- callers

    def _item(self) -> Item:
        draw = self._random.random() * 1000
        deed = ""
        for name, share in work.DEEDS.items():
            draw -= share
            if draw < 0:
                deed = name
                break
        number = next(self._numbers)
        payload: Any = number
        if deed == "unpicklable":
            payload = threading.Lock()
        elif deed == "unreadable":
            payload = work.Unreadable()
        elif (size := self._random.choice([0, 0, 0, 10, 5_000, 70_000, 300_000])) > 0:
            payload = bytes([number % 256]) * size
        elif self._random.random() < 0.02:
            payload = _array(number)
        return (number, deed, payload, self._path)

    async def _client(self) -> None:
        ways = [self._call_pool, self._call_batcher, self._submit, self._call_many, self._map]
        while not self._is_over:
            way = self._random.choices(ways, [3, 4, 2, 1, 1])[0]
            await way()
            if self._random.random() < 0.05:
                await asyncio.sleep(self._random.choice([0.001, 0.02]))

    async def _call_pool(self) -> None:
        item = self._item()
        call = self._pool.run(work.run_item, item, timeout=work.BATCH_TIMEOUT)
        await self._await([item], call, lambda result: [result])

    async def _call_batcher(self) -> None:
        timeout = self._deadline()
        batcher, item = self._random.choice(self._batchers), self._item()
        call = batcher.process(item, timeout=timeout)
        await self._await([item], call, lambda result: [result], batcher)

    async def _submit(self) -> None:
        batcher, item = self._random.choice(self._batchers), self._item()
        try:
            future = batcher.submit(item, timeout=self._deadline())
        except BatcherStoppedError:
            return
        await self._await([item], _result_of(future), lambda result: [result], batcher)

    async def _call_many(self) -> None:
        batcher = self._random.choice(self._batchers)
        items = [self._item() for _ in range(self._random.choice([2, 8, 30]))]
        call = batcher.process_many(items, return_exceptions=True, timeout=self._deadline())
        await self._await(items, call, list, batcher)

    async def _map(self) -> None:
        batcher = self._random.choice(self._batchers)
        items = [self._item() for _ in range(self._random.choice([5, 40]))]
        leaves_after = self._random.choice([None, None, None, 3])
        results: dict[int, Any] = {}
        stream = batcher.map(
            items,
            ordered=self._random.random() < 0.5,
            return_exceptions=True,
            read_in_thread=self._random.random() < 0.2,
            pairs=True,
        )

        async def read() -> list[Any]:
            async with contextlib.aclosing(stream):
                async for item, result in stream:
                    assert item[0] not in results, "a result came twice"
                    results[item[0]] = result
                    if len(results) == leaves_after:
                        break
            return [results.get(item[0], asyncio.CancelledError()) for item in items]

        if leaves_after:
            self.ledger.faults["cancelled"] += 1
        await self._await(items, read(), list, batcher)

    def _deadline(self) -> float | None:
        if self._random.random() > 0.05:
            return None
        self.ledger.faults["deadline"] += 1
        return self._random.choice([0.002, 0.05])

    async def _await(
        self,
        items: list[Item],
        call: Coroutine[Any, Any, Any],
        results_of: Callable[[Any], list[Any]],
        batcher: AsyncBatcher[Item, Any] | None = None,
    ) -> None:
        """Await a call, perhaps cancel it, and note what the caller got for each item."""
        is_isolated = batcher in self._isolating
        for item in items:
            self.ledger.begin(item, may_rerun=is_isolated)
        task = asyncio.ensure_future(call)
        if self._random.random() < 0.08:
            self.ledger.faults["cancelled"] += 1
            await asyncio.sleep(self._random.choice([0, 0.001, 0.01]))
            task.cancel()
        await asyncio.wait([task], timeout=PATIENCE)
        if not task.done():
            self.ledger.lose(items, (self._pool, self._events()))
            task.cancel()
            return
        results: list[Any]
        if task.cancelled():
            results = [asyncio.CancelledError()] * len(items)
        elif (error := task.exception()) is not None:
            results = [error] * len(items)
            is_isolated = False
        else:
            results = results_of(task.result())
            if len(results) != len(items):
                self.ledger.wrong.append(f"{len(results)} results for {len(items)} items")
        for item, result in zip(items, results, strict=False):
            self.ledger.end(item, result, is_isolated=is_isolated)
        if isinstance(results[0], BatcherStoppedError):
            await asyncio.sleep(0.05)

    # --- faults

    async def _trouble(self) -> None:
        faults: list[tuple[Callable[[], Coroutine[Any, Any, None]], int]] = [
            (self._kill, 30),
            (self._halt_shortly, 25),
            (self._halt_for_long, 3),
            (self._restart_workers, 4),
            (self._replace_batcher, 6),
            (self._flush, 6),
            (self._stop_pool, 1),
            (self._block_loop, 4),
            (self._take_descriptors, 3),
        ]
        if self._method == "forkserver":
            faults += [(self._kill_server, 3), (self._halt_server, 3)]
        while not self._is_over:
            await asyncio.sleep(self._random.choice([0, 0.003, 0.03, 0.3]))
            ((fault, _),) = self._random.choices(faults, [share for _, share in faults])
            await fault()

    def _pid(self) -> int | None:
        pids = [worker.pid for worker in self._pool.workers() if worker.pid is not None]
        return self._random.choice(pids) if pids else None

    async def _kill(self) -> None:
        pid = self._pid()
        if pid is not None:
            self.ledger.faults["killed"] += 1
            _send(pid, self._random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV]))

    async def _halt_shortly(self) -> None:
        await self._halt(self._pid(), self._random.choice([0, 0.001, 0.02]))

    async def _halt_for_long(self) -> None:
        self._in_background(self._halt(self._pid(), 2 * work.BATCH_TIMEOUT))

    async def _halt(self, pid: int | None, seconds: float) -> None:
        if pid is not None:
            self.ledger.faults["stopped"] += 1
            _send(pid, signal.SIGSTOP)
            await asyncio.sleep(seconds)
            # Later, the number may be that of another program's process.
            kills = seconds < 0.1 and self._random.random() < 0.1
            _send(pid, signal.SIGKILL if kills else signal.SIGCONT)

    def _server(self) -> int | None:
        pid = self._pid()
        with contextlib.suppress(OSError):
            server = None if pid is None else parent_of(pid)
            return None if server in (os.getpid(), 1) else server
        return None

    async def _kill_server(self) -> None:
        server = self._server()
        if server is not None:
            self.ledger.faults["server"] += 1
            _send(server, signal.SIGKILL)

    async def _halt_server(self) -> None:
        server = self._server()
        if server is not None:
            self.ledger.faults["server"] += 1
            _send(server, signal.SIGSTOP)
            await asyncio.sleep(0.3)
            _send(server, signal.SIGCONT)

    async def _restart_workers(self) -> None:
        self.ledger.faults["restart"] += 1
        self._in_background(self._in_time("restart_workers", self._pool.restart_workers()))

    async def _replace_batcher(self) -> None:
        self.ledger.faults["stop"] += 1
        place = self._random.randrange(len(self._batchers))
        old, self._batchers[place] = self._batchers[place], self._new_batcher()
        force = self._random.random() < 0.6
        self._in_background(self._in_time("stop of a batcher", old.stop(force=force)))

    async def _flush(self) -> None:
        batcher = self._random.choice(self._batchers)
        self._in_background(self._in_time("flush", batcher.flush()))

    async def _stop_pool(self) -> None:
        self.ledger.faults["stop"] += 1
        force = self._random.random() < 0.5
        timeout = self._random.choice([0.1, 1.0])
        await self._in_time("stop of the pool", _stop(self._pool, force, timeout))
        await self._in_time("start of the pool", self._pool.start())

    async def _block_loop(self) -> None:
        self.ledger.faults["blocked"] += 1
        time.sleep(self._random.choice([0.02, 0.3]))  # noqa: ASYNC251 - on purpose

    async def _take_descriptors(self) -> None:
        self.ledger.faults["descriptors"] += 1
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
        few = used + self._random.choice([1, 3, 8])
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        try:
            await asyncio.sleep(self._random.choice([0.02, 0.2]))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    def _in_background(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _stop(pool: WorkerPool, force: bool, timeout: float | None) -> None:  # noqa: ASYNC109
    with contextlib.suppress(TimeoutError):
        await pool.stop(force=force, timeout=timeout)


async def _result_of(future: asyncio.Future[Any]) -> Any:
    return await future


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _array(number: int) -> Any:
    try:
        import numpy
    except ImportError:
        return bytearray([number % 256]) * 2_000_000
    return numpy.full(300_000, number, "int64")
