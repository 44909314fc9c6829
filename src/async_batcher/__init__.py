"""Collects single asyncio calls into batches, and runs each batch as a coroutine, in threads, or in a pool of processes.

==================  ================================================================================================
module              one responsibility
==================  ================================================================================================
``__main__``        ``python -m async_batcher``
``cli``             the command ``async-batcher``
``_demo``           its main job: the standard library analysed in every mode
``_comparison``     what the demo shows: figures and their table
``_analysis``       what the demo does to one file (pure)
``loops``           `run`: asyncio or uvloop
``batcher``         `AsyncBatcher`, `batched`: what users see
``_life``           one session after the other: first call, stop, another loop, fork
``_session``        the loop's side: waiting futures, the one timer, the end
``_waiter``         what a call waits on: a future, or one of a batch that is woken together
``runners``         run one batch somewhere: as a coroutine, or in any executor
``_worker``         the far side of the process boundary
``_wire``           how objects cross it
``_program``        the user's function and its set-up, where they run
``_forming``        which items make the next batch, and when (pure)
``_outcome``        what came of a batch: one answer each (pure)
``_options``        the options, checked (pure)
``_cores``          how many cores may be used
``exceptions``      the error tree
==================  ================================================================================================

A module imports only from below its own line (``tests/test_structure.py`` holds it to that). Names are resolved when they are
first used, so that a worker process does not import asyncio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from async_batcher.batcher import AsyncBatcher, batched
    from async_batcher.loops import run

__all__ = ["AsyncBatcher", "batched", "run"]

_HOMES = {"AsyncBatcher": "batcher", "batched": "batcher", "run": "loops"}


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted({*globals(), *__all__})
