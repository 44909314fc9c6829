"""Collects single asyncio calls into batches, and runs each batch as a coroutine, in threads, or in a pool of processes.

==================  ================================================================================================
module              one responsibility
==================  ================================================================================================
``__main__``        ``python -m async_batcher``
``cli``             the command ``async-batcher``
``_demo``           its main job: the standard library analysed in every mode
``_comparison``     what the demo shows: figures and their table
``_analysis``       what the demo does to one file (pure)
``_map``            its job ``map``: what the user asks for, checked
``_mapping``        a run of it: items of an input through the user's function
``_tune``           its job ``tune``: the options that suit the user's function, measured
``_frontier``       a plot of what was measured
``_advice``         what is shown of it: table, words, code (pure)
``_trials``         a function by itself, and in a batcher that always has something to do
``_timed``          the function as it is measured, in a worker
``_plan``           how the time is shared out among the trials (pure)
``_tuning``         from measurements to advice (pure)
``_interrupts``     Ctrl-C and SIGTERM while a run lives
``_progress``       how far it is, on a terminal
``_scan``           a look at its whole input beforehand
``_output``         where its results go: files that can be taken up again, or a stream
``_partial``        a file that is written beside its place until it is whole
``_journal``        what of them is finished (pure)
``_formats``        what an item of an input is, how it is decoded and its result encoded; a worker's side too
``_target``         the function that the user names, imported
``loops``           `run`: asyncio or uvloop
``prometheus``      a batcher's figures as metrics
``decorator``       `batched`: a batcher made of a function
``batcher``         `AsyncBatcher`: what users see
``lifecycle``           one session after the other: first call, stop, another loop, fork
``streaming``         items read from a source as fast as batches take them
``sources``        where a stream gets its items from: an iterable, async or not, or one that is read in a thread
``scheduler``        the loop's side: waiting futures, timers, the end
``inflight``        the batches that run: when they end, who is told, what is run again
``batch``            one of them
``delivery``       those who wait are told what came of their batch
``waitlist``           those who wait for room in the queue
``bulk``           many items with one who waits for all of them
``opentelemetry``   a span for each batch, linked to its callers' spans
``runners``         run one batch somewhere: as a coroutine, in a pool of workers, or in any executor
``pool``            `WorkerPool`: worker processes on the event loop, one private channel each
``future``         what a call waits on: a future, or something that costs less to wake
``batch_request``       one batch as it crosses, and what the replies mean
``fork_server``     the small process that forks the workers of a pool
``main``          a worker process of a pool, from its first moment to its last
``run_batch``         the far side of the process boundary: one batch
``signals``        signals to the whole process group, which a worker leaves to its program
``status_page``         what a worker shows its parent without a message
``remote_exception``        an exception to bytes and back
``codec``           objects to bytes and back
``pickler``        what is pickled by value
``unpickler``       how that is made again on the other side
``by_name``        objects that pickle refers to by their names
``by_value``       what has been sent and received by value: classes by their ids, namespaces by their keys
``object_path``     which modules other processes can import
``diagnostics``    which part of a value cannot be pickled
``framing``         how messages travel over a socket
``out_of_band``           large bytes beside a pickle
``tensors``        PyTorch's tensors beside a pickle
``shared_memory``            shared memory without a name
``slots``          the slots of a batcher in this process, each with its set-up and tear-down
``user_function``        the user's function, its set-up and its tear-down
``queue``        which items make the next batch, and when (pure)
``isolation``       what is run again when a batch has failed (pure)
``failure_kinds``          what a failed batch is to be blamed on (pure)
``deadlines``      whose time is over, and when the next one's will be (pure)
``recorder``          what is counted while a batcher works
``caller_exceptions`` an exception of its own for each caller (pure)
``exception_copy`` one exception taken apart, put together again, copied (pure)
``results``        what came of a batch: one answer each (pure)
``options``        the options, checked (pure)
``exit_status``         how worker processes ended, in words
``cpu_count``          how many cores may be used
``stats``           records of what a batcher has done
``exceptions``      the error tree
==================  ================================================================================================

A module imports only from below its own line (``tests/test_structure.py`` holds it to that). Names are resolved when they are
first used, so that a worker process does not import asyncio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from async_batcher._pool.pool import WorkerInfo, WorkerPool
    from async_batcher.batcher import AsyncBatcher
    from async_batcher.decorator import BatchedFunction, batched
    from async_batcher.loops import run

__all__ = ["AsyncBatcher", "BatchedFunction", "WorkerInfo", "WorkerPool", "batched", "run"]

__version__ = "0.3.0"

_HOMES = {
    "AsyncBatcher": "batcher",
    "BatchedFunction": "decorator",
    "WorkerInfo": "_pool.pool",
    "WorkerPool": "_pool.pool",
    "batched": "decorator",
    "run": "loops",
}


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
