"""`WorkerPool.run`: functions, results, exceptions and cancelled callers."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher.exceptions import (
    BatchError,
    SerializationError,
)
from tests.support import worker_functions as work
from tests.support.polling import wait_until
from tests.support.worker_pools import may_warn_of_fork, pids_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


async def test_every_kind_of_callable(pool: WorkerPool) -> None:
    """Builtins, importable functions, lambdas, closures, partials and methods run in workers."""
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


async def test_a_rebound_name_runs_the_function_that_was_passed(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function that was passed runs, even if its module binds the name to another one."""
    assert await pool.run(work.double, [1]) == [2]
    monkeypatch.setattr(work, "double", work.Scale(3))
    assert await pool.run(work.double, [1]) == [3]
    monkeypatch.undo()
    assert [
        await pool.run(call, [2]) for call in (work.double, work.Scale(5), work.double, len)
    ] == [[4], [10], [4], 1]


async def test_an_async_function_is_rejected(pool: WorkerPool) -> None:
    """However it is wrapped: nothing in a worker could await it."""

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
async def test_an_invalid_timeout_is_rejected(
    timeout: Any,  # noqa: ASYNC109 - of the call
    error: type[Exception],
    text: str,
) -> None:
    """The error comes before anything starts."""
    with pytest.raises(error, match=re.escape(text)):
        await WorkerPool(1).run(abs, -1, timeout=timeout)


async def test_every_call_gets_its_own_result(pool: WorkerPool) -> None:
    """Hundreds of calls at once, on two workers, each get their own result."""
    results = await asyncio.gather(
        *(pool.run(work.scaled, factor, [1, 2]) for factor in range(300))
    )
    assert results == [[factor, 2 * factor] for factor in range(300)]


async def test_the_first_call_starts_the_pool() -> None:
    """Neither ``start`` nor ``async with`` is needed."""
    pool = WorkerPool(1)
    assert await pool.run(abs, -1) == 1
    await pool.stop()


async def test_an_exception_keeps_type_attributes_and_traceback(pool: WorkerPool) -> None:
    """The caller gets the exception, whose cause shows the worker's traceback.

    The worker goes on.
    """
    before = pids_of(pool)
    with pytest.raises(work.FrankError, match="frankly") as caught:
        await pool.run(work.raise_named, ["frank"])
    assert caught.value.code == 7
    assert caught.value.__cause__ is not None
    assert "in raise_named" in "".join(traceback.format_exception(caught.value.__cause__))
    assert pids_of(pool) == before
    with pytest.raises(work.FalsyError):
        await pool.run(work.raise_named, ["falsy"])


async def test_a_returned_exception_is_a_result(pool: WorkerPool) -> None:
    """An exception that a function returns is not raised."""
    error = await pool.run(lambda: ValueError("here you are"))
    assert type(error) is ValueError
    assert str(error) == "here you are"
    assert [type(one) for one in await pool.run(lambda: [KeyError(1), StopIteration()])] == [
        KeyError,
        StopIteration,
    ]


@pytest.mark.parametrize("name", ["exit", "interrupt", "stop", "cancelled", "closed"])
async def test_control_flow_exceptions_become_batch_errors(pool: WorkerPool, name: str) -> None:
    """The `BatchError` names what was raised, and the worker goes on."""
    with pytest.raises(BatchError) as caught:
        await pool.run(work.raise_named, [name])
    assert caught.value.original_type.rpartition(".")[2] in str(caught.value)
    assert await pool.run(work.raise_named, []) == []


async def test_unpicklable_functions_arguments_and_results(pool: WorkerPool) -> None:
    """Each is a `SerializationError` that names the culprit, in both directions."""
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


async def test_instances_of_local_classes(pool: WorkerPool) -> None:
    """An instance comes back as one of the caller's class, and the class is unchanged."""

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


async def test_calls_from_many_tasks(pool: WorkerPool) -> None:
    """Each of many tasks gets its own result."""
    results = await asyncio.gather(*(asyncio.create_task(pool.run(abs, -i)) for i in range(20)))
    assert results == list(range(20))


async def test_a_cancelled_caller_whose_call_is_queued(tmp_path: Path) -> None:
    """The call is never run; the calls beside it are."""
    async with WorkerPool(1) as pool:
        first = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [0]))
        await wait_until(lambda: work.noted(tmp_path, "pid"))
        waiting = [
            asyncio.ensure_future(pool.run(work.note, tmp_path, "ran", str(i))) for i in range(3)
        ]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0)
        (tmp_path / "go").touch()
        results = await asyncio.gather(first, *waiting, return_exceptions=True)
    assert [type(result).__name__ for result in results] == [
        "list",
        "NoneType",
        "CancelledError",
        "NoneType",
    ]
    assert work.noted(tmp_path, "ran") == ["0", "2"]


async def test_a_cancelled_caller_whose_call_runs(tmp_path: Path) -> None:
    """The worker finishes the call, is busy until then, and takes the next call after it."""
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


class Interrupting:
    """Ctrl-C comes while it is pickled."""

    def __reduce__(self) -> Any:
        """Raise KeyboardInterrupt."""
        raise KeyboardInterrupt


async def test_ctrl_c_while_an_argument_is_pickled(pool: WorkerPool) -> None:
    """The KeyboardInterrupt reaches the program."""
    with pytest.raises(KeyboardInterrupt):
        await pool.run(len, Interrupting())
    assert await pool.run(abs, -1) == 1


def test_ctrl_c_while_an_item_is_pickled() -> None:
    """The KeyboardInterrupt reaches the program; the caller of the item gets an error."""
    futures: list[asyncio.Future[Any]] = []

    async def main() -> None:
        batcher = batched(work.same, executor="process", max_workers=1)
        futures.append(batcher.submit(Interrupting()))
        await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt), asyncio.Runner() as runner:
        runner.run(main())
    assert isinstance(futures.pop().exception(), BatchError)
