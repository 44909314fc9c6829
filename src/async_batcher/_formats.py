"""What an item is in each input format: how it is found, how it is decoded, and how its result is encoded.

::

    input --read--> (line number, raw bytes) ---:--> Job: decode --> the user's function --> encode ---:--> bytes, or a Failure
                                                :             a worker process                         :

=========  ====================================  ====================================  ===========================
format     one item is                           blank lines                           the function gets
=========  ====================================  ====================================  ===========================
``jsonl``  a line of JSON                        are no items                          what the JSON says
``lines``  a line of text                        are items                             a str without the line's end
``files``  a path on a line, or in a directory   are no items                          the file's bytes
=========  ====================================  ====================================  ===========================

Rules:

- Line numbers are physical lines from 1; in a directory, the place of a file in the order of their paths.
- Text is UTF-8; a byte order mark at the beginning is dropped. A line may end in CR LF. The last one needs no end.
- Decoding and encoding are the workers' work; what cannot be decoded is a `Failure` of its item alone, and not in the list that
  the function gets. What the function itself raises for a batch passes through, so that a batcher can isolate it.
- Imported in the workers: neither asyncio nor what is not used.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from async_batcher._serialization.exception_text import is_exception, one_line
from async_batcher._worker.results import insert_failures, normalize_results
from async_batcher.exceptions import PoolBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from async_batcher._target import Target

Format: TypeAlias = Literal["jsonl", "lines", "files"]
FORMATS: tuple[Format, ...] = ("jsonl", "lines", "files")

_CHUNK = 1 << 18  # bytes that are read at a time: a few hundred lines, and little to keep
_BOM = b"\xef\xbb\xbf"


class InputError(Exception):
    """The input cannot be read, or an item in it cannot be decoded; the message is one line."""


class Failure(NamedTuple):
    """What became of an item that failed alone.

    Attributes:
        error: One line.
        traceback: In the worker; empty where no code of the user's was run.
    """

    error: str
    traceback: str = ""


Answer: TypeAlias = "bytes | Failure"


# In the parent: which items there are.


def is_directory(path: str) -> bool:
    """Whether the input is a directory."""
    return Path(path).is_dir()


def open_input(path: str | None, form: Format) -> Iterator[tuple[int, bytes]]:
    """The items of an input, with their line numbers; it is opened when the first is asked for.

    Args:
        path: A file, or a directory with the format ``files``; None: standard input.
        form: What an item is.

    Raises:
        InputError: It is a directory where lines are expected; at once.
    """
    if path is not None and is_directory(path):
        if form != "files":
            msg = f"{path!r} is a directory; --format files takes each file in it for an item"
            raise InputError(msg)
        return iter(enumerate(files_below(path), 1))
    return items(lines(chunks(path)), form)


def read_items(path: str, form: Format, limit: int) -> list[Any]:
    """The first items of an input, decoded.

    Args:
        path: A file, or a directory with the format ``files``.
        form: What an item is.
        limit: How many at most.

    Raises:
        InputError: It cannot be read, or one of these items cannot be decoded.
    """
    found: list[Any] = []
    try:
        source = open_input(path, form)
        for number, raw in source:
            if len(found) >= limit:
                close(source)
                break
            item = decode(raw, form)
            if isinstance(item, Failure):
                msg = f"{place(number, raw, form)}: {item.error}"
                raise InputError(msg)
            found.append(item)
    except OSError as exc:
        raise InputError(unreadable(path, exc)) from exc
    return found


def place(number: int, raw: bytes, form: Format) -> str:
    """How an item is named to the user."""
    return os.fsdecode(raw) if form == "files" else f"line {number}"


def chunks(path: str | None) -> Iterator[bytes]:
    """What is in a file, a pipe or a terminal; None: in standard input. It is closed at the end.

    Not a buffered reader: the interpreter waits for ever at its end for a thread that reads with one.
    """
    descriptor = os.dup(0) if path is None else os.open(path, os.O_RDONLY)
    try:
        while data := _read(descriptor):
            yield data
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> bytes:
    while True:
        try:
            return os.read(descriptor, _CHUNK)
        except BlockingIOError:  # somebody has made it non-blocking
            select.select([descriptor], [], [])


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines, without their ends, and without a byte order mark."""
    begun: list[bytes] = []  # pieces of a line whose end is still to come
    is_first = True
    try:
        for piece in pieces:
            head, *rest = piece.split(b"\n")
            begun.append(head)
            if not rest:
                continue
            line, begun = b"".join(begun), [rest.pop()]
            if is_first:
                line, is_first = line.removeprefix(_BOM), False
            yield line.removesuffix(b"\r")
            for line in rest:
                yield line.removesuffix(b"\r")
    finally:
        close(pieces)
    last = b"".join(begun)
    if is_first:
        last = last.removeprefix(_BOM)
    if last:
        yield last.removesuffix(b"\r")


def items(found: Iterable[bytes], form: Format) -> Iterator[tuple[int, bytes]]:
    """Those lines that are items, numbered."""
    try:
        for number, line in enumerate(found, 1):
            if form == "lines" or (line and not line.isspace()):
                yield number, line
    finally:
        close(found)


def files_below(folder: str) -> list[bytes]:
    """The paths of all regular files in a directory and below it, in order.

    Raises:
        OSError: One of the directories cannot be read.
    """

    def fail(exc: OSError) -> None:
        raise exc

    found = (Path(base, name) for base, _, names in os.walk(folder, onerror=fail) for name in names)
    return sorted(os.fsencode(path) for path in found if path.is_file())


def close(source: object) -> None:
    """End a generator, if it is one."""
    if isinstance(source, Generator):
        source.close()


def unreadable(path: str, exc: OSError) -> str:
    """That an input cannot be read, in words."""
    if isinstance(exc, FileNotFoundError):
        return f"there is no file {path!r}"
    return f"{path!r} cannot be read: {exc.strerror or exc}"


# In a worker: from raw items to encoded answers.


class Job:
    """What a batch is handed to: decodes its items, calls the user's function, encodes the answers.

    Args:
        target: The user's function.
        form: What an item is.
        each: Whether the function takes one item, not a list of them.
    """

    def __init__(self, target: Target, form: Format, *, each: bool) -> None:
        self._target = target
        self._form = form
        self._each = each

    def __call__(self, batch: list[bytes]) -> list[Answer]:
        """One answer for each raw item.

        Raises:
            Exception: Whatever the function raises for a whole batch.
        """
        decoded: list[Any] = []
        failures: dict[int, Any] = {}
        for index, raw in enumerate(batch):
            item = decode(raw, self._form)
            if isinstance(item, Failure):
                failures[index] = item
            else:
                decoded.append(item)
        if not decoded:
            return [failures[index] for index in range(len(batch))]
        call = call_each if self._each else call_once
        answers = [answer if isinstance(answer, Failure) else encode(answer) for answer in call(self._target.function, decoded)]
        return insert_failures(answers, failures) if failures else answers


class Setup:
    """What is called once in each worker before its first batch.

    Args:
        target: Whose set-up it is.
    """

    def __init__(self, target: Target) -> None:
        self._target = target

    def __call__(self) -> None:
        """Set up.

        Raises:
            PoolBrokenError: It cannot be done; no item is to be blamed for that.
        """
        if self._target.setup is not None:
            try:
                self._target.setup()
            except BaseException as exc:
                msg = f"a worker cannot be set up: {one_line(exc)}"
                raise PoolBrokenError(msg) from exc


def call_once(function: Callable[[Any], Any], batch: list[Any]) -> Sequence[Any]:
    """The answers of a function over a list."""
    return normalize_results(function(batch), len(batch))


def call_each(function: Callable[[Any], Any], batch: list[Any]) -> list[Any]:
    """The answers of a function over one item; what it raises is the answer of that item."""
    answers: list[Any] = []
    for item in batch:
        try:
            answers.append(function(item))
        except PoolBrokenError:  # there is no function
            raise
        except BaseException as exc:  # noqa: BLE001 - user code; SystemExit is an answer here too
            answers.append(failure_of(exc))
    return answers


def decode(raw: bytes, form: Format) -> Any:
    """An item as the function gets it, or a `Failure`."""
    if form == "files":
        try:
            return Path(os.fsdecode(raw)).read_bytes()
        except OSError as exc:
            return Failure(f"cannot be read: {exc.strerror or exc}")
        except ValueError as exc:  # a null character
            return Failure(f"is no path: {exc}")
    try:
        text = raw.decode()
    except UnicodeDecodeError as exc:
        return Failure(f"not UTF-8: byte 0x{raw[exc.start]:02x} at column {exc.start + 1}")
    if form == "lines":
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        return Failure(f"not JSON: {exc.msg} at column {exc.colno}")
    except ValueError as exc:  # a number of too many digits
        return Failure(f"not JSON: {exc}")
    except RecursionError:
        return Failure("not JSON that can be read: nested too deeply")


def encode(answer: Any) -> Answer:
    """A result as JSON, without a line's end, or why there is none."""
    if is_exception(answer):
        return failure_of(answer)
    try:
        text = json.dumps(answer, ensure_ascii=False, allow_nan=False, default=_as_plain)
        try:
            return text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which has no UTF-8
            return json.dumps(answer, allow_nan=False, default=_as_plain).encode()
    except RecursionError:
        return Failure("the result is not JSON: nested too deeply")
    except Exception as exc:  # noqa: BLE001 - TypeError, ValueError, and whatever a tolist() raises
        return Failure(f"the result is not JSON: {one_line(exc)}")


def failure_of(exc: BaseException) -> Failure:
    """An exception of one item; its traceback begins in the user's code."""
    import traceback

    trace = exc.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        text = "".join(traceback.format_exception(type(exc), exc, trace))
    except BaseException:  # noqa: BLE001 - user code (__str__)
        text = ""
    return Failure(one_line(exc), text)


def _as_plain(value: Any) -> Any:
    """What json cannot take: arrays and their scalars say what they hold."""
    tolist = getattr(value, "tolist", None)
    if callable(tolist) and not isinstance(value, type):
        return tolist()
    msg = f"a value of type {type(value).__name__}"
    raise TypeError(msg)
