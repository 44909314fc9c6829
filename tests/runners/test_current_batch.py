"""`current_batch` where batches are pickled, and in given threads: one contract for all of them."""

from __future__ import annotations

import asyncio
import enum
import functools
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import BatchInfo, WorkerPool, batched, current_batch
from async_batcher._batching.batch import Batch
from async_batcher.exceptions import SerializationError, WorkerDiedError
from tests.support import worker_functions as work
from tests.support.batch_infos import infos, infos_after_hold, infos_yielded, note_info
from tests.support.batchers import call_all
from tests.support.executors import INTERPRETERS, LOKY, POOLS, STANDARD, WORKERS, make_executor
from tests.support.modules import unimportable_module
from tests.support.polling import wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, pids_of
from tests.support.yielding_functions import Unreadable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from async_batcher.current import BatchFacts

pytestmark = [may_warn_of_fork]

needs_pool = pytest.mark.skipif(
    sys.platform == "win32", reason="no event loop there watches sockets"
)
QUICK = ["threads", "standard_forkserver", "pool_forkserver"]
SLOW = [kind for kind in [*STANDARD, *POOLS, *LOKY, *INTERPRETERS] if kind not in QUICK]
KINDS = [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)]
EXECUTORS = [kind for kind in QUICK if kind != "threads"]  # of those that pickle

FAR = 10_000.0  # seconds until a deadline


class Colour(enum.Enum):
    """A key."""

    RED = 1


@pytest.fixture(scope="module", autouse=True)
def _standing_helpers_of_loky() -> None:
    """Start the helper processes that loky keeps, which are not leaks."""
    for kind in LOKY:
        with make_executor(kind) as made:
            made.submit(int).result()


@pytest.fixture
async def executor(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    """Return an executor of the kind, whose initializer notes what it sees."""
    kind: str = request.param
    options: dict[str, Any] = {}
    if kind not in INTERPRETERS:  # they have an initializer
        options = {"initializer": note_info, "initargs": (tmp_path, "initializer")}
    made = make_executor(kind, **options)
    yield made
    if isinstance(made, WorkerPool):
        await made.stop()
    else:
        made.shutdown()
    seen = work.noted(tmp_path, "initializer")
    assert set(seen) == ({"None"} if options else set())


def is_far(seconds: float | None) -> bool:
    """Tell whether a deadline of `FAR` has come nearer."""
    return seconds is not None and 0 < seconds <= FAR


@pytest.mark.parametrize("executor", KINDS, indirect=True)
@pytest.mark.parametrize("function", [infos, infos_yielded])
async def test_what_a_batch_knows(
    executor: Any, function: Callable[..., Any], tmp_path: Path
) -> None:
    """Its size, its deadlines and its worker; nothing where no batch runs."""
    numbers = range(WORKERS) if isinstance(executor, WorkerPool) else [None]
    set_up = functools.partial(note_info, tmp_path, "setup")
    batcher = batched(function, executor=executor, setup_worker=set_up, max_batch_size=2)
    async with batcher:
        without: list[Any] = await batcher.process_many(range(4))
        in_time: list[Any] = await batcher.process_many(range(3), timeout=FAR)
        partly: list[Any] = [
            *await asyncio.gather(batcher.process(0), batcher.process(1, timeout=FAR))
        ]
        if isinstance(executor, WorkerPool):
            outside = [await executor.run(current_batch) for _ in range(4)]
        else:
            outside = [executor.submit(current_batch).result() for _ in range(4)]
    for pid, info in [*without, *in_time, *partly]:
        assert type(info) is BatchInfo
        assert (info.key, info.attempt) == (None, 1)
        assert info.worker in numbers
        assert pid != os.getpid() or info.worker is None
    assert [info.size for _, info in without] == [2] * 4
    for _, info in without:
        assert info.seconds_to_first_deadline is info.seconds_to_last_deadline is None
    assert [info.size for _, info in in_time] == [2, 2, 1]
    for _, info in in_time:
        assert is_far(info.seconds_to_first_deadline)
        assert info.seconds_to_first_deadline == info.seconds_to_last_deadline
    assert is_far(partly[0][1].seconds_to_first_deadline)
    assert partly[0][1].seconds_to_last_deadline is None
    assert outside == [None] * 4
    assert set(work.noted(tmp_path, "setup")) == {"None"}


@needs_pool
async def test_the_worker_is_named(tmp_path: Path) -> None:
    """The number is that of the process."""
    async with WorkerPool(WORKERS) as pool:
        hold = functools.partial(infos_after_hold, tmp_path)
        async with batched(hold, executor=pool, max_batch_size=1) as batcher:
            calls = [asyncio.create_task(batcher.process(f"hold-{i}")) for i in range(WORKERS)]
            await wait_until(lambda: len(work.noted(tmp_path, "begun")) == WORKERS)
            for i in range(WORKERS):
                (tmp_path / f"hold-{i}").touch()
            results = [info for info in await asyncio.gather(*calls) if info]
    assert sorted(info.worker for info in results if info.worker is not None) == [0, 1]


@needs_pool
@pytest.mark.parametrize("method", METHODS)
async def test_a_pool_that_a_batch_makes(method: str, tmp_path: Path) -> None:
    """Its workers do not take over what the batch knows, also if they are forked from it."""

    async def process_batch(batch: list[Any]) -> list[Any]:
        options: dict[str, Any] = {"initializer": note_info, "initargs": (tmp_path, "initializer")}
        async with WorkerPool(1, mp_context=method, **options) as pool:
            return [await pool.run(current_batch)] * len(batch)

    assert await batched(process_batch, max_queue_time=0).process(1) is None
    assert work.noted(tmp_path, "initializer") == ["None"]


# --- what is not the default


def one_key(_: object) -> None:
    """Return the same key for all items: with keys, batches may know something."""


def give_facts(monkeypatch: pytest.MonkeyPatch, facts: BatchFacts | None) -> None:
    """Have batches know something that nothing in the front end says yet."""
    monkeypatch.setattr(Batch, "facts", lambda *_: facts)


@pytest.mark.slow
@pytest.mark.parametrize("executor", [*QUICK, *SLOW], indirect=True)
@pytest.mark.parametrize("function", [infos, infos_yielded])
async def test_key_and_attempt(
    executor: Any, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any key that can be pickled arrives, also one of a class that no worker can import."""

    class Local:
        def __eq__(self, other: object) -> bool:
            return type(other) is type(self)

        __hash__ = None  # type: ignore[assignment]

    batcher = batched(function, executor=executor, max_batch_size=2, key=one_key)
    async with batcher:
        for key in ["a", ("a", 1), Colour.RED, 0, Local()]:
            give_facts(monkeypatch, (key, 3, None, None))
            results: list[Any] = await batcher.process_many(range(2))
            for _, info in results:
                assert (info.key, info.attempt, info.size) == (key, 3, 2)
        give_facts(monkeypatch, None)
        results = await batcher.process_many([0])
        assert (results[0][1].key, results[0][1].attempt) == (None, 1)


@pytest.mark.parametrize("executor", EXECUTORS, indirect=True)
async def test_a_key_that_cannot_be_pickled(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names it; the next batch runs."""
    async with batched(infos, executor=executor, max_batch_size=2, key=one_key) as batcher:
        for key, what in [
            (threading.Lock(), r"the key of the batch \(a _thread.lock\) cannot be pickled"),
            ([threading.Lock()], r"the key of the batch\[0\] \(a _thread.lock\) cannot be pickled"),
            (Unreadable(os.getpid()), r"the key of the batch was sent, but .*made in another"),
        ]:
            give_facts(monkeypatch, (key, 1, None, None))
            outcomes = await call_all(batcher, range(2))
            for outcome in outcomes:
                with pytest.raises(SerializationError, match=what):
                    raise outcome
            give_facts(monkeypatch, ("key", 1, None, None))
            (result,) = await call_all(batcher, [1])
            assert result[1].key == "key"


@pytest.mark.parametrize("executor", EXECUTORS, indirect=True)
async def test_a_key_of_a_module_that_no_worker_can_import(
    executor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It travels by value."""
    text = """
        class Key:
            def __init__(self, name): self.name = name
            def __eq__(self, other): return type(other) is Key and other.name == self.name
            def __hash__(self): return hash(self.name)
    """
    with unimportable_module(tmp_path, "module_of_a_key", text) as module:
        async with batched(infos, executor=executor, max_batch_size=2, key=one_key) as batcher:
            give_facts(monkeypatch, (module.Key("a"), 1, None, None))
            results: list[Any] = await batcher.process_many(range(2))
            assert [info.key.name for _, info in results] == ["a", "a"]


class KeyOfMain:
    """A key that the main module has bound, in this process only."""


@pytest.mark.parametrize("executor", EXECUTORS, indirect=True)
async def test_a_key_of_a_main_module_that_workers_have_not_run(
    executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It travels by value, too."""
    monkeypatch.setattr(KeyOfMain, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "KeyOfMain", KeyOfMain, raising=False)
    async with batched(infos, executor=executor, max_batch_size=2, key=one_key) as batcher:
        give_facts(monkeypatch, (KeyOfMain(), 1, None, None))
        results: list[Any] = await batcher.process_many(range(2))
        assert [type(info.key) for _, info in results] == [KeyOfMain] * 2


@pytest.mark.parametrize("executor", EXECUTORS, indirect=True)
async def test_items_that_travel_one_by_one(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is the number of those that arrive."""
    give_facts(monkeypatch, ("key", 2, None, None))
    batcher: Any = batched(infos, executor=executor, max_batch_size=4, key=one_key)
    async with batcher:
        items = [1, threading.Lock(), 2, Unreadable(os.getpid())]
        first, second, third, fourth = await call_all(batcher, items)
    assert isinstance(second, SerializationError)
    assert isinstance(fourth, SerializationError)
    for _, info in (first, third):
        assert (info.size, info.key, info.attempt) == (2, "key", 2)


@pytest.mark.parametrize("executor", EXECUTORS, indirect=True)
async def test_large_items(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What travels in shared memory has its facts, too, and so has a large key."""
    key = bytes(1 << 18)
    give_facts(monkeypatch, (key, 2, None, None))
    async with batched(infos, executor=executor, max_batch_size=2, key=one_key) as batcher:
        for size in (1 << 10, 1 << 20):
            results: list[Any] = await batcher.process_many([bytes(size), bytes(size)])
            assert [(info.key, info.attempt) for _, info in results] == [(key, 2)] * 2


@needs_pool
async def test_batches_that_wait_at_a_worker_and_run_in_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A batch that was sent ahead keeps its facts, also after a crash of its first worker."""
    give_facts(monkeypatch, ("key", 2, None, None))
    hold = functools.partial(infos_after_hold, tmp_path)
    async with (
        WorkerPool(1) as pool,
        batched(hold, executor=pool, max_batch_size=1, key=one_key) as batcher,
    ):
        first = asyncio.create_task(batcher.process("hold"))
        await wait_until(lambda: work.noted(tmp_path, "begun") == ["hold"])
        second = asyncio.create_task(batcher.process("next"))
        await wait_until(lambda: batcher.stats().queued == 1)
        (pid,) = pids_of(pool)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError):
            await first
        info: Any = await second
    assert (info.key, info.attempt, info.size, info.worker) == ("key", 2, 1, 0)
