"""What every test runs under: which loops, and the check that nothing is left behind.

``ASYNC_BATCHER_LOOP`` (asyncio or uvloop; both where it is unset) chooses the loops; asyncio stands for its debug mode and its
eager tasks too where a test is marked ``every_loop``. A test marked ``virtual_clock`` runs on a loop whose time passes at once.
With ``ASYNC_BATCHER_TESTS=loop`` only those tests run that may fare differently on another loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import inspect
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.virtual_clock import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell has its background jobs ignore it, and all that they start
    signal.signal(signal.SIGINT, signal.default_int_handler)

LoopFactory = "Callable[[], asyncio.AbstractEventLoop]"

HAS_UVLOOP = importlib.util.find_spec("uvloop") is not None


def _debug_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    return loop


def _eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]  # from Python 3.12
    return loop


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what does not depend on the loop, if that is asked for."""
    if os.environ.get("ASYNC_BATCHER_TESTS") == "loop":
        chosen = [item for item in items if _depends_on_the_loop(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def _depends_on_the_loop(item: pytest.Item) -> bool:
    return inspect.iscoroutinefunction(getattr(item, "function", None)) and not item.get_closest_marker("virtual_clock")


def pytest_asyncio_loop_factories(
    config: pytest.Config,  # noqa: ARG001 - the hook's signature
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loops that an async test runs on."""
    if item.get_closest_marker("virtual_clock"):
        return {"virtual": VirtualLoop}
    wanted = os.environ.get("ASYNC_BATCHER_LOOP", "")
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {}
    if wanted in ("", "asyncio"):
        factories["asyncio"] = asyncio.new_event_loop
        if item.get_closest_marker("every_loop"):
            factories["debug"] = _debug_loop
            if sys.version_info >= (3, 12):
                factories["eager"] = _eager_loop
    if wanted == "uvloop" or (not wanted and HAS_UVLOOP):
        import uvloop

        factories["uvloop"] = uvloop.new_event_loop
    return factories


@pytest.fixture(scope="session", autouse=True)
def _standing_helpers() -> None:
    """Start what multiprocessing, libuv and ctypes start once and keep, lest it look like a leak of the first test."""
    if HAS_UVLOOP:
        import uvloop

        uvloop.new_event_loop().close()
    if sys.platform == "win32":
        return
    from multiprocessing import forkserver, resource_tracker

    with contextlib.suppress(ImportError):
        import ctypes  # noqa: F401 - the library that it is linked to stays open with some Pythons

    resource_tracker.ensure_running()  # type: ignore[attr-defined,unused-ignore]
    forkserver.ensure_running()


@pytest.fixture(scope="module")
def quick_collector() -> Iterator[None]:
    """Have the collector pass over what was there before: it is the most by far, and each test that collects goes through it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_noise(caplog: pytest.LogCaptureFixture, quick_collector: None) -> Iterator[None]:  # noqa: ARG001 - for its effect
    """Nothing that asyncio complains of: no exception never retrieved, no task destroyed, no error in a callback."""
    yield
    gc.collect()
    noise = [record for record in caplog.get_records("call") if record.name == "asyncio" and record.levelno >= logging.ERROR]
    noise += [record for record in caplog.records if record.name == "asyncio" and record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in noise] == []


def _children(pid: int) -> Iterator[list[int]]:
    """The children of each thread of a process; a process or a thread that has ended meanwhile has none."""
    with contextlib.suppress(OSError):
        for thread in Path("/proc", str(pid), "task").iterdir():
            with contextlib.suppress(OSError):
                yield [int(word) for word in (thread / "children").read_text().split()]


def descendants(pid: int | None = None) -> set[int]:
    """The processes below ``pid`` (this one), where /proc tells; the helpers of multiprocessing are among them."""
    found: set[int] = set()
    waiting = [os.getpid() if pid is None else pid]
    while waiting:
        for children in _children(waiting.pop()):
            found.update(children)
            waiting.extend(children)
    return found


# Looks at what is left before all generations are collected, which takes long: what a test has dropped is young.
_QUICK_LOOKS = 5


def _open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test no thread, process or descriptor is left that was not there before it."""
    threads, processes, files = set(threading.enumerate()), descendants(), _open_files()
    yield
    if request.node.get_closest_marker("leaves_things"):
        return

    def left() -> list[object]:
        extra_files = _open_files() - files
        return [
            *(thread for thread in threading.enumerate() if thread not in threads),
            *(f"process {pid}" for pid in descendants() - processes),
            *([f"{extra_files} descriptors"] if extra_files > 0 else []),
        ]

    deadline = time.monotonic() + 5.0
    looks = 0
    while left() and time.monotonic() < deadline:  # what is ending needs a moment that no event announces
        gc.collect(1 if looks < _QUICK_LOOKS else 2)
        looks += 1
        time.sleep(0.01)
    assert not left()
