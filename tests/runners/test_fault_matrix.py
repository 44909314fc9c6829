"""The fault matrix: stage, kind of fault, what each caller gets. Also how programs exit.

===================  ===============================  ==============================================
stage                raise, sys.exit                  os._exit, SIGKILL, segmentation fault
===================  ===============================  ==============================================
pickle an item       `SerializationError`, its item   (would end the caller's own process)
unpickle an item     `SerializationError`, its item   `WorkerPool`: `WorkerDiedError` for its batch;
set up               as raised, or `BatchError`       a standard pool of ours: that for all batches
run                  as raised, or `BatchError`       in it, and a new pool next; a given one:
pickle a result      `SerializationError`, its item   `PoolBrokenError`, for that and every later
half-written result                                   call
unpickle a result    `SerializationError`, its item   (would end the caller's own process)
idle                                                  ours: no caller gets an error; given:
                                                      `PoolBrokenError`
===================  ===============================  ==============================================

SIGSTOP ends nothing; ``batch_timeout`` (``pool/test_timeouts.py``) and a forced stop do.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher, WorkerPool, batched
from async_batcher._transport.protocol import ReplyKind
from async_batcher.exceptions import (
    BatchError,
    BatcherStoppedError,
    PoolBrokenError,
    SerializationError,
    WorkerDiedError,
)
from tests.conftest import descendants
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.batchers import call_all, refuse_a_thread, stop_by
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, forkserver")

DEADLINE = work.DEADLINE


@pytest.fixture
def pool() -> Iterator[ProcessPoolExecutor]:
    """Return a pool that is given to the batcher."""
    executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver"))
    yield executor
    executor.shutdown(cancel_futures=True)


@pytest.fixture
def standard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``executor="process"`` mean a standard pool, as on Windows."""
    monkeypatch.setattr("async_batcher._batching.lifecycle.SUPPORTS_WORKER_POOL", False)


# Out of threads.


async def test_no_thread_for_an_executor(
    monkeypatch: pytest.MonkeyPatch, pool: ProcessPoolExecutor
) -> None:
    """The call that needs a thread fails and says so; the next call works."""
    batcher = batched(work.same, executor=pool)
    refuse_a_thread(monkeypatch)
    async with asyncio.timeout(work.DEADLINE):
        with pytest.raises(RuntimeError, match="can't start new thread async_batcher-submit"):
            await batcher(0)
        assert await batcher(1) == 1
        await batcher.stop()


# The matrix.

_SOFT = ("raise", "exit")
_HARD = ("os._exit", "kill", "segfault")
_STAGES: dict[str, tuple[Callable[[list[Any]], Any], Callable[[str], Any], tuple[str, ...]]] = {
    "pickle_item": (work.same, work.CrashAtPickle, _SOFT),
    "unpickle_item": (work.same, work.CrashAtUnpickle, _SOFT + _HARD),
    "set_up": (work.same, str, _SOFT + _HARD),
    "run": (work.crash_in_batch, str, _SOFT + _HARD),
    "pickle_result": (work.results_that_crash_pickled, str, _SOFT + _HARD),
    "unpickle_result": (work.results_that_crash_unpickled, str, _SOFT),
}


def _matrix() -> Iterator[tuple[str, str, str]]:
    """Yield the places, stages and kinds of faults.

    Start methods differ in how the exit of a worker is seen; what happens inside one is the same.
    """
    for stage, (_, _, ways) in _STAGES.items():
        for way in ways:
            for place in (*METHODS, "standard", "given"):
                is_other_method = place in METHODS and place != METHODS[0]
                if not is_other_method or (way in _HARD if stage == "run" else way == "kill"):
                    yield place, stage, way


@pytest.mark.slow
@may_warn_of_fork
@pytest.mark.parametrize(("place", "stage", "way"), list(_matrix()))
async def test_fault_matrix(
    request: pytest.FixtureRequest,
    pool: ProcessPoolExecutor,
    tmp_path: Path,
    place: str,
    stage: str,
    way: str,
) -> None:
    """The second of three items has the fault: what each caller and the next batch get."""
    function, make, _ = _STAGES[stage]
    options: dict[str, Any] = {"executor": "process", "max_workers": 1}
    workers = WorkerPool(1, mp_context=place) if place in METHODS else None
    if place == "standard":
        request.getfixturevalue("standard")
    else:
        options = {"executor": workers or pool}
    if stage == "set_up":
        options["setup_worker"] = functools.partial(work.crash_once, tmp_path, way)
    batcher = batched(function, **options)
    results = await call_all(batcher, ["a", make(way), "c"])
    if way in _SOFT and stage in ("set_up", "run"):
        assert [type(error) for error in results] == [
            ArithmeticError if way == "raise" else BatchError
        ] * 3
        assert way == "raise" or all(
            error.original_type == "builtins.SystemExit" for error in results
        )
    elif way in _SOFT:
        assert [results[0], results[2]] == ["a", "c"]
        assert type(results[1]) is SerializationError
        assert ("this hurts" if way == "raise" else "3") in str(results[1])
    elif place == "given":
        assert [type(error) for error in results] == [PoolBrokenError] * 3
        assert all("make a new executor" in str(error) for error in results)
        again = await call_all(batcher, ["d"])
        assert [type(error) for error in again] == [PoolBrokenError]
        assert "make a new executor" in str(again[0])
        await batcher.stop()
        return
    elif (
        stage == "set_up" and place in METHODS
    ):  # no batch had started: another worker was set up for it
        assert not any(isinstance(result, BaseException) for result in results)
    else:
        assert [type(error) for error in results] == [WorkerDiedError] * 3
        assert len({id(error) for error in results}) == 3
        for error in results:
            assert error.exit_code == work.EXIT_CODES[way]
            assert error.may_have_run
            assert str(error.pid) in str(error)
            assert not scripts.is_alive(error.pid)
            name = (
                "exit code 5" if way == "os._exit" else signal.Signals(-work.EXIT_CODES[way]).name
            )
            assert name in str(error)
    assert await call_all(batcher, ["d", "e"]) == ["d", "e"]
    await batcher.stop()
    if workers is not None:
        await workers.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("standard")
async def test_error_names_the_crashed_worker(tmp_path: Path) -> None:
    """Both batches of a standard pool fail, and name the worker that crashed."""
    function = functools.partial(work.note_pid_and_wait, tmp_path)
    batcher = batched(function, executor="process", max_workers=2, max_batch_size=1)
    calls = asyncio.gather(batcher(1), batcher(2), return_exceptions=True)
    await wait_until(lambda: len([pid for pid in work.noted(tmp_path, "pid") if pid]) == 2)
    victim, other = (int(pid) for pid in work.noted(tmp_path, "pid"))
    os.kill(victim, signal.SIGKILL)
    async with asyncio.timeout(DEADLINE):
        errors: list[Any] = list(await calls)
    assert [type(error) for error in errors] == [WorkerDiedError] * 2
    assert [(error.pid, error.exit_code) for error in errors] == [(victim, -signal.SIGKILL)] * 2
    await wait_for_exit([other])
    (tmp_path / "go").touch()
    assert await call_all(batcher, [3]) == [3]
    await batcher.stop()


@pytest.mark.slow
async def test_a_worker_that_dies_takes_its_own_batch_along_and_no_other(tmp_path: Path) -> None:
    """The other worker's batch gets results, and the next ones find two workers."""
    function = functools.partial(work.note_pid_and_wait, tmp_path)
    batcher = batched(function, executor="process", max_workers=2, max_batch_size=1)
    calls = asyncio.gather(batcher(1), batcher(2), return_exceptions=True)
    await wait_until(lambda: len([pid for pid in work.noted(tmp_path, "pid") if pid]) == 2)
    victim, other = (int(pid) for pid in work.noted(tmp_path, "pid"))
    os.kill(victim, signal.SIGKILL)
    await wait_for_exit([victim])
    (tmp_path / "go").touch()
    async with asyncio.timeout(DEADLINE):
        results: list[Any] = list(await calls)
    (error,) = [result for result in results if not isinstance(result, int)]
    assert (type(error), error.pid, error.exit_code, error.may_have_run) == (
        WorkerDiedError,
        victim,
        -signal.SIGKILL,
        True,
    )
    assert len([result for result in results if isinstance(result, int)]) == 1
    assert scripts.is_alive(other)
    assert await call_all(batcher, [3, 4]) == [3, 4]
    await batcher.stop()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1, signal.SIGSEGV])
@pytest.mark.parametrize("place", ["ours", "standard"])
async def test_killed_idle_worker_fails_no_caller(
    request: pytest.FixtureRequest, tmp_path: Path, number: signal.Signals, place: str
) -> None:
    """The next calls get results: a worker is replaced, a standard pool made again."""
    if place == "standard":
        request.getfixturevalue("standard")
    batcher = batched(
        functools.partial(work.note_pid_and_wait, tmp_path),
        executor="process",
        max_workers=2,
        max_batch_size=1,
    )
    calls = asyncio.gather(batcher(1), batcher(2))
    await wait_until(lambda: len([pid for pid in work.noted(tmp_path, "pid") if pid]) == 2)
    (tmp_path / "go").touch()
    assert list(await calls) == [1, 2]
    pids = [int(pid) for pid in work.noted(tmp_path, "pid")]
    os.kill(pids[0], number)
    if place == "standard":
        await wait_for_exit(pids)  # the pool ends the other one when it sees that exit
    assert await call_all(batcher, [3, 4]) == [3, 4]
    await batcher.stop()


@pytest.mark.slow
async def test_killed_idle_worker_breaks_a_given_pool() -> None:
    """The given pool is broken, and every call says so."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver")) as pool:
        batcher = batched(work.pids, executor=pool, max_queue_time=0)
        (pid,) = await call_all(batcher, [1])
        os.kill(pid, signal.SIGKILL)
        await wait_for_exit([pid])
        for _ in range(3):
            (error,) = await call_all(batcher, [1])
            assert type(error) is PoolBrokenError
        with pytest.raises(PoolBrokenError):
            await batcher.start()
        await batcher.stop()


@pytest.mark.slow
async def test_crashes_under_load() -> None:
    """Each of hundreds of calls gets its own result or WorkerDiedError."""
    batcher = batched(
        work.pids, executor="process", max_workers=2, max_batch_size=4, max_queue_time=0.001
    )
    for _ in range(3):
        calls = asyncio.gather(*(batcher(item) for item in range(40)), return_exceptions=True)
        (pid,) = await call_all(batcher, [0])
        if isinstance(pid, int):
            os.kill(pid, signal.SIGKILL)
        calls_after = await call_all(batcher, list(range(40)))
        async with asyncio.timeout(DEADLINE):
            results = [*await calls, *calls_after]
        assert {type(result) for result in results} <= {int, WorkerDiedError}
    (last,) = await call_all(batcher, [0])
    while type(last) is WorkerDiedError:  # of a worker killed above, not yet reaped then
        (last,) = await call_all(batcher, [0])
    assert type(last) is int
    await batcher.stop()


@pytest.mark.slow
async def test_crash_fails_start(tmp_path: Path) -> None:
    """A worker that crashes at its start fails ``start``; the next one may succeed."""
    setup = functools.partial(work.crash_once, tmp_path, "os._exit")
    batcher = batched(work.double, setup_worker=setup, executor="process", max_workers=1)
    with pytest.raises(WorkerDiedError):
        await batcher.start()
    async with batcher:
        assert await call_all(batcher, [1]) == [2]


# Halted workers.


@pytest.mark.slow
@pytest.mark.parametrize("how", ["force", "timeout", "cancel"])
async def test_stop_kills_a_halted_worker(tmp_path: Path, how: str) -> None:
    """A forced, timed-out or cancelled stop kills a worker that SIGSTOP halted."""
    batcher = batched(
        functools.partial(work.note_pid_and_halt, tmp_path), executor="process", max_workers=1
    )
    call = asyncio.gather(batcher(1), return_exceptions=True)
    await wait_until(lambda: any(work.noted(tmp_path, "pid")))
    async with asyncio.timeout(DEADLINE):
        await stop_by(how, batcher)
        assert [type(error) for error in await call] == [BatcherStoppedError]
    await wait_for_exit([int(pid) for pid in work.noted(tmp_path, "pid")])


@pytest.mark.slow
async def test_stop_kills_an_idle_halted_worker() -> None:
    """An idle worker that SIGSTOP halted is killed if it does not exit."""
    batcher = batched(work.pids, executor="process", max_workers=1)
    (pid,) = await call_all(batcher, [1])
    os.kill(pid, signal.SIGSTOP)
    stop = asyncio.ensure_future(batcher.stop())
    done, _ = await asyncio.wait([stop], timeout=DEADLINE / 2)
    if not done:  # or it would hang forever
        os.kill(pid, signal.SIGKILL)
    await stop
    assert done
    await wait_for_exit([pid])


@pytest.mark.slow
async def test_halted_worker_keeps_its_batch_when_another_crashes(tmp_path: Path) -> None:
    """The batch of a halted worker survives the crash of another worker."""
    batcher = batched(
        functools.partial(work.halt_or_crash, tmp_path),
        executor="process",
        max_workers=2,
        max_batch_size=1,
    )
    halted = asyncio.ensure_future(batcher("halt"))
    await wait_until(lambda: any(work.noted(tmp_path, "pid")))
    (error,) = await call_all(batcher, ["kill"])
    assert type(error) is WorkerDiedError
    assert await call_all(batcher, ["fine"]) == ["fine"]
    assert not halted.done()
    os.kill(int(work.noted(tmp_path, "pid")[0]), signal.SIGCONT)
    async with asyncio.timeout(DEADLINE):
        assert await halted == "halt"
        await batcher.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("standard")
async def test_halted_worker_of_a_standard_pool_delays_no_error(tmp_path: Path) -> None:
    """In a standard pool a halted worker delays no error when another crashes."""
    batcher = batched(
        functools.partial(work.halt_or_crash, tmp_path),
        executor="process",
        max_workers=2,
        max_batch_size=1,
    )
    halted = asyncio.gather(batcher("halt"), return_exceptions=True)
    await wait_until(lambda: any(work.noted(tmp_path, "pid")))
    (error,) = await call_all(batcher, ["kill"])
    assert type(error) is WorkerDiedError
    async with asyncio.timeout(DEADLINE):
        assert [type(error) for error in await halted] == [WorkerDiedError]
    assert await call_all(batcher, ["fine"]) == ["fine"]
    async with asyncio.timeout(DEADLINE):
        await batcher.stop()


@pytest.mark.slow
async def test_halted_worker_of_a_given_pool_is_left_alone(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """The callers get errors at once; the worker is left to the pool's owner."""
    batcher = batched(functools.partial(work.note_pid_and_halt, tmp_path), executor=pool)
    call = asyncio.gather(batcher(1), return_exceptions=True)
    await wait_until(lambda: any(work.noted(tmp_path, "pid")))
    async with asyncio.timeout(DEADLINE):
        await batcher.stop(force=True)
        assert [type(error) for error in await call] == [BatcherStoppedError]
    (pid,) = (int(pid) for pid in work.noted(tmp_path, "pid"))
    assert scripts.is_alive(pid)
    os.kill(pid, signal.SIGCONT)


# Executors that are shut down, block, or break the protocol.


@pytest.mark.parametrize("kind", ["process", "thread"])
async def test_a_given_pool_that_was_shut_down(kind: str) -> None:
    """Each call says that its pool is shut down, and what to do."""
    executor: Executor = ThreadPoolExecutor(1)
    if kind == "process":
        executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver"))
    batcher = batched(work.double, executor=executor, max_queue_time=0)
    assert await call_all(batcher, [1]) == [2]
    executor.shutdown()
    for _ in range(2):
        (error,) = await call_all(batcher, [1])
        assert type(error) is PoolBrokenError
        assert "shut down" in str(error)
        assert "new executor" in str(error)
    await batcher.stop()


@pytest.mark.slow
async def test_given_pool_shut_down_under_load(tmp_path: Path) -> None:
    """After ``shutdown(cancel_futures=True)`` every caller gets a result or an error."""
    executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver"))
    batcher = batched(
        functools.partial(work.gated, tmp_path), executor=executor, max_batch_size=1, concurrency=10
    )
    calls = asyncio.gather(*(batcher(item) for item in range(20)), return_exceptions=True)
    await wait_until(lambda: work.noted(tmp_path, "begun"))
    executor.shutdown(wait=False, cancel_futures=True)
    (tmp_path / "go").touch()
    async with asyncio.timeout(DEADLINE):
        results = await calls
    assert {type(result) for result in results} == {int, PoolBrokenError}
    assert any("cancel_futures" in str(result) for result in results)
    await batcher.stop()
    executor.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True])
def test_given_threads_shut_down_under_load(tmp_path: Path, elsewhere: bool) -> None:
    """``shutdown`` of given threads cancels under its own lock without a deadlock."""
    text = f"""
        import asyncio, threading
        from concurrent.futures import ThreadPoolExecutor
        from async_batcher import batched
        from async_batcher.exceptions import PoolBrokenError

        begun, go = threading.Event(), threading.Event()

        def process_batch(batch):
            begun.set()
            go.wait(20)
            return batch

        async def main():
            executor = ThreadPoolExecutor(1)
            batcher = batched(process_batch, executor=executor, max_batch_size=1, concurrency=10)
            calls = asyncio.gather(*(batcher(item) for item in range(20)), return_exceptions=True)
            while not begun.is_set():
                await asyncio.sleep(0.001)
            if {elsewhere}:
                await asyncio.to_thread(executor.shutdown, False, cancel_futures=True)
            else:
                executor.shutdown(False, cancel_futures=True)
            go.set()
            results = await calls
            assert {{type(result) for result in results}} == {{int, PoolBrokenError}}, results
            assert any("cancel_futures" in str(result) for result in results)
            await batcher.stop()
            print("good")

        asyncio.run(main())
    """
    done = scripts.run_any(tmp_path, text)
    assert done.stdout == "good\n", done.stderr


class _Blocking(Executor):
    """An executor whose ``submit`` waits for the test."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.free = threading.Event()
        self._broken = False
        self._threads = ThreadPoolExecutor(1)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.entered.set()
        assert self.free.wait(DEADLINE)
        return self._threads.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT002
        self.free.set()
        self._threads.shutdown(wait, cancel_futures=cancel_futures)


async def test_a_submit_that_blocks_does_not_stall_the_loop() -> None:
    """The event loop goes on while ``submit`` blocks."""
    with _Blocking() as executor:
        batcher = batched(work.double, executor=executor, max_queue_time=0)
        call = asyncio.ensure_future(batcher(1))
        await wait_until(executor.entered.is_set)
        await asyncio.sleep(0)
        assert not call.done()
        executor.free.set()
        assert await call == 2
        await batcher.stop()


async def test_forced_stop_while_submit_blocks() -> None:
    """A forced stop returns at once although ``submit`` blocks."""
    with _Blocking() as executor:
        batcher = batched(work.double, executor=executor, max_queue_time=0)
        call = asyncio.gather(batcher(1), batcher(2), return_exceptions=True)
        await wait_until(executor.entered.is_set)
        async with asyncio.timeout(DEADLINE):
            await batcher.stop(force=True)
        assert [type(error) for error in await call] == [BatcherStoppedError] * 2


async def test_submit_of_a_broken_pool_never_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers get an error if ``submit`` of a broken pool never returns."""
    from async_batcher._runners import executor as executor_module

    monkeypatch.setattr(executor_module, "_WATCHDOG_INTERVAL", 0.01)
    with _Blocking() as executor:
        batcher = batched(work.double, executor=executor, max_queue_time=0)
        first = asyncio.gather(batcher(1), batcher(2), return_exceptions=True)
        await wait_until(executor.entered.is_set)
        assert not first.done()
        executor._broken = True
        async with asyncio.timeout(DEADLINE):
            errors = [*await first, *await call_all(batcher, [3])]
        assert [type(error) for error in errors] == [PoolBrokenError] * 3
        assert all("make a new one" in str(error) for error in errors)
        async with asyncio.timeout(DEADLINE):
            await batcher.stop()


class _Odd(Executor):
    """An executor whose ``submit`` does what the test says."""

    def __init__(self, submit: Callable[[Callable[..., Any]], Any]) -> None:
        self._submit = submit

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # noqa: ARG002
        future: Future[Any] = self._submit(fn)
        return future


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def _failed(error: BaseException) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def _raise(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("submit", "expected"),
    [
        (lambda _: _raise(OSError("no more processes")), PoolBrokenError),
        (lambda _: _raise(SystemExit(3)), BatchError),
        (lambda _: _failed(OSError("lost")), PoolBrokenError),
        (lambda _: _failed(SystemExit(3)), PoolBrokenError),
        (lambda _: _done("no reply of ours"), BatchError),
        (lambda _: _done(None), BatchError),
        (lambda _: _done((ReplyKind.NEED_FUNCTION,)), BatchError),
        (lambda _: _done((ReplyKind.DONE,)), BatchError),
        (lambda _: None, PoolBrokenError),
    ],
    ids=[
        "raises",
        "exits",
        "failed",
        "failed_exit",
        "text",
        "none",
        "needs_for_ever",
        "short",
        "no_future",
    ],
)
async def test_executor_that_breaks_the_protocol(
    submit: Callable[[Any], Any], expected: type[Exception]
) -> None:
    """No caller waits forever for an executor that breaks the protocol."""
    batcher = batched(work.double, executor=_Odd(submit), max_queue_time=0)
    try:
        for _ in range(2):
            async with asyncio.timeout(DEADLINE):
                errors = await asyncio.gather(batcher(1), batcher(2), return_exceptions=True)
            assert [type(error) for error in errors] == [expected] * 2
    finally:
        await batcher.stop(force=True)


async def test_stop_with_an_executor_that_never_returns() -> None:
    """A forced or timed-out stop fails the callers."""
    for timeout in (None, 0.01):
        batcher = batched(work.double, executor=_Odd(lambda _: Future()), max_queue_time=0)
        call = asyncio.gather(batcher(1), return_exceptions=True)
        await asyncio.sleep(0)
        try:
            await batcher.stop(force=timeout is None, timeout=timeout)
        except TimeoutError:
            assert timeout is not None
        assert [type(error) for error in await call] == [BatcherStoppedError]


async def test_outcome_after_a_forced_stop_is_dropped() -> None:
    """An outcome after a forced stop is dropped, also after a restart."""
    futures: list[Future[Any]] = []

    def submit(_: Any) -> Future[Any]:
        futures.append(Future())
        return futures[-1]

    batcher = batched(work.double, executor=_Odd(submit), max_queue_time=0)
    call = asyncio.gather(batcher(1), return_exceptions=True)
    await wait_until(lambda: futures)
    await batcher.stop(force=True)
    futures[0].set_result("late")
    assert [type(error) for error in await call] == [BatcherStoppedError]


async def test_default_executor_shut_down() -> None:
    """Calls say that the loop's default executor is shut down."""
    batcher = batched(work.double, max_queue_time=0)
    assert await call_all(batcher, [1]) == [2]
    await asyncio.get_running_loop().shutdown_default_executor()
    (error,) = await call_all(batcher, [1])
    assert type(error) is PoolBrokenError
    await batcher.stop()


# Sharing, restarts, options.


@pytest.mark.slow
async def test_batchers_share_a_broken_pool(pool: ProcessPoolExecutor) -> None:
    """If one batcher breaks a shared pool, both get errors and neither hangs."""
    good, bad = batched(work.double, executor=pool), batched(work.crash_in_batch, executor=pool)
    assert list(await asyncio.gather(call_all(good, [1, 2]), call_all(bad, ["a"]))) == [
        [2, 4],
        ["a"],
    ]
    (error,) = await call_all(bad, ["kill"])
    assert type(error) is PoolBrokenError
    (error,) = await call_all(good, [1])
    assert type(error) is PoolBrokenError
    await good.stop()
    await bad.stop()


@pytest.mark.slow
async def test_broken_pool_affects_its_own_batcher_only() -> None:
    """A broken pool of one batcher does not affect another batcher."""
    options: dict[str, Any] = {"executor": "process", "max_workers": 1}
    async with (
        batched(work.double, **options) as good,
        batched(work.crash_in_batch, **options) as bad,
    ):
        (error,) = await call_all(bad, ["os._exit"])
        assert type(error) is WorkerDiedError
        assert await call_all(good, [1]) == [2]


@pytest.mark.slow
async def test_forced_stop_at_any_moment_of_the_start() -> None:
    """A forced stop at any moment of the start leaves no worker and no caller."""
    for turns in (0, 1, 2, 5, 20, 100):
        batcher = batched(work.double, executor="process", max_workers=2, max_queue_time=0)
        call = asyncio.gather(batcher(1), return_exceptions=True)
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE):
            await batcher.stop(force=True)
            assert [type(error) for error in await call] in ([BatcherStoppedError], [int])


@pytest.mark.slow
async def test_cancelled_start() -> None:
    """After a cancelled ``start``, calls and ``stop`` work."""
    batcher = batched(work.double, executor="process", max_workers=1)
    start = asyncio.ensure_future(batcher.start())
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert await call_all(batcher, [1]) == [2]
    await batcher.stop()


@pytest.mark.slow
@pytest.mark.parametrize("pending", [False, True])
def test_a_second_loop_after_the_first_has_closed(tmp_path: Path, pending: bool) -> None:
    """A batcher that was not stopped starts again on the next loop."""
    function = functools.partial(work.note_pid_and_wait, tmp_path)
    batcher: AsyncBatcher[Any, Any] = batched(function, executor="process", max_workers=1)

    async def first() -> None:
        call = asyncio.ensure_future(batcher.process(1))
        await wait_until(lambda: work.noted(tmp_path, "pid"))
        if not pending:
            (tmp_path / "go").touch()
            assert await call == 1

    async def last() -> None:
        (tmp_path / "go").touch()
        assert await batcher.process(2) == 2
        await batcher.stop()

    asyncio.run(first())
    asyncio.run(first())
    asyncio.run(last())


@pytest.mark.slow
async def test_dropped_batcher_ends_its_workers() -> None:
    """A batcher that is dropped without a stop ends its workers and threads."""
    for executor in ("process", "thread"):
        batcher = batched(work.double, executor=executor, max_workers=1)
        assert await call_all(batcher, [1]) == [2]
        del batcher
        gc.collect()


def _recycling_pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("forkserver"), max_tasks_per_child=2
    )


def test_warning_about_max_tasks_per_child() -> None:
    """Where ``max_tasks_per_child`` may hang, a warning names the user's line."""

    class Local(AsyncBatcher[int, int]):
        def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    with _recycling_pool() as pool:
        for make in (lambda: batched(work.double, executor=pool), lambda: Local(executor=pool)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                make()
            if sys.version_info >= (3, 14):
                assert not caught
                continue
            (warning,) = caught
            assert warning.category is RuntimeWarning
            assert "max_tasks_per_child" in str(warning.message)
            assert warning.filename == __file__


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="nothing to warn of")
def test_warning_in_a_script() -> None:
    """The main module belongs to no package, and a warning names its line, too."""
    script = compile("batched(function, executor=pool)", "script.py", "exec")
    names: dict[str, Any] = {"__name__": "__main__", "__package__": None, "batched": batched}
    with _recycling_pool() as pool:
        names.update(function=work.double, pool=pool)
        with pytest.warns(RuntimeWarning) as caught:
            exec(script, names)  # noqa: S102
    assert [warning.filename for warning in caught] == ["script.py"]


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 14), reason="may hang, and is warned of")
async def test_recycled_workers_of_a_given_pool_are_set_up() -> None:
    """Each new worker loads and sets up the function."""
    with _recycling_pool() as pool:
        batcher = batched(work.pids, executor=pool, max_queue_time=0)
        pids = [(await call_all(batcher, [i]))[0] for i in range(6)]
        assert all(isinstance(pid, int) for pid in pids), pids
        assert len(set(pids)) > 1
        await batcher.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("standard")
async def test_exit_status_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """If reading the exit status fails, the callers get that error."""

    def fail(_: object) -> None:
        raise ZeroDivisionError

    batcher = batched(lambda batch: os._exit(len(batch)), executor="process", max_workers=1)  # type: ignore[var-annotated]
    with monkeypatch.context() as patched:
        patched.setattr("async_batcher._runners.standard_pool.exited_processes", fail)
        async with asyncio.timeout(DEADLINE):
            errors = await call_all(batcher, [1, 2])
    assert [type(error) for error in errors] == [ZeroDivisionError] * 2
    await batcher.stop(force=True)


# Program exits.


_PROGRAM = """
    import asyncio, os, sys, time
    from async_batcher import batched

    def work(batch):
        if batch[0] == "pid":
            return [os.getpid()] * len(batch)
        print("begun", os.getpid(), flush=True)
        open(BEGUN, "w").close()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            BUSY
        return batch

    batcher = batched(work, executor="process", max_workers=2, max_batch_size=1)

    BEGUN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "begun")

    async def until_begun():
        while not os.path.exists(BEGUN):
            await asyncio.sleep(0.001)

    async def main():
        MAIN

    if __name__ == "__main__":
        asyncio.run(main())
"""


def _program(main: str, busy: str = "time.sleep(0.1)") -> str:
    return _PROGRAM.replace("MAIN", main.replace("\n", "\n        ")).replace("BUSY", busy)


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_a_program_that_ends_without_stop(tmp_path: Path, busy: bool) -> None:
    """The program exits at once, quietly, and leaves no worker."""
    main = "print(await batcher('pid'), flush=True)"
    if busy:
        main += "\ntask = asyncio.ensure_future(batcher('busy'))\nawait until_begun()"
    output = scripts.run_script(tmp_path, _program(main))
    pids = [int(word) for word in output.split() if word.isdigit()]
    assert len(pids) == 1 + busy
    asyncio.run(wait_for_exit(pids))


@pytest.mark.slow
def test_program_that_raises_ends_its_workers(tmp_path: Path) -> None:
    """Leaving ``async with`` by an exception ends the workers and shows it."""
    main = "async with batcher:\n    call = asyncio.gather(batcher('busy'), return_exceptions=True)"
    main += "\n    await until_begun()\n    1 / 0"
    done = scripts.run_any(tmp_path, _program(main))
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert "ZeroDivisionError" in done.stderr
    asyncio.run(wait_for_exit([int(word) for word in done.stdout.split() if word.isdigit()]))


_IN_C = pytest.param(
    "sum(range(10**12))",
    marks=pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's help"),
)
_HALTED = pytest.param(
    "os.kill(os.getpid(), 19)", marks=pytest.mark.skipif(sys.platform != "linux", reason="the same")
)


@pytest.mark.slow
@pytest.mark.parametrize("busy", ["", "time.sleep(0.1)", "pass", _IN_C, _HALTED])
def test_a_program_that_is_killed(tmp_path: Path, busy: str) -> None:
    """Workers exit with a killed program, idle or busy."""
    call = (
        "await batcher('busy')"
        if busy
        else "print('begun', await batcher('pid'), flush=True)\nawait asyncio.sleep(60)"
    )
    with scripts.start(tmp_path, _program(call, busy or "pass")) as program:
        assert program.stdout is not None
        word, pid = program.stdout.readline().split()
        assert word == "begun"
        family = [*descendants(program.pid), int(pid)]
        program.kill()
        program.wait(DEADLINE)
        asyncio.run(wait_for_exit(family))


@pytest.mark.slow
@pytest.mark.parametrize("within", [True, False])
def test_ctrl_c(tmp_path: Path, within: bool) -> None:
    """Ctrl-C ends the program by KeyboardInterrupt; its workers print nothing."""
    call = "async with batcher:\n    await batcher('busy')" if within else "await batcher('busy')"
    with scripts.start(tmp_path, _program(call)) as program:
        assert program.stdout is not None
        _, pid = program.stdout.readline().split()
        os.killpg(program.pid, signal.SIGINT)
        _, errors = program.communicate(timeout=DEADLINE)
        assert program.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
        assert errors.count("KeyboardInterrupt") in (
            1,
            2,
        )  # asyncio.run raises it from a CancelledError
        assert "Process " not in errors  # the head of a worker's traceback in multiprocessing
        assert "async_batcher-submit" not in errors
        asyncio.run(wait_for_exit([int(pid)]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fork is not safe there")
def test_forked_child_cannot_use_the_batcher(tmp_path: Path) -> None:
    """After os.fork() the child's copy raises; the parent's works on."""
    main = """
import signal, warnings
warnings.simplefilter("ignore")
async with batcher:
    assert await batcher("pid") != os.getpid()
    for same_loop in (False, True):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                if same_loop:
                    await batcher("pid")
                else:
                    asyncio.new_event_loop().run_until_complete(batcher("pid"))
            except RuntimeError as error:
                if "fork" in str(error) or same_loop:
                    os._exit(7)
                print(repr(error), flush=True)
            except BaseException as error:
                print(repr(error), flush=True)
            os._exit(8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert isinstance(await batcher("pid"), int)
print("good")"""
    done = scripts.run_any(tmp_path, _program(main))
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fork is not safe there")
def test_forked_child_exits_without_effect(tmp_path: Path) -> None:
    """A forked child that exits does not affect the parent's workers."""
    text = """
        import asyncio, os, sys, warnings
        from async_batcher import batched
        from tests.support import worker_functions

        batcher = batched(worker_functions.pids, executor="process", max_workers=1)

        async def main(loop_number):
            return await batcher(loop_number)

        if __name__ == "__main__":
            warnings.simplefilter("ignore")
            with asyncio.Runner() as runner:
                first = runner.run(main(1))
                child = os.fork()
                if child == 0:
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
                assert runner.run(main(2)) == first
                runner.run(batcher.stop())
            print("good")
    """
    assert scripts.run_script(tmp_path, text) == "good\n"
