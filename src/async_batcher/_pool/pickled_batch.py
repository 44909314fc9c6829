"""A pickled batch for its trips to a worker: what is sent, and what the replies mean.

::

    PickledFunction, batch --pickled--> PickledBatch: encode_batch(...) ... reply
    reply --decode_reply--> outcome, or None: send it again, with what the worker lacks

In a `WorkerPool` it is a `WorkItem`, in an executor a `BatchRequest` (`_runners`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._pool.pickled_function import is_own_interrupt
from async_batcher._serialization.diagnostics import pickling_error, unpickling_error
from async_batcher._serialization.remote_exception import (
    PickledException,
    decode_exception,
    describe_failure,
)
from async_batcher._transport.protocol import ReplyKind
from async_batcher._worker.results import Outcome, PartialOutcome, insert_failures
from async_batcher.exceptions import BatchError, SerializationError

if TYPE_CHECKING:
    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._serialization.codec import Payload
    from async_batcher._transport.protocol import SentFacts
    from async_batcher.current import BatchFacts


class PickledBatch:
    """A pickled batch.

    Args:
        function: The function that runs it.
        batch: The items; None: a trip that only loads and sets up the function.
        facts: What the batch knows of itself; see `current_batch`. None: the defaults.

    Attributes:
        facts: The same with the pickle of the key.
        key: Names the function.
        items: What is sent: the pickle of the batch, or of each item where that fails.
        definitions: The classes of the items, for a worker that lacks one.
        outcome: What came of the batch, if that is known before it is sent.
    """

    __slots__ = (
        "_batch", "_facts", "_failures", "_is_checked", "_is_key_checked", "definitions", "facts",
        "function", "items", "key", "outcome",
    )  # fmt: skip

    def __init__(
        self, function: PickledFunction, batch: list[Any] | None, facts: BatchFacts | None = None
    ) -> None:
        self.function = function
        self.items: Payload | list[Payload] | None = None
        self.definitions: list[Payload] | None = None
        self.outcome: Outcome | None = None
        self._batch = batch
        self._facts = facts
        self.facts: SentFacts | None = None
        self._failures: dict[int, BaseException] | None = None  # items that could not be pickled
        self._is_checked = self._is_key_checked = False
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
            if facts is not None:
                self._pickle_facts(facts)

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
                return self._raised(failure, [])
            case (ReplyKind.RAISED, failure, list(results)):
                return self._raised(failure, results)
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
            case (ReplyKind.KEY_ERROR, failure):
                if self._check_key():
                    return None
                return self._unreadable("key of the batch", failure)
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

    def _pickle_facts(self, facts: BatchFacts) -> None:
        key, attempt, first, last = facts
        try:
            payload = None if key is None else self.function.codec.dumps(key)
        except BaseException as exc:
            if is_own_interrupt(exc):
                raise
            self.outcome = pickling_error("the key of the batch", key, exc)
        else:
            self.facts = payload, attempt, first, last

    def _check_key(self) -> bool:
        """Pickle by value what no worker can import of the key; return whether it is another."""
        if self._facts is None or self.facts is None or self._is_key_checked:
            return False
        self._is_key_checked = True
        try:
            payload, _ = self.function.codec.dumps_checked(self._facts[0])
        except Exception:  # noqa: BLE001 - the worker's error says why
            return False
        sent = self.facts[0]
        self.facts = payload, *self.facts[1:]
        return payload != sent

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

    def _raised(self, failure: PickledException, some: list[tuple[int, Any] | None]) -> Outcome:
        """Return the outcome of a batch that raised; ``some`` items may have another result."""
        error = decode_exception(self.function.codec, failure)
        if self._batch is None or not (self._failures or some):
            return error
        sent = some or [None] * (len(self._batch) - len(self._failures or ()))
        results = self._with_failures(
            [error if one is None else self._result(*one) for one in sent]
        )
        return PartialOutcome(error, results) if isinstance(results, list) else results

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
