"""One batch, or one call, for a `WorkerPool`; see `pickled_batch` for what is sent.

What a generator yields comes before the reply: `WorkItem.yielded`. The outcome is that of the items
whose results have not been passed on. A work item that is sent again has never yielded, since no
worker had begun it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._pool.pickled_batch import PickledBatch
from async_batcher._serialization.caller_exceptions import of_call
from async_batcher._serialization.diagnostics import unpickling_error
from async_batcher._transport.protocol import CODEC_PICKLE, ENVELOPE, ReplyKind, loads
from async_batcher._worker.results import PartialOutcome
from async_batcher.failures import Later

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from async_batcher._pool.pickled_function import PickledFunction
    from async_batcher._serialization.codec import Payload
    from async_batcher._transport.framing import Message
    from async_batcher._worker.results import Outcome
    from async_batcher.current import BatchFacts


class WorkItem(PickledBatch):
    """A batch for a `WorkerPool`, and the callbacks for its outcome.

    Args:
        client: Takes turns with other clients; one batcher, for example.
        timeout: Seconds that the batch may run, from when it starts. None disables it.
        on_outcome: Called once, on the loop's thread, with the outcome.
        claim: Called once, when a worker is about to get the item, even if a second worker gets it
            later. False: the item is not wanted.
        on_early: Called before the outcome, any number of times, with the results of the next
            items. None: they are part of the outcome if the function returns.
        facts: As of a `PickledBatch`.
        counts_until_end: Whether an outcome that is decided while the worker still runs the batch,
            as at a timeout, waits until it no longer does.

    Attributes:
        is_tear_down: Whether it is a `TearDownItem`.
        requeues: How often it was taken back from a worker that crashed before it had begun it.
        is_abandoned: Whether all of its callers are gone.
        is_recalled: Whether it is to have `BatchRecalledError` if no worker has begun it.
        on_later: Called with a `Later` that the batch raised, if its outcome is another.
        verdict: The outcome that waits; None if there is none.
        began_at: When it began, on `time.monotonic`, if it had to wait in the pool: infinity until
            then. Otherwise 0.
        yielded: The results that were read and have not been passed on.
    """

    __slots__ = (
        "_on_early", "began_at", "claim", "client", "counts_until_end", "is_abandoned",
        "is_recalled", "on_later", "on_outcome", "requeues", "timeout", "verdict", "yielded",
    )  # fmt: skip

    is_tear_down = False

    def __init__(
        self,
        function: PickledFunction,
        batch: list[Any] | None,
        client: Hashable = None,
        timeout: float | None = None,
        on_outcome: Callable[[Outcome], None] | None = None,
        claim: Callable[[], bool] | None = None,
        on_early: Callable[[list[Any]], None] | None = None,
        facts: BatchFacts | None = None,
        *,
        counts_until_end: bool = False,
    ) -> None:
        self.yielded: list[Message] | None = None
        super().__init__(function, batch, facts)
        self.client = client
        self.timeout = timeout
        self.on_outcome = on_outcome
        self.claim = claim
        self._on_early = on_early
        self.requeues = 0
        self.is_abandoned = self.is_recalled = False
        self.counts_until_end = counts_until_end
        self.on_later: Callable[[Later], None] | None = None
        self.verdict: Outcome | None = None
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
        if reply in ((ReplyKind.NEED_FUNCTION,), (ReplyKind.NOT_STARTED,)):
            return None
        return super().decode_reply(reply)

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
        self.on_outcome = self.claim = self._on_early = None

    def resolve(self, outcome: Outcome) -> None:
        """Pass the outcome on, once."""
        on_outcome = self.on_outcome
        self.detach()  # a callback may hold the item: a reference cycle
        if self.verdict is not None:
            self._pass_later_on(outcome)
        if on_outcome is not None:
            on_outcome(self.verdict or outcome)

    def read_late(self, reply: Any) -> None:
        """Read the reply of a batch that was cancelled, and has been resolved."""
        if self.on_later is not None:
            self._pass_later_on(self.decode_reply(reply))

    def _pass_later_on(self, outcome: Outcome | None) -> None:
        error = outcome.error if isinstance(outcome, PartialOutcome) else outcome
        on_later, self.on_later = self.on_later, None
        if on_later is not None and isinstance(error, Later):
            on_later(error)

    def resolve_with_results(self, results: Payload) -> None:
        """Unpickle a worker's results and pass them on, once."""
        outcome = self.verdict or self.decode_results(results)
        on_outcome = self.on_outcome
        self.on_outcome = self.claim = None
        if on_outcome is not None:
            on_outcome(outcome)


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
