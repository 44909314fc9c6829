"""Run rounds in a library's own process, as `benchmarks.harness.child_process` asks for them.

::

    start                      --> {"version": ..., "python": ..., "loop": ...}
                                   or {"unavailable": reason}
    {"scenario": ..., load...} --> {measure: number, ...}
                                   or {"unavailable": reason} or {"failed": error}
    end of input               --> the process exits

Each message is one line of JSON. Each round has a new event loop.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import json
import os
import platform
import sys
import time
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.base import NotAvailableError
from benchmarks.scenarios.registry import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


# Standard output carries replies only. What the library or a worker prints goes to standard error.
_replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def serve(
    open_library: Callable[[dict[str, Any]], Any],
    distribution: str | None = None,
) -> None:
    """Run one round for each line of input.

    Args:
        open_library: Called on the round's loop with the load. Returns what the scenario measures:
            a `BatcherAdapter`, a `PoolAdapter`, or another object with ``stop`` and ``discard``.
            A batcher follows ``place``, ``max_batch_size`` (items), ``max_queue_time`` (seconds),
            ``workers`` and ``job`` of the load, a pool ``workers``.
        distribution: The library's name in its environment. None for code of the benchmarks and
            for the standard library.
    """
    loop_name = sys.argv[1]
    try:
        version = importlib.metadata.version(distribution) if distribution else "-"
        facts = {"version": version, "python": platform.python_version(), "loop": loop_name}
        if distribution:
            facts["distribution"] = distribution
        if loop_name == "uvloop":
            facts["loop"] = f"uvloop {importlib.metadata.version('uvloop')}"
    except importlib.metadata.PackageNotFoundError as exc:
        _reply({"unavailable": f"{exc.name} is not installed"})
        return
    _reply(facts)
    for line in sys.stdin:
        load = json.loads(line)
        try:
            gc.collect()
            with asyncio.Runner(loop_factory=_loop_factory(loop_name)) as runner:
                measured = runner.run(_run_round(open_library, load))
            # The parent starts the next library's round when it reads this, so the loop is closed.
            _reply(measured)
        except NotAvailableError as exc:
            _reply({"unavailable": str(exc)})
        except Exception as exc:  # noqa: BLE001 - the parent reports it
            _reply({"failed": f"{type(exc).__name__}: {exc}"})


async def _run_round(open_library: Callable[[dict[str, Any]], Any], load: dict[str, Any]) -> Any:
    scenario: Callable[..., Awaitable[Any]] = SCENARIOS[load["scenario"]]
    load["opened"] = time.perf_counter()  # read by `pool_start`
    library = open_library(load)
    try:
        return await scenario(library, load)
    finally:
        if scenario is not SCENARIOS["stop"]:  # which stops it itself
            await (library.discard or library.stop)()


def _reply(message: dict[str, Any]) -> None:
    print(json.dumps(message), file=_replies, flush=True)


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop
    return asyncio.new_event_loop
