"""The ways to run the job: on one core, in threads and processes by hand, and in a batcher.

Each reads files, and yields the result of each as it arrives, or the exception that its batch got.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import sys
from abc import abstractmethod
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

from async_batcher import batched
from async_batcher.cli.demo.job import FileResult, analyse_batch, silence_parser
from async_batcher.exceptions import PoolBrokenError, WorkerDiedError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from typing import Self, TypeAlias

    from async_batcher.stats import BatchRecord

    Results: TypeAlias = AsyncGenerator[FileResult | BaseException, None]

CRASHES = (BrokenExecutor, PoolBrokenError, WorkerDiedError)

# One that runs, and one that the worker starts while the results of the first are on their way.
_CHUNKS_PER_WORKER = 2


class Approach(contextlib.AbstractAsyncContextManager["Approach"]):
    """A way to run the job.

    Args:
        name: As in the tables.
        workers: Threads or processes.
        batch_size: Files in a batch.

    Attributes:
        has_processes: Whether workers are processes, which can be killed.
        lost_batches: Batches that ended with an exception.
    """

    has_processes = False

    def __init__(self, name: str, workers: int, batch_size: int) -> None:
        self.name = name
        self.workers = workers
        self.lost_batches = 0
        self._batch_size = batch_size

    @abstractmethod
    def run(self, files: Iterator[str]) -> Results:
        """Run the job for files until there are no more; the iterator may be endless."""


class OneCore(Approach):
    """The batch function itself, called on the event loop."""

    async def __aexit__(self, *_: object) -> None:
        """There is nothing to stop."""

    async def run(self, files: Iterator[str]) -> Results:
        while chunk := list(islice(files, self._batch_size)):
            for result in analyse_batch(chunk):
                yield result
            await asyncio.sleep(0)  # Ctrl-C waits for one batch


class HandWritten(Approach):
    """What a user of asyncio writes around an executor.

    It cuts the input into chunks, limits those in flight, and replaces an executor that broke.
    """

    def __init__(
        self, name: str, workers: int, batch_size: int, make_executor: Callable[[int], Executor]
    ) -> None:
        super().__init__(name, workers, batch_size)
        self.has_processes = make_executor is new_process_pool
        self._make_executor = make_executor

    async def __aenter__(self) -> Self:
        self._executor = self._make_executor(self.workers)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    async def run(self, files: Iterator[str]) -> Results:
        chunk_sizes: dict[asyncio.Future[list[FileResult]], int] = {}
        try:
            while True:
                while len(chunk_sizes) < _CHUNKS_PER_WORKER * self.workers:
                    chunk = list(islice(files, self._batch_size))
                    if not chunk:
                        break
                    chunk_sizes[self._submit(chunk)] = len(chunk)
                if not chunk_sizes:
                    return
                done, _ = await asyncio.wait(chunk_sizes, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    size = chunk_sizes.pop(future)
                    results: list[FileResult] | list[BrokenExecutor]
                    try:
                        results = future.result()
                    except BrokenExecutor as exc:
                        self.lost_batches += 1
                        results = [exc] * size
                    for result in results:
                        yield result
        finally:
            for future in chunk_sizes:
                future.cancel()  # also keeps asyncio from logging an exception that is not read

    def _submit(self, chunk: list[str]) -> asyncio.Future[list[FileResult]]:
        loop = asyncio.get_running_loop()
        with _sigint_blocked():
            try:
                return loop.run_in_executor(self._executor, analyse_batch, chunk)
            except BrokenExecutor:
                self._executor.shutdown(wait=False)
                self._executor = self._make_executor(self.workers)
                return loop.run_in_executor(self._executor, analyse_batch, chunk)


class WithBatcher(Approach):
    """A batcher with ``executor="process"``."""

    has_processes = True

    async def __aenter__(self) -> Self:
        self._stack = contextlib.AsyncExitStack()
        self._batcher = await self._stack.enter_async_context(
            batched(
                analyse_batch,
                executor="process",
                max_workers=self.workers,
                max_batch_size=self._batch_size,
                setup_worker=silence_parser,
                on_batch=self._count,
            )
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.__aexit__(*exc_info)  # type: ignore[arg-type]

    async def run(self, files: Iterator[str]) -> Results:
        results = self._batcher.map(files, ordered=False, return_exceptions=True)
        async with contextlib.aclosing(results):
            async for result in results:
                yield result

    def _count(self, record: BatchRecord) -> None:
        self.lost_batches += record.error is not None


def new_approaches(workers: int, batch_size: int) -> list[Approach]:
    return [
        OneCore("one core", 1, batch_size),
        HandWritten("threads", workers, batch_size, ThreadPoolExecutor),
        HandWritten("ProcessPoolExecutor", workers, batch_size, new_process_pool),
        WithBatcher("batcher", workers, batch_size),
    ]


def new_process_pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: with other threads, a forked child may hang on a lock that is never released.
    method = "forkserver" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=silence_parser)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Keep Ctrl-C from worker processes that start meanwhile: each would print a traceback.

    They inherit the mask. In this process the signal stays pending until the block has ended.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
