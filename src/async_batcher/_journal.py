"""The journal of a run: which items are finished, and where in the output their results end. Reads and makes lines, no more.

::

    <crc32> {"header": {"version": 1, "input": ..., "target": ..., ...}}
    <crc32> {"done": [[0, 64], [70, 80]], "failed": 0, "output": 5120, "errors": 0, "crc": 3735928559}
    <crc32> {"errors_file": "/data/bad.jsonl"}
    <crc32> {"whole": true}

Rules:

- Items are counted from 0, and a range leaves out its end. ``output`` and ``errors`` are the sizes of the files once the record
  holds; ``crc`` is of the bytes that it adds to both; ``failed`` is how many of its items failed.
- What a record speaks of is written before it. So one whose bytes are not there, or are others, was never true, and nothing
  after it counts; nor does a line that is torn or altered, which its own checksum tells.
- An item is finished when a record that counts says so, and then for good.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Iterable

VERSION = 1
_CRC = 9  # characters: eight digits and a blank
_PIECE = 1 << 20  # bytes that are read at a time to be checked


class Header(NamedTuple):
    """What must be the same for a run to be resumed.

    Attributes:
        input: A digest of the input; empty for one that cannot be read twice.
        target: The function, as the user named it.
        format: What an item is.
        each: Whether the function takes one item.
        unordered: Whether results are written as they come.
        version: Of the journal.
    """

    input: str
    target: str
    format: str
    each: bool
    unordered: bool
    version: int = VERSION

    def difference(self, other: Header) -> str | None:
        """In which way another run is not the same one, in words for the user; None if it is."""
        if self.version != other.version:
            return f"its journal is of version {self.version}, not {other.version}"
        if self.input != other.input:
            return "the input has changed"
        for name in ("target", "format", "each", "unordered"):
            before, now = getattr(self, name), getattr(other, name)
            if before != now:
                return f"the function was {before!r}" if name == "target" else _option(name, before)
        return None


def _option(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"it was run {'with' if value else 'without'} --{name}"
    return f"it was run with --{name} {value}"


class Progress:
    """What a journal tells.

    Attributes:
        header: None: there is no journal yet.
        finished: 1 for each item that is finished; items beyond its end are not.
        done: How many are finished.
        failed: How many of them failed.
        errors_file: Where errors have been written; None: nowhere.
        is_whole: Whether all items were finished, so that the files only remain to be put in their place.
        output: Bytes of the output that count.
        errors: Bytes of the errors file that count.
        end: Bytes of the journal that count.
    """

    def __init__(self) -> None:
        self.header: Header | None = None
        self.finished = bytearray()
        self.done = self.failed = self.output = self.errors = self.end = 0
        self.errors_file: str | None = None
        self.is_whole = False

    def follow(self, entry: dict[str, Any]) -> bool:
        """Take in an entry; says whether it can be one that comes next."""
        match entry:
            case {"header": dict(header)} if self.header is None:
                self.header = _header(header)
                return self.header is not None
            case _ if self.header is None or self.header.version != VERSION or self.is_whole:
                return False
            case {"done": list(ranges), "failed": int(failed), "output": int(output), "errors": int(errors)}:
                if output < self.output or errors < self.errors or not self._finish(ranges):
                    return False
                self.failed += failed
                self.output, self.errors = output, errors
                return True
            case {"errors_file": str() | None as path}:
                self.errors_file = path
                return True
            case {"whole": True}:
                self.is_whole = True
                return True
        return False

    def _finish(self, ranges: list[Any]) -> bool:
        if any(any(self.finished[begin:end]) for begin, end in ranges):
            return False
        for begin, end in ranges:
            if end > len(self.finished):
                self.finished.extend(bytes(end - len(self.finished)))
            self.finished[begin:end] = b"\1" * (end - begin)
            self.done += end - begin
        return True


class Bytes(Protocol):
    """A file to be read."""

    def read(self, size: int, /) -> bytes:
        """Up to so many bytes; none at the end."""


def replay(journal: Iterable[bytes], output: Bytes | None = None, errors: Bytes | None = None) -> Progress:
    """What a journal tells, as far as it is true.

    Args:
        journal: Its lines.
        output: What has been written, from the beginning; it is checked as far as the journal speaks of it. None: the journal is
            taken at its word.
        errors: The same of the errors file; None: there is none, and it is empty.
    """
    progress = Progress()
    for line in journal:
        entry = unseal(line)
        if entry is None:
            break
        if output is not None and "crc" in entry:
            more = (int(entry["output"]) - progress.output, int(entry["errors"]) - progress.errors)
            crc = _crc_of(output, more[0], 0)
            crc = None if crc is None else _crc_of(errors, more[1], crc)
            if crc != entry["crc"]:
                break
        if not progress.follow(entry):
            break
        progress.end += len(line)
    return progress


def record(done: list[int], failed: int, output: tuple[int, bytes], errors: tuple[int, bytes]) -> bytes:
    """The line that says that items are finished.

    Args:
        done: The items, in any order.
        failed: How many of them failed.
        output: The size of the output now, and what has been added to it.
        errors: The same of the errors file.
    """
    crc = crc32(errors[1], crc32(output[1]))
    return seal({"done": as_ranges(done), "failed": failed, "output": output[0], "errors": errors[0], "crc": crc})


def as_ranges(numbers: list[int]) -> list[list[int]]:
    """Numbers, each of which is there once, as ranges that leave out their end, in order."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number:
            ranges[-1][1] += 1
        else:
            ranges.append([number, number + 1])
    return ranges


def seal(entry: dict[str, Any]) -> bytes:
    """An entry as a line of the journal."""
    text = json.dumps(entry).encode()
    return b"%08x %s\n" % (crc32(text), text)


def unseal(line: bytes) -> dict[str, Any] | None:
    """The entry in a line; None if the line is torn or altered."""
    text = line[_CRC:-1]
    if line[-1:] != b"\n" or line[:_CRC] != b"%08x " % crc32(text):
        return None
    entry = json.loads(text)
    return entry if isinstance(entry, dict) else None


def is_torn(line: bytes) -> bool:
    """Whether it may be the beginning of a line of a journal, whose rest was never written."""
    return (
        not line.endswith(b"\n")
        and all(byte in b"0123456789abcdef" for byte in line[: _CRC - 1])
        and line[_CRC - 1 : _CRC] in b" "
    )


def _header(entry: dict[str, Any]) -> Header | None:
    if entry.get("version") != VERSION:  # of another release, whose fields are its own
        return Header("", "", "", each=False, unordered=False, version=int(entry.get("version", 0)))
    return Header(**entry)


def _crc_of(file: Bytes | None, count: int, crc: int) -> int | None:
    """The checksum continued over the next bytes of a file; None if there are not so many."""
    while count > 0:
        piece = b"" if file is None else file.read(min(count, _PIECE))
        if not piece:
            return None
        crc = crc32(piece, crc)
        count -= len(piece)
    return crc
