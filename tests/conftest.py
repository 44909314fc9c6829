"""The event loops of the tests, and the check that a test leaves nothing behind.

``ASYNC_BATCHER_LOOP`` (asyncio, uvloop; default: both) chooses the loops. On asyncio, tests marked
``every_loop`` also run in debug mode and with eager tasks. Tests marked ``virtual_clock`` run on a
loop with a virtual clock. ``ASYNC_BATCHER_TESTS=loop`` runs only tests that depend on the loop, with
one start method; ``sample`` runs each test with one of its start methods, another one for another
test.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import importlib.util
import inspect
import logging
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import pytest
from hypothesis import HealthCheck, settings

from tests.support.virtual_clock import VirtualLoop
from tests.support.worker_functions import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A background job of a shell ignores SIGINT, `nohup` SIGHUP, and so do the processes that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A busy machine is as slow as it likes; `timeout` in pyproject.toml ends what hangs.
# Each run tries the same examples; `pytest --hypothesis-profile=explore` tries new ones.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("tests", settings.get_profile("explore"), derandomize=True)
settings.load_profile("tests")

_START_METHOD = re.compile("forkserver|spawn|fork")

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
    """Deselect tests that do not depend on the loop, or start methods, on request."""
    mode = os.environ.get("ASYNC_BATCHER_TESTS")
    if mode == "loop":
        selected = {item for item in items if _depends_on_the_loop(item)}
    elif mode == "sample":
        variants: dict[str, list[pytest.Item]] = {}
        for item in items:
            variants.setdefault(_START_METHOD.sub("*", item.nodeid), []).append(item)
        selected = {found[crc32(name.encode()) % len(found)] for name, found in variants.items()}
    else:
        return
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = [item for item in items if item in selected]


def _depends_on_the_loop(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    # On another loop, one start method will do.
    is_repeated = callspec is not None and not {"spawn", "fork"}.isdisjoint(
        map(str, callspec.params.values())
    )
    is_async = inspect.iscoroutinefunction(getattr(item, "function", None))
    return is_async and not is_repeated and not item.get_closest_marker("virtual_clock")


def pytest_asyncio_loop_factories(
    config: pytest.Config,  # noqa: ARG001 - the hook's signature
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Return the loops that an async test runs on."""
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
def _start_permanent_helpers() -> None:
    """Start what multiprocessing, libuv and ctypes keep, so that it is no leak of a test."""
    if HAS_UVLOOP:
        import uvloop

        uvloop.new_event_loop().close()
    if sys.platform == "win32":
        return
    from multiprocessing import forkserver, resource_tracker

    with contextlib.suppress(ImportError):
        import ctypes  # noqa: F401 - some Pythons keep its library open

    resource_tracker.ensure_running()  # type: ignore[attr-defined,unused-ignore]
    forkserver.ensure_running()


@pytest.fixture(scope="session")
def numpy() -> Any:
    """Import numpy before the test's open files are counted."""
    return pytest.importorskip("numpy")


@pytest.fixture
def long_graces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill and cancel nothing only because the machine is busy."""
    graces = [
        ("_pool.state.time_limits", "INTERRUPT_GRACE"),
        ("_pool.state.time_limits", "MIN_BEGIN_TIMEOUT"),
        ("_pool.state.worker_events", "SHUTDOWN_GRACE"),
        ("_pool.state.worker_events", "_EOF_TO_EXIT_TIMEOUT"),
        ("_pool.state.pool_state", "SHUTDOWN_GRACE"),
        ("_pool.state.supervisor", "EXIT_STATUS_TIMEOUT"),
        ("_runners.worker_pool", "SHUTDOWN_GRACE"),
        ("_runners.adapters", "_END_GRACE"),
        ("_runners.factory", "FACTORY_STOP_GRACE"),
        ("_runners.executor", "_WATCHDOG_INTERVAL"),
        ("_runners.coroutine", "CANCEL_GRACE"),
        ("_runners.coroutine_setup", "CANCEL_GRACE"),
    ]
    # All are imported first: one that is imported later would keep what it finds.
    modules = [importlib.import_module(f"async_batcher.{name}") for name, _ in graces]
    for module, (_, grace) in zip(modules, graces, strict=True):
        monkeypatch.setattr(module, grace, DEADLINE)


@pytest.fixture(scope="module")
def quick_collector() -> Iterator[None]:
    """Freeze existing objects, so that each collection of a test is fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_noise(caplog: pytest.LogCaptureFixture, quick_collector: None) -> Iterator[None]:  # noqa: ARG001 - a fixture
    """Check that asyncio logs no error: no unretrieved exception, no destroyed task."""
    yield
    gc.collect()
    noise = [
        record
        for record in caplog.get_records("call")
        if record.name == "asyncio" and record.levelno >= logging.ERROR
    ]
    noise += [
        record
        for record in caplog.records
        if record.name == "asyncio" and record.levelno >= logging.ERROR
    ]
    assert [record.getMessage() for record in noise] == []


def _children(pid: int) -> Iterator[list[int]]:
    """Yield the children of each thread of a process; none for one that has ended."""
    with contextlib.suppress(OSError):
        for thread in Path("/proc", str(pid), "task").iterdir():
            with contextlib.suppress(OSError):
                yield [int(word) for word in (thread / "children").read_text().split()]


def descendants(pid: int | None = None) -> set[int]:
    """Return the processes below ``pid`` (this one) by /proc, with multiprocessing's helpers."""
    found: set[int] = set()
    pending = [os.getpid() if pid is None else pid]
    while pending:
        for children in _children(pending.pop()):
            found.update(children)
            pending.extend(children)
    return found


# Checks before all generations are collected, which is slow; garbage of a test is young.
_QUICK_CHECKS = 5


def _open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check that a test leaves no thread, process or descriptor."""
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

    deadline = time.monotonic() + DEADLINE
    checks = 0
    # No event announces the end of a thread or a process.
    while left() and time.monotonic() < deadline:
        gc.collect(1 if checks < _QUICK_CHECKS else 2)
        checks += 1
        time.sleep(0.01)
    assert not left()
