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
    from types import ModuleType


class NotAvailableError(Exception):
    """This rival has no answer to a question."""


@dataclass(frozen=True)
class Front:
    """What a rival offers for one round, opened on the round's loop.

    Attributes:
        process: Awaited by a client for one item.
        submit: Given to gather, one for each item.
        many: Awaited for many items in one call; None: a gather over ``submit`` is all there is.
        stop: Ends it in good order, with all that it or its user made for it.
        discard: Ends it after a round that is not about its end; None: as ``stop`` does.
    """

    process: Callable[[int], Awaitable[int]]
    submit: Callable[[int], Awaitable[int]]
    stop: Callable[[], Awaitable[None]]
    discard: Callable[[], Awaitable[None]] | None = None
    many: Callable[[list[int]], Awaitable[list[int]]] | None = None


@dataclass(frozen=True)
class Pool:
    """Worker processes that a rival offers for one round, opened on the round's loop.

    Attributes:
        call: Awaited for what a function returns in a worker, given its arguments.
        stop: Ends it in good order.
        workers: How many processes it has.
        pids: Their process ids.
        recover: Awaited when the process of that id has been killed, until there are as many workers as before.
        discard: As of `Front`.
    """

    call: Callable[..., Awaitable[Any]]
    stop: Callable[[], Awaitable[None]]
    workers: int
    pids: Callable[[], list[int]] | None = None
    recover: Callable[[int], Awaitable[None]] | None = None
    discard: Callable[[], Awaitable[None]] | None = None


async def nothing(batch: list[int]) -> list[int]:
    """The batch function of every rival: does nothing, and answers with the items, so that a mix-up shows."""
    return batch


async def no_stop() -> None:
    """For a rival that has nothing to stop."""


def serve(
    open_rival: Callable[[dict[str, Any]], Any], distribution: str | None = None, questions: ModuleType = _questions
) -> None:
    """Answer questions until the input ends.

    Args:
        open_rival: Makes what the questions are put to, under a load; called on the loop: a `Front`, a `Pool`, or what else has
            ``stop`` and ``discard`` as these. A `Front` heeds ``place``,
            ``max_batch_size`` (items), ``max_queue_time`` (seconds) and ``workers``; a `Pool` heeds ``workers``.
        distribution: The rival's name in its environment; None for what is written here, or comes with Python.
        questions: Whose functions they are.
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
            question = getattr(questions, load["question"])
            gc.collect()
            with asyncio.Runner(loop_factory=_loop_factory(loop_name)) as runner:
                _say(runner.run(_one_round(question, open_rival, load)))
        except NotAvailableError as exc:
            _say({"unavailable": str(exc)})
        except Exception as exc:  # noqa: BLE001 - the parent says it
            _say({"failed": f"{type(exc).__name__}: {exc}"})


async def _one_round(
    question: Callable[..., Awaitable[Any]], open_rival: Callable[[dict[str, Any]], Any], load: dict[str, Any]
) -> Any:
    rival = open_rival(load)
    try:
        return await question(rival, load)
    finally:
        if question is not _questions.stop:
            await (rival.discard or rival.stop)()


def _say(reply: dict[str, Any]) -> None:
    print(json.dumps(reply), flush=True)


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop  # type: ignore[no-any-return]
    return asyncio.new_event_loop
