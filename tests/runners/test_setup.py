"""Set-up and tear-down: slots, their attributes, and time limits.

The set-up of every runner and start method is tested in ``runners/test_contract.py``, that of the
front end in ``batching/test_setup_worker.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import logging
import math
import os
import pickle
import sqlite3
import threading
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import Mock

import pytest

from async_batcher import AsyncBatcher, WorkerPool, batched
from async_batcher._pool.pickled_function import PickledFunction
from async_batcher._pool.state import setups
from async_batcher._runners.slots import Slots
from async_batcher._transport.protocol import ReplyKind
from async_batcher._worker import function_cache
from async_batcher._worker.results import BatchNotStartedError
from async_batcher._worker.run_batch import run_batch
from async_batcher._worker.user_function import UserFunction
from async_batcher.exceptions import (
    BatchError,
    BatcherStoppedError,
    ItemTimeoutError,
    WorkerDiedError,
)
from async_batcher.failures import isolate
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.batchers import async_echo, call_all
from tests.support.executors import InlineExecutor
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, no_backoff
from tests.support.worker_setups import (
    failing_tear_down,
    gated_after_first,
    gated_set_up,
    hangs_at_first,
    hangs_in_tear_down,
    notes_its_exit,
    notes_its_exit_and_tears_down,
    set_up,
    slow_set_up,
    waits_in_tear_down,
    yields_twice,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

pytestmark = [
    may_warn_of_fork,
]


class Connected(AsyncBatcher[int, int]):
    """Each slot has a connection of SQLite, which refuses other threads."""

    rows: ClassVar[list[int]] = []
    db: sqlite3.Connection | None = None  # as many write it: the class has the name too

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.cursor: Any = None  # and so has the instance
        self.total = 0
        self.lock = threading.Lock()

    def setup_worker(self) -> Iterator[None]:
        """Connect; then count the rows and close."""
        self.db = sqlite3.connect(":memory:")
        self.cursor = self.db.execute("create table t (n)")
        self.thread = threading.get_ident()
        yield
        assert threading.get_ident() == self.thread
        with self.lock:
            self.rows.append(self.db.execute("select count(*) from t").fetchone()[0])
        self.db.close()

    def process_batch(self, batch: list[int]) -> list[int]:
        """Insert the items."""
        assert self.db is not None
        assert threading.get_ident() == self.thread
        self.cursor.executemany("insert into t values (?)", [(n,) for n in batch])
        self.cursor = self.db.cursor()
        with self.lock:
            self.total += len(batch)
        return batch


# Attributes.


@pytest.mark.parametrize("workers", [1, 4])
async def test_each_thread_has_a_connection_of_its_own(
    monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """What a set-up binds belongs to its thread; all else is shared."""
    monkeypatch.setattr(Connected, "rows", [])
    async with Connected(executor="thread", max_workers=workers, max_batch_size=8) as batcher:
        assert await call_all(batcher, list(range(200))) == list(range(200))
    assert len(Connected.rows) == workers, (
        "every thread was set up by start(), and torn down by stop()"
    )
    assert sum(Connected.rows) == 200
    assert batcher.total == 200
    assert batcher.cursor is None
    assert batcher.db is None
    assert Connected.db is None
    with pytest.raises(
        AttributeError,
        match="'Connected' object has no attribute 'thread' here: setup_worker binds",
    ):
        _ = batcher.thread
    assert set(vars(batcher)) == {"cursor", "total", "lock"}


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("place", [None, "given"])
async def test_threads_of_others_have_a_slot_per_batch(
    tmp_path: Path, place: str | None, concurrency: int
) -> None:
    """In threads that are not ours, each batch at a time has a slot."""
    together = threading.Barrier(concurrency)

    class Slotted(AsyncBatcher[int, int]):
        def setup_worker(self) -> Iterator[None]:
            self.mine = object()
            work.note(tmp_path, "up", str(id(self.mine)))
            yield
            work.note(tmp_path, "down", str(id(self.mine)))

        def process_batch(self, batch: list[int]) -> list[int]:
            mine = self.mine
            together.wait(work.DEADLINE)
            assert self.mine is mine
            return [id(mine)] * len(batch)

    executor = None if place is None else ThreadPoolExecutor(4)
    batcher = Slotted(
        executor=executor, concurrency=concurrency, max_batch_size=1, max_queue_time=0
    )
    ids = [name for _ in range(4) for name in await call_all(batcher, [0] * concurrency)]
    await batcher.stop()
    assert len(set(ids)) == concurrency
    assert (
        sorted(work.noted(tmp_path, "up"))
        == sorted(work.noted(tmp_path, "down"))
        == sorted(map(str, set(ids)))
    )
    if executor is not None:
        executor.shutdown()


class Guarded(AsyncBatcher[int, Any]):
    """Uses slots, properties, ``__setattr__`` and ``__getattr__``."""

    __slots__ = ("__dict__", "slotted")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.shared: list[str] = []
        self.was_set: list[str] = []

    def __setattr__(self, name: str, value: Any) -> None:
        """Record what is set."""
        super().__setattr__(name, value)
        if name != "was_set" and "was_set" in vars(self):
            self.was_set.append(name)

    def __getattr__(self, name: str) -> Any:
        """Return a value for missing names."""
        if name.startswith("made_up"):
            return name
        return super().__getattr__(name)  # type: ignore[misc]

    @property
    def doubled(self) -> int:
        """A property that stores under another name."""
        return self._half * 2

    @doubled.setter
    def doubled(self, value: int) -> None:
        self._half = value // 2

    def greet(self) -> str:
        """Return a text; the set-up replaces this method."""
        return "hello"

    def setup_worker(self) -> None:
        """Bind the attributes."""
        self.slotted = threading.get_ident()
        self.doubled = 2 * self.slotted
        self.made_up_first = "bound"
        self.temporary = 1
        del self.temporary
        self.greet = lambda: f"hello from {self.slotted}"  # type: ignore[method-assign]
        self.shared.append("set up")

    def process_batch(self, batch: list[int]) -> list[Any]:
        """Return what the batch sees."""
        me = threading.get_ident()
        assert self.slotted == self.doubled // 2 == me
        assert self.greet() == f"hello from {me}"
        assert (self.made_up_first, self.made_up_second) == ("bound", "made_up_second")
        assert not hasattr(self, "temporary")
        self.late = me  # not bound by the set-up: shared
        twin = pickle.loads(pickle.dumps(self))  # noqa: S301 - our own
        assert "_half" not in vars(twin)
        return [me] * len(batch)


async def test_attribute_protocols_of_the_users_class() -> None:
    """All ways to define and delete attributes work as without slots."""
    before = AsyncBatcher.__setattr__
    batcher = Guarded(executor="thread", max_workers=3, max_batch_size=1)
    async with batcher:
        threads = set(await call_all(batcher, list(range(30))))
        assert all(isinstance(thread, int) for thread in threads), threads
    assert AsyncBatcher.__setattr__ is before, "no hook is left"
    assert "__setattr__" not in vars(AsyncBatcher)
    assert batcher.late in threads
    assert batcher.shared == ["set up"] * 3
    assert {"slotted", "doubled", "_half", "greet", "made_up_first"} <= set(batcher.was_set)
    assert batcher.greet() == "hello"
    assert not hasattr(batcher, "slotted")
    assert not hasattr(batcher, "_half")
    assert batcher.made_up_first == "made_up_first"
    other = copy.copy(batcher)
    other.slotted = 1  # outside of slots nothing changes
    assert (other.slotted, hasattr(batcher, "slotted")) == (1, False)
    del other.slotted
    assert not hasattr(other, "slotted")


async def test_class_and_subclass_bind_the_same_attribute() -> None:
    """A class and its subclass bind the same attribute at the same time."""

    class Base(AsyncBatcher[int, str]):
        name: str = "default"

        def setup_worker(self) -> None:
            self.name = type(self).__name__

        def process_batch(self, batch: list[int]) -> list[str]:
            return [self.name] * len(batch)

    class Derived(Base):
        name = "derived default"

    for _ in range(2):
        for executor in ("thread", "process"):
            base, derived = (
                Base(executor=executor, max_workers=2),
                Derived(executor=executor, max_workers=2),
            )
            async with base, derived:
                assert (await base.process(1), await derived.process(1)) == ("Base", "Derived")
            assert (base.name, derived.name, Base.name, Derived.name) == (
                "default",
                "derived default",
                "default",
                "derived default",
            )


async def test_attributes_bound_elsewhere_during_a_set_up_are_shared() -> None:
    """What other code binds while a set-up runs is shared."""
    entered, go = threading.Event(), threading.Event()

    class Counting(AsyncBatcher[int, int]):
        count = 0

        def setup_worker(self) -> None:
            entered.set()
            go.wait(work.DEADLINE)
            self.seen = self.count

        def process_batch(self, batch: list[int]) -> list[int]:
            return [self.seen] * len(batch)

    batcher = Counting(executor="thread", max_workers=1)
    call = asyncio.ensure_future(batcher.process(1))
    await asyncio.to_thread(entered.wait, work.DEADLINE)
    batcher.count += 5
    go.set()
    assert await call == 5
    assert batcher.count == 5
    await batcher.stop()


class FailsAtFirst(AsyncBatcher[int, int]):
    """Its set-up binds an attribute, then fails until there is a file."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self.folder = folder

    def setup_worker(self) -> None:
        """Bind an attribute, and fail at first."""
        assert not hasattr(self, "bound")
        self.bound = 2
        if not (self.folder / "mended").exists():
            msg = "not yet"
            raise LookupError(msg)

    def process_batch(self, batch: list[int]) -> list[int]:
        """Double the items."""
        return [self.bound * item for item in batch]


@pytest.mark.parametrize("executor", [None, "thread", "process"])
async def test_failed_set_up_leaves_no_attribute(tmp_path: Path, executor: Any) -> None:
    """A set-up that failed starts over without the attributes that it bound."""
    options: dict[str, Any] = {"max_workers": 1} if executor else {}
    batcher = FailsAtFirst(tmp_path, executor=executor, **options)
    for _ in range(2):
        with pytest.raises(LookupError, match="not yet"):
            await batcher.process(1)
    (tmp_path / "mended").touch()
    assert await batcher.process(1) == 2
    assert not hasattr(batcher, "bound")
    await batcher.stop()


class CachedBase:
    """A mixin with cached properties."""

    @functools.cached_property
    def connection(self) -> int:
        """Return the thread that computed this."""
        return threading.get_ident()

    @functools.cached_property
    def unused(self) -> int:
        """Return the thread; the set-up does not read this."""
        return threading.get_ident()


class Caching(CachedBase, AsyncBatcher[int, tuple[int, int, int]]):
    """Its set-up reads cached properties, one of which was read before."""

    @functools.cached_property
    def own(self) -> int:
        """Return the thread; defined in the class itself."""
        return -self.connection

    @functools.cached_property
    def earlier(self) -> int:
        """Return the thread; read before the first set-up."""
        return threading.get_ident()

    def setup_worker(self) -> None:
        """Read the cached properties."""
        assert self.own == -threading.get_ident()
        assert self.earlier

    def process_batch(self, batch: list[int]) -> list[tuple[int, int, int]]:
        """Return where the values were computed, and where this runs."""
        assert self.own == -self.connection
        return [(self.connection, self.earlier, threading.get_ident())] * len(batch)


async def test_cached_properties_read_by_a_set_up_are_per_slot() -> None:
    """Cached properties that a set-up reads belong to its thread; others do not."""
    for _ in range(2):
        batcher = Caching(executor="thread", max_workers=3, max_batch_size=1)
        earlier = batcher.earlier
        async with batcher:
            for connection, shared, thread in await call_all(batcher, list(range(60))):
                assert connection == thread
                assert shared == earlier == threading.get_ident()
        assert vars(batcher).keys() == {"earlier"}
        assert batcher.connection == batcher.unused == threading.get_ident()
        assert vars(batcher).keys() == {"earlier", "connection", "unused"}
        assert isinstance(vars(Caching)["earlier"], functools.cached_property)
        assert "unused" not in vars(Caching)


async def test_mock_as_set_up() -> None:
    """A mock in place of the set-up is called; its result is not a generator."""
    batcher = Connected(executor="thread", max_workers=1)
    batcher.setup_worker = Mock()  # type: ignore[method-assign]
    batcher.process_batch = Mock(side_effect=lambda batch: batch)  # type: ignore[method-assign]
    async with batcher:
        assert await call_all(batcher, [1, 2]) == [1, 2]
    batcher.setup_worker.assert_called_once_with()


# Tear-down.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("long_graces")
async def test_a_worker_tears_down_when_its_batcher_stops(tmp_path: Path, method: str) -> None:
    """Workers of a shared pool tear down before ``stop`` returns, and run on."""
    async with WorkerPool(2, mp_context=method) as pool:
        pids = {worker.pid for worker in pool.workers()}
        other = batched(
            work.same, executor=pool, setup_worker=functools.partial(set_up, tmp_path, "other-")
        )
        batcher = batched(
            work.same,
            executor=pool,
            setup_worker=functools.partial(set_up, tmp_path),
            max_batch_size=1,
        )
        await other.start()
        await batcher.start()
        assert await call_all(batcher, [1, 2, 3]) == [1, 2, 3]
        assert work.noted(tmp_path, "down") == []
        await batcher.stop()
        assert sorted(work.noted(tmp_path, "down")) == sorted(work.noted(tmp_path, "up"))
        assert len(work.noted(tmp_path, "up")) == 2
        assert {worker.pid for worker in pool.workers()} == pids
        await batcher.start()
        assert await batcher(1) == 1, "it can be started again, and is set up again"
        assert len(work.noted(tmp_path, "up")) == 4
        assert work.noted(tmp_path, "other-down") == []
    assert len(work.noted(tmp_path, "down")) == 4, "the pool was stopped first"
    assert len(work.noted(tmp_path, "other-down")) == 2
    await batcher.stop()
    await other.stop()


@pytest.mark.parametrize(
    "how", ["process", "thread", None, "given", "standard", "processes", "factory", "pool"]
)
@pytest.mark.usefixtures("long_graces")
async def test_each_slot_tears_down_where_it_was_set_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str | None
) -> None:
    """Each slot tears down where it was set up, at the batcher's end."""
    if how == "standard":
        monkeypatch.setattr("async_batcher._batching.lifecycle.SUPPORTS_WORKER_POOL", False)
    given: Executor | None = None
    if how == "given":
        given = ThreadPoolExecutor(2)
    elif how == "processes":
        given = ProcessPoolExecutor(2, mp_context=get_context("forkserver"))
    factories = {
        "factory": functools.partial(ThreadPoolExecutor, 2),
        "pool": functools.partial(WorkerPool, 2),
    }
    executor: Any = given or factories.get(str(how)) or ("process" if how == "standard" else how)
    options: dict[str, Any] = {"max_workers": 2} if isinstance(executor, str) else {}
    setup = functools.partial(set_up, tmp_path)
    async with batched(
        work.same, executor=executor, setup_worker=setup, max_batch_size=1, **options
    ) as batcher:
        assert await call_all(batcher, [1, 2, 3]) == [1, 2, 3]
    if given is not None:
        await asyncio.to_thread(given.shutdown)
    ups, downs = work.noted(tmp_path, "up"), work.noted(tmp_path, "down")
    assert len(ups) == len(downs) >= 1
    if how not in (None, "given"):
        assert sorted(ups) == sorted(downs), "in the same thread of the same process"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
async def test_replaced_worker_tears_down(tmp_path: Path, method: str) -> None:
    """A worker that is replaced tears down before it exits."""
    async with WorkerPool(1, mp_context=method, max_tasks_per_child=2) as pool:
        setup = functools.partial(set_up, tmp_path)
        async with batched(
            work.whereabouts, executor=pool, setup_worker=setup, max_batch_size=1, max_queue_time=0
        ) as batcher:
            done: set[work.Where] = set()
            while len(done) < 3:
                done.add(await batcher(1))
    assert {str(where) for where in done} <= set(work.noted(tmp_path, "up"))
    assert {str(where) for where in done} <= set(work.noted(tmp_path, "down"))


async def test_worker_tears_down_evicted_functions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker with too many functions tears down the least recently used one."""
    monkeypatch.setattr(function_cache, "MAX_CACHED_FUNCTIONS", 2)
    monkeypatch.setattr(function_cache, "_functions", type(function_cache._functions)())
    monkeypatch.setattr(
        function_cache, "_exit_handlers_in", os.getpid()
    )  # this is no worker: nothing at its exit
    for name in "abc":
        function = PickledFunction(
            UserFunction(
                work.same, by_keyword=False, setup=functools.partial(set_up, tmp_path, name)
            )
        )
        assert run_batch(*function.pickle(), None, None) == (ReplyKind.READY,)
    assert (len(work.noted(tmp_path, "adown")), len(work.noted(tmp_path, "bdown"))) == (1, 0)
    function_cache._drop_all()
    assert (len(work.noted(tmp_path, "bdown")), len(work.noted(tmp_path, "cdown"))) == (1, 1)


@pytest.mark.parametrize("setup", [failing_tear_down, yields_twice])
@pytest.mark.parametrize("executor", [None, "thread", "process", "coroutine"])
async def test_failed_tear_down_is_logged(
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    executor: Any,
    setup: Callable[[], Any],
) -> None:
    """A tear-down that fails is logged with its name; in a worker process on standard error."""
    said = {
        failing_tear_down: "failing_tear_down: the tear-down failed: OSError",
        yields_twice: "yields_twice yielded twice",
    }[setup]
    if executor == "coroutine":
        batcher = batched(async_echo, setup_worker=setup)
    else:
        options: dict[str, Any] = {} if executor is None else {"max_workers": 1}
        batcher = batched(work.same, executor=executor, setup_worker=setup, **options)
    async with asyncio.timeout(work.DEADLINE), batcher:
        assert await batcher(1) == 1
    if executor == "process":
        assert said in capfd.readouterr().err
    else:
        (message,) = [
            record.getMessage() for record in caplog.records if record.levelno == logging.ERROR
        ]
        assert message.startswith(said)


async def test_generator_that_raises_before_its_yield() -> None:
    """The callers get what a generator raises before its yield."""
    tries: list[int] = []

    def setup() -> Iterator[None]:
        tries.append(1)
        if len(tries) == 1:
            msg = "not yet"
            raise LookupError(msg)
        if len(tries) > 5:
            yield

    batcher = batched(work.same, setup_worker=setup)
    with pytest.raises(LookupError, match="not yet"):
        await batcher(1)
    assert await batcher(1) == 1
    await batcher.stop()
    assert len(tries) == 2


@contextlib.contextmanager
def manages() -> Iterator[None]:
    """A context manager, not a generator function."""
    yield


@contextlib.asynccontextmanager
async def manages_async() -> AsyncIterator[None]:
    """An async context manager."""
    yield


async def is_async() -> None:
    """A coroutine function."""


def calls_async() -> Any:
    """A plain function that returns a coroutine."""
    return is_async()


@pytest.mark.parametrize("setup", [manages, manages_async, calls_async])
@pytest.mark.parametrize("place", [None, "thread", "process", "coroutine"])
async def test_set_up_that_would_never_run_is_an_error(
    place: str | None, setup: Callable[[], Any]
) -> None:
    """A context manager or coroutine as set-up is an error that says what to write."""
    if place == "coroutine":
        batcher = batched(async_echo, setup_worker=setup if setup is not calls_async else manages)
    else:
        options: dict[str, Any] = {} if place is None else {"executor": place, "max_workers": 1}
        batcher = batched(work.same, setup_worker=setup, **options)
    with pytest.raises(TypeError, match="generator function with one yield"):
        await batcher(1)
    await batcher.stop()


async def test_set_up_may_return_a_context_manager() -> None:
    """A set-up may return an object that is a context manager, such as a lock."""
    async with batched(work.same, setup_worker=threading.Lock) as batcher:
        assert await batcher(1) == 1


# Tear-down at a forced stop.


@pytest.mark.parametrize("executor", ["thread", None])
async def test_forced_stop_tears_down_in_threads(tmp_path: Path, executor: Any) -> None:
    """Idle slots tear down at once, busy ones when their batch ends."""
    go = threading.Event()

    def wait(batch: list[int]) -> list[int]:
        if batch == [1]:
            work.note(tmp_path, "busy", str(work.where()))
            go.wait(work.DEADLINE)
        return batch

    options: dict[str, Any] = {"max_workers": 2} if executor else {"concurrency": 2}
    setup = functools.partial(set_up, tmp_path)
    batcher = batched(
        wait, executor=executor, setup_worker=setup, max_batch_size=1, max_queue_time=0, **options
    )
    await batcher.start()
    call = asyncio.ensure_future(batcher(1))
    await wait_until(lambda: work.noted(tmp_path, "busy"))
    assert await batcher(2) == 2
    await batcher.stop(force=True)
    with pytest.raises(BatcherStoppedError):
        await call
    assert len(work.noted(tmp_path, "down")) == 1
    go.set()
    await wait_until(lambda: len(work.noted(tmp_path, "down")) == 2)
    if executor == "thread":
        assert sorted(work.noted(tmp_path, "up")) == sorted(work.noted(tmp_path, "down"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["force", "timeout", "cancel", "second"])
@pytest.mark.parametrize("place", ["pool", "own", "thread", "coroutine"])
async def test_stop_does_not_wait_for_a_tear_down_that_hangs(
    tmp_path: Path, place: str, how: str
) -> None:
    """A forced, timed-out or cancelled ``stop`` does not wait for a tear-down."""
    pool = WorkerPool(1) if place == "pool" else None
    setup = functools.partial(hangs_in_tear_down, tmp_path)

    async def hang() -> AsyncIterator[None]:
        yield
        work.note(tmp_path, "begun")
        await asyncio.Event().wait()

    if place == "coroutine":
        batcher = batched(async_echo, setup_worker=hang)
    elif pool is not None:
        batcher = batched(work.same, executor=pool, setup_worker=setup)
    else:
        batcher = batched(
            work.same,
            executor="process" if place == "own" else "thread",
            max_workers=1,
            setup_worker=setup,
        )
    assert await batcher(1) == 1
    async with asyncio.timeout(work.DEADLINE / 2):
        if how == "timeout":
            with pytest.raises(TimeoutError):
                await batcher.stop(timeout=0.05)
        elif how == "force":
            await batcher.stop(force=True)
        else:
            stopping = asyncio.ensure_future(batcher.stop())
            await wait_until(lambda: work.noted(tmp_path, "begun"))
            assert not stopping.done()
            if how == "cancel":
                stopping.cancel()
            else:
                await batcher.stop(force=True)
            await asyncio.wait([stopping])
            assert stopping.cancelled() == (how == "cancel")
        if pool is not None:
            assert await pool.run(abs, -1) == 1, "the shared pool goes on"
            await pool.stop()
    (tmp_path / "go").touch()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["force", "cancel", "timeout", "pool"])
@pytest.mark.parametrize("place", ["pool", "own"])
@pytest.mark.usefixtures("long_graces")
async def test_forced_stop_tears_down_in_idle_workers(tmp_path: Path, place: str, how: str) -> None:
    """A forced stop tears down in idle workers, and kills busy ones."""
    pool = WorkerPool(2)
    setup = functools.partial(waits_in_tear_down, tmp_path)
    executor: Any = pool if place == "pool" else lambda: pool
    batcher = batched(
        work.whereabouts, setup_worker=setup, executor=executor, max_batch_size=1, max_queue_time=0
    )
    await batcher.start()
    async with asyncio.timeout(work.DEADLINE):
        if how == "timeout":
            with pytest.raises(TimeoutError):
                await batcher.stop(timeout=0.001)
        elif how == "cancel":
            stopping = asyncio.ensure_future(batcher.stop())
            await wait_until(lambda: len(work.noted(tmp_path, "begun")) == 2)
            stopping.cancel()
            await asyncio.wait([stopping])
        elif how == "force":
            await batcher.stop(force=True)
        else:
            await pool.stop(force=True)
    assert sorted(work.noted(tmp_path, "down")) == sorted(work.noted(tmp_path, "up"))
    assert len(work.noted(tmp_path, "up")) == 2
    await batcher.stop(force=True)
    await pool.stop(force=True)


@pytest.mark.parametrize("method", METHODS)
async def test_forced_stop_without_tear_down_kills_at_once(tmp_path: Path, method: str) -> None:
    """A forced stop runs no exit handlers without a tear-down, nor in a busy worker."""
    for setup in (
        functools.partial(notes_its_exit, tmp_path),
        functools.partial(notes_its_exit_and_tears_down, tmp_path),
    ):
        async with WorkerPool(1, mp_context=method) as pool:
            batcher = batched(work.same, setup_worker=setup, executor=pool)
            assert await batcher(1) == 1
            call = None
            if setup.func is notes_its_exit_and_tears_down:
                call = asyncio.ensure_future(pool.run(work.wait_for, tmp_path / "go"))
                await wait_until(lambda: any(worker.state == "busy" for worker in pool.workers()))
            await pool.stop(force=True)
            if call is not None:
                await asyncio.wait([call])
                assert isinstance(call.exception(), BatcherStoppedError)
            await batcher.stop()
    assert work.noted(tmp_path, "exit") == work.noted(tmp_path, "down") == []


@pytest.mark.usefixtures("long_graces")
async def test_cancelled_stop_lets_a_coroutine_tear_down() -> None:
    """A cancelled stop gives a coroutine's tear-down the grace of a forced stop."""
    seen: list[str] = []
    at_yield, go = asyncio.Event(), asyncio.Event()

    async def setup() -> AsyncIterator[None]:
        yield
        at_yield.set()
        await go.wait()
        seen.append("down")

    batcher = batched(async_echo, setup_worker=setup)
    assert await batcher(1) == 1
    stopping = asyncio.ensure_future(batcher.stop())
    await at_yield.wait()
    stopping.cancel()
    asyncio.get_running_loop().call_later(0.01, go.set)
    await asyncio.wait([stopping])
    assert stopping.cancelled()
    assert seen == ["down"]


@pytest.mark.parametrize("generates", [False, True])
async def test_start_raises_a_coroutines_set_up_error(generates: bool) -> None:
    """``start`` raises what a coroutine's set-up raised, even a `CancelledError`."""

    async def setup() -> None:
        msg = "not us"
        raise asyncio.CancelledError(msg)

    async def generator() -> AsyncIterator[None]:
        await setup()
        yield

    batcher = batched(async_echo, setup_worker=generator if generates else setup)
    with pytest.raises(BatchError, match=r"CancelledError.*not us"):
        await batcher.start()
    with pytest.raises(BatchError, match=r"CancelledError.*not us"):
        await batcher(1)
    await batcher.stop()


# Coroutines.


async def test_async_generator_as_set_up(tmp_path: Path) -> None:
    """An async generator sets up and tears down in one task."""

    class Grouped(AsyncBatcher[int, int]):
        async def setup_worker(self) -> AsyncIterator[None]:
            task = asyncio.current_task()
            async with asyncio.TaskGroup() as self.group:
                work.note(tmp_path, "up")
                yield
                work.note(tmp_path, "down")
                assert asyncio.current_task() is task

        async def process_batch(self, batch: list[int]) -> list[int]:
            return await asyncio.gather(
                *(self.group.create_task(asyncio.sleep(0, item)) for item in batch)
            )

    batcher = Grouped(concurrency=3, max_batch_size=1)
    for count in (1, 2):
        async with batcher:
            assert await call_all(batcher, [1, 2, 3]) == [1, 2, 3]
            assert (len(work.noted(tmp_path, "up")), len(work.noted(tmp_path, "down"))) == (
                count,
                count - 1,
            )
        assert len(work.noted(tmp_path, "down")) == count


@pytest.mark.parametrize("how", ["force", "end"])
async def test_coroutine_tears_down_at_the_loops_end(how: str) -> None:
    """A forced stop, or the end of `asyncio.run`, runs a coroutine's tear-down."""
    seen: list[str] = []

    async def setup() -> AsyncIterator[None]:
        seen.append("up")
        yield
        await asyncio.sleep(0)
        seen.append("down")

    if how == "force":
        batcher = batched(async_echo, setup_worker=setup)
        assert await batcher(1) == 1
        await batcher.stop(force=True)
    else:
        await asyncio.to_thread(
            lambda: asyncio.run(batched(async_echo, setup_worker=setup).process(1))
        )
    assert seen == ["up", "down"]


@pytest.mark.virtual_clock
async def test_batch_timeout_excludes_a_coroutines_set_up() -> None:
    """A set-up that takes longer than ``batch_timeout`` completes."""
    gate, runs = asyncio.Event(), 0

    async def setup() -> None:
        nonlocal runs
        runs += 1
        await gate.wait()

    async def process_batch(batch: list[str]) -> list[str]:
        if "hang" in batch:
            await asyncio.Event().wait()
        return batch

    batcher = batched(
        process_batch,
        setup_worker=setup,
        batch_timeout=0.01,
        cancel_abandoned=True,
        max_queue_time=0,
    )
    with pytest.raises(ItemTimeoutError):
        await batcher("a", timeout=0.05)
    call = asyncio.ensure_future(batcher("b"))
    await asyncio.sleep(0.03)
    assert not call.done()
    gate.set()
    assert await call == "b"
    assert runs == 1
    with pytest.raises(TimeoutError):
        await batcher("hang")
    await batcher.stop()


# Time limits of a set-up.


def place_options(place: str) -> dict[str, Any]:
    """Return the options for a place."""
    if place == "pool":
        return {"executor": WorkerPool(1)}
    if place == "given":
        return {"executor": ProcessPoolExecutor(1, mp_context=get_context("forkserver"))}
    if place == "given threads":
        return {"executor": ThreadPoolExecutor(1)}
    return {"executor": "thread", "max_workers": 1} if place == "thread" else {}


async def give_up(options: dict[str, Any]) -> None:
    """Stop the pool of a test."""
    executor = options.get("executor")
    if isinstance(executor, WorkerPool):
        await executor.stop(force=True)
    elif isinstance(executor, Executor):
        await asyncio.to_thread(executor.shutdown)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["pool", "given", "given threads", "thread", "loop"])
async def test_batch_timeout_excludes_the_set_up(tmp_path: Path, place: str) -> None:
    """``batch_timeout`` bounds the batch, not a set-up before it."""
    options = place_options(place)
    setup = functools.partial(gated_set_up, tmp_path)
    batcher = batched(
        work.same,
        setup_worker=setup,
        batch_timeout=1.0,
        max_batch_size=1,
        max_queue_time=0,
        **options,
    )
    call = asyncio.ensure_future(batcher("a"))
    await wait_until(lambda: work.noted(tmp_path, "begun"))
    with pytest.raises(ItemTimeoutError):
        await batcher("b", timeout=1.2)
    assert not call.done()
    (tmp_path / "go").touch()
    assert await call == "a"
    assert len(work.noted(tmp_path, "begun")) == 1
    await batcher.stop()
    if place == "pool":
        slow = functools.partial(work.note_pid_and_halt, tmp_path)
        batcher = batched(slow, setup_worker=setup, batch_timeout=0.2, **options)
        with pytest.raises(TimeoutError):
            await batcher("c")
        await batcher.stop(force=True)
    await give_up(options)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["force", "timeout"])
@pytest.mark.parametrize("by_start", [False, True], ids=["by call", "by start"])
@pytest.mark.parametrize("place", ["pool", "own", "thread"])
async def test_stop_ends_a_set_up_that_hangs(
    tmp_path: Path, place: str, by_start: bool, how: str
) -> None:
    """A forced or timed-out stop ends a set-up that hangs."""
    options = place_options(place) if place != "own" else {"executor": "process", "max_workers": 1}
    setup = functools.partial(gated_set_up, tmp_path)
    batcher = batched(
        work.same, setup_worker=setup, batch_timeout=0.05, max_queue_time=0, **options
    )
    call = asyncio.ensure_future(batcher.start() if by_start else batcher("a"))
    await wait_until(lambda: work.noted(tmp_path, "begun"))
    with pytest.raises(ItemTimeoutError):
        await batcher("b", timeout=0.1)
    async with asyncio.timeout(work.DEADLINE / 2):
        if how == "force":
            await batcher.stop(force=True)
        else:
            with pytest.raises(TimeoutError):
                await batcher.stop(timeout=0.05)
        await asyncio.wait([call])
        assert isinstance(call.exception(), BatcherStoppedError)
        if place == "pool":
            await wait_for_exit(map(int, work.noted(tmp_path, "begun")))
            pool: Any = options["executor"]
            assert await pool.run(abs, -1) == 1, "the pool has another worker"
    (tmp_path / "go").touch()
    await give_up(options)


def options_of_one_worker(place: str, **options: Any) -> dict[str, Any]:
    """Return options for one worker process, of an own or a given pool."""
    if place == "own":
        return {"executor": functools.partial(WorkerPool, 1, **options)}
    return {"executor": WorkerPool(1, **options)}


@pytest.mark.slow
@pytest.mark.parametrize("cancel_abandoned", [False, True])
@pytest.mark.parametrize("how", ["call", "start"])
@pytest.mark.parametrize("place", ["pool", "own"])
async def test_abandoned_set_up_that_hangs_is_killed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    how: str,
    cancel_abandoned: bool,
) -> None:
    """A set-up that hangs is killed soon after its callers are gone."""
    monkeypatch.setattr(setups, "ABANDONED_SETUP_TIMEOUT", 0.1)
    options = options_of_one_worker(place)
    setup = functools.partial(hangs_at_first, tmp_path)
    batcher = batched(
        work.same,
        setup_worker=setup,
        max_queue_time=0,
        cancel_abandoned=cancel_abandoned,
        **options,
    )
    call = asyncio.ensure_future(batcher("a") if how == "call" else batcher.start())
    await wait_until(lambda: work.noted(tmp_path, "begun"))
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    async with asyncio.timeout(work.DEADLINE):
        assert await batcher("b") == "b"
        await batcher.stop()
    await wait_for_exit(map(int, work.noted(tmp_path, "begun")[:-1]))
    await give_up(options)


@pytest.mark.parametrize("key_concurrency", [None, 1])
@pytest.mark.parametrize("cancel_abandoned", [False, True])
async def test_a_batch_that_is_abandoned_during_the_set_up_never_begins(
    tmp_path: Path,
    cancel_abandoned: bool,
    key_concurrency: int | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The set-up goes on, and the worker takes the next batch."""
    monkeypatch.setattr(setups, "ABANDONED_SETUP_TIMEOUT", work.DEADLINE)

    def note_items(batch: list[str]) -> list[str]:
        for item in batch:
            work.note(tmp_path, "ran", item)
        return batch

    pool = WorkerPool(1)
    batcher = batched(
        note_items,
        executor=pool,
        setup_worker=functools.partial(gated_set_up, tmp_path),
        max_queue_time=0,
        cancel_abandoned=cancel_abandoned,
        key_concurrency=key_concurrency,
        key=None if key_concurrency is None else lambda _: "key",
    )
    call = asyncio.ensure_future(batcher("cancelled"))
    await wait_until(lambda: work.noted(tmp_path, "begun"))
    call.cancel()
    await asyncio.wait([call])
    (tmp_path / "go").touch()
    async with asyncio.timeout(work.DEADLINE):
        assert await batcher("next") == "next"
        await batcher.stop()
    assert work.noted(tmp_path, "ran") == ["next"]
    assert caplog.records == []
    assert len(work.noted(tmp_path, "begun")) == 1, "one worker, one set-up"
    assert pool.worker_counts().crashed == {}
    await pool.stop()


@pytest.mark.parametrize("how", ["start", "call"])
async def test_a_pool_forgets_the_set_ups_of_dropped_batchers(how: str) -> None:
    """Later workers do not run those of batchers that were never stopped."""
    async with WorkerPool(1) as pool:
        for _ in range(3):
            batcher = batched(work.same, executor=pool, setup_worker=functools.partial(int, "1"))
            await (batcher.start() if how == "start" else batcher(1))
        await pool.restart_workers()
        dispatcher = pool._lifecycle.session
        assert dispatcher is not None
        functions = dispatcher._state.setups.functions
        assert len(functions) >= 1
        del batcher
        await wait_until(lambda: gc.collect() >= 0 and not functions)
        await pool.restart_workers()
        assert await pool.run(abs, -1) == 1


@pytest.mark.slow
async def test_plain_stop_after_a_set_up_that_hangs(tmp_path: Path) -> None:
    """A plain stop returns when the worker with a hanging set-up is killed."""
    options = options_of_one_worker("pool", start_timeout=3.0)
    setup = functools.partial(gated_set_up, tmp_path)
    async with asyncio.timeout(work.DEADLINE):
        batcher = batched(work.same, setup_worker=setup, max_queue_time=0, **options)
        call = asyncio.ensure_future(batcher("a"))
        await wait_until(lambda: work.noted(tmp_path, "begun"))
        call.cancel()
        await batcher.stop()
        batcher = batched(
            work.same,
            setup_worker=setup,
            max_queue_time=0,
            batch_timeout=0.05,
            on_failure=isolate(),
            **options,
        )
        with pytest.raises(WorkerDiedError, match="setup_worker took longer than") as caught:
            await batcher("b")
        assert not caught.value.may_have_run
        await batcher.stop()
        await wait_for_exit(map(int, work.noted(tmp_path, "begun")))
        assert await options["executor"].run(abs, -1) == 1
    await give_up(options)


@pytest.mark.slow
async def test_set_up_goes_on_while_a_caller_waits(tmp_path: Path) -> None:
    """A set-up goes on while a caller without a time limit waits."""
    pool = WorkerPool(1)
    assert await pool.run(abs, -1) == 1
    dispatcher: Any = pool.dispatcher()
    dispatcher._state.setups._start_timeout = 1.0
    worker = dispatcher.workers()[0].worker
    seen: list[Any] = []
    limits = dispatcher._state.time_limits
    report = limits._check_setup

    def note(*args: Any) -> None:
        report(*args)
        if worker.deadline == math.inf:
            seen.append(args)

    limits._check_setup = note
    batcher = batched(
        work.same,
        setup_worker=functools.partial(gated_set_up, tmp_path),
        executor=pool,
        max_queue_time=0,
    )
    call = asyncio.ensure_future(batcher("a"))
    await wait_until(lambda: seen)
    assert worker.is_alive()
    assert not call.done()
    call.cancel()
    await wait_until(lambda: not worker.is_alive())
    await batcher.stop()
    await give_up({"executor": pool})


async def test_slow_set_up_gets_more_time_each_attempt() -> None:
    """Each killed set-up doubles the time of the next; a success resets it."""
    pool = WorkerPool(1, start_timeout=9.0)
    assert await pool.run(abs, -1) == 1
    dispatcher: Any = pool.dispatcher()
    setups = dispatcher._state.setups
    seen = []
    for _ in range(5):
        seen.append(setups.abandoned_timeout(b"key"))
        setups.on_abandoned_timeout(b"key")
        setups.on_failed(b"key")
    assert seen == [2.0, 4.0, 8.0, 9.0, 9.0]
    for seconds, allowed in [(0.1, 2.0), (1.5, 6.0), (3.0, 12.0)]:
        setups.on_done(b"key", seconds)
        assert setups.abandoned_timeout(b"key") == allowed
    await pool.stop()


class HangingSetup:
    """A coroutine's set-up that hangs a number of times."""

    def __init__(self, *, hangs: int = 0, seconds: float = 0.0) -> None:
        self.hangs = hangs
        self.seconds = seconds
        self.seen: list[str] = []

    async def __call__(self) -> None:
        """Hang, or set up."""
        try:
            if len(self.seen) < self.hangs:
                await asyncio.Event().wait()
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise
        self.seen.append("done")


@pytest.mark.virtual_clock
@pytest.mark.parametrize("how", ["time limit", "cancelled", "start"])
async def test_coroutines_set_up_that_hangs_is_cancelled(how: str) -> None:
    """A set-up that hangs is cancelled when its callers are gone."""
    setup = HangingSetup(hangs=1)
    batcher = batched(async_echo, setup_worker=setup, max_queue_time=0, concurrency=1)
    began_at = asyncio.get_running_loop().time()
    if how == "time limit":
        with pytest.raises(ItemTimeoutError):
            await batcher(1, timeout=0.5)
    else:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await (batcher.start() if how == "start" else batcher(1))
    assert await batcher(2) == 2
    assert setup.seen == ["cancelled", "done"]
    assert asyncio.get_running_loop().time() - began_at == pytest.approx(2.0)
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_coroutines_slow_set_up_completes_in_the_end() -> None:
    """Each attempt of a coroutine's set-up gets twice the time."""
    setup = HangingSetup(seconds=10.0)
    batcher = batched(
        async_echo, setup_worker=setup, max_queue_time=0, concurrency=1, item_timeout=0.5
    )
    for _ in range(100):
        with contextlib.suppress(ItemTimeoutError):
            assert await batcher(1) == 1
            break
    assert setup.seen == [*["cancelled"] * 3, "done"]  # after 2, 4 and 8 seconds
    await batcher.stop()


@pytest.mark.virtual_clock
async def test_coroutines_cancelled_set_up_is_started_again() -> None:
    """A batch that waits for a cancelled set-up starts another."""
    setup = HangingSetup(hangs=1)
    batcher = batched(
        async_echo, setup_worker=setup, max_batch_size=1, max_queue_time=0, concurrency=2
    )
    impatient = asyncio.ensure_future(batcher(1, timeout=0.5))
    patient = asyncio.ensure_future(batcher(2))
    assert await patient == 2
    with pytest.raises(ItemTimeoutError):
        await impatient
    assert setup.seen == ["cancelled", "done"]
    await batcher.stop()


async def test_stop_cancels_an_abandoned_set_up_of_a_coroutine() -> None:
    """``stop`` cancels a set-up that no caller waits for."""
    seen: list[str] = []

    async def setup() -> None:
        seen.append("begun")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    batcher = batched(async_echo, setup_worker=setup, max_queue_time=0, concurrency=1)
    for _ in range(2):
        with pytest.raises(ItemTimeoutError):
            await batcher(1, timeout=0.02)
    async with asyncio.timeout(work.DEADLINE):
        await batcher.stop()
    assert seen == ["begun", "cancelled"]


# Replacements.


@pytest.mark.slow
@pytest.mark.parametrize("by_start", [False, True], ids=["by call", "by start"])
async def test_replacement_is_set_up_before_it_takes_over(tmp_path: Path, by_start: bool) -> None:
    """While workers are replaced, no call waits for a set-up."""
    setup = functools.partial(gated_after_first, tmp_path, 1, "hang")
    async with WorkerPool(1, max_tasks_per_child=5) as pool:
        batcher = batched(
            work.with_setup_here,
            setup_worker=setup,
            executor=pool,
            max_batch_size=1,
            max_queue_time=0,
        )
        if by_start:
            await batcher.start()
        first, _ = await batcher(tmp_path)
        for _ in range(10):  # the worker goes on while its replacement sets up
            assert await batcher(tmp_path) == (first, True)
        await wait_until(lambda: len(work.noted(tmp_path, "begun")) == 2)
        assert await batcher(tmp_path) == (first, True)
        (tmp_path / "go").touch()
        pids = {first}
        while len(pids) < 3:
            pid, was_set_up = await batcher(tmp_path)
            pids.add(pid)
            assert was_set_up
        await batcher.stop()


@pytest.mark.slow
async def test_crashed_worker_is_replaced_by_one_that_is_set_up(tmp_path: Path) -> None:
    """After a crash, the other worker takes the batches until the set-up has run."""
    setup = functools.partial(slow_set_up, tmp_path, 0.3)
    async with WorkerPool(2) as pool:
        batcher = batched(
            work.with_setup_here,
            setup_worker=setup,
            executor=pool,
            max_batch_size=1,
            max_queue_time=0,
        )
        await batcher.start()
        pid, _ = await batcher(tmp_path)
        os.kill(pid, 9)
        while len(work.noted(tmp_path, "up")) < 3:
            _, was_set_up = await batcher(tmp_path)
            assert was_set_up
        assert len(pool.workers()) == 2
        await batcher.stop()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["raise", "hang", "os._exit"])
async def test_failed_set_up_of_a_replacement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    """A failed set-up of a replacement fails its batcher's callers only."""
    no_backoff(monkeypatch)
    pool = WorkerPool(1)
    setup = functools.partial(gated_after_first, tmp_path, 1, way)
    batcher = batched(
        work.same,
        setup_worker=setup,
        executor=pool,
        max_batch_size=1,
        max_queue_time=0,
        item_timeout=15.0,
    )
    assert await batcher("a") == "a"
    if way == "hang":
        pool.dispatcher()._state.setups._start_timeout = 2.0
    pid = await pool.run(os.getpid)
    os.kill(pid, 9)
    await wait_until(lambda: len(work.noted(tmp_path, "begun")) > 1)
    assert await pool.run(os.getpid) != pid
    expected: Any = {"raise": LookupError, "hang": ItemTimeoutError, "os._exit": WorkerDiedError}[
        way
    ]
    if way == "hang":
        batcher_call = asyncio.ensure_future(batcher.process("b", timeout=0.5))
    else:
        batcher_call = asyncio.ensure_future(batcher.process("b"))
    with pytest.raises(expected) as caught:
        await batcher_call
    if way == "os._exit":
        assert not caught.value.may_have_run
        assert "setup_worker" in str(caught.value)
    await batcher.stop(force=True)
    assert await pool.run(abs, -1) == 1
    await pool.stop()


# Loading set-up and function.


@pytest.mark.parametrize("method", [*METHODS, "given"])
async def test_the_set_up_runs_before_the_functions_module_is_imported(
    tmp_path: Path, method: str
) -> None:
    """A set-up of another module runs before the function's module is imported."""
    (tmp_path / "framework_for_setup.py").write_text(
        "ready = False\ndef setup():\n    global ready\n    ready = True\n"
    )
    (tmp_path / "work_for_setup.py").write_text(
        "import framework_for_setup\nassert framework_for_setup.ready, 'not set up'\ndef same(batch):\n    return batch\n"
    )
    program = f"""
        import asyncio, sys
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        import framework_for_setup
        framework_for_setup.setup()
        import work_for_setup
        from async_batcher import WorkerPool, batched

        async def main():
            given = {method!r} == "given"
            pool = ProcessPoolExecutor(1, mp_context=get_context("spawn")) if given else WorkerPool(1, mp_context={method!r})
            batcher = batched(work_for_setup.same, executor=pool, setup_worker=framework_for_setup.setup)
            async with batcher:
                print(await batcher(7))
            pool.shutdown() if given else await pool.stop()

        if __name__ == "__main__":
            asyncio.run(main())
    """
    assert await asyncio.to_thread(scripts.run_script, tmp_path, program) == "7\n"


async def test_set_up_and_function_share_objects() -> None:
    """Set-up and function share objects, even from different modules."""
    shared = work.Recorder()
    async with batched(
        shared.recorded,
        executor="process",
        max_workers=1,
        setup_worker=functools.partial(shared.note, "set up"),
    ) as b:
        assert await b(1) == ["set up"]
        assert shared.texts == []


def test_threads_of_a_worker_load_a_function_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of a worker load and set up a function once."""
    monkeypatch.setattr(function_cache, "_functions", type(function_cache._functions)())
    monkeypatch.setattr(function_cache, "_exit_handlers_in", os.getpid())
    function = PickledFunction(
        UserFunction(
            work.same, by_keyword=False, setup=functools.partial(slow_set_up, tmp_path, 0.05)
        )
    )
    key, blob = function.pickle()
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda _: run_batch(key, blob, None, None), range(8)))
    assert replies == [(ReplyKind.READY,)] * 8
    assert len(work.noted(tmp_path, "up")) == 1
    function_cache._drop_all()
    assert len(work.noted(tmp_path, "down")) == 1


def test_tear_down_of_a_thread_that_has_ended(tmp_path: Path) -> None:
    """Another thread runs the tear-down of a thread that has ended."""
    slots = Slots(
        UserFunction(work.same, by_keyword=False, setup=functools.partial(set_up, tmp_path)),
        by_thread=True,
    )
    thread = threading.Thread(target=slots.run, args=([1], None))
    thread.start()
    thread.join()
    assert slots.run([2], None) == [2]
    assert slots.close()
    assert not slots.torn_down.done()
    slots.tear_down_idle()
    assert slots.torn_down.done()
    assert len(work.noted(tmp_path, "down")) == 2
    assert isinstance(slots.run([3], None), BatchNotStartedError)


async def test_tear_down_after_a_given_executor_was_shut_down(tmp_path: Path) -> None:
    """If a given executor was shut down first, a new thread tears down."""
    for executor in (InlineExecutor(), ThreadPoolExecutor(1)):
        batcher = batched(
            work.same, executor=executor, setup_worker=functools.partial(set_up, tmp_path)
        )
        assert await batcher(1) == 1
        executor.shutdown()
        await batcher.stop()
    assert len(work.noted(tmp_path, "down")) == 2


def test_program_exits_despite_tear_downs(tmp_path: Path) -> None:
    """A program exits without ``stop``, even if slots have a tear-down."""
    program = """
        import asyncio
        from async_batcher import batched

        def setup():
            yield
            print("down", flush=True)

        async def main():
            batcher = batched(lambda batch: batch, executor="thread", max_workers=3, setup_worker=setup)
            print(await batcher(1))

        asyncio.run(main())
    """
    assert scripts.run_script(tmp_path, program).splitlines()[0] == "1"
