"""One batch on its way through a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_batcher._outcome import is_exception, own_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from async_batcher._crossing import Crossing
    from async_batcher._outcome import Outcome


class Task:
    """One batch, and who is told what came of it.

    Args:
        source: Who takes turns with others; one batcher, for example.
        crossing: The batch as it crosses.
        timeout: Seconds that it may run, from when it begins; None: as long as it likes.
        done: Called once, on the loop's thread, with what came of it.
        departs: Asked when a worker is to get it; False: it is not wanted any more.

    Attributes:
        key: Names the program that it needs.
        returns: How often it was taken back from a worker that died before it had begun it.
    """

    __slots__ = ("_crossing", "_departs", "_done", "key", "returns", "source", "timeout")

    def __init__(
        self,
        source: Hashable,
        crossing: Crossing,
        timeout: float | None,
        done: Callable[[Outcome], None] | None,
        departs: Callable[[], bool] | None = None,
    ) -> None:
        self.source = source
        self.key = crossing.key
        self.timeout = timeout
        self.returns = 0
        self._crossing = crossing
        self._done = done
        self._departs = departs

    def departs(self) -> bool:
        """Whether it is still wanted, now that a worker is to get it."""
        if self._departs is None:
            return True
        departs, self._departs = self._departs, None  # once: it may be handed to a second worker
        return departs()

    def message(self, *, with_program: bool) -> tuple[Any, ...]:
        """What `_worker.perform` is called with."""
        return self._crossing.message(with_program=with_program)

    def read(self, reply: Any) -> Outcome | None:
        """What came of it; None: the worker lacked something, run it once more."""
        try:
            return self._crossing.read(reply)
        except BaseException as exc:  # noqa: BLE001 - nobody is to wait for ever because a reply cannot be read
            return exc

    def forget(self) -> None:
        """Nobody waits any more."""
        self._done = self._departs = None

    def settle(self, outcome: Outcome) -> None:
        """Tell who waits; once."""
        done, self._done = self._done, None  # it may know the task: together they would stay until the garbage collector comes
        if done is not None:
            done(outcome)


def result_of(outcome: Outcome) -> Any:
    """What a call returned; raises what it raised."""
    answer: Any = outcome if isinstance(outcome, BaseException) else outcome[0]
    if is_exception(answer):
        raise own_copy(answer)
    return answer[0]
