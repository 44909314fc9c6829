"""`WorkerPool` by itself: its options, calls and their results, time, workers that come and go, and its end.

What crosses and how: ``transport/test_large_buffers.py``, ``transport/test_unusual_buffers.py``; how programs with a pool end:
``pool/test_programs.py``; deaths by chance: ``pool/test_chaos.py``. ``_nothing_left`` (conftest) looks after what a test leaves
behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import gc
import math
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import async_batcher
from async_batcher import WorkerPool, batched
from async_batcher._pool import process_watcher, supervisor
from async_batcher._pool.cpu_count import cpu_count
from async_batcher.exceptions import (
    BatchError,
    BatcherStoppedError,
    BatchTimeoutError,
    PoolBrokenError,
    SerializationError,
    WorkerDiedError,
)
from tests.support import scripts
from tests.support import worker_functions as work
from tests.support.polling import wait_for_exit, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),  # what the test asks for
]

METHODS = ["forkserver", "spawn", "fork"] if sys.platform == "linux" else ["forkserver", "spawn"]


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    """Two workers, started the usual way."""
    async with WorkerPool(2) as two:
        yield two


def pids_of(pool: WorkerPool) -> list[int]:
    """Its workers' process ids."""
    return [worker.pid for worker in pool.workers() if worker.pid is not None]


def numbers(folder: Path, kind: str) -> list[int]:
    """The numbers that workers have noted, those that are written."""
    return [int(text) for text in work.noted(folder, kind) if text]


def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let starts that failed be tried again sooner."""
    monkeypatch.setattr(supervisor, "_BACKOFF_DELAYS", (0.01, 0.02, 0.03))


# Options.


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"max_workers": 0}, ValueError, ("max_workers=0", "at least 1")),
        ({"max_workers": True}, TypeError, ("max_workers=True", "whole number", "bool")),
        ({"max_workers": "2"}, TypeError, ("max_workers='2'", "whole number", "str")),
        ({"max_tasks_per_child": 0}, ValueError, ("max_tasks_per_child=0", "at least 1")),
        ({"max_tasks_per_child": 1.5}, TypeError, ("max_tasks_per_child=1.5", "whole number", "float")),
        ({"max_memory_per_child": -1}, ValueError, ("max_memory_per_child=-1", "at least 1")),
        ({"threads_per_worker": -1}, ValueError, ("threads_per_worker=-1", "at least 0")),
        ({"start_timeout": 0}, ValueError, ("start_timeout=0", "more than 0")),
        ({"start_timeout": None}, TypeError, ("start_timeout=None", "seconds")),
        ({"start_timeout": math.nan}, ValueError, ("start_timeout=nan", "seconds")),
        ({"initializer": 3}, TypeError, ("initializer=3", "function")),
        ({"initializer": asyncio.sleep}, TypeError, ("initializer=<function sleep", "async")),
        ({"initializer": print, "initargs": 5}, TypeError, ("initargs=5", "tuple")),
        ({"mp_context": "threads"}, ValueError, ("mp_context='threads'", "'forkserver'", "'spawn'", "'fork'")),
        ({"mp_context": 3}, TypeError, ("mp_context=3", "'forkserver'", "'spawn'", "'fork'")),
    ],
    ids=str,
)
def test_an_option_that_is_refused(options: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    """The message names the option, its value and what is allowed."""
    with pytest.raises(error) as caught:
        WorkerPool(**options)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_options_are_by_keyword_but_for_the_first() -> None:
    """As those of ProcessPoolExecutor are called; the second one is not the same there."""
    with pytest.raises(TypeError, match="positional"):
        WorkerPool(2, "spawn")  # type: ignore[call-arg, misc, unused-ignore]


def test_how_many_workers() -> None:
    """As many as usable cores, if nothing is said."""
    assert WorkerPool().max_workers == cpu_count()
    assert WorkerPool(3).max_workers == 3


def test_a_pool_that_is_not_used_costs_nothing() -> None:
    """Nothing starts before the first call (conftest), and there are no workers to tell of."""
    assert WorkerPool(2).workers() == []


def test_a_pool_does_not_cross() -> None:
    """It cannot be pickled, and says what to do."""
    with pytest.raises(TypeError, match="make one where it is used"):
        pickle.dumps(WorkerPool(1))


def test_it_is_where_users_look() -> None:
    """``from async_batcher import WorkerPool``."""
    assert async_batcher.WorkerPool is WorkerPool
    assert async_batcher.WorkerInfo.__name__ == "WorkerInfo"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("as_context", [False, True], ids=["name", "context"])
async def test_every_start_method(method: str, as_context: bool) -> None:  # noqa: FBT001
    """Given by its name or as a context of multiprocessing: workers are processes of their own, and take turns."""
    context: Any = multiprocessing.get_context(method) if as_context else method
    async with WorkerPool(2, mp_context=context) as pool:
        assert len(set(pids_of(pool))) == 2
        used = await asyncio.gather(*(pool.run(os.getpid) for _ in range(10)))
        assert set(used) <= set(pids_of(pool))
        assert os.getpid() not in used


# Calls and what comes of them.


async def test_what_can_be_called(pool: WorkerPool) -> None:
    """Builtins, importable functions, lambdas, closures, partials, methods, and methods of local classes."""
    step = 5

    class Local(work.Scale):
        def twice(self, batch: list[int]) -> list[int]:
            return [2 * item for item in self(batch)]

    assert await pool.run(abs, -3) == 3
    assert await pool.run(work.double, [1, 2]) == [2, 4]
    assert await pool.run(lambda: step + 1) == 6
    assert await pool.run(lambda number, *rest: (number + step, rest), 1, 2, 3) == (6, (2, 3))
    assert await pool.run(functools.partial(pow, 2), 10) == 1024
    assert await pool.run(work.Scale(2).__call__, [1]) == [2]
    assert await pool.run(Local(3).twice, [1]) == [6]
    assert await pool.run(work.Scale(3), [1]) == [3]
    nothing: Any = await pool.run(lambda: None)
    assert nothing is None


async def test_a_function_that_was_found_by_its_name(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one that was given, even if its module has bound the name to another one since."""
    assert await pool.run(work.double, [1]) == [2]
    monkeypatch.setattr(work, "double", work.Scale(3))
    assert await pool.run(work.double, [1]) == [3]
    monkeypatch.undo()
    assert [await pool.run(call, [2]) for call in (work.double, work.Scale(5), work.double, len)] == [[4], [10], [4], 1]


async def test_an_async_function_is_refused(pool: WorkerPool) -> None:
    """However it is wrapped; nothing in a worker could await it."""

    async def sleeps() -> None: ...

    async def yields() -> AsyncIterator[int]:
        yield 1

    class Called:
        async def __call__(self) -> None: ...

    for function in (sleeps, yields, functools.partial(sleeps), Called()):
        with pytest.raises(TypeError, match="is async"):
            await pool.run(function)


@pytest.mark.parametrize(
    ("timeout", "error", "text"),
    [
        (0, ValueError, "timeout=0: must be a number of seconds, more than 0"),
        ("1", TypeError, "timeout='1'"),
        (-1, ValueError, "-1"),
    ],
)
async def test_a_timeout_that_is_refused(timeout: Any, error: type[Exception], text: str) -> None:  # noqa: ASYNC109 - of the call
    """Before anything starts."""
    with pytest.raises(error, match=re.escape(text)):
        await WorkerPool(1).run(abs, -1, timeout=timeout)


async def test_every_call_gets_its_own_result(pool: WorkerPool) -> None:
    """Hundreds at once, on two workers."""
    results = await asyncio.gather(*(pool.run(work.scaled, factor, [1, 2]) for factor in range(300)))
    assert results == [[factor, 2 * factor] for factor in range(300)]


async def test_the_first_call_starts_it() -> None:
    """Without ``start`` or ``async with``."""
    pool = WorkerPool(1)
    assert await pool.run(abs, -1) == 1
    await pool.stop()


async def test_what_the_function_raised(pool: WorkerPool) -> None:
    """It is raised with its type and attributes; its cause shows the worker's traceback. The worker works on."""
    before = pids_of(pool)
    with pytest.raises(work.FrankError, match="frankly") as caught:
        await pool.run(work.raise_what_is_named, ["frank"])
    assert caught.value.code == 7
    assert caught.value.__cause__ is not None
    assert "in raise_what_is_named" in "".join(traceback.format_exception(caught.value.__cause__))
    assert pids_of(pool) == before
    with pytest.raises(work.FalsyError):
        await pool.run(work.raise_what_is_named, ["falsy"])


async def test_an_exception_that_is_returned(pool: WorkerPool) -> None:
    """It is a result as any other."""
    error = await pool.run(lambda: ValueError("here you are"))
    assert type(error) is ValueError
    assert str(error) == "here you are"
    assert [type(one) for one in await pool.run(lambda: [KeyError(1), StopIteration()])] == [KeyError, StopIteration]


@pytest.mark.parametrize("name", ["exit", "interrupt", "stop", "cancelled", "closed"])
async def test_what_cannot_be_raised_as_itself(pool: WorkerPool, name: str) -> None:
    """What would mean something else here is a BatchError that names it; the worker works on."""
    with pytest.raises(BatchError) as caught:
        await pool.run(work.raise_what_is_named, [name])
    assert caught.value.original_type.rpartition(".")[2] in str(caught.value)
    assert await pool.run(work.raise_what_is_named, []) == []


async def test_what_cannot_cross(pool: WorkerPool) -> None:
    """A function, an argument or a result that cannot be pickled, there and back, is a SerializationError that says so."""
    lock = threading.Lock()
    with pytest.raises(SerializationError, match="lock"):
        await pool.run(lambda: lock)
    with pytest.raises(SerializationError, match="lock"):
        await pool.run(id, lock)
    with pytest.raises(SerializationError, match="lock"):
        await pool.run(threading.Lock)
    with pytest.raises(SerializationError, match="this hurts"):
        await pool.run(id, work.CrashAtUnpickle("raise"))
    with pytest.raises(SerializationError, match="this hurts"):
        await pool.run(work.CrashAtUnpickle, "raise")
    assert await pool.run(abs, -1) == 1


async def test_classes_of_the_caller(pool: WorkerPool) -> None:
    """An instance of a class that the worker had to be told of comes back as one of the original class, which is as it was."""

    class Local:
        count = 0

        def __init__(self, value: int) -> None:
            self.value = value

    def more(one: Any) -> Any:
        type(one).count += 1
        one.value += 1
        return one

    for _ in range(3):
        back = await pool.run(more, Local(1))
        assert type(back) is Local
        assert back.value == 2
    assert Local.count == 0


async def test_the_context_of_a_call_is_left_alone(pool: WorkerPool) -> None:
    """A coroutine that calls from many tasks, in whatever context, gets its own answers."""
    results = await asyncio.gather(*(asyncio.create_task(pool.run(abs, -i)) for i in range(20)))
    assert results == list(range(20))


# Callers who leave.


async def test_a_caller_who_leaves_while_waiting(tmp_path: Path) -> None:
    """The call is never run, and its neighbours are."""
    async with WorkerPool(1) as pool:
        first = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
        await wait_until(lambda: work.noted(tmp_path, "pid"))
        waiting = [asyncio.ensure_future(pool.run(work.note, tmp_path, "ran", str(i))) for i in range(3)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0)
        (tmp_path / "go").touch()
        results = await asyncio.gather(first, *waiting, return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["list", "NoneType", "CancelledError", "NoneType"]
    assert work.noted(tmp_path, "ran") == ["0", "2"]


async def test_a_caller_who_leaves_while_it_runs(tmp_path: Path) -> None:
    """The call runs on unseen, its worker is busy until then, and takes the next one after it."""
    async with WorkerPool(1) as pool:
        (pid,) = pids_of(pool)
        running = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
        await wait_until(lambda: work.noted(tmp_path, "pid"))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        following = asyncio.ensure_future(pool.run(os.getpid))
        await asyncio.sleep(0)
        assert [worker.state for worker in pool.workers()] == ["busy"]
        assert not following.done()
        (tmp_path / "go").touch()
        assert await following == pid


# Time.


HANGS: dict[str, Callable[..., Any]] = {
    "waits": signal.pause,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "in_c": lambda: sum(range(10**12)),
    "in_re": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
    "deaf": lambda: (signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.pause()),  # type: ignore[func-returns-value]
}


@pytest.mark.slow
@pytest.mark.parametrize("way", HANGS)
@pytest.mark.parametrize("method", METHODS)
async def test_a_batch_that_hangs(tmp_path: Path, way: str, method: str) -> None:
    """Its worker is ended, in whatever it is stuck, and no other: what runs beside it ends well, in its own worker."""
    async with WorkerPool(2, mp_context=method) as pool:
        beside = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [1]))
        await wait_until(lambda: numbers(tmp_path, "pid"))
        (other,) = numbers(tmp_path, "pid")
        (victim,) = set(pids_of(pool)) - {other}
        with pytest.raises(BatchTimeoutError, match=rf"longer than 0\.2 seconds.*{victim}") as caught:
            await pool.run(HANGS[way], timeout=0.2)
        assert isinstance(caught.value, TimeoutError)
        await wait_for_exit([victim])
        assert not beside.done()
        (tmp_path / "go").touch()
        assert await beside == [1]
        assert other in pids_of(pool)
        await wait_until(lambda: [worker.state for worker in pool.workers()] == ["idle"] * 2)


@pytest.mark.slow
async def test_a_batch_in_time(pool: WorkerPool) -> None:
    """A timeout that is not reached changes nothing, later either."""
    before = pids_of(pool)
    assert [await pool.run(abs, -i, timeout=0.2) for i in range(20)] == list(range(20))
    loop = asyncio.get_running_loop()
    start = loop.time()
    await wait_until(lambda: loop.time() > start + 0.3)
    assert pids_of(pool) == before


async def test_a_timeout_without_end(pool: WorkerPool) -> None:
    """``math.inf`` seconds are as good as none."""
    assert await pool.run(abs, -1, timeout=math.inf) == 1


@pytest.mark.slow
async def test_waiting_does_not_count(tmp_path: Path) -> None:
    """The time runs from when the batch begins, not while all workers are busy with others."""
    async with WorkerPool(1) as pool:
        first = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
        await wait_until(lambda: work.noted(tmp_path, "pid"))
        second = asyncio.ensure_future(pool.run(abs, -1, timeout=0.2))
        loop = asyncio.get_running_loop()
        start = loop.time()
        await wait_until(lambda: loop.time() > start + 0.5)
        assert not second.done()
        (tmp_path / "go").touch()
        assert await second == 1
        await first


@pytest.mark.slow
async def test_an_idle_worker_that_was_stopped(pool: WorkerPool) -> None:
    """A batch that it was given and has not begun is run by another, unseen."""
    pids = await asyncio.gather(*(pool.run(os.getpid, timeout=5.0) for _ in range(20)))
    victim = pids[-1]  # the next batch goes to the one that was busy last
    os.kill(victim, signal.SIGSTOP)
    results = await asyncio.gather(*(pool.run(os.getpid, timeout=0.5) for _ in range(4)))
    assert victim not in results
    await wait_for_exit([victim])


@pytest.mark.slow
async def test_an_answer_just_in_time(pool: WorkerPool) -> None:
    """Batches that take about as long as they may: each gets its answer or BatchTimeoutError, never anything else."""
    import time

    def take(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    async def one(seconds: float) -> str:
        try:
            return "answer" if await pool.run(take, seconds, timeout=0.05) == seconds else "wrong"
        except BatchTimeoutError:
            return "timeout"

    results = Counter(await asyncio.gather(*(one(0.044 + i * 0.0003) for i in range(40))))
    assert set(results) <= {"answer", "timeout"}
    assert await pool.run(abs, -1) == 1


# What is known of workers.


async def test_what_is_known_of_workers(tmp_path: Path) -> None:
    """A frozen record of each: its process, what it does, how much it has done, and its memory."""
    pool = WorkerPool(2)
    start = asyncio.ensure_future(pool.start())
    await asyncio.sleep(0)
    assert [worker.state for worker in pool.workers()] == ["starting"] * 2
    await start
    workers = pool.workers()
    assert [(worker.state, worker.batches) for worker in workers] == [("idle", 0)] * 2
    assert len({worker.pid for worker in workers}) == 2
    assert all(1 << 20 < worker.memory < 1 << 30 for worker in workers)
    with pytest.raises(dataclasses.FrozenInstanceError):
        workers[0].batches = 3  # type: ignore[call-arg, misc, unused-ignore]
    call = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
    await wait_until(lambda: numbers(tmp_path, "pid"))
    busy = {worker.pid: worker.state for worker in pool.workers()}
    assert busy[numbers(tmp_path, "pid")[0]] == "busy"
    assert sorted(busy.values()) == ["busy", "idle"]
    (tmp_path / "go").touch()
    await call
    for _ in range(4):
        await pool.run(abs, -1)
    assert sum(worker.batches for worker in pool.workers()) == 5
    await pool.stop()
    assert pool.workers() == []


async def test_memory_is_the_workers_own(pool: WorkerPool) -> None:
    """What a batch keeps shows."""

    def keep() -> int:
        import builtins

        builtins.kept = bytearray(b"x" * (50 << 20))  # type: ignore[attr-defined]
        return os.getpid()

    pid = await pool.run(keep)
    memory = {worker.pid: worker.memory for worker in pool.workers()}
    assert memory[pid] > 50 << 20
    assert min(memory.values()) < 50 << 20


# Getting ready.


@pytest.mark.parametrize("method", METHODS)
async def test_the_initializer(tmp_path: Path, method: str) -> None:
    """It runs once in each worker, with its arguments, before the first batch; it may be a closure."""
    word = "well"

    def initialize(folder: Path, kind: str) -> None:
        os.environ["INITIALIZED"] = word
        work.note(folder, kind, str(os.getpid()))

    async with WorkerPool(2, mp_context=method, initializer=initialize, initargs=(tmp_path, "setup")) as pool:
        assert sorted(numbers(tmp_path, "setup")) == sorted(pids_of(pool))
        assert await asyncio.gather(*(pool.run(os.getenv, "INITIALIZED") for _ in range(10))) == ["well"] * 10
    assert len(numbers(tmp_path, "setup")) == 2


@pytest.mark.parametrize("by_call", [False, True], ids=["start", "run"])
async def test_an_initializer_that_raises(tmp_path: Path, by_call: bool) -> None:  # noqa: FBT001
    """Everyone who waits gets PoolBrokenError, whose cause is what was raised, with its traceback. A later call tries anew."""
    pool = WorkerPool(1, initializer=functools.partial(work.fail_first, tmp_path))
    if by_call:
        errors: list[Any] = list(await asyncio.gather(*(pool.run(abs, -1) for _ in range(3)), return_exceptions=True))
    else:
        errors = list(await asyncio.gather(pool.start(), return_exceptions=True))
    for error in errors:
        assert type(error) is PoolBrokenError
        assert "the model is not there yet" in str(error)
        assert type(error.__cause__) is LookupError
        assert "in fail_first" in "".join(traceback.format_exception(error.__cause__))
    assert len({id(error) for error in errors}) == len(errors)
    assert pool.workers() == [], "nothing is tried before somebody asks"
    assert await pool.run(abs, -1) == 1
    await pool.stop()


@pytest.mark.slow
async def test_an_initializer_that_raises_odd_things() -> None:
    """SystemExit and what cannot be pickled break the pool as any other does, and say so."""
    for name, text in (("exit", "SystemExit"), ("picky", "PickyError"), ("own", "OwnSignal")):
        pool = WorkerPool(1, initializer=work.raise_what_is_named, initargs=([name],))
        with pytest.raises(PoolBrokenError, match=text):
            await pool.run(abs, -1)
        await pool.stop()


async def test_an_initializer_that_cannot_cross() -> None:
    """It is refused when the pool starts, with the part that is at fault; the pool stays as it was."""
    pool = WorkerPool(1, initializer=id, initargs=(threading.Lock(),))
    for _ in range(2):
        with pytest.raises(SerializationError, match="lock"):
            await pool.start()
        with pytest.raises(SerializationError, match="lock"):
            await pool.run(abs, -1)
    await pool.stop()


@pytest.mark.slow
@pytest.mark.parametrize("way", work.DEADLY)
@pytest.mark.parametrize("method", METHODS)
async def test_workers_that_die_before_they_are_ready(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, way: str
) -> None:
    """They are started again after pauses, then everyone who waits is told; once that is mended, a later call finds workers."""
    no_pauses(monkeypatch)
    pool = WorkerPool(1, mp_context=method, initializer=work.die_until, initargs=(tmp_path, "mended", way))
    for round_ in (1, 2):
        errors = await asyncio.gather(pool.start(), *(pool.run(abs, -1) for _ in range(2)), return_exceptions=True)
        pids = numbers(tmp_path, "pid")
        assert len(pids) == 4 * round_
        for error in errors:
            assert type(error) is PoolBrokenError
            cause = error.__cause__
            assert type(cause) is WorkerDiedError
            assert (cause.exit_code, cause.may_have_run) == (work.DEADLY[way], False)
            assert cause.pid == pids[-1]
            assert "before it was ready" in str(error)
        assert pool.workers() == []
    (tmp_path / "mended").touch()
    assert await pool.run(abs, -1) == 1
    await pool.stop()


@pytest.mark.slow
async def test_the_pauses_grow(tmp_path: Path) -> None:
    """A pool whose workers die at their start does not keep the machine busy."""
    pool = WorkerPool(1, initializer=work.die_until, initargs=(tmp_path, "mended", "os._exit"))
    loop = asyncio.get_running_loop()
    start = loop.time()
    with pytest.raises(PoolBrokenError):
        await pool.start()
    assert loop.time() - start > 1.3
    await pool.stop()


async def test_one_worker_that_cannot_start_beside_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While one worker lives, calls are run by it, whatever becomes of the other."""
    no_pauses(monkeypatch)
    pool = WorkerPool(2, initializer=work.only_one_lives, initargs=(tmp_path,))
    pids = await asyncio.gather(*(pool.run(os.getpid) for _ in range(20)))
    assert len(set(pids)) == 1
    await wait_until(lambda: len(work.noted(tmp_path, "died")) > 1)
    assert await pool.run(os.getpid) == pids[0]
    await pool.stop()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
async def test_workers_that_are_not_ready_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    """``start_timeout``: they are killed, and everyone learns why."""
    no_pauses(monkeypatch)
    pool = WorkerPool(1, mp_context=method, initializer=work.note_pid_and_wait, initargs=(tmp_path, []), start_timeout=0.4)
    with pytest.raises(PoolBrokenError, match="start_timeout") as caught:
        await pool.run(abs, -1)
    assert type(caught.value.__cause__) is TimeoutError
    await wait_for_exit(numbers(tmp_path, "pid"))
    (tmp_path / "go").touch()
    assert await pool.run(abs, -1) == 1
    await pool.stop()


@pytest.mark.slow
async def test_stop_while_it_starts(tmp_path: Path) -> None:
    """By force, at whatever point: who waits is told, and nothing is left (conftest)."""
    for method in METHODS:
        for turns in (0, 1, 2, 5, 20):
            pool = WorkerPool(2, mp_context=method, initializer=work.note_setup, initargs=(tmp_path,))
            waiting = asyncio.gather(pool.start(), pool.run(abs, -1), return_exceptions=True)
            for _ in range(turns):
                await asyncio.sleep(0)
            await pool.stop(force=True)
            assert {type(result) for result in await waiting} <= {BatcherStoppedError, type(None), int}


async def test_a_start_that_is_cancelled() -> None:
    """Who gives up on ``start`` may call all the same."""
    pool = WorkerPool(2)
    start = asyncio.ensure_future(pool.start())
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert await pool.run(abs, -1) == 1
    await pool.stop()


@pytest.mark.parametrize("method", METHODS)
async def test_what_a_worker_has_imported(method: str) -> None:
    """Neither asyncio nor what a batch has no use for."""
    if method == "fork":
        pytest.skip("a fork has what its parent has")
    async with WorkerPool(1, mp_context=method) as pool:
        modules = set(await pool.run(lambda: [*sys.modules]))
    assert "async_batcher._worker.run_batch" in modules
    assert modules.isdisjoint(
        {"asyncio", "pytest", "tests.pool.test_pool", "numpy", "async_batcher.batcher", "async_batcher._pool"}
    )


# Threads of BLAS and OpenMP.

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.mark.parametrize(("given", "expected"), [(None, max(1, cpu_count() // 2)), (3, 3), (0, None)])
async def test_threads_per_worker(monkeypatch: pytest.MonkeyPatch, given: int | None, expected: int | None) -> None:
    """They are in the worker's environment: cores / workers, what was given, or nothing for 0. Those set already stay."""
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "17")
    async with WorkerPool(2, threads_per_worker=given) as pool:
        text = None if expected is None else str(expected)
        assert await pool.run(lambda: [os.environ.get(name) for name in THREADS]) == [text, text, "17"]
    assert "OMP_NUM_THREADS" not in os.environ


async def test_threads_are_set_before_the_initializer() -> None:
    """Which may be what loads such a library."""

    def initialize() -> None:
        os.environ["SEEN"] = os.environ["OMP_NUM_THREADS"]

    async with WorkerPool(1, threads_per_worker=3, initializer=initialize) as pool:
        assert await pool.run(lambda: os.environ["SEEN"]) == os.environ.get("OMP_NUM_THREADS", "3")


# Workers that are replaced.


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS)
async def test_so_many_batches_per_worker(method: str, most: int) -> None:
    """Each worker does exactly as many, however many calls come at once; only those that are left may have done fewer."""
    async with WorkerPool(2, mp_context=method, max_tasks_per_child=most) as pool:
        done = Counter(await asyncio.gather(*(pool.run(os.getpid) for _ in range(16))))
        for _ in range(5):
            done[await pool.run(os.getpid)] += 1
        left = pids_of(pool)
    assert sum(done.values()) == 21
    assert max(done.values()) <= most
    assert all(count == most for pid, count in done.items() if pid not in left)


@pytest.mark.parametrize("by_start", [False, True], ids=["by call", "by start"])
async def test_only_batches_count(by_start: bool) -> None:  # noqa: FBT001
    """Neither loading the function ahead nor asking for a class that a worker lacks is one of its batches."""

    class Local:
        pass

    async with WorkerPool(1, max_tasks_per_child=2) as pool:
        batcher = batched(work.pids, executor=pool, max_batch_size=1, max_queue_time=0)
        if by_start:
            await batcher.start()
            assert [worker.batches for worker in pool.workers()] == [0]
        done = Counter([await batcher(Local()) for _ in range(8)])
        await batcher.stop()
    assert list(done.values()) == [2, 2, 2, 2]


async def test_a_successor_is_ready_before(tmp_path: Path) -> None:
    """While a worker runs its last batch, the next one gets ready, and takes the next batch at once."""
    async with WorkerPool(1, max_tasks_per_child=1) as pool:
        (first,) = pids_of(pool)
        call = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
        await wait_until(lambda: [worker.state for worker in pool.workers()] == ["busy", "idle"])
        (second,) = set(pids_of(pool)) - {first}
        queued = asyncio.ensure_future(pool.run(os.getpid))
        await wait_until(lambda: numbers(tmp_path, "pid") == [first])
        assert not queued.done(), "one worker means one batch at a time"
        (tmp_path / "go").touch()
        await call
        assert await queued == second


async def test_a_successor_whose_predecessor_dies(tmp_path: Path) -> None:
    """It takes the place, and there are no more workers than before."""
    async with WorkerPool(1, max_tasks_per_child=1) as pool:
        call = asyncio.gather(pool.run(work.note_pid_and_wait, tmp_path, [0]), return_exceptions=True)
        await wait_until(lambda: [worker.state for worker in pool.workers()] == ["busy", "idle"])
        await wait_until(lambda: numbers(tmp_path, "pid"))
        os.kill(numbers(tmp_path, "pid")[0], signal.SIGKILL)
        assert [type(error) for error in await call] == [WorkerDiedError]
        assert isinstance(await pool.run(os.getpid), int)
        await wait_until(lambda: len([worker for worker in pool.workers() if worker.state in ("idle", "starting")]) == 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
async def test_a_worker_that_has_grown(method: str) -> None:
    """Past its memory it is replaced, once its successor is ready, and not before."""

    def grow() -> int:
        import builtins

        builtins.kept = bytearray(b"x" * (80 << 20))  # type: ignore[attr-defined]
        return os.getpid()

    async with WorkerPool(1, mp_context=method, max_memory_per_child=60 << 20) as pool:
        usual = pids_of(pool)
        if method == "fork" and pool.workers()[0].memory > 50 << 20:
            pytest.skip("this process is large itself")
        assert [await pool.run(os.getpid) for _ in range(5)] == usual * 5
        grown = await pool.run(grow)
        pids = [await pool.run(os.getpid) for _ in range(3)]
        while pids[-1] == grown:
            pids.append(await pool.run(os.getpid))
        assert len(set(pids) - {grown}) == 1
        await wait_until(lambda: pids_of(pool) == [pids[-1]])
        await wait_for_exit([grown])


# Its end.


async def test_stop_runs_what_waits(tmp_path: Path) -> None:
    """It returns when the last call has ended; meanwhile nothing more is taken. A second one does no harm."""
    pool = WorkerPool(1)
    calls = asyncio.gather(*(pool.run(work.note_pid_and_wait, tmp_path, [i]) for i in range(4)))
    await wait_until(lambda: work.noted(tmp_path, "pid"))
    stop = asyncio.ensure_future(pool.stop())
    await asyncio.sleep(0)
    with pytest.raises(BatcherStoppedError, match=r"start\(\) reopens"):
        await pool.run(abs, -1)
    assert not stop.done()
    (tmp_path / "go").touch()
    await asyncio.gather(stop, pool.stop())
    assert calls.done()
    assert await calls == [[0], [1], [2], [3]]
    await pool.stop()
    assert pool.workers() == []


@pytest.mark.parametrize("way", ["force", "timeout", "cancel", "exception"])
async def test_stop_by_force(tmp_path: Path, way: str) -> None:
    """By force, in time, cancelled, or because ``async with`` was left by an exception: nobody waits, and no worker is left."""
    pool = WorkerPool(2)
    calls = asyncio.gather(*(pool.run(work.note_pid_and_wait, tmp_path, [i]) for i in range(6)), return_exceptions=True)
    await wait_until(lambda: len(numbers(tmp_path, "pid")) == 2)
    if way == "force":
        await pool.stop(force=True)
    elif way == "timeout":
        with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
            await pool.stop(timeout=0.01)
    elif way == "cancel":
        stop = asyncio.ensure_future(pool.stop())
        await asyncio.sleep(0)
        stop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stop
    else:
        with pytest.raises(ZeroDivisionError):
            async with pool:
                raise ZeroDivisionError
    assert [type(error) for error in await calls] == [BatcherStoppedError] * 6
    assert pool.workers() == []
    assert not any(scripts.is_alive(pid) for pid in numbers(tmp_path, "pid"))
    with pytest.raises(BatcherStoppedError):
        await pool.run(abs, -1)


@pytest.mark.parametrize("dies", [False, True])
async def test_a_stop_by_who_has_just_been_answered(dies: bool) -> None:  # noqa: FBT001 - a parameter
    """He goes on where the answer is read, and may end everything there; also when its worker's death is to be seen next."""
    for _ in range(5):
        pool = WorkerPool(2)
        await pool.start()
        pids = pids_of(pool)
        other = asyncio.ensure_future(pool.run(time.sleep, work.DEADLINE))

        async def call_and_stop(pool: WorkerPool = pool) -> None:
            await (pool.run(work.end_soon, "kill") if dies else pool.run(os.getpid))
            await pool.stop(force=True)

        caller = asyncio.ensure_future(call_and_stop())
        await asyncio.sleep(0)
        deadline = time.monotonic() + work.DEADLINE
        while dies and all(scripts.is_alive(pid) for pid in pids):  # without the loop, which shall learn of both together
            assert time.monotonic() < deadline
            time.sleep(0.002)  # noqa: ASYNC251
        await asyncio.wait_for(caller, work.DEADLINE)
        with pytest.raises(BatcherStoppedError):
            await other
        assert pool.workers() == []


async def test_stop_in_good_time() -> None:
    """A timeout that is not reached is none."""
    pool = WorkerPool(1)
    call = asyncio.ensure_future(pool.run(abs, -1))
    await asyncio.sleep(0)
    await pool.stop(timeout=work.DEADLINE)
    assert await call == 1


async def test_a_stop_that_is_forced_meanwhile(tmp_path: Path) -> None:
    """One waits for the calls, another does not: both return."""
    pool = WorkerPool(1)
    call = asyncio.gather(pool.run(work.note_pid_and_wait, tmp_path, [0]), return_exceptions=True)
    await wait_until(lambda: work.noted(tmp_path, "pid"))
    stop = asyncio.ensure_future(pool.stop())
    await asyncio.sleep(0)
    await pool.stop(force=True)
    await stop
    assert [type(error) for error in await call] == [BatcherStoppedError]


@pytest.mark.slow
async def test_it_can_be_started_again() -> None:
    """After a stop, by force or not, with new workers."""
    pool = WorkerPool(1)
    pids = set()
    for force in (False, True, False):
        await pool.start()
        pids.add(await pool.run(os.getpid))
        await pool.stop(force=force)
    assert len(pids) == 3


async def test_a_stop_of_what_never_ran() -> None:
    """It is harmless, and closes it all the same."""
    pool = WorkerPool(1)
    await pool.stop()
    with pytest.raises(BatcherStoppedError):
        await pool.run(abs, -1)


@pytest.mark.slow
async def test_a_stopped_worker_does_not_hold_up_the_end(pool: WorkerPool) -> None:
    """An idle worker that was halted is killed when it does not end by itself."""
    pids = pids_of(pool)
    os.kill(pids[0], signal.SIGSTOP)
    async with asyncio.timeout(work.DEADLINE / 2):
        await pool.stop()
    assert not any(scripts.is_alive(pid) for pid in pids)


@pytest.mark.parametrize("method", METHODS)
async def test_exit_handlers_of_a_worker(tmp_path: Path, method: str) -> None:
    """What user code registers in a worker runs when that leaves; what this process has registered does not."""

    def register(folder: Path) -> None:
        import atexit

        atexit.register(work.note, folder, "exit", str(os.getpid()))

    async with WorkerPool(1, mp_context=method) as pool:
        pids = pids_of(pool)
        await pool.run(register, tmp_path)
    assert numbers(tmp_path, "exit") == pids


@pytest.mark.parametrize("method", METHODS)
async def test_a_pool_that_is_dropped(method: str, tmp_path: Path) -> None:
    """One that nobody holds any more takes its workers along, idle or busy (conftest)."""
    pool = WorkerPool(2, mp_context=method)
    call = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
    await wait_until(lambda: numbers(tmp_path, "pid"))
    pids = pids_of(pool)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    del pool, call
    gc.collect()
    await wait_for_exit(pids)


# Loops, processes, batchers.


async def test_another_loop_while_this_one_lives(pool: WorkerPool) -> None:
    """It is refused there, with what to do, and works on here."""
    assert await pool.run(abs, -1) == 1

    async def elsewhere() -> None:
        for use in (pool.run(abs, -1), pool.start(), pool.stop()):
            with pytest.raises(RuntimeError, match="another event loop"):
                await use

    await asyncio.to_thread(asyncio.run, elsewhere())
    assert await pool.run(abs, -1) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pending", ["idle", "busy", "starting", "copying"])
def test_a_loop_that_has_closed(tmp_path: Path, method: str, pending: str) -> None:
    """A pool that was not stopped starts afresh on the next loop, and what it had before is ended and closed (conftest)."""
    pool = WorkerPool(2, mp_context=method)
    pids: list[int] = []

    async def first() -> None:
        if pending == "starting":
            call = asyncio.ensure_future(pool.run(abs, -1))
            await asyncio.sleep(0)
            return
        pids.extend(await asyncio.gather(pool.run(os.getpid), pool.run(os.getpid)))
        if pending == "copying":
            call = asyncio.ensure_future(pool.run(len, bytearray(100 << 20)))
            await asyncio.sleep(0)
        elif pending == "busy":
            call = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
            await wait_until(lambda: work.noted(tmp_path, "pid"))
            assert not call.done()

    async def last() -> None:
        assert await pool.run(os.getpid) not in pids
        await pool.stop()

    for _ in range(2):
        asyncio.run(first())
    asyncio.run(last())
    asyncio.run(wait_for_exit(pids))


async def test_batchers_take_turns(tmp_path: Path) -> None:
    """One that brings a crowd does not keep another, nor a single call, waiting behind all of it."""
    order: list[str] = []
    async with WorkerPool(1) as pool:
        options: dict[str, Any] = {"executor": pool, "max_batch_size": 1, "max_queue_time": 0}
        many, one = batched(work.same, concurrency=100, **options), batched(work.same, **options)
        blocker = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
        await wait_until(lambda: work.noted(tmp_path, "pid"))

        async def call(name: str, batcher: Any, item: int) -> None:
            assert await batcher(item) == item
            order.append(name)

        crowd = [asyncio.ensure_future(call("many", many, i)) for i in range(50)]
        for _ in range(5):
            await asyncio.sleep(0)
        single = [asyncio.ensure_future(call("one", one, i)) for i in range(2)]
        direct = asyncio.ensure_future(pool.run(abs, -1))
        direct.add_done_callback(lambda _: order.append("direct"))
        for _ in range(5):
            await asyncio.sleep(0)
        (tmp_path / "go").touch()
        await asyncio.gather(blocker, *crowd, *single, direct)
        await many.stop()
        await one.stop()
    assert order.index("one") <= 3
    assert order.index("direct") <= 3
    assert [i for i, name in enumerate(order) if name == "one"][1] <= 8


async def test_a_batcher_on_a_pool_that_is_given(pool: WorkerPool) -> None:
    """It runs in its workers, as many batches at a time as those, and leaves it running, however it stops."""
    pids = pids_of(pool)
    for force in (False, True):
        async with batched(work.pids, executor=pool, max_batch_size=1) as batcher:
            assert batcher.concurrency == 2
            assert set(await asyncio.gather(*(batcher(i) for i in range(8)))) <= set(pids)
            await batcher.stop(force=force)
    assert await pool.run(abs, -1) == 1
    assert pids_of(pool) == pids


async def test_a_batcher_starts_the_pool_that_it_is_given() -> None:
    """And does not stop it."""
    pool = WorkerPool(1)
    async with batched(work.pids, executor=pool) as batcher:
        pid = await batcher(1)
    assert await pool.run(os.getpid) == pid
    await pool.stop()
    with pytest.raises(BatcherStoppedError):
        await batched(work.pids, executor=pool)(1)


# What user code does in a worker.


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
async def test_a_helper_that_a_batch_forked(tmp_path: Path, method: str) -> None:
    """It holds the channel and all else of the worker open; the death is seen all the same."""

    def fork_and_die(folder: Path) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                work.wait_for(folder / "go")
            finally:
                os._exit(0)
        work.note(folder, "helper", str(pid))
        os._exit(3)

    async with WorkerPool(1, mp_context=method) as pool:
        (pid,) = pids_of(pool)
        async with asyncio.timeout(work.DEADLINE / 2):
            with pytest.raises(WorkerDiedError) as caught:
                await pool.run(fork_and_die, tmp_path)
        assert (caught.value.pid, caught.value.exit_code) == (pid, 3)
        (helper,) = numbers(tmp_path, "helper")
        assert scripts.is_alive(helper)
        assert await pool.run(abs, -1) == 1
    (tmp_path / "go").touch()
    await wait_for_exit([helper])


@pytest.mark.parametrize("method", METHODS)
async def test_user_code_that_closes_everything(method: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A batch that closes all descriptors of its worker loses that, and nothing else."""
    async with WorkerPool(1, mp_context=method) as pool:
        (pid,) = pids_of(pool)
        with pytest.raises(WorkerDiedError) as caught:
            await pool.run(os.closerange, 3, 1000)
        assert caught.value.pid == pid
        assert await pool.run(abs, -1) == 1
    capfd.readouterr()  # what the worker may have had to say


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
async def test_user_code_that_closes_the_channel_and_goes_on(method: str) -> None:
    """The error says so, and not that the system had no memory left."""

    def close_and_go_on() -> None:
        import time

        os.closerange(3, 1000)
        time.sleep(60)

    async with WorkerPool(1, mp_context=method) as pool:
        with pytest.raises(WorkerDiedError, match=r"It had closed its channel to the pool, and was killed"):
            await pool.run(close_and_go_on)
        assert await pool.run(abs, -1) == 1


@pytest.mark.parametrize("method", METHODS)
async def test_user_code_that_becomes_another_program(method: str) -> None:
    """The worker is gone, whatever the other program keeps open."""
    async with WorkerPool(1, mp_context=method) as pool:
        with pytest.raises(WorkerDiedError, match="has replaced the process by another program"):
            await pool.run(os.execv, sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"])
        assert await pool.run(abs, -1) == 1


@pytest.mark.parametrize("method", METHODS)
async def test_user_code_that_forks_and_comes_back_twice(method: str) -> None:
    """Only the worker answers."""

    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        os.waitpid(pid, 0)
        return os.getpid()

    async with WorkerPool(1, mp_context=method) as pool:
        (worker,) = pids_of(pool)
        for _ in range(5):
            assert await pool.run(fork) == worker


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("method", METHODS)
async def test_programs_that_user_code_starts_inherit_nothing(method: str) -> None:
    """Neither the channel nor shared memory, which would outlive the pool."""

    def others(_: bytes) -> list[str]:
        listing = subprocess.run(["/bin/ls", "-l", "/proc/self/fd"], capture_output=True, text=True, check=True, close_fds=False)
        return [line for line in listing.stdout.splitlines() if "socket:" in line or "memfd:" in line]

    large = bytes(10_000_000)
    async with WorkerPool(1, mp_context=method) as pool:
        await pool.run(len, large)
        assert await pool.run(others, large) == []


async def test_user_code_that_uses_up_the_descriptors() -> None:
    """A large result comes back all the same; a large batch is refused by a worker that cannot take it, and says why."""

    def use_up() -> bytes:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
        with contextlib.suppress(OSError):
            while True:
                os.dup(0)
        return bytes(1_000_000)

    async with WorkerPool(1) as pool:
        pids = pids_of(pool)
        assert await pool.run(use_up) == bytes(1_000_000)
        with pytest.raises(OSError, match="no file descriptors left"):
            await pool.run(len, bytes(1_000_000))
        assert await pool.run(abs, -1) == 1
        assert pids_of(pool) == pids


async def test_a_worker_whose_own_code_fails(capfd: pytest.CaptureFixture[str]) -> None:
    """The error does not blame the function for an end that it has not asked for."""

    def leave_an_alarm() -> None:
        def ring(*_: object) -> None:
            msg = "an alarm that nobody waits for"
            raise TimeoutError(msg)

        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    async with WorkerPool(1) as pool:
        (pid,) = pids_of(pool)
        await pool.run(leave_an_alarm)
        await wait_for_exit([pid])
        assert await pool.run(abs, -1) == 1
        assert pool.worker_counts().crashed == {"exit code 70": 1}
    assert "an alarm that nobody waits for" in capfd.readouterr().err


@pytest.mark.parametrize("method", METHODS)
async def test_a_program_that_limits_the_time_of_its_sockets(method: str) -> None:
    """A worker waits for as long as there is nothing to do."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.05)
    try:
        async with WorkerPool(2, mp_context=method) as pool:
            await pool.run(time.sleep, 0.2)  # the other one has nothing to do meanwhile
            assert await pool.run(abs, -1) == 1
            assert pool.worker_counts().started == 2
    finally:
        socket.setdefaulttimeout(before)


@pytest.mark.parametrize("method", METHODS)
async def test_a_program_with_very_many_descriptors(method: str) -> None:
    """More than `select` takes; a service with as many connections has them."""
    resource = pytest.importorskip("resource")
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 2500:
        pytest.skip("the system does not allow for them")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(least, 2500), most))
    many = [os.dup(0) for _ in range(1100)]
    try:
        async with WorkerPool(1, mp_context=method) as pool:
            assert await pool.run(abs, -1) == 1
    finally:
        for descriptor in many:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, most))


async def test_user_code_that_reads_and_writes(capfd: pytest.CaptureFixture[str]) -> None:
    """Standard input is empty; what is printed goes where this program's output goes, at the latest when the worker leaves."""

    def talk() -> str:
        print("spoken")
        print("complained", file=sys.stderr)
        return sys.stdin.read()

    async with WorkerPool(1) as pool:
        assert await pool.run(talk) == ""
    output, errors = capfd.readouterr()
    assert output == "spoken\n"
    assert errors == "complained\n"


async def test_user_code_that_changes_the_process(pool: WorkerPool, tmp_path: Path) -> None:
    """Signals, the folder, threads: the worker goes on, and its successors start where this process is."""

    def change(folder: str) -> int:
        os.chdir(folder)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return os.getpid()

    pid = await pool.run(change, str(tmp_path))
    assert await pool.run(os.getpid) == pid
    os.kill(pid, signal.SIGKILL)
    await wait_for_exit([pid])
    await wait_until(lambda: len(pids_of(pool)) == 2 and all(worker.state == "idle" for worker in pool.workers()))
    here = os.getcwd()  # noqa: PTH109 - as the worker tells it
    assert await asyncio.gather(*(pool.run(os.getcwd) for _ in range(6))) == [here] * 6


# The fork server.


def parent_of(pid: int) -> int:
    """The process that started it."""
    return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_the_fork_server_is_killed(tmp_path: Path) -> None:
    """Its workers go on with what they do, their ends are seen as before, and new ones come from a new server."""
    async with WorkerPool(2, mp_context="forkserver") as pool:
        call = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [1]))
        await wait_until(lambda: numbers(tmp_path, "pid"))
        before = pids_of(pool)
        server = parent_of(before[0])
        assert server not in (os.getpid(), 1)
        os.kill(server, signal.SIGKILL)
        await wait_for_exit([server])
        assert not call.done()
        (busy,) = numbers(tmp_path, "pid")
        (idle,) = set(before) - {busy}
        assert await pool.run(os.getpid) == idle
        with pytest.raises(WorkerDiedError) as caught:
            await pool.run(work.end_now, 3)
        assert caught.value.pid == idle
        assert await pool.run(os.getpid) not in before
        (tmp_path / "go").touch()
        assert await call == [1]
        await wait_until(lambda: [worker.state for worker in pool.workers()] == ["idle"] * 2)
        (new,) = set(pids_of(pool)) - {busy}
        assert parent_of(new) != server


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_the_fork_server_is_killed_while_all_is_idle() -> None:
    """Nobody hears of it; when all workers have gone too, new ones come."""
    async with WorkerPool(2, mp_context="forkserver") as pool:
        pids = pids_of(pool)
        server = parent_of(pids[0])
        for pid in (server, *pids):
            os.kill(pid, signal.SIGKILL)
        await wait_for_exit([server, *pids])
        results = await asyncio.gather(*(pool.run(os.getpid) for _ in range(10)))
        assert not set(results) & set(pids)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_the_fork_server_is_halted() -> None:
    """When a worker has not come in its time, another server is asked; who waits for it gets his answer from there."""
    async with WorkerPool(1, mp_context="forkserver", start_timeout=3.0) as pool:
        (pid,) = pids_of(pool)
        server = parent_of(pid)
        os.kill(server, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        new = await pool.run(os.getpid)
        await wait_for_exit([server])
        assert parent_of(new) != server


async def test_a_python_that_does_not_fork_while_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some raise RuntimeError; the call fails, the pool ends."""
    if "fork" not in METHODS:
        pytest.skip("no fork")
    no_pauses(monkeypatch)

    def fork() -> int:
        msg = "can't fork at interpreter shutdown"
        raise RuntimeError(msg)

    pool = WorkerPool(1, mp_context="fork")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fork", fork)
        with pytest.raises(PoolBrokenError, match="can't fork at interpreter shutdown"):
            await pool.run(abs, -1)
    assert await pool.run(abs, -1) == 1
    await pool.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_a_task_that_comes_back_after_the_pool_has_given_up(tmp_path: Path) -> None:
    """A halted worker has it and has not begun it; no other can be started; it is killed: the task is tried anew, or fails."""

    def refuse(folder: Path) -> None:
        while (folder / "wait").exists():
            time.sleep(0.01)
        if (folder / "refuse").exists():
            msg = "no licence"
            raise RuntimeError(msg)

    pool = WorkerPool(2, initializer=refuse, initargs=(tmp_path,))
    await pool.start()
    halted, killed = pids_of(pool)
    (tmp_path / "wait").touch()
    (tmp_path / "refuse").touch()
    os.kill(killed, signal.SIGKILL)
    await wait_until(lambda: killed not in pids_of(pool) and len(pids_of(pool)) == 2)
    os.kill(halted, signal.SIGSTOP)
    call = asyncio.create_task(pool.run(abs, -1))
    await wait_until(lambda: any(worker.state == "busy" for worker in pool.workers()))
    os.kill(parent_of(halted), signal.SIGSTOP)
    server = parent_of(halted)
    (tmp_path / "wait").unlink()
    os.kill(halted, signal.SIGKILL)
    await wait_until(lambda: not any(worker.state == "starting" for worker in pool.workers()))
    os.kill(server, signal.SIGCONT)
    with pytest.raises(PoolBrokenError, match="no licence"):
        await asyncio.wait_for(call, work.DEADLINE)
    await pool.stop()


@pytest.mark.parametrize("failing", ["nameless", "pipe", "socketpair", "fork"])
async def test_a_system_that_has_nothing_left(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Without descriptors or processes there are pauses, then an error that says so, and a later call finds workers."""
    no_pauses(monkeypatch)
    method = "fork" if failing == "fork" else "forkserver"
    if method not in METHODS:
        pytest.skip("no fork")
    pool = WorkerPool(2, mp_context=method)

    def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    place = {
        "nameless": "async_batcher._transport.shared_memory.create_anonymous",
        "pipe": "async_batcher._pool.worker_handle.os.pipe",
        "socketpair": "socket.socketpair",
        "fork": "os.fork",
    }[failing]
    assert asyncio.get_running_loop().time() > 0
    with monkeypatch.context() as patched:
        patched.setattr(place, fail)
        with pytest.raises(PoolBrokenError, match="Too many open files") as caught:
            await pool.run(abs, -1)
    assert isinstance(caught.value.__cause__, OSError)
    assert await pool.run(abs, -1) == 1
    await pool.stop()


async def test_a_system_that_has_nothing_left_for_one_batch_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets the error; who is told when the pool gives up may bring the next."""
    no_pauses(monkeypatch)

    def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    async with asyncio.timeout(work.DEADLINE):
        batcher = batched(work.same, executor="process", max_workers=1, max_batch_size=1)
        with monkeypatch.context() as patched:
            patched.setattr("async_batcher._transport.shared_memory.create_anonymous", fail)
            errors = await asyncio.gather(*map(batcher, range(4)), return_exceptions=True)
        assert [type(error) for error in errors] == [PoolBrokenError] * 4
        assert await batcher(4) == 4
        await batcher.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a kqueue")
@pytest.mark.parametrize("lack", ["of Python", "of the system"])
@pytest.mark.parametrize("method", ["spawn", "fork"])
async def test_a_system_that_tells_no_end_of_a_process(monkeypatch: pytest.MonkeyPatch, method: str, lack: str) -> None:
    """Without a descriptor for a process its end is seen all the same, with its exit code, and nothing is left."""

    def refuse(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented", pid)

    if lack == "of Python":
        monkeypatch.delattr(os, "pidfd_open")
    else:
        monkeypatch.setattr(os, "pidfd_open", refuse)
    async with WorkerPool(1, mp_context=method) as pool:
        with pytest.raises(WorkerDiedError, match=r"exit code 3"):
            await pool.run(work.end_now, 3)
        pid = await pool.run(os.getpid)
    assert not scripts.is_alive(pid)


async def test_a_process_that_ends_before_it_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some systems will not watch it then: it has ended."""

    def refuse(pid: int) -> Any:
        raise ProcessLookupError(pid)

    monkeypatch.setattr(process_watcher, "_exit_fd", refuse)
    ended_with: list[int | None] = []

    class Owner:
        def on_exit(self, exit_code: int | None) -> None:
            ended_with.append(exit_code)

    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])  # noqa: ASYNC220 - asyncio would watch it
    watched = process_watcher.ProcessWatcher(asyncio.get_running_loop())
    watched.watch(process.pid, cast("Any", Owner()))
    await wait_until(lambda: ended_with)
    assert ended_with == [3]
    process.returncode = 3


class Interrupting:
    """Ctrl-C comes while it is pickled."""

    def __reduce__(self) -> Any:
        """There it is."""
        raise KeyboardInterrupt


async def test_ctrl_c_while_an_argument_is_pickled(pool: WorkerPool) -> None:
    """It is the program's, and no fault of the argument's."""
    with pytest.raises(KeyboardInterrupt):
        await pool.run(len, Interrupting())
    assert await pool.run(abs, -1) == 1


def test_ctrl_c_while_an_item_is_pickled() -> None:
    """The same; who waits for the batch is told."""
    futures: list[asyncio.Future[Any]] = []

    async def main() -> None:
        batcher = batched(work.same, executor="process", max_workers=1)
        futures.append(batcher.submit(Interrupting()))
        await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt), asyncio.Runner() as runner:
        runner.run(main())
    assert isinstance(futures.pop().exception(), BatchError)
