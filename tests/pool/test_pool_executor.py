"""`WorkerPool.as_executor`: the contract of `concurrent.futures.Executor`, with real workers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import gc
import logging
import os
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher, WorkerPool, batched
from async_batcher.exceptions import BatchError, SerializationError, WorkerDiedError
from tests.support import scripts
from tests.support.polling import block_until
from tests.support.threads import HAS_GIL
from tests.support.worker_functions import (
    DEADLINE,
    CrashAtUnpickle,
    PickyError,
    fail_by,
    note_pid_and_wait,
    noted,
    wait_for,
)
from tests.support.worker_pools import METHODS, may_warn_of_fork

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="WorkerPool needs a loop that can watch sockets"
)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Every start method."""
    return str(request.param)


@pytest.fixture
def executor(method: str) -> Iterator[Executor]:
    """Two workers."""
    with WorkerPool(2, mp_context=method).as_executor() as executor:
        yield executor


@pytest.fixture
def one() -> Iterator[Executor]:
    """One worker, with the fastest start method."""
    with WorkerPool(1, mp_context=METHODS[0]).as_executor() as executor:
        yield executor


def capture(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments."""
    return args, kwargs


def seconds_slept(seconds: float) -> float:
    """Sleep, and return the seconds."""
    time.sleep(seconds)
    return seconds


class Thing:
    """An object with weak references."""

    def me(self) -> None:
        """Do nothing."""


def make_thing(_: int) -> Thing:
    """Return a new object."""
    return Thing()


class Unpicklable:
    """An object that cannot be pickled."""

    def __reduce__(self) -> str:
        """Raise ValueError."""
        msg = "not today"
        raise ValueError(msg)


def make_unpicklable() -> Unpicklable:
    """Return a result that cannot be pickled."""
    return Unpicklable()


def refuse(*_: Any) -> None:
    """Raise instead of starting a thread."""
    msg = "can't start new thread"
    raise RuntimeError(msg)


def exception_of(future: Future[Any]) -> BaseException | None:
    """Wait for a future; return its exception."""
    return future.exception(timeout=DEADLINE)


# Calls and their results.


@may_warn_of_fork
def test_results_exceptions_and_arguments(executor: Executor) -> None:
    """Results, exceptions and arguments of any name arrive."""
    assert executor.submit(pow, 2, 8).result(DEADLINE) == 256
    assert executor.submit(capture, 1, self=2, fn=3, args=4).result(DEADLINE) == (
        (1,),
        {"self": 2, "fn": 3, "args": 4},
    )
    assert executor.submit(lambda: os.getpid() != 0).result(DEADLINE)
    raised = exception_of(executor.submit(divmod, 1, 0))
    assert type(raised) is ZeroDivisionError
    assert "divmod" in str(raised.__cause__) or "call" in str(raised.__cause__)
    with pytest.raises(TypeError):
        executor.submit(fn=pow)  # type: ignore[call-arg]


@may_warn_of_fork
def test_map(executor: Executor) -> None:
    """`map` yields the results in order, lazily, and raises in its turn."""
    squares = [n * n for n in range(40)]
    for size in (1, 6, 40, 50):
        assert list(executor.map(pow, range(40), [2] * 40, chunksize=size)) == squares
    assert list(executor.map(pow, range(40), range(0), chunksize=7)) == []
    with pytest.raises(ValueError, match="chunksize=-1"):
        executor.map(pow, range(4), range(4), chunksize=-1)
    results = executor.map(divmod, [1, 1, 1], [2, 0, 1])
    assert next(results) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.skipif(sys.version_info < (3, 14), reason="buffersize came with Python 3.14")
def test_map_with_a_buffer(one: Executor) -> None:
    """`map` reads at most ``buffersize`` chunks ahead."""
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for n in range(12):
            taken.append(n)
            yield n

    results = one.map(str, numbers(), chunksize=2, buffersize=2)  # type: ignore[call-arg,unused-ignore]
    assert taken == [0, 1, 2, 3]
    assert list(results) == [str(n) for n in range(12)]


@pytest.mark.slow
def test_map_times_out(one: Executor, tmp_path: Path) -> None:
    """`map` yields what came in time, and raises TimeoutError for the rest."""
    one.submit(int).result(DEADLINE)
    results = one.map(wait_for, [tmp_path, tmp_path / "gate"], timeout=2.0)
    try:
        assert next(results) is None
        with pytest.raises(TimeoutError):
            next(results)
    finally:
        (tmp_path / "gate").touch()


def test_nothing_is_kept(one: Executor) -> None:
    """After a call, nothing refers to its function, arguments or result."""
    collected = threading.Event()
    thing = Thing()
    weakref.finalize(thing, collected.set)
    one.submit(thing.me).result(DEADLINE)
    del thing
    one.submit(int).result(DEADLINE)  # the thread has come back from the first one
    gc.collect()
    assert collected.is_set()
    for result in one.map(make_thing, range(4)):
        held = weakref.ref(result)
        del result
        if not HAS_GIL:
            one.submit(int).result(DEADLINE)  # its thread frees what it has made when it runs again
        block_until(functools.partial(_is_gone, held))  # the thread may not be back from telling


def test_a_failed_future_is_in_no_cycle(one: Executor) -> None:
    """A future that failed is freed by reference counting."""
    gc.collect()
    gc.disable()
    try:
        future = one.submit(divmod, 1, 0)
        exception_of(future)
        one.submit(int).result(DEADLINE)
        gone = weakref.ref(future)
        del future
        assert gone() is None
    finally:
        gc.enable()


@may_warn_of_fork
@pytest.mark.slow
def test_unpicklable_arguments_and_results(executor: Executor) -> None:
    """They fail their own call, and no other."""
    failures = [
        exception_of(executor.submit(id, Unpicklable())),
        exception_of(executor.submit(make_unpicklable)),
        exception_of(executor.submit(id, CrashAtUnpickle("raise"))),
    ]
    assert [type(failure) for failure in failures] == [SerializationError] * 3
    picky = exception_of(executor.submit(_raise_picky))
    assert (type(picky), str(picky)) == (PickyError, "1: why not")
    assert type(exception_of(executor.submit(sys.exit, 3))) is BatchError
    assert executor.submit(pow, 2, 8).result(DEADLINE) == 256


def _raise_picky() -> None:
    raise PickyError(1, "why not")


@may_warn_of_fork
def test_a_killed_worker(executor: Executor, tmp_path: Path) -> None:
    """The call that it ran fails, and its replacement runs the next calls."""
    victim = executor.submit(note_pid_and_wait, tmp_path, [1])
    pid = _pid_of(tmp_path)
    os.kill(pid, signal.SIGKILL)
    died = exception_of(victim)
    assert isinstance(died, WorkerDiedError)
    assert (died.pid, died.exit_code, died.may_have_run) == (pid, -signal.SIGKILL, True)
    assert isinstance(exception_of(executor.submit(fail_by, "exit")), WorkerDiedError | BatchError)
    assert list(executor.map(abs, range(-4, 0))) == [4, 3, 2, 1]


def _pid_of(folder: Path) -> int:
    block_until(lambda: noted(folder, "pid"))
    return int(noted(folder, "pid")[0])


@may_warn_of_fork
@pytest.mark.slow
def test_max_tasks_per_child_of_an_executor(method: str) -> None:
    """Each worker runs exactly that many calls, after the initializer."""
    with WorkerPool(
        1, mp_context=method, max_tasks_per_child=3, initializer=_note_here, initargs=("set",)
    ).as_executor() as executor:
        seen = [executor.submit(_pid_and_note).result(DEADLINE) for _ in range(7)]
    pids = [pid for pid, _ in seen]
    assert pids == [pids[0]] * 3 + [pids[3]] * 3 + [pids[6]]
    assert len(set(pids)) == 3
    assert {note for _, note in seen} == {"set"}


_here: list[str] = []


def _note_here(text: str) -> None:
    _here.append(text)


def _pid_and_note() -> tuple[int, str]:
    return os.getpid(), _here[0]


# Futures.


def test_states_of_futures(one: Executor, tmp_path: Path) -> None:
    """A running call cannot be cancelled; a queued one can, and is never run.

    Those that wait for a cancelled call are notified at once.
    """
    busy: Future[Any] = one.submit(note_pid_and_wait, tmp_path, ["done"])
    _pid_of(tmp_path)
    waiting: Future[Any] = one.submit((tmp_path / "ran").touch)
    other: Future[Any] = one.submit(pow, 2, 8)
    try:
        assert (busy.running(), busy.done(), busy.cancel()) == (True, False, False)
        assert (waiting.running(), waiting.cancel(), waiting.cancelled()) == (False, True, True)
        assert concurrent.futures.wait([waiting], DEADLINE).done == {waiting}
        assert list(concurrent.futures.as_completed([waiting], DEADLINE)) == [waiting]
        with pytest.raises(CancelledError):
            waiting.result()
        assert concurrent.futures.wait(
            [busy, waiting, other], DEADLINE, "FIRST_COMPLETED"
        ).done == {waiting}
    finally:
        (tmp_path / "go").touch()
    assert concurrent.futures.wait([busy, other], DEADLINE).done == {busy, other}
    assert (busy.result(), other.result(), busy.cancel()) == (["done"], 256, False)
    assert not (tmp_path / "ran").exists()


def test_callbacks(one: Executor, caplog: pytest.LogCaptureFixture) -> None:
    """A callback may submit and shut down; the executor goes on if it raises, even SystemExit."""
    later: Future[Future[int]] = Future()
    with caplog.at_level(logging.ERROR):
        first = one.submit(pow, 2, 2)
        first.add_done_callback(lambda _: sys.exit(3))
        second = one.submit(pow, 2, 3)
        second.add_done_callback(lambda _: later.set_result(one.submit(pow, 2, 4)))
        assert (
            first.result(DEADLINE),
            second.result(DEADLINE),
            later.result(DEADLINE).result(DEADLINE),
        ) == (4, 8, 16)
    last = one.submit(pow, 2, 5)
    last.add_done_callback(lambda _: one.shutdown())
    assert last.result(DEADLINE) == 32
    one.shutdown()


@pytest.mark.slow
def test_many_threads() -> None:
    """Each of 10,000 calls from eight threads gets its own result."""
    with WorkerPool(2).as_executor() as executor:
        wrong: list[object] = []

        def submit(start: int) -> None:
            futures = [(n, executor.submit(abs, -n)) for n in range(start, start + 1_250)]
            wrong.extend((n, future) for n, future in futures if future.result(3 * DEADLINE) != n)

        threads = [threading.Thread(target=submit, args=(1_250 * i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_ctrl_c_while_waiting(one: Executor, tmp_path: Path) -> None:
    """KeyboardInterrupt is raised in the program; the call and the executor go on."""
    future = one.submit(note_pid_and_wait, tmp_path, ["done"])
    _pid_of(tmp_path)
    main = threading.main_thread().ident
    assert main is not None
    interrupter = threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it may come at once
        interrupter.start()
        future.result(DEADLINE)
    interrupter.join()
    (tmp_path / "go").touch()
    assert future.result(DEADLINE) == ["done"]


# The end.


@may_warn_of_fork
def test_shutdown(method: str) -> None:
    """`shutdown` runs the submitted calls, and leaves no worker; new calls fail.

    A second shutdown does nothing.
    """
    executor = WorkerPool(2, mp_context=method).as_executor()
    futures = [executor.submit(seconds_slept, 0.01) for _ in range(20)]
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(int)
    threads = [threading.Thread(target=executor.shutdown) for _ in range(3)]
    for thread in threads:
        thread.start()
    executor.shutdown()
    for thread in threads:
        thread.join()
    assert [future.result(0) for future in futures] == [0.01] * 20
    executor.shutdown()


@pytest.mark.parametrize("earlier", [False, True])
def test_shutdown_with_cancel_futures(earlier: bool, tmp_path: Path) -> None:
    """It cancels queued calls, also after another shutdown; a running call ends."""
    executor = WorkerPool(1).as_executor()
    busy = executor.submit(note_pid_and_wait, tmp_path, ["done"])
    _pid_of(tmp_path)
    waiting = [executor.submit(pow, 2, 8) for _ in range(50)]
    if earlier:
        executor.shutdown(wait=False)
    executor.shutdown(wait=False, cancel_futures=True)
    assert concurrent.futures.wait(waiting, DEADLINE).not_done == set()
    (tmp_path / "go").touch()
    executor.shutdown()
    assert busy.result(0) == ["done"]
    assert all(future.cancelled() for future in waiting)


def test_an_unused_executor() -> None:
    """It has neither a thread nor workers, and ends at once."""
    before = threading.active_count()
    with WorkerPool(2).as_executor() as executor:
        assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(int)


def test_a_garbage_collected_executor(tmp_path: Path) -> None:
    """It runs the submitted calls, and then ends its workers and its thread."""
    executor = WorkerPool(1).as_executor()
    busy = executor.submit(note_pid_and_wait, tmp_path, ["done"])
    waiting = executor.submit(pow, 2, 8)
    pid = _pid_of(tmp_path)
    gone = weakref.ref(executor)
    del executor
    assert gone() is None
    (tmp_path / "go").touch()
    assert (busy.result(DEADLINE), waiting.result(DEADLINE)) == (["done"], 256)
    block_until(lambda: not scripts.is_alive(pid))


def _is_gone(reference: weakref.ref[Any]) -> bool:
    return reference() is None


PROGRAM = """
    import os, sys, time
    from async_batcher import WorkerPool

    def say(seconds, text):
        time.sleep(seconds)
        print(text, flush=True)

    executor = WorkerPool(2, mp_context={method!r}).as_executor()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "rest",
    [
        "executor.submit(say, 0.2, 'said')",
        "executor.submit(say, 0.2, 'said'); executor.shutdown(wait=False)",
        "executor.submit(say, 0.2, 'said'); del executor",
    ],
)
def test_program_exit(method: str, rest: str, tmp_path: Path) -> None:
    """A program that exits waits for the submitted calls."""
    assert scripts.run_script(tmp_path, PROGRAM.format(method=method) + "    " + rest) == "said\n"


@pytest.mark.slow
@pytest.mark.parametrize("used", [True, False])
def test_submit_in_an_exit_handler(used: bool, tmp_path: Path) -> None:
    """It raises RuntimeError; no call is lost without an error."""
    text = (
        PROGRAM.format(method=METHODS[0])
        + f"""
    import atexit

    @atexit.register
    def last():
        try:
            executor.submit(int)
        except RuntimeError as exc:
            print(exc)

    if {used}:
        executor.submit(int).result()
    """
    )
    assert scripts.run_script(tmp_path, text).startswith("cannot schedule new futures after ")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child(tmp_path: Path) -> None:
    """A child cannot use its parent's executor, can exit, and can make its own."""
    text = (
        PROGRAM.format(method=METHODS[0])
        + """
    import warnings
    warnings.simplefilter("ignore")
    executor.submit(int).result()
    if os.fork() == 0:
        try:
            executor.submit(int)
        except RuntimeError as exc:
            print("os.fork()" in str(exc), flush=True)
        executor.shutdown()
        with WorkerPool(1).as_executor() as own:
            print(own.submit(pow, 2, 8).result(), flush=True)
        sys.exit(0)
    os.wait()
    executor.submit(say, 0, "parent").result()
    """
    )
    assert scripts.run_script(tmp_path, text) == "True\n256\nparent\n"


# What can go wrong.


@may_warn_of_fork
def test_an_initializer_that_raises(method: str) -> None:
    """All callers get BrokenExecutor, caused by what was raised, and new calls fail."""
    with WorkerPool(
        2, mp_context=method, initializer=divmod, initargs=(1, 0)
    ).as_executor() as executor:
        futures = [executor.submit(int) for _ in range(5)]
        for broken in map(exception_of, futures):
            assert isinstance(broken, BrokenExecutor)
            assert isinstance(broken.__cause__, ZeroDivisionError)
        with pytest.raises(BrokenExecutor, match="ZeroDivisionError"):
            executor.submit(int)


def test_a_thread_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """`submit` raises, and the next call tries again."""
    with WorkerPool(1).as_executor() as executor:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                executor.submit(int)
        assert executor.submit(pow, 2, 8).result(DEADLINE) == 256


@may_warn_of_fork
@pytest.mark.slow
def test_no_helper_threads(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without helper threads the loop's thread does their work, for large arguments, too."""
    monkeypatch.setattr("concurrent.futures.thread.ThreadPoolExecutor._adjust_thread_count", refuse)
    with WorkerPool(1, mp_context=method).as_executor() as executor:
        data = bytearray(5_000_000)
        assert executor.submit(bytes, data).result(DEADLINE) == data


def test_a_pool_in_use() -> None:
    """A pool has one executor at a time; a stopped pool is reopened."""
    pool = WorkerPool(1)
    with pool.as_executor() as first:
        assert first.submit(pow, 2, 2).result(DEADLINE) == 4
        with pytest.raises(RuntimeError, match="in use"):
            pool.as_executor()
        assert first.submit(pow, 2, 3).result(DEADLINE) == 8
    with pool.as_executor() as second:
        assert second.submit(pow, 2, 4).result(DEADLINE) == 16


# Where an executor is expected.


async def test_run_in_executor(one: Executor) -> None:
    """`loop.run_in_executor` accepts the executor."""
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(one, functools.partial(pow, 2, 8)) == 256
    with pytest.raises(ZeroDivisionError):
        await loop.run_in_executor(one, divmod, 1, 0)


class Doubler(AsyncBatcher[int, int]):
    """Doubles each item."""

    def process_batch(self, batch: list[int]) -> list[int]:
        """Run in a worker."""
        return [item * 2 for item in batch]


async def test_in_a_batcher(one: Executor) -> None:
    """A batcher accepts the executor, and leaves it running."""
    async with Doubler(executor=one) as batcher:
        assert await asyncio.gather(*map(batcher.process, range(5))) == [0, 2, 4, 6, 8]
    assert one.submit(pow, 2, 8).result(DEADLINE) == 256


async def test_a_crash_in_a_batcher(one: Executor) -> None:
    """A batch whose worker crashes fails with WorkerDiedError, and the next one runs."""
    async with batched(_end_some, executor=one) as batcher:
        with pytest.raises(WorkerDiedError):
            await batcher.process("os._exit")
        assert await batcher.process("live") == "live"


def _end_some(batch: list[str]) -> list[str]:
    if batch != ["live"]:
        fail_by(batch[0])
    return batch
