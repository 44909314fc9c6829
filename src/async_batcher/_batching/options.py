"""The options of a batcher: declared, described, checked; the error of a value that is wrong."""

from __future__ import annotations

import dataclasses
import operator
import sys
from concurrent.futures import Executor
from inspect import Parameter, Signature, cleandoc
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeGuard

from async_batcher._batching.option_checks import CHECKS, as_tuple
from async_batcher._pool.checks import warn_user

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
    from typing import TypeAlias

    from async_batcher._batching.records.observers import ObserverOption
    from async_batcher._pool.pool import WorkerPool
    from async_batcher.failures import FailurePolicy
    from async_batcher.limits import Limit

    ExecutorOption: TypeAlias = (
        Executor
        | WorkerPool
        | Literal["thread", "process"]
        | Callable[[], Executor | WorkerPool]
        | None
    )

NO_LIMIT = sys.maxsize

_DEPRECATED = {
    "batch_size": "is deprecated and will be removed: use 'max_batch_size'.",
    "buffering_time": "has no effect and will be removed: 'max_queue_time' bounds the wait.",
    "sleep_time": (
        "has no effect and will be removed: callers are woken when their result is there."
    ),
}


class _DeprecatedOptions(TypedDict, total=False):
    batch_size: int | None
    buffering_time: float
    sleep_time: float


class BatcherOptions(_DeprecatedOptions, total=False):
    """The keyword arguments of `AsyncBatcher`.

    Args:
        max_batch_size: Items of a batch at most. -1 or None: no limit; due items are then divided
            by the free workers, or leave in one batch where ``concurrency`` is 1 by default.
        max_queue_time: Seconds that an item is queued at most for its batch to fill, from its
            arrival. A full batch does not wait. With 0 a batch leaves in the next iteration of the
            event loop; more items collect only while all workers are busy. None: 0 where batches
            run in a `WorkerPool`; 0.01 elsewhere, and until a factory has returned a `WorkerPool`.
        concurrency: Batches that run at a time. -1: no limit. None: as many as there are worker
            processes or interpreters, or threads that the batcher made; 1 for coroutines, the
            loop's threads, a given thread pool, and an executor of unknown size.
        max_queue_size: Items that are queued at most, without those in running batches. Items that
            come back count, and may exceed it. -1 or None: no limit.
        executor: Where a sync `process_batch` runs. None: the event loop's default threads.
            ``"thread"`` or ``"process"``: a pool that the batcher makes and shuts down. A
            `WorkerPool` or a `concurrent.futures.Executor`: there; the batcher leaves it running. A
            factory, which is a callable without arguments that returns one of these
            (``partial(ProcessPoolExecutor, 4, initializer=load)``): the batcher calls it in a
            thread, at the first call or `start`, shuts down what it returned at `stop`, and calls
            it again after that broke. It must make a new one each time.
        max_workers: Workers of the pool that ``"thread"`` or ``"process"`` makes. None: one for
            each usable core.
        batch_timeout: Seconds that a batch may run, from its start. None: no timeout. Then its
            callers get `BatchTimeoutError`. In a `WorkerPool`, user code gets `KeyboardInterrupt`,
            and its worker is killed 0.5 seconds later and replaced. A coroutine is cancelled; a
            call in a thread or a standard pool runs on and keeps its slot. Time for which the whole
            program is halted does not count.
        item_timeout: Seconds from the call until an item must have its result. None: no timeout.
            Then its caller gets `ItemTimeoutError`; an item that is still queued never runs.
            `process` takes a ``timeout`` of its own.
        when_full: What a call does if the queue is full. ``"raise"``: it raises
            `QueueFullException`. ``"wait"``: it waits for capacity, first come, first served;
            `submit`, which cannot wait, raises.
        on_failure: What happens to a batch that raises, crashes its worker or exceeds
            ``batch_timeout``, and to items for which an exception is returned: a list of policies,
            such as `retry` and `isolate` of `async_batcher.failures` make. The first that matches
            the exception decides. Without a match the callers get the exception; a `Later` needs
            none.
        limits: `Limit` objects: the sum of bytes, tokens or other costs that a batch or the queue
            may hold, and what may be dispatched in a span of time.
        key: A function of one item, called when it is enqueued. A batch holds items of one key.
            Each key has its own window; they share the slots and limits. If it raises, or returns
            what is not hashable, the call for that item fails.
        key_concurrency: Batches of one key that run at a time at most. None: no limit. With 1,
            batches of a key run in the order of their items, also after a `Later`. A batch that
            times out, or is cancelled, counts until it has ended; in a `WorkerPool` its callers
            get their error then.
        cancel_abandoned: Whether a running batch is cancelled when all its callers were: in a
            `WorkerPool` as by ``batch_timeout``; a coroutine is cancelled. Otherwise it runs to its
            end. A `Later` that it raises pauses the batcher all the same.
        on_batch: What observes the batches, on the event loop: a function that gets a
            `stats.BatchRecord` of each batch that has ended; an observer, which is an object with
            the methods ``started(batch)``, which gets a `stats.BatchStart` before the batch runs,
            and ``finished(record)``; or a list or tuple of these. An observer may also have
            ``enqueued()``, which is called in the context of each call that enqueues items; what it
            returns, unless that is None, is in ``captured`` of the `stats.BatchStart` of their
            batches. The first exception of each observer is logged; none has another effect.
            ``async_batcher.integrations.opentelemetry.BatchTracer()`` makes spans.
        name: What log lines, notes on exceptions, metrics, spans and ``repr`` call the batcher.
            None: the name of the function or class.
        batch_size: Deprecated since 0.2.2, like ``sleep_time`` and ``buffering_time``.
    """

    max_batch_size: int | None
    max_queue_time: float | None
    concurrency: int | None
    max_queue_size: int | None
    executor: ExecutorOption
    max_workers: int | None
    batch_timeout: float | None
    item_timeout: float | None
    when_full: Literal["raise", "wait"]
    on_failure: Sequence[FailurePolicy] | FailurePolicy | None
    limits: Sequence[Limit] | Limit | None
    key: Callable[[Any], Hashable] | None
    key_concurrency: int | None
    cancel_abandoned: bool
    on_batch: ObserverOption
    name: str | None


class BatchedOptions(BatcherOptions, total=False):
    """The keyword arguments of `batched`: also ``setup_worker``, which prepares a worker.

    It runs before a worker's first batch: once in each worker process, in each thread of
    ``executor="thread"``, and on the event loop for an async `process_batch`; with other
    executors in this process once for each batch that may run at a time. In threads, attributes
    that it assigns (``self.db = ...``) and each `functools.cached_property` that it is the
    first to read belong to that thread. All other attributes are shared, also what it writes to
    ``self.__dict__`` itself. Its time does not count against ``batch_timeout``.

    A generator function tears down in what follows its one ``yield``, when the worker, the
    thread or the batcher ends; for an async `process_batch` it may be an async generator
    function. An exception of the tear-down is logged. It runs at `stop` and when a worker is
    replaced, but not in a worker process that is killed; in a process of a given executor it
    runs when that process exits.

    If it raises, the callers of the batch get the exception, and the next batch tries again.

    It may take longer than ``item_timeout`` and ``batch_timeout``: it runs for as long as a
    caller without a timeout, or `start`, waits for it. When all callers of the batch that
    started it have timed out or were cancelled, it is ended after 2 seconds, or 4 times as long
    as it took before: its worker process is killed, or its coroutine cancelled, and the next
    batch starts another. Each set-up that was ended doubles the time of the next, up to
    ``start_timeout`` of the `WorkerPool` (60 seconds), so that a slow set-up finishes even if
    every caller has a short timeout. A batch with a ``batch_timeout`` waits for
    ``start_timeout``; its callers then get `WorkerDiedError`. In a thread nothing can end a
    set-up.
    """

    setup_worker: Callable[[], Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckedOptions:
    """The options with their defaults, checked.

    Raises:
        TypeError: A value has the wrong type, or ``max_workers`` has no pool to size.
        ValueError: A value is out of range.
    """

    max_batch_size: int | None = -1
    max_queue_time: float | None = None
    concurrency: int | None = None
    max_queue_size: int | None = -1
    executor: ExecutorOption = None
    max_workers: int | None = None
    batch_timeout: float | None = None
    item_timeout: float | None = None
    when_full: Literal["raise", "wait"] = "raise"
    on_failure: Sequence[FailurePolicy] | FailurePolicy | None = None
    limits: Sequence[Limit] | Limit | None = None
    key: Callable[[Any], Hashable] | None = None
    key_concurrency: int | None = None
    cancel_abandoned: bool = False
    on_batch: ObserverOption = None
    name: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_batch_size",
            "max_queue_size",
            "concurrency",
            "max_workers",
            "key_concurrency",
        ):
            value: Any = getattr(self, name)
            if not isinstance(value, int) and hasattr(type(value), "__index__"):  # as NumPy's
                object.__setattr__(self, name, operator.index(value))
        for name, check in CHECKS.items():
            check(name, getattr(self, name))
        if self.key_concurrency is not None and self.key is None:
            msg = f"key_concurrency={self.key_concurrency!r}: needs key=, which tells the key"
            raise TypeError(msg)
        if self.max_workers is not None and self.executor not in ("thread", "process"):
            msg = (
                f"max_workers={self.max_workers!r} sizes the pool that executor='thread' or "
                f"executor='process' makes; with executor={self.executor!r} there is none to size"
            )
            raise TypeError(msg)

    @property
    def policies(self) -> Sequence[FailurePolicy]:
        """The option ``on_failure``, as a sequence."""
        return as_tuple(self.on_failure)

    @classmethod
    def of_keywords(cls, keywords: Mapping[str, Any], callee: str) -> CheckedOptions:
        """Make the options of keyword arguments; deprecated and pointless ones warn.

        Args:
            keywords: What was passed to the class or function.
            callee: Its name, for the error.

        Raises:
            TypeError: There is no such option.
        """
        check_keywords(keywords, callee)
        options = {name: value for name, value in keywords.items() if name not in _DEPRECATED}
        for name in keywords.keys() & _DEPRECATED.keys():
            msg = f"The {name!r} argument {_DEPRECATED[name]}"
            warn_user(msg)
            if name == "batch_size":
                options["max_batch_size"] = keywords[name]
        checked = cls(**options)
        batch_size, queue_size = checked.max_batch_size, checked.max_queue_size
        if or_unlimited(queue_size) < or_unlimited(batch_size) < NO_LIMIT:
            msg = (
                f"max_batch_size={batch_size}: no batch can be that large, since the queue holds "
                f"max_queue_size={queue_size} items"
            )
            warn_user(msg)
        return checked


_PARAMETERS = [
    Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
    for field in dataclasses.fields(CheckedOptions)
]
_SELF = Parameter("self", Parameter.POSITIONAL_ONLY)


def signature_with_options(first: Parameter = _SELF, *last: Parameter) -> Signature:
    """Return the signature of a callable that takes the options as keywords."""
    return Signature([first, *_PARAMETERS, *last])


def with_text_of(source: type, doc: str | None) -> str | None:
    """Return a docstring whose "See `source`." is replaced by what the docstring there says."""
    if doc is None or source.__doc__ is None:  # python -OO
        return None
    _, _, text = cleandoc(source.__doc__).partition("\n\n")
    return cleandoc(doc).replace(f"See `{source.__name__}`.", text)


def check_keywords(keywords: Iterable[str], callee: str, *more: str) -> None:
    """Raise TypeError unless each is an option, a deprecated one, or one of ``more``."""
    known = [parameter.name for parameter in _PARAMETERS] + list(more)
    for name in keywords:
        if name not in known and name not in _DEPRECATED:
            import difflib
            import inspect

            from async_batcher._pool.pool import WorkerPool

            close = difflib.get_close_matches(name, known, 1)
            hint = f". Did you mean {close[0]!r}?" if close else ""
            if name in inspect.signature(WorkerPool).parameters:
                hint = f"; it is one of the pool's: executor=WorkerPool({name}=...)"
            msg = f"{callee} got an unexpected keyword argument {name!r}{hint}"
            raise TypeError(msg)


def or_unlimited(value: int | None) -> int:
    """A limit as a number: -1 and None mean none."""
    return NO_LIMIT if value is None or value == -1 else value


def is_factory(executor: object) -> TypeGuard[Callable[[], Executor | WorkerPool]]:
    """Tell whether it makes an executor when it is called."""
    return callable(executor) and not isinstance(executor, Executor)
