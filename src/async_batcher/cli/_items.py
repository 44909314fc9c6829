"""The items of an input: how they are found in each format.

=========  ==============================  ==================  ================================
format     an item is                      blank lines         the function gets
=========  ==============================  ==================  ================================
``jsonl``  a line of JSON                  are skipped         the decoded JSON value
``lines``  a line of text                  are items           a str without the line ending
``files``  a path on a line, or a file in  are skipped         the bytes of the file
           a directory
=========  ==============================  ==================  ================================

Rules:

- Lines are numbered from 1, as in an editor; files of a directory are numbered in path order.
- Text is UTF-8. A byte order mark at the beginning is dropped. Lines end in LF or CR LF.
- Nothing is decoded here: workers do that (`_item_processor`).
"""

from __future__ import annotations

import os
import select
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from async_batcher.cli._errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Format: TypeAlias = Literal["jsonl", "lines", "files"]

STREAM = "-"  # the name of standard input, and output

_CHUNK_BYTES = 1 << 18  # a few hundred lines, and little to keep
_BOM = b"\xef\xbb\xbf"


def open_items(source: str, form: Format) -> Iterator[tuple[int, bytes]]:
    """Iterate over the items of a file, standard input or a directory, with their line numbers.

    The input is opened when the first item is read, and closed at the end.

    Raises:
        CommandError: The input is a directory, and lines are expected.
    """
    if source != STREAM and Path(source).is_dir():
        if form != "files":
            msg = f"{source!r} is a directory; --format files takes each file in it for an item"
            raise CommandError(msg)
        return iter(enumerate(walk_files(source), 1))
    return number_items(split_lines(read_chunks(source)), form)


def item_label(number: int, raw: bytes, form: Format) -> str:
    """Name an item in a message."""
    return os.fsdecode(raw) if form == "files" else f"line {number}"


def read_chunks(source: str) -> Iterator[bytes]:
    """Read a file, a pipe or a terminal, and close it in the end.

    A buffered reader would not do: at exit the interpreter waits for a thread that reads from one.
    """
    descriptor = os.dup(0) if source == STREAM else os.open(source, os.O_RDONLY)
    try:
        while data := _read(descriptor):
            yield data
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> bytes:
    while True:
        try:
            return os.read(descriptor, _CHUNK_BYTES)
        except BlockingIOError:  # another process has made it non-blocking
            select.select([descriptor], [], [])


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Split into lines, without their endings and a byte order mark."""
    started: list[bytes] = []  # chunks of a line whose end has not been read
    is_first = True
    try:
        for chunk in chunks:
            head, *rest = chunk.split(b"\n")
            started.append(head)
            if not rest:
                continue
            line, started = b"".join(started), [rest.pop()]
            if is_first:
                line, is_first = line.removeprefix(_BOM), False
            yield line.removesuffix(b"\r")
            for line in rest:
                yield line.removesuffix(b"\r")
    finally:
        close_generator(chunks)
    last = b"".join(started)
    if is_first:
        last = last.removeprefix(_BOM)
    if last:
        yield last.removesuffix(b"\r")


def number_items(lines: Iterable[bytes], form: Format) -> Iterator[tuple[int, bytes]]:
    """Select the lines that are items, with their numbers."""
    try:
        for number, line in enumerate(lines, 1):
            if form == "lines" or (line and not line.isspace()):
                yield number, line
    finally:
        close_generator(lines)


def walk_files(folder: str) -> list[bytes]:
    """List the paths of all regular files in a directory and below it, in order.

    Raises:
        OSError: One of the directories cannot be read.
    """

    def fail(exc: OSError) -> None:
        raise exc

    walk = os.walk(folder, onerror=fail)
    found = (Path(base, name) for base, _, names in walk for name in names)
    return sorted(os.fsencode(path) for path in found if path.is_file())


def close_generator(source: object) -> None:
    if isinstance(source, Generator):
        source.close()


def read_error(source: str, exc: OSError) -> CommandError:
    if isinstance(exc, FileNotFoundError):
        return CommandError(f"there is no file {source!r}")
    return CommandError(f"{source!r} cannot be read: {exc.strerror or exc}")
