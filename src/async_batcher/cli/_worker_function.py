"""What happens to a batch of items in a worker, around the user's function.

::

    raw bytes --decode--> items --> user's function --> results --encode--> bytes, or a failure

Rules:

- An item that cannot be decoded is an `ItemFailure`, and is not in the list that the function gets.
- An exception for a whole batch passes through if the batcher is to isolate its cause. Otherwise
  each item of the batch gets a `BatchFailure`.
- Workers import this module, so it imports neither asyncio nor anything heavy.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Generator, Mapping, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from async_batcher._serialization.exception_text import one_line
from async_batcher.cli._errors import counted
from async_batcher.exceptions import BadResultError, PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from async_batcher.cli._import_string import ImportedFunction
    from async_batcher.cli._items import Format, Item


ISOLATE_HINT = "--isolate finds the failing item"
EACH_HINT = "add --each if the function takes one item"


class ItemFailure(NamedTuple):
    """The result of an item that failed alone."""

    error: str  # one line
    traceback: str = ""  # in the worker, of user code; empty if none raised the exception


class BatchFailure(NamedTuple):
    """The result of each item of a batch that failed as a whole."""

    failure: ItemFailure
    batch_size: int
    hint: str  # an option that may help; empty if there is none


@dataclass(frozen=True)
class ItemProcessor:
    """The batch function of ``map``: decode items, call the user's function, encode its results."""

    function: ImportedFunction
    form: Format
    each: bool  # the function takes one item, not a list of them
    isolates: bool  # the batcher isolates failures, down to batches of one item

    def __call__(self, batch: list[Item]) -> list[bytes | ItemFailure | BatchFailure]:
        """Return a result for each item; if it isolates, raise what the function raises."""
        decoded = [decode(raw, self.form) for _, raw in batch]
        items = [item for item in decoded if type(item) is not ItemFailure]
        results = iter(self._process(items) if items else [])
        return [item if type(item) is ItemFailure else next(results) for item in decoded]

    def _process(self, items: list[Any]) -> list[bytes | ItemFailure | BatchFailure]:
        count = len(items)  # now: the function may use up its list
        try:
            return [encode(result) for result in self._call(items)]
        except PoolBrokenError:  # the function cannot be imported
            raise
        except BaseException as exc:  # user code, SystemExit included
            if self.isolates:
                raise
            return [BatchFailure(failure_of(exc), count, _hint(exc, count))] * count

    def _call(self, items: list[Any]) -> list[Any]:
        function = self.function.function
        if self.each:
            return call_per_item(function, items)
        if self.isolates and len(items) == 1:
            return call_per_item(lambda item: call_batch(function, [item])[0], items)
        return call_batch(function, items)


def worker_setup(function: ImportedFunction) -> Callable[[], Iterator[None]] | None:
    """Return a set-up for workers that runs that of the user's batcher, if it has one."""
    return None if function.setup is None else functools.partial(setup_worker, function)


def setup_worker(function: ImportedFunction) -> Iterator[None]:
    """Run the set-up, and after the yield the tear-down, which only a generator has.

    Raises:
        PoolBrokenError: The set-up failed. No item is the cause.
    """
    assert function.setup is not None  # noqa: S101 - see `worker_setup`
    try:
        returned = function.setup()
        if isinstance(returned, Generator):
            next(returned, None)
    except BaseException as exc:
        msg = f"a worker cannot be set up: {one_line(exc)}"
        raise PoolBrokenError(msg) from exc
    yield
    if isinstance(returned, Generator):
        next(returned, None)


def call_batch(function: Callable[[Any], Any], batch: list[Any]) -> list[Any]:
    """Call a function over a list, and return its results as a list.

    Raises:
        BadResultError: The function has not returned one result for each item.
    """
    count = len(batch)  # now: the function may use up its list
    returned = function(batch)
    if returned is None:
        return [None] * count
    iterator = None
    if not isinstance(returned, str | bytes | bytearray | memoryview | Mapping | Set):
        with contextlib.suppress(TypeError):
            iterator = iter(returned)
    if iterator is None:
        wrong = f"the function returned one {type(returned).__name__} for {counted(count, 'item')}"
        msg = f"{wrong}; return a list with one result per item"
        raise BadResultError(msg)
    # An iterable without a length may not end: one result too many is enough to reject it.
    limit = None if hasattr(returned, "__len__") else count + 1
    results = list(islice(iterator, limit))
    if len(results) != count:
        at_least = "at least " if len(results) == limit else ""
        found = f"{at_least}{counted(len(results), 'result')}"
        wrong = f"the function returned {found} for {counted(count, 'item')}"
        msg = f"{wrong}; return exactly one per item, in order"
        raise BadResultError(msg)
    return results


def call_per_item(function: Callable[[Any], Any], batch: list[Any]) -> list[Any]:
    """Call a function for each item; an exception is the result of its item."""
    results: list[Any] = []
    for item in batch:
        try:
            results.append(function(item))
        except PoolBrokenError:  # the function cannot be imported
            raise
        except BaseException as exc:  # noqa: BLE001 - user code, SystemExit included
            results.append(failure_of(exc))
    return results


def decode(raw: bytes, form: Format) -> Any:
    """Decode an item for the function, or say in an `ItemFailure` why that is not possible."""
    if form == "files":
        try:
            return Path(os.fsdecode(raw)).read_bytes()
        except OSError as exc:
            return ItemFailure(f"cannot be read: {exc.strerror or exc}")
        except ValueError as exc:  # a null character
            return ItemFailure(f"is not a path: {exc}")
    try:
        text = raw.decode()
    except UnicodeDecodeError as exc:
        return ItemFailure(f"not UTF-8: byte 0x{raw[exc.start]:02x} at column {exc.start + 1}")
    if form == "lines":
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        way_out = "--format lines takes each line as text"
        return ItemFailure(f"not JSON: {exc.msg} at column {exc.colno}; {way_out}")
    except ValueError as exc:  # a number of too many digits
        return ItemFailure(f"not JSON: {exc}")
    except RecursionError:
        return ItemFailure("not JSON that can be read: nested too deeply")


def _hint(exc: BaseException, batch_size: int) -> str:
    """Return the option that helps with an exception of a whole batch."""
    # A function over one item gets a list without --each. What it does with that list fails, with
    # a message that names the type, or gives another number of results.
    takes_no_list = isinstance(exc, TypeError | AttributeError) and re.search(
        r"\blist\b", one_line(exc)
    )
    if takes_no_list or isinstance(exc, BadResultError):
        return EACH_HINT
    return ISOLATE_HINT if batch_size > 1 else ""


def encode(result: Any) -> bytes | ItemFailure:
    """Encode a result as JSON, without a line ending."""
    if isinstance(result, ItemFailure):
        return result
    if isinstance(result, BaseException):
        return failure_of(result)
    try:
        text = json.dumps(result, ensure_ascii=False, allow_nan=False, default=_to_plain)
        try:
            return text.encode()
        except UnicodeEncodeError:  # a lone surrogate
            return json.dumps(result, allow_nan=False, default=_to_plain).encode()
    except RecursionError:
        return ItemFailure("the result is not JSON: nested too deeply")
    except Exception as exc:  # noqa: BLE001 - TypeError, ValueError, and what a tolist() raises
        return ItemFailure(f"the result is not JSON: {one_line(exc)}")


def failure_of(exc: BaseException) -> ItemFailure:
    """Make a failure of an exception; its traceback begins in the user's code."""
    import traceback

    trace = exc.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    if trace is None:  # raised by this package, or by a function in C
        return ItemFailure(one_line(exc))
    try:
        text = "".join(traceback.format_exception(type(exc), exc, trace))
    except BaseException:  # noqa: BLE001 - user code (__str__)
        text = ""
    return ItemFailure(one_line(exc), text)


def _to_plain(value: Any) -> Any:
    """Convert arrays and their scalars."""
    tolist = getattr(value, "tolist", None)
    if callable(tolist) and not isinstance(value, type):
        return tolist()
    msg = f"a value of type {type(value).__name__}"
    raise TypeError(msg)
