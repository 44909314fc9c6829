"""``executor=`` as a factory: when it is called, what is taken from what it returns, how that ends, and what replaces it.

==================  ===================================  ==============================  =================================
what happens        standard pool, loky                  `WorkerPool`                    threads, interpreters
==================  ===================================  ==============================  =================================
a worker crashes    `WorkerDiedError` for its batches;   the same for its own batch;     (the program would crash)
                    the factory is called again          the pool replaces the worker
an initializer      `WorkerDiedError`; called again      `PoolBrokenError`; the pool     `PoolBrokenError`; called again
raises                                                   tries again
stop                shut down                            stopped                         shut down
stop(force=True)    killed                               killed                          left to its batch
==================  ===================================  ==============================  =================================
"""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._runners import executor as executor_module
from async_batcher._runners import factory as factory_module
from async_batcher.exceptions import BatcherStoppedError, ItemTimeoutError, PoolBrokenError, WorkerDiedError
from tests.conftest import descendants
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="signals, forkserver"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),  # what the tests ask for
]

DEADLINE = work.DEADLINE
WORKERS = 2

_METHODS = [method for method in ("forkserver", "spawn", "fork") if method in multiprocessing.get_all_start_methods()]
_STANDARD = [f"standard_{method}" for method in _METHODS]
_POOLS = [f"pool_{method}" for method in _METHODS]
_LOKY = ["loky"] if importlib.util.find_spec("loky") is not None else []
_INTERPRETERS = ["interpreters"] if sys.version_info >= (3, 14) else []


def _kinds(*names: str) -> list[Any]:
    return [name if name == "threads" else pytest.param(name, marks=pytest.mark.slow) for name in names]


PROCESSES = _kinds(*_STANDARD, *_LOKY, *_POOLS)
KINDS = _kinds("threads", *_STANDARD, *_LOKY, *_POOLS, *_INTERPRETERS)


class Factory:
    """A factory that keeps what it made.

    Args:
        kind: What it makes.
        options: What that is made with.
    """

    def __init__(self, kind: str = "threads", **options: Any) -> None:
        self.kind = kind
        self.options = options
        self.made: list[Any] = []

    def __call__(self) -> Any:
        """Make one."""
        self.made.append(self._make())
        return self.made[-1]

    def _make(self) -> Any:
        name, _, method = self.kind.partition("_")
        if name == "threads":
            return ThreadPoolExecutor(WORKERS, **self.options)
        if name == "standard":
            return ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context(method), **self.options)
        if name == "pool":
            return WorkerPool(WORKERS, mp_context=method, **self.options)
        if name == "loky":
            import loky

            return loky.ProcessPoolExecutor(WORKERS, **self.options)
        from concurrent.futures import InterpreterPoolExecutor  # type: ignore[attr-defined]

        # pytest puts the root of the project on the path of this interpreter only.
        set_path = f"import sys; sys.path[:] = {sys.path!r}"
        return InterpreterPoolExecutor(WORKERS, **({"initializer": exec, "initargs": (set_path,)} | self.options))


class Slow:
    """A factory that waits for the test.

    Attributes:
        entered: Set when it has been called.
        go: Set by the test: it returns.
        made: What it returned.
    """

    def __init__(self, make: Callable[[], Any] | None = None) -> None:
        self.make = make or partial(ThreadPoolExecutor, WORKERS)
        self.entered = threading.Event()
        self.go = threading.Event()
        self.made: list[Any] = []

    def __call__(self) -> Any:
        """Wait, then make one."""
        self.entered.set()
        assert self.go.wait(DEADLINE)
        self.made.append(self.make())
        return self.made[-1]


def in_turn(*factories: Callable[[], Any]) -> Callable[[], Any]:
    """A factory that is each of these, one after the other."""
    rest = list(factories)

    def make() -> Any:
        factory = rest.pop(0)
        return factory()

    return make


class Inline(Executor):
    """Runs a call where it is submitted; its size is not known.

    Args:
        refuses: Whether `submit` raises.
    """

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.is_shut = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run it."""
        if self.refuses or self.is_shut:
            msg = "closed"
            raise RuntimeError(msg)
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future

    def shutdown(self, wait: bool = True) -> None:  # type: ignore[override]  # noqa: ARG002, FBT001, FBT002 - as before Python 3.9
        """Take no more."""
        self.is_shut = True


@pytest.fixture(scope="module", autouse=True)
def _standing_helpers_of_loky() -> None:
    """Start what loky starts once and keeps, so that it does not look like a leak of the first test."""
    for kind in _LOKY:
        with Factory(kind)() as executor:
            executor.submit(os.getpid).result()


async def answers(batcher: Any, items: list[Any]) -> list[Any]:
    """What each of the calls, all made now, returned or raised."""
    async with asyncio.timeout(DEADLINE):
        return await asyncio.gather(*(batcher.process(item) for item in items), return_exceptions=True)


# Made with the first call, ended with the batcher.


@pytest.mark.parametrize("kind", KINDS)
async def test_a_factory_is_called_with_the_first_call_and_again_after_a_stop(kind: str) -> None:
    """Not before; its size is the concurrency; what it made is shut down; the next start makes another."""
    factory = Factory(kind)
    batcher = batched(work.double, executor=factory, max_queue_time=0)
    assert (factory.made, batcher.concurrency, batcher.executor) == ([], 1, factory)
    assert await answers(batcher, [1, 2]) == [2, 4]
    assert (len(factory.made), batcher.concurrency) == (1, WORKERS)
    await batcher.stop()
    assert factory_module.is_over(factory.made[0])
    async with batcher:
        assert (len(factory.made), batcher.concurrency) == (2, WORKERS)
        assert await answers(batcher, [3]) == [6]
    assert all(factory_module.is_over(made) for made in factory.made)


@pytest.mark.parametrize("kind", KINDS)
async def test_as_many_batches_at_a_time_as_workers(kind: str, tmp_path: Path) -> None:
    """The workers of what the factory made, threads too, run one batch each."""
    batcher = batched(partial(work.gated, tmp_path), executor=Factory(kind), max_batch_size=1, max_queue_time=0)
    calls = [asyncio.ensure_future(batcher(item)) for item in range(WORKERS + 1)]
    await wait_until(lambda: len(list(tmp_path.glob("inside-*"))) == WORKERS)
    assert batcher.stats().running == WORKERS
    (tmp_path / "go").touch()
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*calls)
    await batcher.stop()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stop_runs_what_waits(kind: str) -> None:
    """A stop right after the calls, before the factory has returned, runs them all."""
    factory = Factory(kind)
    batcher = batched(work.double, executor=factory, max_batch_size=1)
    calls = [asyncio.ensure_future(batcher(item)) for item in range(5)]
    await asyncio.sleep(0)
    async with asyncio.timeout(DEADLINE):
        await batcher.stop()
        assert await asyncio.gather(*calls) == [0, 2, 4, 6, 8]
    assert factory_module.is_over(factory.made[0])


@pytest.mark.parametrize("kind", PROCESSES)
async def test_a_stop_by_force_kills(kind: str, tmp_path: Path) -> None:
    """Callers of running and queued batches get `BatcherStoppedError`, and no worker process lives."""
    batcher = batched(partial(work.stopped_first, tmp_path), executor=Factory(kind), max_batch_size=1, max_queue_time=0)
    calls = asyncio.gather(*(batcher(item) for item in range(WORKERS + 1)), return_exceptions=True)
    await wait_until(lambda: len([pid for pid in work.noted(tmp_path, "pid") if pid]) == WORKERS)
    async with asyncio.timeout(DEADLINE):
        await batcher.stop(force=True)
        assert {type(error) for error in await calls} == {BatcherStoppedError}
    await wait_for_exit(int(pid) for pid in work.noted(tmp_path, "pid"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*_STANDARD, *_POOLS])
async def test_two_batchers_with_one_factory_have_two_pools(kind: str) -> None:
    """Each ends its own, and leaves the other's alone."""
    factory = Factory(kind)
    one, two = (batched(work.pids, executor=factory, max_queue_time=0) for _ in range(2))
    (first,), (second,) = await answers(one, [1]), await answers(two, [1])
    assert len(factory.made) == 2
    assert first != second
    await one.stop()
    await wait_for_exit([first])
    assert await answers(two, [2]) != [first]
    await two.stop()


@pytest.mark.parametrize("make", [ThreadPoolExecutor, ProcessPoolExecutor, WorkerPool, lambda: WorkerPool(1).as_executor()])
async def test_a_class_or_a_function_is_a_factory(make: Any) -> None:
    """A class with its defaults, a lambda: all that can be called without arguments."""
    if make is ProcessPoolExecutor and sys.version_info < (3, 14):
        make = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("forkserver"))
    async with batched(work.double, executor=make) as batcher:
        assert await answers(batcher, [4]) == [8]


async def test_an_executor_of_unknown_size_runs_one_batch_at_a_time() -> None:
    """As one that is given does. Its shutdown may lack the newer arguments."""
    made = Inline()
    async with batched(work.double, executor=lambda: made) as batcher:
        assert batcher.concurrency == 1
        assert await answers(batcher, [4]) == [8]
    assert made.is_shut


async def test_a_concurrency_that_is_given_holds() -> None:
    """The size of what the factory makes does not change it."""
    for concurrency in (1, 5, -1):
        async with batched(work.double, executor=Factory(), concurrency=concurrency) as batcher:
            assert batcher.concurrency == concurrency
            assert await answers(batcher, [1, 2, 3]) == [2, 4, 6]
            assert batcher.concurrency == concurrency


async def test_the_executor_may_be_set() -> None:
    """While the batcher is not running; the size of an earlier factory is forgotten."""
    batcher = batched(work.double, executor=Factory())
    await answers(batcher, [1])
    with pytest.raises(RuntimeError, match="executor cannot be changed while"):
        batcher.executor = ThreadPoolExecutor
    await batcher.stop()
    assert batcher.concurrency == WORKERS
    batcher.executor = other = partial(ThreadPoolExecutor, 3)
    assert (batcher.executor, batcher.concurrency) == (other, 1)
    async with batcher:
        assert batcher.concurrency == 3


async def test_a_factory_stays_behind() -> None:
    """As an executor that is given does: a copy, or a batcher that is sent to a worker, has none."""
    batcher = batched(work.double, executor=Factory(), max_batch_size=3)
    for twin in (copy.copy(batcher), pickle.loads(pickle.dumps(batcher))):  # noqa: S301 - ours
        assert (twin.executor, twin.max_batch_size) == (None, 3)


def test_no_process_is_started_by_an_import(tmp_path: Path) -> None:
    """A module-level batcher calls its factory with the first call, and not when a worker imports the module."""
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


# What breaks is made again.


@pytest.mark.parametrize("way", ["os._exit", "kill"])
@pytest.mark.parametrize("kind", PROCESSES)
async def test_a_crash_does_not_end_the_batcher(kind: str, way: str) -> None:
    """The callers of the lost batch get `WorkerDiedError`; the next batch runs, in a fresh standard pool."""
    factory = Factory(kind)
    batcher = batched(work.die_in_batch, executor=factory, max_queue_time=0)
    for crashes in range(1, 4):
        errors = await answers(batcher, ["a", way, "b"])
        assert [type(error) for error in errors] == [WorkerDiedError] * 3
        if kind != "loky":  # it ends the other workers before it reports
            assert {error.exit_code for error in errors} == {work.DEADLY[way]}
        assert await answers(batcher, ["c"]) == ["c"]
        assert len(factory.made) == (1 if kind in _POOLS else crashes + 1)
    await batcher.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", _STANDARD)
async def test_what_was_queued_when_a_pool_broke_is_run(kind: str, tmp_path: Path) -> None:
    """All running batches of a standard pool are lost with one worker; those in the queue get the next pool."""
    batcher = batched(partial(work.note_pid_and_wait, tmp_path), executor=Factory(kind), max_batch_size=1, max_queue_time=0)
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
async def test_a_crash_while_idle_is_no_caller_s_concern(kind: str) -> None:
    """The next calls are answered, once a standard pool has noticed; a batch that it takes before that is lost."""
    factory = Factory(kind)
    batcher = batched(work.pids, executor=factory, max_queue_time=0)
    (pid,) = await answers(batcher, [1])
    os.kill(pid, signal.SIGKILL)
    await wait_for_exit([pid])
    await wait_until(lambda: kind in _POOLS or factory_module.is_over(factory.made[0]))
    results = [(await answers(batcher, [item]))[0] for item in range(3)]
    assert all(isinstance(result, int) and result != pid for result in results)
    await batcher.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", _STANDARD)
async def test_a_bad_item_fails_alone(kind: str) -> None:
    """``isolate_failures`` works across the pools that the bad item breaks."""
    batcher = batched(work.die_in_batch, executor=Factory(kind), isolate_failures=True)
    results = await answers(batcher, ["a", "b", "kill", "c"])
    assert [results[0], results[1], type(results[2]), results[3]] == ["a", "b", WorkerDiedError, "c"]
    await batcher.stop()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_initializer_runs_in_each_worker(kind: str, tmp_path: Path) -> None:
    """Before the first batch of the worker."""
    if kind == "interpreters":
        pytest.skip("the project is on no interpreter's path before the initializer has put it there")
    factory = Factory(kind, initializer=work.note_setup, initargs=(tmp_path,))
    batcher = batched(partial(work.with_setup, tmp_path), executor=factory, max_queue_time=0)
    ((where, setups),) = await answers(batcher, [1])
    assert str(where) in setups
    await batcher.stop()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_initializer_that_raises(kind: str, tmp_path: Path) -> None:
    """The callers get an error that says so; the next batch tries again, and the batcher goes on when it has been mended."""
    options = {"initializer": work.die_until, "initargs": (tmp_path, "mended", "raise")}
    if kind == "interpreters":
        text = f"import sys; sys.path[:] = {sys.path!r}\nfrom tests.support import worker_functions as w, __path__\n"
        text += f"from pathlib import Path\nw.die_until(Path({str(tmp_path)!r}), 'mended', 'raise')"
        options = {"initializer": exec, "initargs": (text,)}
    factory = Factory(kind, **options)
    batcher = batched(work.double, executor=factory, max_queue_time=0)
    (error,) = await answers(batcher, [1])
    if kind in _STANDARD:
        assert type(error) is WorkerDiedError
        assert "the initializer of the pool raised" in str(error)
    elif kind in ("threads", "interpreters"):
        assert type(error) is PoolBrokenError
        assert "is broken" in str(error)
        assert "The next batch gets a new one" in str(error)
    else:
        assert type(error) is (WorkerDiedError if kind == "loky" else PoolBrokenError)
    (error,) = await answers(batcher, [2])
    assert type(error) in (WorkerDiedError, PoolBrokenError)
    (tmp_path / "mended").touch()
    assert await answers(batcher, [3]) == [6]
    assert len(factory.made) == (1 if kind in _POOLS else 3)
    await batcher.stop()


@pytest.mark.parametrize("kind", _kinds("threads", *_STANDARD, *_LOKY, *_INTERPRETERS))
async def test_an_executor_that_is_shut_down(kind: str) -> None:
    """By user code: the next batch gets a new one, and no caller hears of it."""
    factory = Factory(kind)
    batcher = batched(work.double, executor=factory, max_queue_time=0)
    for count in range(1, 4):
        assert await answers(batcher, [count]) == [2 * count]
        assert len(factory.made) == count
        await asyncio.to_thread(factory.made[-1].shutdown)
    await batcher.stop()


async def test_an_executor_that_refuses_is_made_again() -> None:
    """One that does not show its state: the batch that it refuses fails, and the next batch gets a new one."""
    made: list[Inline] = []

    def make() -> Inline:
        made.append(Inline())
        return made[-1]

    batcher = batched(work.double, executor=make, max_queue_time=0)
    assert await answers(batcher, [1]) == [2]
    made[0].refuses = True
    (error,) = await answers(batcher, [2])
    assert type(error) is PoolBrokenError
    assert "the Inline that the batcher made did not run the batch: RuntimeError: closed. The next batch gets a new" in str(error)
    assert await answers(batcher, [3]) == [6]
    assert [executor.is_shut for executor in made] == [True, False]
    await batcher.stop()


async def test_a_thread_that_cannot_be_started_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool of threads stays."""
    factory = Factory()
    batcher = batched(work.double, executor=factory, max_queue_time=0)
    await batcher.start()

    def refuse(_: Any) -> Any:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    with monkeypatch.context() as patched:
        patched.setattr(factory.made[0], "submit", refuse)
        (error,) = await answers(batcher, [1])
    assert type(error) is PoolBrokenError
    assert str(error).endswith("can't start new thread. The next batch tries again")
    assert await answers(batcher, [2]) == [4]
    assert len(factory.made) == 1
    await batcher.stop()


# Factories that do something wrong.


class Custom(Exception):  # noqa: N818 - any
    """What a factory raises."""


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
    "raises": (_raise, r"raised .*Custom: no licence\. No batch can run without its executor; the next call tries again"),
    "exits": (_exit, r"raised SystemExit: 3"),
    "none": (lambda: None, r"returned None; it must return a concurrent\.futures\.Executor or a WorkerPool$"),
    "number": (lambda: 3, r"returned 3; it must return"),
    "class": (lambda: ThreadPoolExecutor, r"returned <class .*ThreadPoolExecutor'>; .*, not a class$"),
    "coroutine": (lambda: _later(), r"returned <coroutine .*; .*, not a coroutine$"),  # noqa: PLW0108 - seen only when called
    "ended": (_shut_down, r"returned an executor that is broken or shut down .* it must make a new one at each call"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_factory(name: str) -> None:
    """Every caller gets an error that names the option and says what is wrong; the next call calls it again."""
    bad, message = BAD[name]
    make = in_turn(bad, bad, Factory())
    batcher = batched(work.double, executor=make, max_queue_time=0)
    errors = await answers(batcher, [1, 2, 3])
    assert [type(error) for error in errors] == [PoolBrokenError] * 3
    assert len({id(error) for error in errors}) == 3
    with pytest.raises(PoolBrokenError, match=rf"^executor=<function .*make at 0x\w+> {message}") as caught:
        await batcher.start()
    if name == "raises":
        causes = [caught.value.__cause__]
        while causes[-1] is not None:
            causes.append(causes[-1].__cause__)
        assert Custom in [type(cause) for cause in causes]
    assert not await batcher.is_running()
    assert batcher.stats().failed == 3
    assert await answers(batcher, [1, 2]) == [2, 4]  # what it was called for the third time
    await batcher.stop()


async def test_every_kind_of_call_hears_of_a_bad_factory() -> None:
    """None waits for ever: futures, many items, streams, callers that wait for room in the queue."""
    batcher = batched(work.double, executor=_raise, max_queue_size=1, when_full="wait")
    async with asyncio.timeout(DEADLINE):
        waiting = await answers(batcher, [1, 2, 3])
        assert [type(error) for error in waiting] == [PoolBrokenError] * 3
        for call in (lambda: batcher.submit(1), lambda: batcher.process_many([1, 2])):
            with pytest.raises(PoolBrokenError, match="no licence"):
                await call()
        with pytest.raises(PoolBrokenError, match="no licence"):
            await anext(batcher.map([1, 2, 3]))
        with pytest.raises(PoolBrokenError, match="no licence"):
            await batcher.run()
        await batcher.stop()


async def test_a_factory_that_returns_the_same_after_it_broke() -> None:
    """The error says that it must make a new one; a new one mends it."""
    made = [ThreadPoolExecutor(1)]
    batcher = batched(work.double, executor=lambda: made[-1], max_queue_time=0)
    assert await answers(batcher, [1]) == [2]
    made[0].shutdown()
    for _ in range(2):
        (error,) = await answers(batcher, [1])
        assert type(error) is PoolBrokenError
        assert "must make a new one at each call" in str(error)
    made.append(ThreadPoolExecutor(1))
    assert await answers(batcher, [2]) == [4]
    await batcher.stop()
    (error,) = await answers(batched(work.double, executor=lambda: made[-1]), [1])
    assert "must make a new one at each call" in str(error)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (_raise, "raised .*no licence"),
        (lambda: None, "returned None"),
        (WorkerPool, "returned an executor first, and now a Work"),
    ],
)
async def test_a_factory_that_fails_later(second: Callable[[], Any], message: str) -> None:
    """The batch that needed a new executor fails, without being blamed on its items; the next one tries again."""
    factory = Factory()
    batcher = batched(work.double, executor=in_turn(factory, second, factory), max_queue_time=0, isolate_failures=True)
    assert await answers(batcher, [1]) == [2]
    factory.made[0].shutdown()
    errors: list[Any] = await answers(batcher, [2, 3])
    assert [type(error) for error in errors] == [PoolBrokenError] * 2
    with pytest.raises(PoolBrokenError, match=message):
        raise errors[0]
    assert await answers(batcher, [4]) == [8]
    await batcher.stop()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="mended there")
async def test_known_faults_of_what_a_factory_returns() -> None:
    """The warning that a given pool gets; here it is an error, and the callers get it."""
    batcher = batched(work.double, executor=Factory("standard_spawn", max_tasks_per_child=3))
    (error,) = await answers(batcher, [1])
    assert type(error) is RuntimeWarning
    assert "max_tasks_per_child may hang on this Python" in str(error)


# Factories that take long.


async def test_a_slow_factory_stalls_nothing() -> None:
    """The loop goes on, and items collect; they are spread over the workers when these are known."""
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


async def test_a_stream_knows_the_size() -> None:
    """Its window holds three batches for each worker, though it is opened before the factory has returned."""
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
async def test_a_stop_by_force_does_not_wait_for_a_factory(how: str, kind: str) -> None:
    """Callers get `BatcherStoppedError` at once; what the factory returns afterwards is shut down; a start begins afresh."""
    factory = Slow(Factory(kind))
    batcher = batched(work.double, executor=factory)
    calls = asyncio.gather(batcher(1), batcher.start(), return_exceptions=True)
    await wait_until(factory.entered.is_set)
    async with asyncio.timeout(DEADLINE):
        if how == "force":
            await batcher.stop(force=True)
        elif how == "timeout":
            with pytest.raises(TimeoutError):
                await batcher.stop(timeout=0.001)
        else:
            stop = asyncio.ensure_future(batcher.stop())
            await asyncio.sleep(0)
            stop.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stop
        assert [type(error) for error in await calls] == [BatcherStoppedError] * 2
    second = Slow(Factory())
    second.go.set()
    batcher.executor = second
    async with batcher:  # while the first one is still being made
        assert await answers(batcher, [4]) == [8]
        factory.go.set()
        await wait_until(lambda: factory.made and (kind == "pool_forkserver" or factory_module.is_over(factory.made[0])))
        assert await answers(batcher, [5]) == [10]


async def test_callers_leave_while_a_factory_is_called() -> None:
    """A deadline ends the wait of one, a cancellation that of another; their items are never run, and a stop waits for none."""
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


async def test_a_stop_while_a_factory_is_called_and_no_caller_is_left() -> None:
    """All callers have left: the stop waits for the factory, and shuts down what it made."""
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
    assert factory_module.is_over(factory.made[0])


async def test_a_stop_gives_up_a_factory_that_never_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, where no caller waits; what it makes at last is shut down."""
    monkeypatch.setattr(factory_module, "FACTORY_STOP_GRACE", 0.01)
    factory = Slow()
    batcher = batched(work.double, executor=factory)
    call = asyncio.ensure_future(batcher(1))
    await wait_until(factory.entered.is_set)
    call.cancel()
    async with asyncio.timeout(DEADLINE):
        await batcher.stop()
    factory.go.set()
    await wait_until(lambda: factory.made and factory_module.is_over(factory.made[0]))


async def test_a_stop_gives_up_a_factory_that_does_not_return_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where the first executor broke; neither the loop nor the stop waits for it."""
    monkeypatch.setattr(executor_module, "_WATCHDOG_INTERVAL", 0.01)
    monkeypatch.setattr(executor_module, "_SHUTDOWN_LIMIT", 0.01)
    first, slow = ThreadPoolExecutor(1), Slow()
    batcher = batched(work.double, executor=in_turn(lambda: first, slow), max_queue_time=0)
    assert await answers(batcher, [1]) == [2]
    first.shutdown()
    call = asyncio.ensure_future(batcher(2))
    await wait_until(slow.entered.is_set)
    async with asyncio.timeout(DEADLINE):
        await batcher.stop(force=True)
        with pytest.raises(BatcherStoppedError):
            await call
    slow.go.set()
    await wait_until(lambda: slow.made and factory_module.is_over(slow.made[0]))


def test_the_loop_closes_while_a_factory_is_called() -> None:
    """What it makes is shut down by the thread that made it; the next loop makes another."""
    factory = Slow()
    batcher = batched(work.double, executor=factory)

    async def begin() -> None:
        batcher.submit(1)
        await wait_until(factory.entered.is_set)

    asyncio.run(begin())
    factory.go.set()
    deadline = threading.Event()
    while not (factory.made and factory_module.is_over(factory.made[0])):
        assert not deadline.wait(0.002)

    async def again() -> list[Any]:
        results = await answers(batcher, [2])
        await batcher.stop()
        return results

    assert asyncio.run(again()) == [4]


async def test_no_thread_for_a_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that would have needed it fails, and says so; the next one finds one."""

    def start(thread: threading.Thread) -> None:
        monkeypatch.undo()
        msg = f"can't start new thread {thread.name}"
        raise RuntimeError(msg)

    batcher = batched(work.double, executor=Factory())
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread async_batcher-factory"):
        await batcher(0)
    assert await answers(batcher, [1]) == [2]
    await batcher.stop()


async def test_a_factory_sees_the_context_of_the_batcher() -> None:
    """As all that the batcher calls does: context variables as they were when it was made."""
    import contextvars

    variable = contextvars.ContextVar("variable", default="outside")
    seen: list[str] = []

    def make() -> ThreadPoolExecutor:
        seen.append(variable.get())
        return ThreadPoolExecutor(1)

    token = variable.set("inside")
    batcher = batched(work.double, executor=make)
    variable.reset(token)
    assert await answers(batcher, [1]) == [2]
    await batcher.stop()
    assert seen == ["inside"]


# Programs.


@pytest.mark.slow
@pytest.mark.parametrize("method", _METHODS)
def test_what_an_initializer_of_the_main_module_binds(tmp_path: Path, method: str) -> None:
    """The batch function sees it, in the first pool and in the one that replaces it."""
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
@pytest.mark.parametrize("method", _METHODS)
def test_a_program_that_ends_without_a_stop(tmp_path: Path, method: str) -> None:
    """Neither does it wait for a batch that hangs, nor does a worker outlive it."""
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
    deadline = threading.Event()
    while scripts.is_alive(pid):
        assert not deadline.wait(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*_STANDARD, *_POOLS])
async def test_a_batcher_that_is_dropped_leaves_no_process(kind: str) -> None:
    """Without a stop: what its factory made goes with it."""
    import gc

    before = descendants()
    batcher = batched(work.pids, executor=Factory(kind))
    (pid,) = await answers(batcher, [1])
    del batcher

    def is_gone() -> bool:
        gc.collect()  # again and again: a thread of the pool may hold the last batch for a moment
        return not scripts.is_alive(pid)

    await wait_until(is_gone)
    await wait_until(lambda: descendants() <= before)


def test_a_partial_of_a_partial() -> None:
    """What binds arguments in several steps is a factory too; what leaves one open is none."""
    batched(work.double, executor=functools.partial(functools.partial(ThreadPoolExecutor, thread_name_prefix="x"), 2))
    with pytest.raises(TypeError, match="without arguments"):
        batched(work.double, executor=partial(ProcessPoolExecutor.submit, 2))  # type: ignore[arg-type]
