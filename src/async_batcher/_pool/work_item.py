"""One batch for its trip to a worker and back: what is sent, and what the replies mean.

::

    PickledFunction, batch --pickled--> WorkItem in a `WorkerPool`: encode_batch(...) ... reply
    reply --decode_reply--> outcome, or None: send it again, with what the worker lacks

What a generator yields comes before the reply: `WorkItem.yielded`. The outcome is that of the items
whose results have not been passed on. A work item that is sent again has never yielded, since no
worker had begun it.

In an executor, a `BatchRequest` (`_runners`) takes the place of the work item.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._pool.pickled_function import is_own_interrupt
from async_batcher._serialization.caller_exceptions import of_call
from async_batcher._serialization.diagnostics import pickling_error, unpickling_error
from async_batcher._serialization.remote_exception import (
    PickledException,
    decode_exception,
    describe_failure,
)
from async_batcher._transport.protocol import CODEC_PICKLE, ENVELOPE, ReplyKind, loads
from async_batcher._worker.results import Outcome, PartialOutcome, insert_failures
from async_batcher.exceptions import BatchError, SerializationError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._serialization.codec import Payload
    from async_batcher._transport.framing import Message


class PickledBatch:
    """A pickled batch.

    Args:
        function: The function that runs it.
        batch: The items; None: a trip that only loads and sets up the function.

    Attributes:
        key: Names the function.
        items: What is sent: the pickle of the batch, or of each item where that fails.
        definitions: The classes of the items, for a worker that lacks one.
        outcome: What came of the batch, if that is known before it is sent.
    """

    __slots__ = (
        "_batch", "_failures", "_is_checked", "definitions", "function", "items", "key", "outcome",
    )  # fmt: skip

    def __init__(self, function: PickledFunction, batch: list[Any] | None) -> None:
        self.function = function
        self.items: Payload | list[Payload] | None = None
        self.definitions: list[Payload] | None = None
        self.outcome: Outcome | None = None
        self._batch = batch
        self._failures: dict[int, BaseException] | None = None  # items that could not be pickled
        self._is_checked = False
        if function.payload is None:
            try:
                function.pickle()
            except SerializationError as exc:
                self.outcome = exc
        self.key = function.key
        if batch is not None and self.outcome is None:
            try:
                self.items = function.codec.dumps(batch)
            except BaseException as exc:
                if is_own_interrupt(exc):
                    raise
            if self.items is None:  # outside of the handler: what an item raises has no context
                self._pickle_items(batch)

    def decode_results(self, payload: Payload) -> Outcome:
        """Return the outcome of a batch whose results are one pickle."""
        try:
            results = self.function.codec.loads(payload)
            batch = self._batch
            if batch is not None and self._failures is None and len(results) == len(batch):
                return results  # type: ignore[no-any-return]
            return self._with_failures(results)
        except MemoryError:
            return MemoryError("there is no memory for the results of the batch")
        except BaseException as error:  # noqa: BLE001 - of any kind, since it came from the reply
            return unpickling_error("results", error)

    def decode_reply(self, reply: Any) -> Outcome | None:
        """Return the outcome of the batch, or None: send it again, with what the worker lacks."""
        if self.outcome is not None:
            return self.outcome
        match reply:
            case (ReplyKind.DONE, tuple(payload)) if self._batch is not None:
                return self.decode_results(payload)
            case (ReplyKind.DONE_EACH, list(results)) if self._batch is not None:
                return self._with_failures([self._result(*result) for result in results])
            case (ReplyKind.RAISED, failure):
                return self._raised(failure, {})
            case (ReplyKind.RAISED, failure, dict(unreadable)):
                return self._raised(failure, unreadable)
            case (ReplyKind.NEED_DEFINITIONS,) if self.definitions is None:
                self.definitions = self.function.codec.definitions()
                return None
            case (ReplyKind.FUNCTION_ERROR, failure):
                return self._unreadable(f"function {self.function.name!r}", failure)
            case (ReplyKind.ITEMS_ERROR, failure):
                if not isinstance(self.items, tuple) or self._batch is None:
                    return self._unreadable("item", failure)
                if not self._check(self._batch):
                    self._pickle_items(self._batch)
                return self.outcome
            case (ReplyKind.READY,) if self._batch is None:
                return []
        msg = (
            f"the executor gave back {type(reply).__name__} {reply!r:.80} "
            "instead of the reply of its worker"
        )
        return BatchError(msg)

    def _check(self, batch: list[Any]) -> bool:
        """Pickle by value what no worker can import, and tell whether that makes a difference."""
        if self._is_checked:
            return False
        self._is_checked = True
        try:
            payload, trace = self.function.codec.dumps_checked(batch)
        except Exception:  # noqa: BLE001 - pickled one by one, the items say why
            return False
        if trace.modules and payload != self.items:
            self.items = payload
            return True
        return False

    def _pickle_items(self, batch: list[Any]) -> None:
        items: list[Payload] = []
        failures: dict[int, BaseException] = {}
        for index, item in enumerate(batch):
            try:
                items.append(self.function.codec.dumps(item))
            except BaseException as exc:
                if is_own_interrupt(exc):
                    raise
                failures[index] = pickling_error("the item", item, exc)
        self.items = items
        self._failures = failures or None
        if not items:
            self.outcome = self._with_failures([])

    def _raised(
        self, failure: PickledException, unreadable: dict[int, PickledException]
    ) -> Outcome:
        error = decode_exception(self.function.codec, failure)
        failures = self._failures or {}
        if self._batch is None or not (failures or unreadable):
            return error
        results: list[Any] = [error] * (len(self._batch) - len(failures))
        for index, why in unreadable.items():
            results[index] = self._unreadable("item", why)
        return PartialOutcome(error, insert_failures(results, failures))

    def _result(self, kind: int, content: Any) -> Any:
        if kind == ReplyKind.RAISED:
            return decode_exception(self.function.codec, content)
        if kind == ReplyKind.ITEMS_ERROR:
            return self._unreadable("item", content)
        try:
            return self.function.codec.loads(content)
        except BaseException as exc:  # noqa: BLE001 - user code
            return unpickling_error("result", exc)

    def _unreadable(self, what: str, failure: PickledException) -> SerializationError:
        cause = decode_exception(self.function.codec, failure)
        return unpickling_error(what, cause, describe_failure(failure))

    def _with_failures(self, results: list[Any]) -> Outcome:
        """Add the failures of the items that were not sent."""
        if self._batch is None:
            return results
        failures = self._failures or {}
        sent = len(self._batch) - len(failures)
        if len(results) != sent:
            return BatchError(f"the worker's reply has {len(results)} results for {sent} items")
        return insert_failures(results, failures) if failures else results


class WorkItem(PickledBatch):
    """A batch for a `WorkerPool`, and the callbacks for its outcome.

    Args:
        client: Takes turns with other clients; one batcher, for example.
        timeout: Seconds that the batch may run, from when it starts. None disables it.
        on_outcome: Called once, on the loop's thread, with the outcome.
        on_results: Called in its place with a worker's results, when everything else that they
            cause is done: user code may run in it. None: ``on_outcome`` is called.
        claim: Called once, when a worker is about to get the item, even if a second worker gets it
            later. False: the item is not wanted.
        on_early: Called before the outcome, any number of times, with the results of the next
            items. None: they are part of the outcome if the function returns.

    Attributes:
        is_tear_down: Whether it is a `TearDownItem`.
        requeues: How often it was taken back from a worker that crashed before it had begun it.
        is_abandoned: Whether all of its callers are gone.
        began_at: When it began, on `time.monotonic`, if it had to wait in the pool: infinity until
            then. Otherwise 0.
        yielded: The results that were read and have not been passed on.
    """

    __slots__ = (
        "_on_early", "_on_results", "began_at", "claim", "client", "is_abandoned", "on_outcome",
        "requeues", "timeout", "yielded",
    )  # fmt: skip

    is_tear_down = False

    def __init__(
        self,
        function: PickledFunction,
        batch: list[Any] | None,
        client: Hashable = None,
        timeout: float | None = None,
        on_outcome: Callable[[Outcome], None] | None = None,
        on_results: Callable[[Outcome], None] | None = None,
        claim: Callable[[], bool] | None = None,
        on_early: Callable[[list[Any]], None] | None = None,
    ) -> None:
        self.yielded: list[Message] | None = None
        super().__init__(function, batch)
        self.client = client
        self.timeout = timeout
        self.on_outcome = on_outcome
        self._on_results = on_results
        self.claim = claim
        self._on_early = on_early
        self.requeues = 0
        self.is_abandoned = False
        self.began_at = 0.0

    def __repr__(self) -> str:
        count = "no" if self._batch is None else len(self._batch)
        return f"<{type(self).__name__} {self.name} with {count} items>"

    @property
    def name(self) -> str:
        """The name of the user's function, for a debugger."""
        return self.function.name

    @property
    def is_setup_only(self) -> bool:
        """Whether it only loads and sets up its function."""
        return self.items is None

    def is_wanted(self) -> bool:
        claim, self.claim = self.claim, None
        return claim is None or claim()

    def decode_reply(self, reply: Any) -> Outcome | None:
        # A worker that could not load the function ahead of its first batch asks for it again.
        needs_function = reply == (ReplyKind.NEED_FUNCTION,)
        return None if needs_function else super().decode_reply(reply)

    def pass_on(self) -> None:
        """Unpickle what was yielded, and pass it on."""
        if self._on_early is not None and self._batch is not None:
            results = self._take_yielded()
            self._batch = self._batch[len(results) :]
            self._on_early(results)

    def _take_yielded(self) -> list[Any]:
        messages, self.yielded = self.yielded or (), None
        return [self._decode_yielded(message) for message in messages]

    def _decode_yielded(self, message: Message) -> Any:
        try:
            if message.form == ENVELOPE:
                kind, content = loads(message.body, message.buffers)
                if kind == ReplyKind.DONE_EACH:
                    return self._result(*content[0])
            else:
                content = (message.form == CODEC_PICKLE, message.body, message.buffers)
            (result,) = self.function.codec.loads(content)
        except BaseException as exc:  # noqa: BLE001 - user code
            return unpickling_error("result", exc)
        return result

    def _with_failures(self, results: list[Any]) -> Outcome:
        return super()._with_failures([*self._take_yielded(), *results])

    def detach(self) -> None:
        """Drop the callbacks; no caller waits."""
        self.on_outcome = self._on_results = self.claim = self._on_early = None

    def resolve(self, outcome: Outcome) -> None:
        """Pass the outcome on, once."""
        on_outcome = self.on_outcome
        self.detach()  # a callback may hold the item: a reference cycle
        if on_outcome is not None:
            on_outcome(outcome)

    def resolve_with_results(self, results: Payload) -> None:
        """Unpickle a worker's results and pass them on, once."""
        outcome = self.decode_results(results)
        on_results = self._on_results or self.on_outcome
        self.on_outcome = self._on_results = self.claim = None
        if on_results is not None:
            on_results(outcome)


class TearDownItem(WorkItem):
    """Has one worker drop a function, after the tear-down of its set-up."""

    __slots__ = ()

    is_tear_down = True

    def __init__(self, key: bytes) -> None:
        super().__init__(_KeyOnly(key), None)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.key.hex()}>"


class _KeyOnly:
    """Stands for a function that need not be sent."""

    payload = (False, b"", ())

    def __init__(self, key: bytes) -> None:
        self.key = key


def return_or_raise(outcome: Outcome, function: Any) -> Any:
    """Return or raise what a call of ``function`` did."""
    result: Any = outcome[0] if type(outcome) is list else outcome
    if type(result) is tuple:
        return result[0]
    try:
        raise of_call(result, function)
    finally:
        del result, outcome  # the exception's traceback holds this frame
