"""`run` and the choice of the event loop."""

from __future__ import annotations

import asyncio
import gc
import sys
from typing import Any

import pytest

from async_batcher import run
from async_batcher.loops import loop_factory


async def kind_of_loop() -> str:
    """Return the package of the running loop's class."""
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_run_on_asyncio() -> None:
    """run() returns the result of the coroutine, and passes on `debug`."""

    async def is_debug() -> bool:
        return asyncio.get_running_loop().get_debug()

    assert run(kind_of_loop(), loop="asyncio") == "asyncio"
    assert run(is_debug(), loop="asyncio", debug=True)
    assert not run(is_debug(), loop="asyncio", debug=False)


def test_run_on_uvloop() -> None:
    """The loop is uvloop on request, and by default where it is installed."""
    pytest.importorskip("uvloop")
    assert run(kind_of_loop(), loop="uvloop") == "uvloop"
    assert run(kind_of_loop()) == "uvloop"


def test_run_without_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, "auto" is asyncio, and "uvloop" an error that says how to install it."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert run(kind_of_loop()) == "asyncio"
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'async-batcher\[uvloop\]'"):
        run(kind_of_loop(), loop="uvloop")


@pytest.mark.parametrize("loop", ["trio", "", None])
def test_run_on_an_unknown_loop(loop: Any) -> None:
    """The value is rejected, and the coroutine is closed."""
    with pytest.raises(ValueError, match=r"must be 'auto', 'asyncio' or 'uvloop'"):
        run(kind_of_loop(), loop=loop)
    with pytest.raises(ValueError, match="loop="):
        loop_factory(loop)


def test_run_propagates_exceptions() -> None:
    """The exception of the coroutine is raised."""

    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(fail())


async def test_run_inside_a_loop() -> None:
    """The error is that of asyncio.run; the coroutine is closed, and no loop is made."""
    with pytest.raises(RuntimeError, match="cannot be called from a running event loop"):
        run(kind_of_loop())
    gc.collect()


@pytest.mark.parametrize("name", ["asyncio", "auto"])
def test_a_loop_factory_makes_new_loops(name: str) -> None:
    """Each call returns a new loop."""
    loops = [loop_factory(name)() for _ in range(2)]
    for loop in loops:
        loop.close()
    assert loops[0] is not loops[1]
