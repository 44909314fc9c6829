"""Exceptions from worker processes arrive as themselves."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from typing import Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._serialization.caller_exceptions import name_of
from async_batcher._serialization.exception_copy import remote_traceback
from async_batcher.exceptions import BatchError, PoolBrokenError
from tests.support import exception_kinds as kinds
from tests.support.exception_kinds import KINDS, UNPICKLABLE, made, shown

FAIL = "tests.support.exception_kinds.fail"

METHODS = [
    pytest.param(
        "fork", marks=pytest.mark.skipif(sys.platform != "linux", reason="unsafe elsewhere")
    ),
    pytest.param("forkserver", marks=pytest.mark.slow),  # where classes are imported anew
]
needs_workers = pytest.mark.skipif(sys.platform == "win32", reason="there is no WorkerPool")


async def gather(batcher: Any, items: list[Any]) -> list[Any]:
    """Return the result or exception of each call; all calls are made at once."""
    return await asyncio.gather(*map(batcher, items), return_exceptions=True)


@pytest.fixture(params=METHODS)
async def pool(request: pytest.FixtureRequest) -> Any:
    """A pool of one worker."""
    async with WorkerPool(1, mp_context=request.param) as made_pool:
        yield made_pool


def _check(error: Any, kind: str, note: str) -> None:
    expected = made(kind)
    assert type(error) is type(expected), kind
    if kind in KINDS:
        assert shown(error) == shown(expected), kind
    remote = remote_traceback(error)
    assert remote is not None
    notes = vars(error)["__notes__"]
    assert notes[-1] == f"{note}, worker process {remote.pid}"
    assert remote.pid != os.getpid()


@needs_workers
async def test_out_of_a_batch_in_a_worker(pool: WorkerPool) -> None:
    """Raised and returned, for one caller and for several."""
    async with batched(kinds.fail, executor=pool, max_queue_time=0) as batcher:
        for kind in [*KINDS, *UNPICKLABLE]:
            for how in ("raise", "return"):
                (alone,) = await gather(batcher, [(how, kind)])
                _check(alone, kind, f"item 1 of 1 in a batch of {FAIL}")
                both = await gather(batcher, [(how, kind)] * 2)
                assert both[0] is not both[1]
                for place, error in enumerate(both, 1):
                    _check(error, kind, f"item {place} of 2 in a batch of {FAIL}")


@needs_workers
async def test_out_of_a_call_in_a_worker(pool: WorkerPool) -> None:
    """WorkerPool.run raises what the function raised."""
    for kind in [*KINDS, *UNPICKLABLE]:
        error = None
        try:
            await pool.run(kinds.fail, [("raise", kind)])
        except BaseException as exc:  # noqa: BLE001 - of any kind
            error = exc
        _check(error, kind, f"a call of {FAIL}")


@needs_workers
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_out_of_an_executor(method: str) -> None:
    """Futures of as_executor have what the function raised; map raises it."""
    with WorkerPool(1, mp_context=method).as_executor() as executor:
        for kind in [*KINDS, *UNPICKLABLE]:
            _check(
                executor.submit(kinds.fail, [("raise", kind)]).exception(),
                kind,
                f"a call of {FAIL}",
            )
        for chunksize in (1, 2):
            with pytest.raises(kinds.KeywordOnlyError) as caught:
                list(
                    executor.map(kinds.fail, [[("raise", "keyword only")]] * 2, chunksize=chunksize)
                )
            _check(caught.value, "keyword only", f"a call of {FAIL}")


@needs_workers
async def test_exceptions_of_local_classes(pool: WorkerPool) -> None:
    """One that travels by value comes back as the caller's; one from the worker with its class."""

    class Refusal(Exception):  # noqa: N818
        __slots__ = ("code",)

        def __init__(self, *, code: int) -> None:
            super().__init__(f"code {code}")
            self.code = code

    def refuse(batch: list[int]) -> list[int]:
        raise Refusal(code=batch[0])

    def invent(batch: list[int]) -> list[int]:
        class Invention(Exception):  # noqa: N818
            def __init__(self, *, code: int) -> None:
                super().__init__(f"code {code}")
                self.code = code

        raise Invention(code=batch[0])

    async with batched(refuse, executor=pool) as batcher:
        with pytest.raises(Refusal) as caught:
            await batcher(3)
        assert (caught.value.code, str(caught.value)) == (3, "code 3")
    async with batched(invent, executor=pool) as batcher:
        (error,) = await gather(batcher, [3])
        assert (type(error).__name__, error.code, str(error)) == ("Invention", 3, "code 3")


@needs_workers
async def test_what_set_up_raises_in_a_worker(pool: WorkerPool) -> None:
    """Start raises it, and so does a batch."""
    setup: Any = functools.partial(kinds.fail, [("raise", "keyword only")])
    batcher: Any = batched(list, executor=pool, setup_worker=setup)
    for call in (batcher.start, functools.partial(batcher, 1)):
        with pytest.raises(kinds.KeywordOnlyError) as caught:
            await call()
        assert shown(caught.value) == shown(made("keyword only"))
        remote = remote_traceback(caught.value)
        assert remote is not None
        assert vars(caught.value)["__notes__"][-1].endswith(f", worker process {remote.pid}")
        assert FAIL in vars(caught.value)["__notes__"][-1] or call is not batcher.start
    await batcher.stop()


def _exit() -> None:
    raise SystemExit(3)


_cached = kinds.TwoArgumentsError(3, "x")


def _raise_cached(batch: list[str]) -> list[Any]:
    how = batch[0]
    if how == "raise":
        raise _cached
    try:
        _raise_cached(["raise"])
    except kinds.TwoArgumentsError as exc:
        if how == "return":
            return [exc for _ in batch]
        raise ValueError from exc
    raise AssertionError


@needs_workers
async def test_a_set_up_that_exits_in_a_worker(pool: WorkerPool) -> None:
    """The error names ``setup_worker``."""
    batcher: Any = batched(list, executor=pool, setup_worker=_exit)
    for call in (batcher.start, functools.partial(batcher, 1)):
        with pytest.raises(BatchError, match=r"^setup_worker raised builtins\.SystemExit"):
            await call()
    await batcher.stop()


@needs_workers
@pytest.mark.parametrize("how", ["raise", "return", "chain"])
async def test_a_cached_exception_does_not_grow_in_a_worker(pool: WorkerPool, how: str) -> None:
    """Its traceback is that of the latest batch, and complete for each caller."""
    async with batched(_raise_cached, executor=pool, max_batch_size=2) as batcher:
        texts = set()
        for _ in range(4):
            for error in await gather(batcher, [how] * 2):
                texts.add(str(remote_traceback(error)))
        assert len(texts) == 1
        assert texts.pop().count("    raise _cached\n") == 1
    if how == "raise":
        texts = set()
        for _ in range(4):
            with pytest.raises(kinds.TwoArgumentsError) as caught:
                await pool.run(_raise_cached, ["raise"])
            texts.add(str(remote_traceback(caught.value)))
        assert len(texts) == 1


@needs_workers
@pytest.mark.parametrize("method", METHODS)
async def test_what_an_initializer_raises(method: str) -> None:
    """It is the cause of the error that the pool is broken."""
    pool = WorkerPool(
        1, mp_context=method, initializer=kinds.fail, initargs=([("raise", "chain")],)
    )
    with pytest.raises(PoolBrokenError) as caught:
        await pool.run(abs, -1)
    assert caught.value.__cause__ is not None
    assert shown(caught.value.__cause__) == shown(made("chain"))
    await pool.stop()


def _nested(method: str) -> Any:
    """Return a batch function that raises a worker's exception again in this process."""

    async def process_batch(batch: list[int]) -> list[int]:
        async with WorkerPool(1, mp_context=method) as pool:
            await pool.run(kinds.fail, [("raise", "keyword only")])
        return batch

    return process_batch


@needs_workers
@pytest.mark.parametrize("method", METHODS)
async def test_out_of_a_call_in_a_batch(method: str) -> None:
    """The notes name the worker's call and the batch, once each."""
    async with batched(_nested(method), max_batch_size=2) as batcher:
        for place, error in enumerate(await gather(batcher, [0, 1]), 1):
            first, second = error.__notes__
            assert first.startswith(f"a call of {FAIL}, worker process ")
            assert second == f"item {place} of 2 in a batch of {name_of(batcher.process_batch)}"
