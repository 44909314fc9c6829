"""``executor=`` as a factory: when it is called, what replaces its executor, how that ends.

===================  ============================  =======================  ========================
what happens         standard pool, loky           `WorkerPool`             threads, interpreters
===================  ============================  =======================  ========================
a worker crashes     `WorkerDiedError` for its     the same; the pool       (the program would
                     batches; factory called       replaces the worker      crash)
                     again
an initializer       `WorkerDiedError`; factory    `PoolBrokenError`; the   `PoolBrokenError`;
raises               called again                  pool tries again         factory called again
stop                 shut down                     stopped                  shut down
stop(force=True)     killed                        killed                   left to its batch
===================  ============================  =======================  ========================
"""

from __future__ import annotations

import asyncio
import copy
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._runners import executor as executor_module
from async_batcher._runners import factory as factory_module
from async_batcher._runners.known_executors import is_over, manager_thread
from async_batcher.exceptions import (
    BatcherStoppedError,
    ItemTimeoutError,
    PoolBrokenError,
    WorkerDiedError,
)
from async_batcher.failures import isolate
from tests.conftest import descendants
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.batchers import call_all, refuse_a_thread, stop_by
from tests.support.executors import (
    INTERPRETERS,
    LOKY,
    POOLS,
    STANDARD,
    WORKERS,
    InlineExecutor,
    make_executor,
)
from tests.support.polling import block_until, wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="signals, forkserver"),
    may_warn_of_fork,
]

DEADLINE = work.DEADLINE


def _kinds(*names: str) -> list[Any]:
    return [
        name if name == "threads" else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


PROCESSES = _kinds(*STANDARD, *LOKY, *POOLS)
KINDS = _kinds("threads", *STANDARD, *LOKY, *POOLS, *INTERPRETERS)


class Factory:
    """A factory that records what it made.

    Args:
        kind: The kind of executor.
        options: The options of each executor.
    """

    def __init__(self, kind: str = "threads", **options: Any) -> None:
        self.kind = kind
        self.options = options
        self.made: list[Any] = []

    def __call__(self) -> Any:
        """Make an executor."""
        self.made.append(make_executor(self.kind, **self.options))
        return self.made[-1]


class Slow:
    """A factory that waits for the test.

    Attributes:
        entered: Set when the factory is called.
        go: Set by the test to let it return.
        made: What it returned.
    """

    def __init__(self, make: Callable[[], Any] | None = None) -> None:
        self.make = make or partial(ThreadPoolExecutor, WORKERS)
        self.entered = threading.Event()
        self.go = threading.Event()
        self.made: list[Any] = []

    def __call__(self) -> Any:
        """Wait, then make an executor."""
        self.entered.set()
        assert self.go.wait(DEADLINE)
        self.made.append(self.make())
        return self.made[-1]


def in_turn(*factories: Callable[[], Any]) -> Callable[[], Any]:
    """Return a factory that calls each of these in turn."""
    rest = list(factories)

    def make() -> Any:
        factory = rest.pop(0)
        return factory()

    return make


@pytest.fixture(scope="module", autouse=True)
def _standing_helpers_of_loky() -> None:
    """Start the helper processes that loky keeps, which are not leaks."""
    for kind in LOKY:
        with Factory(kind)() as executor:
            executor.submit(os.getpid).result()


# The executor's life.


@pytest.mark.parametrize("kind", KINDS)
async def test_first_call_and_restart_call_the_factory(kind: str) -> None:
    """The first call and each restart call it; a stop shuts down its executor."""
    factory = Factory(kind)
    batcher = batched(work.double, executor=factory, max_queue_time=0)
    assert (factory.made, batcher.concurrency, batcher.executor) == ([], 1, factory)
    assert await call_all(batcher, [1, 2]) == [2, 4]
    assert (len(factory.made), batcher.concurrency) == (1, WORKERS)
    await batcher.stop()
    assert is_over(factory.made[0])
    async with batcher:
        assert (len(factory.made), batcher.concurrency) == (2, WORKERS)
        assert await call_all(batcher, [3]) == [6]
    assert all(is_over(made) for made in factory.made)


@pytest.mark.parametrize("kind", KINDS)
async def test_factory_workers_set_the_concurrency(kind: str, tmp_path: Path) -> None:
    """The workers of a factory's executor, threads too, run one batch each."""
    batcher = batched(
        partial(work.gated, tmp_path), executor=Factory(kind), max_batch_size=1, max_queue_time=0
    )
    calls = [asyncio.ensure_future(batcher(item)) for item in range(WORKERS + 1)]
    await wait_until(lambda: len(list(tmp_path.glob("inside-*"))) == WORKERS)
    assert batcher.stats().running == WORKERS
    (tmp_path / "go").touch()
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*calls)
    await batcher.stop()


async def test_the_default_max_queue_time_follows_what_the_factory_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a `WorkerPool` it is 0, also for items that were held until the factory returned."""
    monkeypatch.setattr("async_batcher._batching.lifecycle.DEFAULT_QUEUE_TIME", 3600.0)
    async with asyncio.timeout(DEADLINE):
        batcher = batched(work.double, executor=partial(WorkerPool, 1))
        assert batcher.max_queue_time == 3600
        assert await batcher(1) == 2
        assert batcher.max_queue_time == 0
        await batcher.stop()
        batcher.executor = partial(ThreadPoolExecutor, 1)
        assert batcher.max_queue_time == 3600
        async with batcher:
            assert batcher.max_queue_time == 3600


async def test_single_calls_are_divided_by_the_workers_of_a_factory() -> None:
    """They were held while their number was not known."""
    sizes: list[int] = []

    def note_size(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        return batch

    batcher = batched(note_size, executor=partial(ThreadPoolExecutor, 2), max_queue_time=0)
    assert await call_all(batcher, range(10)) == list(range(10))
    assert sizes == [5, 5]
    await batcher.stop()


@pytest.mark.parametrize("kind", KINDS)
async def test_stop_drains_before_the_factory_returned(kind: str) -> None:
    """A stop before the factory has returned runs all items."""
    factory = Factory(kind)
    batcher = batched(work.double, executor=factory, max_batch_size=1)
    calls = [asyncio.ensure_future(batcher(item)) for item in range(5)]
    await asyncio.sleep(0)
    async with asyncio.timeout(DEADLINE):
        await batcher.stop()
        assert await asyncio.gather(*calls) == [0, 2, 4, 6, 8]
    assert is_over(factory.made[0])


@pytest.mark.parametrize("kind", PROCESSES)
async def test_forced_stop_kills_workers_of_a_factory(kind: str, tmp_path: Path) -> None:
    """All callers get `BatcherStoppedError`, and no worker process remains."""
    batcher = batched(
        partial(work.note_pid_and_halt, tmp_path),
        executor=Factory(kind),
        max_batch_size=1,
        max_queue_time=0,
    )
    calls = asyncio.gather(*(batcher(item) for item in range(WORKERS + 1)), return_exceptions=True)
    await wait_until(lambda: len([pid for pid in work.noted(tmp_path, "pid") if pid]) == WORKERS)
    async with asyncio.timeout(DEADLINE):
        await batcher.stop(force=True)
        assert {type(error) for error in await calls} == {BatcherStoppedError}
    await wait_for_exit(int(pid) for pid in work.noted(tmp_path, "pid"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*STANDARD, *POOLS])
async def test_batchers_with_one_factory_have_separate_pools(kind: str) -> None:
    """Each batcher shuts down its own pool only."""
    factory = Factory(kind)
    one, two = (batched(work.pids, executor=factory, max_queue_time=0) for _ in range(2))
    (first,), (second,) = await call_all(one, [1]), await call_all(two, [1])
    assert len(factory.made) == 2
    assert first != second
    await one.stop()
    await wait_for_exit([first])
    assert await call_all(two, [2]) != [first]
    await two.stop()


@pytest.mark.parametrize(
    "make",
    [ThreadPoolExecutor, ProcessPoolExecutor, WorkerPool, lambda: WorkerPool(1).as_executor()],
)
async def test_any_callable_without_arguments_is_a_factory(make: Any) -> None:
    """Any callable without arguments is a factory: a class, a lambda, a partial."""
    if make is ProcessPoolExecutor and sys.version_info < (3, 14):
        make = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("forkserver"))
    async with batched(work.double, executor=make) as batcher:
        assert await call_all(batcher, [4]) == [8]


async def test_executor_of_unknown_size_runs_one_batch_at_a_time() -> None:
    """An executor of unknown size runs one batch at a time."""
    made = InlineExecutor()
    async with batched(work.double, executor=lambda: made) as batcher:
        assert batcher.concurrency == 1
        assert await call_all(batcher, [4]) == [8]
    assert made.is_shut


async def test_explicit_concurrency_overrides_the_size() -> None:
    """An explicit ``concurrency`` overrides the size of the factory's executor."""
    for concurrency in (1, 5, -1):
        async with batched(work.double, executor=Factory(), concurrency=concurrency) as batcher:
            assert batcher.concurrency == concurrency
            assert await call_all(batcher, [1, 2, 3]) == [2, 4, 6]
            assert batcher.concurrency == concurrency


async def test_executor_may_be_set_to_another_factory() -> None:
    """The ``executor`` of a stopped batcher may be set to another factory."""
    batcher = batched(work.double, executor=Factory())
    await call_all(batcher, [1])
    with pytest.raises(RuntimeError, match="executor cannot be changed while"):
        batcher.executor = ThreadPoolExecutor
    await batcher.stop()
    assert batcher.concurrency == WORKERS
    batcher.executor = other = partial(ThreadPoolExecutor, 3)
    assert (batcher.executor, batcher.concurrency) == (other, 1)
    async with batcher:
        assert batcher.concurrency == 3


async def test_copies_have_no_factory() -> None:
    """Copies and pickles of a batcher have no factory."""
    batcher = batched(work.double, executor=Factory(), max_batch_size=3)
    for twin in (copy.copy(batcher), pickle.loads(pickle.dumps(batcher))):  # noqa: S301 - ours
        assert (twin.executor, twin.max_batch_size) == (None, 3)


def test_import_calls_no_factory(tmp_path: Path) -> None:
    """A worker that imports a module with a batcher calls no factory."""
    (tmp_path / "service.py").write_text(
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "import os\n"
        "from async_batcher import batched\n"
        "calls = []\n"
        "def make():\n"
        "    calls.append(os.getpid())\n"
        "    return ProcessPoolExecutor(2, mp_context=get_context('spawn'))\n"
        "@batched(executor=make)\n"
        "def parents(batch):\n"
        "    return [(os.getppid(), list(calls))] * len(batch)\n"
    )
    printed = scripts.run_script(
        tmp_path,
        """
        import asyncio, os, sys
        from pathlib import Path
        sys.path.insert(0, os.getcwd())
        import service
        async def main():
            assert service.calls == []
            assert not any(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
            print(await service.parents(1) == (os.getpid(), []), service.calls == [os.getpid()])
            await service.parents.stop()
        if __name__ == "__main__":
            asyncio.run(main())
        """,
    )
    assert printed == "True True\n"


# Replacing broken executors.


@pytest.mark.parametrize("way", ["os._exit", "kill"])
@pytest.mark.parametrize("kind", PROCESSES)
async def test_crash_does_not_end_the_batcher(kind: str, way: str) -> None:
    """Callers of the crashed batch get `WorkerDiedError`; the next batch runs."""
    factory = Factory(kind)
    batcher = batched(work.crash_in_batch, executor=factory, max_batch_size=3)
    for crashes in range(1, 4):
        errors = await call_all(batcher, ["a", way, "b"])
        assert [type(error) for error in errors] == [WorkerDiedError] * 3
        if kind != "loky":  # it ends the other workers before it reports
            assert {error.exit_code for error in errors} == {work.EXIT_CODES[way]}
        assert await call_all(batcher, ["c"]) == ["c"]
        assert len(factory.made) == (1 if kind in POOLS else crashes + 1)
    await batcher.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", STANDARD)
async def test_queued_items_run_in_the_next_pool(kind: str, tmp_path: Path) -> None:
    """Running batches fail with the pool; queued items run in the next pool."""
    batcher = batched(
        partial(work.note_pid_and_wait, tmp_path),
        executor=Factory(kind),
        max_batch_size=1,
        max_queue_time=0,
    )
    calls = [asyncio.ensure_future(batcher(item)) for item in range(WORKERS + 2)]
    await wait_until(lambda: len([pid for pid in work.noted(tmp_path, "pid") if pid]) == WORKERS)
    victim = int(work.noted(tmp_path, "pid")[0])
    os.kill(victim, signal.SIGKILL)
    async with asyncio.timeout(DEADLINE):
        lost: list[Any] = await asyncio.gather(*calls[:WORKERS], return_exceptions=True)
        assert [(type(error), error.pid) for error in lost] == [(WorkerDiedError, victim)] * WORKERS
        (tmp_path / "go").touch()
        assert await asyncio.gather(*calls[WORKERS:]) == [WORKERS, WORKERS + 1]
    await batcher.stop()


@pytest.mark.parametrize("kind", PROCESSES)
async def test_crash_while_idle_fails_no_caller(kind: str) -> None:
    """After a crash while idle, the next calls get results."""
    factory = Factory(kind)
    batcher = batched(work.pids, executor=factory, max_queue_time=0)
    (pid,) = await call_all(batcher, [1])
    os.kill(pid, signal.SIGKILL)
    await wait_for_exit([pid])
    await wait_until(lambda: kind in POOLS or is_over(factory.made[0]))
    results = [(await call_all(batcher, [item]))[0] for item in range(3)]
    assert all(isinstance(result, int) and result != pid for result in results)
    await batcher.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", STANDARD)
async def test_a_bad_item_fails_alone(kind: str) -> None:
    """`isolate` works across the pools that the bad item breaks."""
    batcher = batched(work.crash_in_batch, executor=Factory(kind), on_failure=isolate())
    results = await call_all(batcher, ["a", "b", "kill", "c"])
    assert [results[0], results[1], type(results[2]), results[3]] == [
        "a",
        "b",
        WorkerDiedError,
        "c",
    ]
    await batcher.stop()


@pytest.mark.parametrize("kind", KINDS)
async def test_initializer_runs_in_each_worker(kind: str, tmp_path: Path) -> None:
    """The executor's initializer runs before a worker's first batch."""
    if kind == "interpreters":
        pytest.skip(
            "the project is on no interpreter's path before the initializer has put it there"
        )
    factory = Factory(kind, initializer=work.note_setup, initargs=(tmp_path,))
    batcher = batched(partial(work.with_setup, tmp_path), executor=factory, max_queue_time=0)
    ((where, setups),) = await call_all(batcher, [1])
    assert str(where) in setups
    await batcher.stop()


@pytest.mark.parametrize("kind", KINDS)
async def test_initializer_that_raises_is_retried(kind: str, tmp_path: Path) -> None:
    """The callers get an error that says so; the next batch tries again."""
    options = {"initializer": work.crash_until, "initargs": (tmp_path, "mended", "raise")}
    if kind == "interpreters":
        text = f"import sys; sys.path[:] = {sys.path!r}\nfrom tests.support import worker_functions as w, __path__\n"
        text += (
            f"from pathlib import Path\nw.crash_until(Path({str(tmp_path)!r}), 'mended', 'raise')"
        )
        options = {"initializer": exec, "initargs": (text,)}
    factory = Factory(kind, **options)
    batcher = batched(work.double, executor=factory, max_queue_time=0)
    (error,) = await call_all(batcher, [1])
    if kind in STANDARD:
        assert type(error) is WorkerDiedError
        assert "the initializer of the pool raised" in str(error)
    elif kind in ("threads", "interpreters"):
        assert type(error) is PoolBrokenError
        assert "is broken" in str(error)
        assert "The next batch gets a new one" in str(error)
    else:
        assert type(error) is (WorkerDiedError if kind == "loky" else PoolBrokenError)
    (error,) = await call_all(batcher, [2])
    assert type(error) in (WorkerDiedError, PoolBrokenError)
    (tmp_path / "mended").touch()
    assert await call_all(batcher, [3]) == [6]
    assert len(factory.made) == (1 if kind in POOLS else 3)
    await batcher.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("long_graces")
async def test_next_pool_is_made_when_the_broken_one_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker forked beside a thread that holds a lock might wait for that lock forever."""
    join = multiprocessing.process.BaseProcess.join
    alive: list[bool] = []

    def join_late(self: Any, timeout: float | None = None) -> None:
        time.sleep(0.1)  # in the thread of the broken pool, which ends after it
        join(self, timeout)

    class Watching(Factory):
        def __call__(self) -> Any:
            threads = [manager_thread(pool) for pool in self.made]
            alive.extend(thread is not None and thread.is_alive() for thread in threads)
            return super().__call__()

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "join", join_late)
    options = {"initializer": work.crash_until, "initargs": (tmp_path, "mended", "raise")}
    factory = Watching("standard_fork", **options)
    batcher = batched(work.double, executor=factory, max_queue_time=0)
    for item in (1, 2):
        (error,) = await call_all(batcher, [item])
        assert type(error) is WorkerDiedError
    await batcher.stop()
    assert alive == [False]


@pytest.mark.parametrize("kind", _kinds("threads", *STANDARD, *LOKY, *INTERPRETERS))
async def test_executor_shut_down_by_the_user_is_made_again(kind: str) -> None:
    """If user code shuts the executor down, the next batch gets a new one."""
    factory = Factory(kind)
    batcher = batched(work.double, executor=factory, max_queue_time=0)
    for count in range(1, 4):
        assert await call_all(batcher, [count]) == [2 * count]
        assert len(factory.made) == count
        await asyncio.to_thread(factory.made[-1].shutdown)
    await batcher.stop()


async def test_executor_that_refuses_is_made_again() -> None:
    """The batch that an executor refuses fails; the next batch gets a new one."""
    made: list[InlineExecutor] = []

    def make() -> InlineExecutor:
        made.append(InlineExecutor())
        return made[-1]

    batcher = batched(work.double, executor=make, max_queue_time=0)
    assert await call_all(batcher, [1]) == [2]
    made[0].refuses = True
    (error,) = await call_all(batcher, [2])
    assert type(error) is PoolBrokenError
    assert (
        "the InlineExecutor that the batcher made did not run the batch: RuntimeError: closed. The next batch gets a new"
        in str(error)
    )
    assert await call_all(batcher, [3]) == [6]
    assert [executor.is_shut for executor in made] == [True, False]
    await batcher.stop()


async def test_thread_that_cannot_be_started_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread pool is kept although it cannot start a thread."""
    factory = Factory()
    batcher = batched(work.double, executor=factory, max_queue_time=0)
    await batcher.start()

    def refuse(_: Any) -> Any:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    with monkeypatch.context() as patched:
        patched.setattr(factory.made[0], "submit", refuse)
        (error,) = await call_all(batcher, [1])
    assert type(error) is PoolBrokenError
    assert str(error).endswith("can't start new thread. The next batch tries again")
    assert await call_all(batcher, [2]) == [4]
    assert len(factory.made) == 1
    await batcher.stop()


# Bad factories.


class Custom(Exception):  # noqa: N818 - any
    """Raised by a factory."""


def _raise() -> Any:
    msg = "no licence"
    raise Custom(msg)


async def _later() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


def _shut_down() -> ThreadPoolExecutor:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    return executor


def _exit() -> Any:
    sys.exit(3)


BAD = {
    "raises": (
        _raise,
        r"raised .*Custom: no licence\. No batch can run without its executor; the next call tries again",
    ),
    "exits": (_exit, r"raised SystemExit: 3"),
    "none": (
        lambda: None,
        r"returned None; it must return a concurrent\.futures\.Executor or a WorkerPool$",
    ),
    "number": (lambda: 3, r"returned 3; it must return"),
    "class": (
        lambda: ThreadPoolExecutor,
        r"returned <class .*ThreadPoolExecutor'>; .*, not a class$",
    ),
    "coroutine": (lambda: _later(), r"returned <coroutine .*; .*, not a coroutine$"),  # noqa: PLW0108 - seen only when called
    "ended": (
        _shut_down,
        r"returned an executor that is broken or shut down .* it must make a new one at each call",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_factory_is_an_error_for_every_caller(name: str) -> None:
    """Every caller gets an error that names the option; the next call tries again."""
    bad, message = BAD[name]
    make = in_turn(bad, bad, Factory())
    batcher = batched(work.double, executor=make, max_queue_time=0)
    errors = await call_all(batcher, [1, 2, 3])
    assert [type(error) for error in errors] == [PoolBrokenError] * 3
    assert len({id(error) for error in errors}) == 3
    with pytest.raises(
        PoolBrokenError, match=rf"^executor=<function .*make at 0x\w+> {message}"
    ) as caught:
        await batcher.start()
    if name == "raises":
        causes = [caught.value.__cause__]
        while causes[-1] is not None:
            causes.append(causes[-1].__cause__)
        assert Custom in [type(cause) for cause in causes]
    assert not await batcher.is_running()
    assert batcher.stats().failed == 3
    assert await call_all(batcher, [1, 2]) == [2, 4]  # what it was called for the third time
    await batcher.stop()


async def test_bad_factory_fails_every_kind_of_call() -> None:
    """Futures, bulk calls, streams and blocked callers all get the error."""
    batcher = batched(work.double, executor=_raise, max_queue_size=1, when_full="wait")
    async with asyncio.timeout(DEADLINE):
        waiting = await call_all(batcher, [1, 2, 3])
        assert [type(error) for error in waiting] == [PoolBrokenError] * 3
        for call in (lambda: batcher.submit(1), lambda: batcher.process_many([1, 2])):
            with pytest.raises(PoolBrokenError, match="no licence"):
                await call()
        with pytest.raises(PoolBrokenError, match="no licence"):
            await anext(batcher.map([1, 2, 3]))
        with pytest.raises(PoolBrokenError, match="no licence"):
            await batcher.run()
        await batcher.stop()


async def test_factory_that_returns_a_broken_executor_again() -> None:
    """The error says to make a new executor; a new one works."""
    made = [ThreadPoolExecutor(1)]
    batcher = batched(work.double, executor=lambda: made[-1], max_queue_time=0)
    assert await call_all(batcher, [1]) == [2]
    made[0].shutdown()
    for _ in range(2):
        (error,) = await call_all(batcher, [1])
        assert type(error) is PoolBrokenError
        assert "must make a new one at each call" in str(error)
    made.append(ThreadPoolExecutor(1))
    assert await call_all(batcher, [2]) == [4]
    await batcher.stop()
    (error,) = await call_all(batched(work.double, executor=lambda: made[-1]), [1])
    assert "must make a new one at each call" in str(error)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (_raise, "raised .*no licence"),
        (lambda: None, "returned None"),
        (WorkerPool, "returned an executor first, and now a Work"),
    ],
)
async def test_factory_that_fails_later(second: Callable[[], Any], message: str) -> None:
    """The batch that needed a new executor fails once; the next one tries again."""
    factory = Factory()
    batcher = batched(
        work.double,
        executor=in_turn(factory, second, factory),
        max_batch_size=2,
        max_queue_time=0,
        on_failure=isolate(),
    )
    assert await call_all(batcher, [1]) == [2]
    factory.made[0].shutdown()
    errors: list[Any] = await call_all(batcher, [2, 3])
    assert [type(error) for error in errors] == [PoolBrokenError] * 2
    with pytest.raises(PoolBrokenError, match=message):
        raise errors[0]
    assert await call_all(batcher, [4]) == [8]
    await batcher.stop()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="mended there")
async def test_warning_about_a_pool_of_a_factory() -> None:
    """The warning for a given pool is raised for a factory's pool too."""
    batcher = batched(work.double, executor=Factory("standard_spawn", max_tasks_per_child=3))
    (error,) = await call_all(batcher, [1])
    assert type(error) is RuntimeWarning
    assert "max_tasks_per_child may hang on this Python" in str(error)


# Slow factories.


async def test_slow_factory_does_not_block_the_loop() -> None:
    """The loop goes on; queued items are spread over the workers later."""
    sizes: list[int] = []

    def note_size(batch: list[Any]) -> list[Any]:
        sizes.append(len(batch))
        return batch

    factory = Slow()
    batcher = batched(note_size, executor=factory, max_queue_time=0)
    call = asyncio.ensure_future(batcher.process_many(range(10)))
    await wait_until(factory.entered.is_set)
    assert (batcher.stats().queued, batcher.concurrency) == (10, 1)
    factory.go.set()
    async with asyncio.timeout(DEADLINE):
        assert await call == list(range(10))
    assert sizes == [5, 5]
    await batcher.stop()


async def test_map_window_follows_the_size_of_the_factory() -> None:
    """The window of `map` is three batches per worker, known after the factory."""
    read: list[int] = []

    def items() -> Any:
        for item in range(1000):
            read.append(item)
            yield item

    factory = Slow(partial(ThreadPoolExecutor, 4))
    batcher = batched(work.same, executor=factory, max_batch_size=5)
    stream = batcher.map(items())
    first = asyncio.ensure_future(anext(stream))
    await wait_until(factory.entered.is_set)
    factory.go.set()
    assert await first == 0
    assert len(read) >= 3 * 4 * 5
    await stream.aclose()
    await batcher.stop()


@pytest.mark.parametrize("how", ["force", "timeout", "cancel"])
@pytest.mark.parametrize("kind", ["threads", "standard_forkserver", "pool_forkserver"])
async def test_forced_stop_does_not_wait_for_a_factory(how: str, kind: str) -> None:
    """Callers get `BatcherStoppedError` at once; a late executor is shut down."""
    factory = Slow(Factory(kind))
    batcher = batched(work.double, executor=factory)
    calls = asyncio.gather(batcher(1), batcher.start(), return_exceptions=True)
    await wait_until(factory.entered.is_set)
    async with asyncio.timeout(DEADLINE):
        await stop_by(how, batcher)
        assert [type(error) for error in await calls] == [BatcherStoppedError] * 2
    second = Slow(Factory())
    second.go.set()
    batcher.executor = second
    async with batcher:  # while the first one is still being made
        assert await call_all(batcher, [4]) == [8]
        factory.go.set()
        await wait_until(
            lambda: factory.made and (kind == "pool_forkserver" or is_over(factory.made[0]))
        )
        assert await call_all(batcher, [5]) == [10]


async def test_start_while_a_stop_waits_for_a_factory() -> None:
    """Each factory call serves the items that were queued for it; the stop ends after its own."""
    factories = [Slow(Factory()), Slow(Factory())]
    remaining = iter(factories)

    def next_factory() -> Any:
        return next(remaining)()

    batcher = batched(work.double, executor=next_factory)
    first = batcher.submit(1)
    await wait_until(factories[0].entered.is_set)
    stop = asyncio.ensure_future(batcher.stop())
    await asyncio.sleep(0)
    start = asyncio.ensure_future(batcher.start())
    await wait_until(factories[1].entered.is_set)
    second = batcher.submit(2)
    async with asyncio.timeout(DEADLINE):
        factories[0].go.set()
        assert await first == 2
        await stop
        assert not second.done()
        factories[1].go.set()
        assert await second == 4
        await start
        await batcher.stop()


async def test_items_cancelled_while_a_factory_runs() -> None:
    """Items that time out or are cancelled meanwhile are never run."""
    seen: list[int] = []

    def note_items(batch: list[int]) -> list[int]:
        seen.extend(batch)
        return batch

    factory = Slow()
    batcher = batched(note_items, executor=factory, max_queue_time=0)
    stays, leaves = (asyncio.ensure_future(batcher(item)) for item in (1, 2))
    with pytest.raises(ItemTimeoutError, match="still queued"):
        await batcher(3, timeout=0.001)
    leaves.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaves
    factory.go.set()
    async with asyncio.timeout(DEADLINE):
        assert await stays == 1
        await batcher.stop()
    assert seen == [1]


@pytest.mark.usefixtures("long_graces")
async def test_stop_without_callers_waits_for_the_factory() -> None:
    """Without callers, the stop waits for the factory and shuts down its executor."""
    factory = Slow()
    batcher = batched(work.double, executor=factory)
    call = asyncio.ensure_future(batcher(1))
    await wait_until(factory.entered.is_set)
    call.cancel()
    stop = asyncio.ensure_future(batcher.stop())
    await asyncio.sleep(0)
    assert not stop.done()
    factory.go.set()
    async with asyncio.timeout(DEADLINE):
        await stop
    assert is_over(factory.made[0])


async def test_stop_gives_up_on_a_factory_that_never_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without callers, a stop gives up after a while; a late executor is shut down."""
    monkeypatch.setattr(factory_module, "FACTORY_STOP_GRACE", 0.01)
    factory = Slow()
    batcher = batched(work.double, executor=factory)
    call = asyncio.ensure_future(batcher(1))
    await wait_until(factory.entered.is_set)
    call.cancel()
    async with asyncio.timeout(DEADLINE):
        await batcher.stop()
    factory.go.set()
    await wait_until(lambda: factory.made and is_over(factory.made[0]))


async def test_stop_gives_up_on_a_factory_that_hangs_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the loop nor a stop waits for a factory that is called again."""
    monkeypatch.setattr(executor_module, "_WATCHDOG_INTERVAL", 0.01)
    monkeypatch.setattr(executor_module, "_SHUTDOWN_LIMIT", 0.01)
    first, slow = ThreadPoolExecutor(1), Slow()
    batcher = batched(work.double, executor=in_turn(lambda: first, slow), max_queue_time=0)
    assert await call_all(batcher, [1]) == [2]
    first.shutdown()
    call = asyncio.ensure_future(batcher(2))
    await wait_until(slow.entered.is_set)
    async with asyncio.timeout(DEADLINE):
        await batcher.stop(force=True)
        with pytest.raises(BatcherStoppedError):
            await call
    slow.go.set()
    await wait_until(lambda: slow.made and is_over(slow.made[0]))


def test_loop_closes_while_a_factory_runs() -> None:
    """A late executor is shut down by its thread; the next loop makes another."""
    factory = Slow()
    batcher = batched(work.double, executor=factory)

    async def begin() -> None:
        batcher.submit(1)
        await wait_until(factory.entered.is_set)

    asyncio.run(begin())
    factory.go.set()
    block_until(lambda: factory.made and is_over(factory.made[0]))

    async def again() -> list[Any]:
        results = await call_all(batcher, [2])
        await batcher.stop()
        return results

    assert asyncio.run(again()) == [4]


async def test_no_thread_for_a_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that needs a thread fails and says so; the next call works."""
    batcher = batched(work.double, executor=Factory())
    refuse_a_thread(monkeypatch)
    with pytest.raises(RuntimeError, match="can't start new thread async_batcher-factory"):
        await batcher(0)
    assert await call_all(batcher, [1]) == [2]
    await batcher.stop()


async def test_factory_runs_in_the_context_of_the_batcher() -> None:
    """A factory runs in the context in which the batcher was made."""
    import contextvars

    variable = contextvars.ContextVar("variable", default="outside")
    seen: list[str] = []

    def make() -> ThreadPoolExecutor:
        seen.append(variable.get())
        return ThreadPoolExecutor(1)

    token = variable.set("inside")
    batcher = batched(work.double, executor=make)
    variable.reset(token)
    assert await call_all(batcher, [1]) == [2]
    await batcher.stop()
    assert seen == ["inside"]


# Whole programs.


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_initializer_binds_globals_of_the_main_module(tmp_path: Path, method: str) -> None:
    """The batch function sees what an initializer binds in the main module."""
    printed = scripts.run_script(
        tmp_path,
        f"""
        import asyncio, logging, os
        from concurrent.futures import ProcessPoolExecutor
        from functools import partial
        from multiprocessing import get_context
        from async_batcher import batched
        from async_batcher.exceptions import WorkerDiedError

        MODEL = None

        def load(model):
            global MODEL
            MODEL = model

        def scale(batch):
            return [MODEL * item if item else os._exit(3) for item in batch]

        make = partial(ProcessPoolExecutor, 2, mp_context=get_context({method!r}), initializer=load, initargs=(10,))

        async def main():
            predict = batched(scale, executor=make)
            print(await predict(1))
            try:
                await predict(0)
            except WorkerDiedError as exc:
                print(exc.exit_code)
            print(await predict(2))
            await predict.stop()

        if __name__ == "__main__":
            logging.disable()
            asyncio.run(main())
        """,
    )
    assert printed.split() == ["10", "3", "20"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_program_that_ends_without_a_stop(tmp_path: Path, method: str) -> None:
    """The program exits although a batch hangs, and leaves no worker."""
    printed = scripts.run_script(
        tmp_path,
        f"""
        import asyncio, os, time
        from concurrent.futures import ProcessPoolExecutor
        from functools import partial
        from multiprocessing import get_context
        from pathlib import Path
        from async_batcher import batched

        def hang(batch):
            Path("pid").write_text(str(os.getpid()))
            Path("pid").rename("begun")
            time.sleep(1000)

        async def main():
            batcher = batched(hang, executor=partial(ProcessPoolExecutor, 2, mp_context=get_context({method!r})))
            batcher.submit(1)
            while not Path("begun").exists():
                await asyncio.sleep(0.002)
            print("begun")

        if __name__ == "__main__":
            asyncio.run(main())
        """,
    )
    assert printed == "begun\n"
    pid = int((tmp_path / "begun").read_text())
    block_until(lambda: not scripts.is_alive(pid))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*STANDARD, *POOLS])
async def test_dropped_batcher_leaves_no_process(kind: str) -> None:
    """A batcher that is dropped without a stop leaves no process."""
    import gc

    before = descendants()
    batcher = batched(work.pids, executor=Factory(kind))
    (pid,) = await call_all(batcher, [1])
    del batcher

    def is_gone() -> bool:
        gc.collect()  # again and again: a thread of the pool may hold the last batch for a moment
        return not scripts.is_alive(pid)

    await wait_until(is_gone)
    await wait_until(lambda: descendants() <= before)


def test_nested_partial_is_a_factory() -> None:
    """Nested partials are factories if no argument is missing."""
    batched(
        work.double,
        executor=functools.partial(
            functools.partial(ThreadPoolExecutor, thread_name_prefix="x"), 2
        ),
    )
    with pytest.raises(TypeError, match="without arguments"):
        batched(work.double, executor=partial(ProcessPoolExecutor.submit, 2))  # type: ignore[arg-type]
