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
import platform
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import _questions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class NotAvailableError(Exception):
    """This rival has no answer to a question."""


@dataclass(frozen=True)
class Front:
    """What a rival offers for one round, opened on the round's loop.

    Attributes:
        process: Awaited by a client for one item.
        submit: Given to gather, one for each item.
        stop: Ends it in good order, with all that it or its user made for it.
        discard: Ends it after a round that is not about its end; None: as ``stop`` does.
    """

    process: Callable[[int], Awaitable[int]]
    submit: Callable[[int], Awaitable[int]]
    stop: Callable[[], Awaitable[None]]
    discard: Callable[[], Awaitable[None]] | None = None


async def nothing(batch: list[int]) -> list[int]:
    """The batch function of every rival: does nothing, and answers with the items, so that a mix-up shows."""
    return batch


async def no_stop() -> None:
    """For a rival that has nothing to stop."""


def serve(open_front: Callable[[dict[str, Any]], Front], distribution: str | None = None) -> None:
    """Answer questions until the input ends.

    Args:
        open_front: Makes a `Front` under a load: ``place``, ``max_batch_size`` (items), ``max_queue_time`` (seconds),
            ``workers``; called on the loop.
        distribution: The rival's name in its environment; None for what is written here.
    """
    loop_name = sys.argv[1]
    try:
        version = importlib.metadata.version(distribution) if distribution else "-"
        facts = {"version": version, "python": platform.python_version(), "loop": loop_name}
        if loop_name == "uvloop":
            facts["loop"] = f"uvloop {importlib.metadata.version('uvloop')}"
    except importlib.metadata.PackageNotFoundError as exc:
        _say({"unavailable": f"{exc.name} is not installed"})
        return
    _say(facts)
    for line in sys.stdin:
        load = json.loads(line)
        try:
            question = getattr(_questions, load["question"])
            gc.collect()
            with asyncio.Runner(loop_factory=_loop_factory(loop_name)) as runner:
                _say(runner.run(_one_round(question, open_front, load)))
        except NotAvailableError as exc:
            _say({"unavailable": str(exc)})
        except Exception as exc:  # noqa: BLE001 - the parent says it
            _say({"failed": f"{type(exc).__name__}: {exc}"})


async def _one_round(question: Callable[..., Awaitable[Any]], open_front: Callable[..., Front], load: dict[str, Any]) -> Any:
    front = open_front(load)
    measures = await question(front, load)
    if question is not _questions.stop:
        await (front.discard or front.stop)()
    return measures


def _say(reply: dict[str, Any]) -> None:
    print(json.dumps(reply), flush=True)


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop  # type: ignore[no-any-return]
    return asyncio.new_event_loop
