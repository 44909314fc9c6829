"""One batcher on several event loops, and after a fork."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import batched
from async_batcher.exceptions import BatcherStoppedError
from tests.support.batchers import async_echo, echo, make_batcher, process_all

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("no_noise")


@pytest.mark.parametrize("function", [echo, async_echo])
def test_a_second_loop_while_the_first_is_open_is_an_error(function: Callable[..., Any]) -> None:
    """The first loop goes on; once it is closed, the second may use the batcher."""
    batcher = batched(function, max_queue_time=0)
    with asyncio.Runner() as second:
        with asyncio.Runner() as first:
            assert first.run(process_all(batcher, 1)) == [1]
            for call in (
                batcher.process(2),
                batcher.start(),
                batcher.stop(),
                batcher.stop(force=True),
            ):
                with pytest.raises(RuntimeError, match="another event loop"):
                    second.run(call)
            assert first.run(process_all(batcher, 3)) == [3]
        assert second.run(process_all(batcher, 4)) == [4]
        second.run(batcher.stop())


@pytest.mark.parametrize("function", [echo, async_echo])
@pytest.mark.parametrize("options", [{}, {"executor": "thread"}])
def test_a_new_loop_after_the_old_one_has_closed(
    function: Callable[..., Any], options: dict[str, Any]
) -> None:
    """The batcher starts again, even with items queued and no stop in between."""
    if function is async_echo and options:
        pytest.skip("an async process_batch takes no executor")
    batcher = batched(function, max_batch_size=2, **options)
    pending: list[asyncio.Future[Any]] = []

    async def main(item: int) -> Any:
        results = await process_all(batcher, item, item)
        batcher.max_queue_time = 1000.0
        pending.append(batcher.submit(-1))
        return results

    for item in range(3):
        batcher.max_queue_time = 0.0
        assert asyncio.run(main(item)) == [item, item]
    assert not any(future.done() for future in pending)
    asyncio.run(batcher.stop())


def test_futures_and_options_after_the_loop_has_closed() -> None:
    """Cancelling a future, closing a call and setting an option raise nothing."""
    batcher = batched(async_echo, max_queue_time=50.0)
    left: list[Any] = []

    async def main() -> None:
        left.append(batcher.submit(1))
        call = batcher.process(2)
        call.send(None)
        left.append(call)
        await asyncio.sleep(0)
        left.append(batcher.submit(3))

    asyncio.run(main())
    batcher.max_queue_time = 5.0
    batcher.max_batch_size = 1
    left[0].cancel()
    left[1].close()
    left[2].cancel()
    assert not asyncio.run(batcher.is_running())
    assert asyncio.run(batcher.process(4)) == 4


def test_a_program_that_ends_without_stop_starts_no_further_batch() -> None:
    """When asyncio.run cancels the running batch, every caller gets an error."""
    batches: list[list[int]] = []
    futures: list[asyncio.Future[Any]] = []

    async def process_batch(batch: list[int]) -> None:
        batches.append(batch)
        await asyncio.sleep(3600)

    async def main() -> None:
        batcher = make_batcher(process_batch, max_batch_size=1)
        futures.extend(batcher.submit(item) for item in range(3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()
    assert batches == [[0]]
    assert all(
        future.cancelled() or isinstance(future.exception(), BatcherStoppedError)
        for future in futures
    )


def test_a_loop_closed_during_a_batch_starts_no_other() -> None:
    """No batch follows the destroyed task, and nothing is called on the closed loop."""
    batches: list[list[int]] = []

    async def process_batch(batch: list[int]) -> list[int]:
        batches.append(list(batch))
        await asyncio.Event().wait()
        return batch

    async def main() -> None:
        batcher = make_batcher(process_batch, max_batch_size=1)
        for item in range(3):
            batcher.submit(item)
        for _ in range(3):
            await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _loop, _context: None)  # asyncio reports the destroyed task
    loop.run_until_complete(main())
    loop.close()
    gc.collect()
    assert batches == [[0]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("started", [False, True])
def test_a_running_batcher_cannot_be_used_after_a_fork(started: bool) -> None:
    """The child gets a clear error; a batcher that never started may be used."""
    batcher = batched(async_echo, max_queue_time=0)

    async def in_child() -> bool:
        if not started:
            return bool(await batcher.process(2) == 2)
        refused = 0
        for call in (batcher.process(2), batcher.start(), batcher.stop()):
            try:
                await call
            except RuntimeError as exc:
                refused += "fork" in str(exc)
        return refused == 3

    with asyncio.Runner() as runner:
        if started:
            assert runner.run(batcher.process(1)) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # threads; the child uses none
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with contextlib.suppress(BaseException):
                    status = 0 if asyncio.run(asyncio.wait_for(in_child(), 20.0)) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert runner.run(batcher.process(3)) == 3, "the parent goes on"
        runner.run(batcher.stop())
