"""The items of a soak, and the batch functions that run them in workers.

An item is a tuple: its id, what happens to it, a payload, and the file where its run is noted. The
result of item 7 with the payload ``b"..."`` is ``(7, payload)``.

Importable in workers, without asyncio and pytest.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from async_batcher import Later, current_batch
from tests.support.exception_kinds import KeywordOnlyError
from tests.support.worker_functions import FalsyError, OwnSignal, PickyError, fail_by, own_channel

if TYPE_CHECKING:
    from collections.abc import Iterator

Item = tuple[int, str, Any, str]

MAX_ATTEMPTS = 3  # of items that are put off

BATCH_TIMEOUT = 2.0  # seconds; of every batch, longer than any that is not to time out takes

# What happens to an item, and how often, of a thousand.
DEEDS = {
    "sleep": 150,  # some milliseconds
    "raise": 15,
    "odd": 10,  # raises what has a meaning of its own, or cannot be made again from its args
    "return": 15,  # an exception as the result
    "hang": 2,
    "os._exit": 3,
    "kill": 3,
    "segfault": 1,
    "halt": 1,  # by SIGSTOP
    "rubbish": 3,  # writes to the worker's channel
    "lock": 5,  # a result that cannot be pickled
    "unpicklable": 5,  # the item cannot be pickled
    "unreadable": 5,  # the item cannot be unpickled
    "thread": 3,  # kills the worker a little later, when it runs another batch
}

_RECORD = struct.Struct("=Q")
_files: dict[str, int] = {}


class Unreadable:
    """Cannot be unpickled in a worker."""

    def __reduce__(self) -> Any:
        """Fail where it is unpickled."""
        return (int, ("no number",))


class DeedError(Exception):
    """What the deed of an item raises; its argument is the id."""


def note_run(number: int, path: str) -> None:
    """Note that an item runs."""
    if path not in _files:
        _files[path] = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(_files[path], _RECORD.pack(number))


def forget_files() -> None:
    """Close the files where runs are noted."""
    while _files:
        os.close(_files.popitem()[1])


def noted_runs(path: str) -> dict[int, int]:
    """Return how often each item has run."""
    counts: dict[int, int] = {}
    with open(path, "rb") as file:  # noqa: PTH123 - a worker needs no pathlib
        data = file.read()
    for (number,) in _RECORD.iter_unpack(data):
        counts[number] = counts.get(number, 0) + 1
    return counts


def run_item(item: Item) -> Any:
    """Run one item; also a function for `WorkerPool.run`."""
    number, deed, payload, path = item
    note_run(number, path)
    match deed:
        case "sleep":
            time.sleep(number % 5 / 1000)
        case "raise":
            raise DeedError(number)
        case "odd":
            raise _odd_exception(number)
        case "return":
            return DeedError(number)
        case "hang":
            time.sleep(10 * BATCH_TIMEOUT)
        case "os._exit" | "kill" | "segfault":
            fail_by(deed)
        case "halt":
            import signal

            os.kill(os.getpid(), signal.SIGSTOP)
        case "rubbish":
            own_channel().sendall(b"a line of a log\n" * (number % 7 + 1))
        case "lock":
            return threading.Lock()
        case "thread":
            threading.Timer(number % 10 / 100, fail_by, ["kill"]).start()
    return number, payload


def _odd_exception(number: int) -> BaseException:
    kinds = (
        lambda: SystemExit(number),
        lambda: KeyboardInterrupt(number),
        lambda: StopIteration(number),
        lambda: GeneratorExit(number),
        lambda: FalsyError(number),
        lambda: PickyError(number, "picky"),
        lambda: KeywordOnlyError(retry_after=number),
        lambda: OwnSignal(number),
        lambda: ExceptionGroup("many", [DeedError(number), ValueError(number)]),
        lambda: MemoryError(number),
        lambda: RecursionError(number),
    )
    return kinds[number % len(kinds)]()


def run_batch(batch: list[Item]) -> list[Any]:
    """Run items."""
    return [run_item(item) for item in batch]


def yield_batch(batch: list[Item]) -> Iterator[Any]:
    """Run items, and yield each result; a deed may end it half way."""
    for item in batch:
        yield run_item(item)


def put_off_batch(batch: list[Item]) -> list[Any]:
    """Put a batch off before any of it has run, or some of its items; run the others."""
    info = current_batch()
    if info is None or info.attempt > MAX_ATTEMPTS or info.size != len(batch):
        raise AssertionError(info)
    if info.attempt < MAX_ATTEMPTS and batch[0][0] % 4 == 0:
        raise Later(batch[0][0] % 3 / 1000)
    return [_put_off(item, info.attempt) or run_item(item) for item in batch]


def yield_or_put_off(batch: list[Item]) -> Iterator[Any]:
    """Do the same, and put off what follows an item half way."""
    info = current_batch()
    attempt = MAX_ATTEMPTS if info is None else info.attempt
    for item in batch:
        if attempt < MAX_ATTEMPTS and item[0] % 7 == 0:
            raise Later(item[0] % 3 / 1000)
        yield _put_off(item, attempt) or run_item(item)


def _put_off(item: Item, attempt: int) -> Later | None:
    return Later(item[0] % 2 / 1000) if attempt < MAX_ATTEMPTS and item[0] % 5 == 0 else None


def key_of(item: Item) -> int:
    """Return the key of an item."""
    return item[0] % 3


def cost_of(item: Item) -> int:
    """Return the cost of an item."""
    return item[0] % 5


def set_up() -> Iterator[None]:
    """Set a worker up, and tear it down."""
    time.sleep(0.005)
    yield
    time.sleep(0.001)
