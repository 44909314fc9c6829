"""The options of `WorkerPool`, its start methods and its public names."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import pickle
import sys
from typing import Any

import pytest

import async_batcher
from async_batcher import WorkerPool
from async_batcher._pool.cpu_count import cpu_count
from tests.support.worker_pools import METHODS, may_warn_of_fork, pids_of

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    may_warn_of_fork,
]


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"max_workers": 0}, ValueError, ("max_workers=0", "at least 1")),
        ({"max_workers": True}, TypeError, ("max_workers=True", "whole number", "bool")),
        ({"max_workers": "2"}, TypeError, ("max_workers='2'", "whole number", "str")),
        ({"max_tasks_per_child": 0}, ValueError, ("max_tasks_per_child=0", "at least 1")),
        (
            {"max_tasks_per_child": 1.5},
            TypeError,
            ("max_tasks_per_child=1.5", "whole number", "float"),
        ),
        ({"max_memory_per_child": -1}, ValueError, ("max_memory_per_child=-1", "at least 1")),
        ({"threads_per_worker": -1}, ValueError, ("threads_per_worker=-1", "at least 0")),
        ({"start_timeout": 0}, ValueError, ("start_timeout=0", "more than 0")),
        ({"start_timeout": None}, TypeError, ("start_timeout=None", "seconds")),
        ({"start_timeout": math.nan}, ValueError, ("start_timeout=nan", "seconds")),
        ({"initializer": 3}, TypeError, ("initializer=3", "function")),
        ({"initializer": asyncio.sleep}, TypeError, ("initializer=<function sleep", "async")),
        ({"initializer": print, "initargs": 5}, TypeError, ("initargs=5", "tuple")),
        (
            {"mp_context": "threads"},
            ValueError,
            ("mp_context='threads'", "'forkserver'", "'spawn'", "'fork'"),
        ),
        ({"mp_context": 3}, TypeError, ("mp_context=3", "'forkserver'", "'spawn'", "'fork'")),
        ({"preload": "torch"}, TypeError, ("preload='torch'", "a list of names")),
        ({"preload": [os]}, TypeError, ("preload=[<module", "a list of names")),
        ({"preload": ["my model"]}, ValueError, ("'my model'", "full name of a module")),
        ({"preload": [".model"]}, ValueError, ("'.model'", "full name of a module")),
        ({"preload": ["__main__"]}, ValueError, ("'__main__'", "main module")),
        (
            {"preload": ["json"], "mp_context": "spawn"},
            ValueError,
            ("preload=('json',)", "mp_context='forkserver'", "'spawn'"),
        ),
    ],
    ids=str,
)
def test_an_invalid_option_is_rejected(
    options: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    """The message names the option, its value and what is allowed."""
    with pytest.raises(error) as caught:
        WorkerPool(**options)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_options_are_keyword_only_except_the_first() -> None:
    """The second positional argument of ProcessPoolExecutor means something else."""
    with pytest.raises(TypeError, match="positional"):
        WorkerPool(2, "spawn")  # type: ignore[call-arg, misc, unused-ignore]


def test_the_default_number_of_workers() -> None:
    """By default there is one worker for each usable core."""
    assert WorkerPool().max_workers == cpu_count()
    assert WorkerPool(3).max_workers == 3


def test_an_unused_pool_starts_nothing() -> None:
    """Nothing starts before the first call (conftest), and no workers are listed."""
    assert WorkerPool(2).workers() == []


def test_a_pool_cannot_be_pickled() -> None:
    """The error says what to do."""
    with pytest.raises(TypeError, match="make one where it is used"):
        pickle.dumps(WorkerPool(1))


def test_public_names() -> None:
    """`WorkerPool` and `WorkerInfo` are importable from ``async_batcher``."""
    assert async_batcher.WorkerPool is WorkerPool
    assert async_batcher.WorkerInfo.__name__ == "WorkerInfo"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("as_context", [False, True], ids=["name", "context"])
async def test_every_start_method(method: str, as_context: bool) -> None:
    """A start method is given by its name or as a multiprocessing context."""
    context: Any = multiprocessing.get_context(method) if as_context else method
    async with WorkerPool(2, mp_context=context) as pool:
        assert len(set(pids_of(pool))) == 2
        used = await asyncio.gather(*(pool.run(os.getpid) for _ in range(10)))
        assert set(used) <= set(pids_of(pool))
        assert os.getpid() not in used


THREADS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "LOKY_MAX_CPU_COUNT", "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"), [(None, max(1, cpu_count() // 2)), (3, 3), (0, None)]
)
async def test_threads_per_worker(
    monkeypatch: pytest.MonkeyPatch, given: int | None, expected: int | None
) -> None:
    """What native libraries read is set in the worker's environment, unless it is set already."""
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "17")
    async with WorkerPool(2, threads_per_worker=given) as pool:
        text = None if expected is None else str(expected)
        found = await pool.run(lambda: {name: os.environ.get(name) for name in THREADS})
        assert found == dict.fromkeys(THREADS, text)
        assert await pool.run(os.getenv, "MKL_NUM_THREADS") == "17"
    assert "OMP_NUM_THREADS" not in os.environ


async def test_loky_sees_the_threads_per_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of cores that joblib gets from loky is the limit."""
    loky = pytest.importorskip("loky")
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT", raising=False)
    async with WorkerPool(1, threads_per_worker=1) as pool:
        assert await pool.run(loky.cpu_count) == 1


async def test_threads_are_set_before_the_initializer() -> None:
    """The initializer may load such a library."""

    def initialize() -> None:
        os.environ["SEEN"] = os.environ["OMP_NUM_THREADS"]

    async with WorkerPool(1, threads_per_worker=3, initializer=initialize) as pool:
        assert await pool.run(lambda: os.environ["SEEN"]) == os.environ.get("OMP_NUM_THREADS", "3")
