"""The far side of ``children.py``: a rival's process. Run as a script's helper, in whatever environment the rival needs.

::

    argument: the loop   --> {"version": ..., "python": ..., "loop": ...}    or {"unavailable": why}
    {"question": ..., load} --> {measure: number, ...}   or {"unavailable": why}  or {"failed": what}
    end of input         --> the process ends

Only the standard library and the rival are imported here. Each round has an event loop of its own.
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

from _questions import QUESTIONS
from _rival import NotAvailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


# What a rival or one of its workers prints goes to standard error: replies have standard output to themselves.
_replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def serve(open_rival: Callable[[dict[str, Any]], Any], distribution: str | None = None) -> None:
    """Answer questions until the input ends.

    Args:
        open_rival: Makes what the questions are put to, under a load; called on the loop: a `Front`, a `Pool`, or what else has
            ``stop`` and ``discard`` as these. A `Front` heeds ``place``, ``max_batch_size`` (items), ``max_queue_time``
            (seconds), ``workers`` and ``job``; a `Pool` heeds ``workers``.
        distribution: The rival's name in its environment; None for what is written here, or comes with Python.
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
        _say({"unavailable": f"{exc.name} is not installed"})
        return
    _say(facts)
    for line in sys.stdin:
        load = json.loads(line)
        try:
            question = QUESTIONS[load["question"]]
            gc.collect()
            with asyncio.Runner(loop_factory=_loop_factory(loop_name)) as runner:
                measured = runner.run(_one_round(question, open_rival, load))
            _say(measured)  # when all of the round has ended: the next rival's begins
        except NotAvailableError as exc:
            _say({"unavailable": str(exc)})
        except Exception as exc:  # noqa: BLE001 - the parent says it
            _say({"failed": f"{type(exc).__name__}: {exc}"})


async def _one_round(
    question: Callable[..., Awaitable[Any]], open_rival: Callable[[dict[str, Any]], Any], load: dict[str, Any]
) -> Any:
    load["opened"] = time.perf_counter()  # for a question about the start
    rival = open_rival(load)
    try:
        return await question(rival, load)
    finally:
        if question is not QUESTIONS["stop"]:  # which has ended it
            await (rival.discard or rival.stop)()


def _say(reply: dict[str, Any]) -> None:
    print(json.dumps(reply), file=_replies, flush=True)


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop  # type: ignore[no-any-return]
    return asyncio.new_event_loop
