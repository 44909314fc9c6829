"""What became of every call: who has waited too long, and who got what is not true."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

from async_batcher.exceptions import (
    AsyncBatchException,
    BatchError,
    BatcherStoppedError,
    BatchTimeoutError,
    ItemTimeoutError,
    PoolBrokenError,
    SerializationError,
    WorkerDiedError,
)
from tests.soak.items import DeedError, noted_runs
from tests.support.exception_kinds import KeywordOnlyError
from tests.support.worker_functions import FalsyError, OwnSignal, PickyError

if TYPE_CHECKING:
    from tests.soak.items import Item

# What a caller may get because of what its item, another one of its batch, or the soak does.
_EXPECTED: dict[type[BaseException], tuple[str, ...]] = {
    DeedError: ("raise", "return", "odd"),
    FalsyError: ("odd",),
    PickyError: ("odd",),
    KeywordOnlyError: ("odd",),
    OwnSignal: ("odd",),
    ExceptionGroup: ("odd",),
    MemoryError: ("odd",),
    RecursionError: ("odd",),
    RuntimeError: ("odd",),  # StopIteration in a generator
    BatchError: ("odd",),
    SerializationError: ("lock", "unpicklable", "unreadable"),
    BatchTimeoutError: ("hang", "halt", "stopped"),
    WorkerDiedError: ("os._exit", "kill", "segfault", "halt", "rubbish", "thread", "killed"),
    BatcherStoppedError: ("stop",),
    PoolBrokenError: ("descriptors", "server", "killed"),
    ItemTimeoutError: ("deadline",),
    asyncio.CancelledError: ("cancelled",),
    OSError: ("descriptors",),
}
_WITHOUT_RESULT = {
    *("raise", "odd", "return", "hang", "lock", "unpicklable", "unreadable"),
    *("os._exit", "kill", "segfault", "rubbish"),
}
_OWN = {  # only the caller whose item does that may get it, if failures are isolated
    DeedError: ("raise", "return"),
    SerializationError: ("lock", "unpicklable", "unreadable"),
}


class Ledger:
    """The calls of one pool.

    Attributes:
        calls: Items that were given to the pool.
        outcomes: How they ended, by the name of what the caller got.
        faults: What the soak has done, by kind; deeds of items included.
        lost: Callers that got nothing in time.
        wrong: What callers got that is not theirs, or not true.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.lost: list[str] = []
        self.wrong: list[str] = []
        self._may_rerun: set[int] = set()

    def begin(self, item: Item, *, may_rerun: bool = False) -> None:
        """Note an item that is given to the pool."""
        self.calls += 1
        if item[1] != "":
            self.faults[item[1]] += 1
        if may_rerun:
            self._may_rerun.add(item[0])

    def end(self, item: Item, result: Any, *, is_isolated: bool = False) -> None:
        """Note what a caller got: a result, or an exception."""
        if not isinstance(result, BaseException):
            self.outcomes["result"] += 1
            if type(result) is not tuple or result[0] != item[0] or not _equal(result[1], item[2]):
                self.wrong.append(f"{item[:2]} got {result!r:.200}")
            elif item[1] in _WITHOUT_RESULT:
                self.wrong.append(f"{item[:2]} got a result")
            return
        kind = type(result)
        self.outcomes[kind.__name__] += 1
        causes = next((_EXPECTED[base] for base in kind.__mro__ if base in _EXPECTED), None)
        if causes is None or not any(self.faults[cause] for cause in causes):
            self.wrong.append(f"{item[:2]} got {result!r:.500}")
        elif is_isolated and kind in _OWN and item[1] not in _OWN[kind]:
            self.wrong.append(f"{item[:2]} got what another item raised: {_described(result)}")
        elif kind is DeedError and is_isolated and result.args != (item[0],):
            self.wrong.append(f"{item[:2]} got the exception of another item: {result!r:.300}")
        elif isinstance(result, AsyncBatchException) and not str(result):
            self.wrong.append(f"{item[:2]} got {kind.__name__} without a message")
        elif "internal error" in str(result):
            self.wrong.append(f"{item[:2]} got {result!r:.500}")

    def lose(self, items: list[Item], state: object) -> None:
        """Note callers that got nothing."""
        self.lost += [f"{item[:2]} while the pool is {state!r:.300}" for item in items]

    def run_twice(self, path: str) -> list[str]:
        """Return the items that ran more than once, and may not."""
        return [
            f"item {number} ran {count} times"
            for number, count in noted_runs(path).items()
            if count > 1 and number not in self._may_rerun
        ]


def _described(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return f"{error!r:.300}, cause {error.__cause__!r:.500}, notes {notes}"


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if hasattr(one, "tobytes"):  # an array
        return bool(one.tobytes() == other.tobytes())
    return bool(one == other)
