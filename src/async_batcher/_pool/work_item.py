"""One batch on its way through a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._serialization.caller_exceptions import of_call
from async_batcher._transport import framing

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from async_batcher._pool.batch_request import BatchRequest
    from async_batcher._worker.results import Outcome


class WorkItem:
    """One batch, and who is told what came of it.

    Args:
        source: Who takes turns with others; one batcher, for example.
        crossing: The batch as it crosses.
        timeout: Seconds that it may run, from when it begins; None: as long as it likes.
        done: Called once, on the loop's thread, with what came of it.
        answered: Called in its place with a worker's answers, when all else that they are cause to do has been done: user code
            may run in it. None: ``done`` is called.
        departs: Asked when a worker is to get it, and only once, though a second worker may get it; False: it is not wanted
            any more.

    Attributes:
        crossing: See above.
        departs: See above; None: it need not be asked.
        key: Names the program that it needs.
        returns: How often it was taken back from a worker that died before it had begun it.
        is_abandoned: Whether all of its callers are gone.
    """

    __slots__ = ("_answered", "_done", "crossing", "departs", "is_abandoned", "key", "returns", "source", "timeout")

    def __init__(
        self,
        source: Hashable,
        crossing: BatchRequest,
        timeout: float | None,
        done: Callable[[Outcome], None] | None,
        answered: Callable[[Outcome], None] | None = None,
        departs: Callable[[], bool] | None = None,
    ) -> None:
        self.source = source
        self.key = crossing.key
        self.timeout = timeout
        self.returns = 0
        self.is_abandoned = False
        self.crossing = crossing
        self._done = done
        self._answered = answered
        self.departs = departs

    @property
    def is_preparation(self) -> bool:
        """Whether it runs no batch, and only loads and sets up its function."""
        return self.crossing.items is None

    def is_wanted(self) -> bool:
        """Whether it is still wanted, now that a worker is to get it."""
        departs, self.departs = self.departs, None
        return departs is None or departs()

    def content(self, *, with_program: bool) -> framing.Content:
        """What `run_batch.run_batch` is called with, as it travels."""
        crossing = self.crossing
        plain = None if with_program or crossing.definitions is not None else framing.bare_pickle(crossing.items)
        return plain or framing.envelope(crossing.message(with_program=with_program)[1:])

    def forget(self) -> None:
        """Nobody waits any more."""
        self._done = self._answered = self.departs = None

    def settle(self, outcome: Outcome) -> None:
        """Tell who waits; once."""
        done = self._done
        self.forget()  # what is told may know the task: together they would stay until the garbage collector comes
        if done is not None:
            done(outcome)

    def answer(self, outcome: Outcome) -> None:
        """The same with the answers of a worker."""
        answered = self._answered or self._done
        self.forget()
        if answered is not None:
            answered(outcome)


class TearDownItem(WorkItem):
    """Has one worker drop a function, after the tear-down of its set-up.

    Args:
        key: Names the function.
    """

    __slots__ = ()

    def __init__(self, key: bytes) -> None:
        super().__init__(None, _Nothing(key), None, None)  # type: ignore[arg-type]  # nothing but its key is asked for


class _Nothing:
    def __init__(self, key: bytes) -> None:
        self.key = key


def unwrap(outcome: Outcome, function: Any) -> Any:
    """What a call of ``function`` returned; raises what it raised."""
    answer: Any = outcome[0] if type(outcome) is list else outcome
    if type(answer) is tuple:
        return answer[0]
    try:
        raise of_call(answer, function)
    finally:
        del answer, outcome  # the exception's traceback holds this frame
