"""What a worker (a process, an interpreter, or a thread of this process) does with a batch.

::

    RemoteCall  --unpickled in the worker-->  RemoteCall()  -->  UserFunction.run(batch)  -->  reply
                                               |
                                               the first time: load and set up (`function_cache.py`)

Rules:

- Bytes in, bytes out: an executor pickles only classes of this package and builtins. Every object
  of the user's is unpickled here, inside a ``try``.
- A worker asks for what it lacks: the function, or the definitions of classes.
- Anything that user code raises, ``SystemExit`` included, becomes a reply; the worker goes on.
- Plain data travels as one pickle, anything else result by result, so that one that cannot be
  pickled fails alone.
- What a generator yields goes to the observer at once; the reply has the rest. Without an observer,
  and for items that travel one by one, whose results are not all of the batch, it is collected. The
  reply then also has what was yielded before the batch raised.
- Imports neither asyncio nor anything that it does not use.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.diagnostics import pickling_error
from async_batcher._serialization.exception_text import is_exception
from async_batcher._serialization.out_of_band import MIN_BUFFER_SIZE, BufferPickler
from async_batcher._serialization.remote_exception import (
    PickledException,
    clear_tracebacks,
    encode_exception,
)
from async_batcher._serialization.unpickler import UnknownClassError
from async_batcher._transport.protocol import Reply, ReplyKind
from async_batcher._worker.function_cache import (
    LoadError,
    find_function,
    load_function,
    refresh_function,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from async_batcher._serialization.codec import Codec, Payload
    from async_batcher._worker.function_cache import LoadedFunction
    from async_batcher.current import BatchFacts

    class BatchObserver(Protocol):
        """Sees how far a batch is."""

        def on_load(self) -> None:
            """Its function is about to be loaded and set up."""

        def on_loaded(self, loaded: LoadedFunction) -> None:
            """Its function has been loaded and set up."""

        def on_begin(self) -> bool:
            """The batch itself is about to begin. Returns whether it is still wanted."""

        def on_result(self, reply: Reply) -> bool:
            """The next result of the batch is there: as the reply to a batch of one.

            Returns whether the batch is to go on.
            """

        def on_raised(self, error: BaseException) -> None:
            """The batch has raised."""


# Of each item; plain ints, since there may be many.
_DONE, _RAISED, _ITEMS_ERROR = map(int, (ReplyKind.DONE, ReplyKind.RAISED, ReplyKind.ITEMS_ERROR))


class RemoteCall:
    """One batch on its way to a worker; see `run_batch` for the arguments."""

    __slots__ = ("definitions", "facts", "function", "items", "key")

    def __init__(
        self,
        key: bytes,
        function: Payload | None,
        definitions: list[Payload] | None,
        items: Payload | list[Payload] | None,
        facts: BatchFacts | None = None,
    ) -> None:
        self.key = key
        self.function = function
        self.definitions = definitions
        self.items = items
        self.facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.key, self.function, self.definitions, self.items)
        return (RemoteCall, arguments if self.facts is None else (*arguments, self.facts))

    def __call__(self) -> Reply:
        kind, *content = run_batch(
            self.key, self.function, self.definitions, self.items, self.facts
        )
        return (int(kind), *content)


def run_batch(
    key: bytes,
    function: Payload | None,
    definitions: list[Payload] | None,
    items: Payload | list[Payload] | None,
    facts: BatchFacts | None = None,
    *,
    out_of_band: bool = False,
    observer: BatchObserver | None = None,
) -> Reply:
    """Run a batch in this process.

    Args:
        key: Names the function.
        function: The function, for a worker that lacks it.
        definitions: The classes of the items, for a worker that lacks one.
        items: The batch, as one list or, if that cannot be unpickled, item by item. None only loads
            and sets up the function.
        facts: What `current_batch` returns beside the size, with the pickle of the key. None: the
            defaults.
        out_of_band: Whether large buffers may travel beside the pickles; see `Codec`.
        observer: Called as the batch goes on.
    """
    loaded = find_function(key)
    if loaded is None:
        if function is None:
            return (ReplyKind.NEED_FUNCTION,)
        if observer is not None:
            observer.on_load()
        try:
            send = None if observer is None else partial(_pass_on, observer)
            loaded = load_function(key, function, out_of_band=out_of_band, on_result=send)
        except LoadError as exc:
            return exc.reply
        if observer is not None:
            observer.on_loaded(loaded)
    elif function is not None and observer is not None:  # else one of several trips to set it up
        try:
            loaded = refresh_function(key, function, loaded)
        except LoadError as exc:
            return exc.reply
    user_function, codec, pickler, _, on_result = loaded
    if items is None:
        return (ReplyKind.READY,)
    if observer is not None and not observer.on_begin():
        return (ReplyKind.NOT_STARTED,)
    broken: PickledException | None = None
    for definition in definitions or ():
        try:
            codec.loads(definition)
        except BaseException as exc:  # noqa: BLE001 - user code; the items of this class fail with it
            broken = broken or encode_exception(codec, exc)
    if facts is not None:
        try:
            facts = _load_key(codec, facts)
        except BaseException as exc:  # noqa: BLE001 - user code
            if definitions is None and isinstance(exc, UnknownClassError):
                return (ReplyKind.NEED_DEFINITIONS,)
            return (ReplyKind.KEY_ERROR, broken or encode_exception(codec, exc))
    unreadable: dict[int, PickledException] | None = None
    try:
        if isinstance(items, tuple):  # nearly always
            batch = codec.loads(items)
        else:
            on_result = None  # collect
            batch, unreadable = _load_each(
                codec, items, has_definitions=definitions is not None, broken=broken
            )
    except UnknownClassError as exc:
        if definitions is None:
            return (ReplyKind.NEED_DEFINITIONS,)
        return (ReplyKind.ITEMS_ERROR, broken or encode_exception(codec, exc))
    except BaseException as exc:  # noqa: BLE001 - user code
        return (ReplyKind.ITEMS_ERROR, encode_exception(codec, exc))
    collected: list[Any] = []
    if on_result is None:
        on_result = partial(_collect, collected)
    count = len(batch) + len(unreadable or ())  # now: the user's code may consume its list
    outcome = user_function.run(batch, on_result, facts) if batch else []
    del batch
    if isinstance(outcome, list):
        outcome = collected + outcome if collected else outcome
        if unreadable:
            return (ReplyKind.DONE_EACH, _encode_some(codec, outcome, unreadable, count))
        return _encode_results(codec, pickler, outcome)
    if observer is not None:
        observer.on_raised(outcome)
    if not (unreadable or collected):
        return (ReplyKind.RAISED, encode_exception(codec, outcome))
    failure = encode_exception(codec, outcome, clear=False)  # a result may be its cause
    some = _encode_some(codec, collected, unreadable or {}, count)
    clear_tracebacks(outcome)
    return (ReplyKind.RAISED, failure, some)


def _load_key(codec: Codec, facts: BatchFacts) -> BatchFacts:
    payload, attempt, first, last = facts
    return (None if payload is None else codec.loads(payload), attempt, first, last)


def _load_each(
    codec: Codec,
    items: Sequence[Payload],
    *,
    has_definitions: bool,
    broken: PickledException | None,
) -> tuple[list[Any], dict[int, PickledException]]:
    batch: list[Any] = []
    unreadable: dict[int, PickledException] = {}
    for index, payload in enumerate(items):
        try:
            batch.append(codec.loads(payload))
        except BaseException as exc:
            is_unknown = isinstance(exc, UnknownClassError)
            if is_unknown and not has_definitions:
                raise
            unreadable[index] = (broken if is_unknown else None) or encode_exception(codec, exc)
    return batch, unreadable


def _collect(results: list[Any], result: Any) -> bool:
    results.append(result)
    return True


def _pass_on(observer: BatchObserver, codec: Codec, pickler: BufferPickler, result: Any) -> bool:
    return observer.on_result(_encode_results(codec, pickler, [result]))


def _encode_results(codec: Codec, pickler: BufferPickler, results: list[Any]) -> Reply:
    try:
        data, buffers = pickler.dumps(results)
    except BaseException:  # noqa: BLE001 - not plain, or user code that fails
        return (ReplyKind.DONE_EACH, _encode_each(codec, results))
    if len(data) < MIN_BUFFER_SIZE:
        return (ReplyKind.DONE, (False, data, buffers))
    return (ReplyKind.DONE, codec.payload(data, buffers))


def _encode_some(
    codec: Codec, results: list[Any], unreadable: dict[int, PickledException], count: int
) -> list[tuple[int, Any] | None]:
    """Encode the results of a batch of which some items could not be unpickled.

    None stands for those of the last items, if there are none.
    """
    rest = iter(_encode_each(codec, results))
    return [
        (_ITEMS_ERROR, unreadable[i]) if i in unreadable else next(rest, None) for i in range(count)
    ]


def _encode_each(codec: Codec, results: list[Any]) -> list[tuple[int, Any]]:
    encoded = [_encode_result(codec, result) for result in results]
    for result in results:  # after all of them: they may share one, or a cause
        if is_exception(result):
            clear_tracebacks(result)
    return encoded


def _encode_result(codec: Codec, result: Any) -> tuple[int, Any]:
    if is_exception(result):
        return (_RAISED, encode_exception(codec, result, clear=False))
    try:
        return (_DONE, codec.dumps(result))
    except BaseException as exc:  # noqa: BLE001 - user code
        return (_RAISED, encode_exception(codec, pickling_error("the result", result, exc)))
