"""One batch for its trips through an executor: what is sent, and what the replies mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._pool.pickled_batch import PickledBatch
from async_batcher._pool.pickled_function import is_own_interrupt
from async_batcher._serialization.diagnostics import pickling_error
from async_batcher._serialization.remote_exception import type_name
from async_batcher._transport.protocol import ReplyKind
from async_batcher._worker.run_batch import RemoteCall
from async_batcher.exceptions import SerializationError

if TYPE_CHECKING:
    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._worker.results import Outcome
    from async_batcher.current import BatchFacts

# What a worker's unpickler raises for a name that its main module lacks.
_LOOKUP_ERRORS = frozenset(
    {"builtins.AttributeError", "builtins.ImportError", "builtins.ModuleNotFoundError"}
)


class BatchRequest(PickledBatch):
    """A batch for an executor, some of whose trips may only set up a worker."""

    __slots__ = ("_is_by_reference", "_setup_trips", "_with_function")

    def __init__(
        self, function: PickledFunction, batch: list[Any] | None, facts: BatchFacts | None = None
    ) -> None:
        refresh_error = None
        if not function.has_setup:  # else another key would have it set up again
            try:
                function.refresh(rename=True)
            except SerializationError as exc:
                refresh_error = exc
        super().__init__(function, batch, facts)
        self.outcome = refresh_error or self.outcome
        self._is_by_reference = function.codec.runs_main
        self._with_function = function.workers > 0 and not function.is_somewhere
        self._setup_trips = function.workers  # that are left

    @property
    def carries_items(self) -> bool:
        """Whether the next trip is that of the batch, and not one that sets up a worker for it."""
        return not (self._with_function and self._setup_trips)

    def to_remote_call(self) -> RemoteCall:
        """Return what is submitted; never fails, since some executors do not recover from that."""
        if self.outcome is not None:
            return RemoteCall(b"", None, None, None)
        function = self.function.payload if self._with_function else None
        items = None if self._with_function and self._setup_trips else self.items
        facts = None if items is None else self.facts
        return RemoteCall(self.key, function, self.definitions, items, facts)

    def decode_reply(self, reply: Any) -> Outcome | None:
        if self.outcome is None:
            match reply:
                case (ReplyKind.NEED_FUNCTION,) if not self._with_function:
                    self._with_function = True  # and again, if another worker needs it
                    return None
                case (ReplyKind.READY,) if self._with_function and self._batch is not None:
                    self.function.is_somewhere, self._with_function = True, False
                    self._setup_trips -= 1
                    return None
                case (
                    ReplyKind.FUNCTION_ERROR | ReplyKind.ITEMS_ERROR | ReplyKind.KEY_ERROR,
                    failure,
                ) if self._is_by_reference and type_name(failure) in _LOOKUP_ERRORS:
                    return self._send_by_value()
        return super().decode_reply(reply)

    def _send_by_value(self) -> Outcome | None:
        """Pickle all anew: a worker has run another main module than this one, or none."""
        self._is_by_reference = False
        try:
            self.function.send_by_value()
            self.key, self._with_function = self.function.key, True
            if self._batch is not None:
                self.items = self.function.codec.dumps(self._batch)
                if self._facts is not None:
                    self._pickle_facts(self._facts)
        except BaseException as exc:
            if is_own_interrupt(exc):
                raise
            is_known = isinstance(exc, SerializationError)
            self.outcome = exc if is_known else pickling_error("the batch", self._batch, exc)
        return self.outcome
