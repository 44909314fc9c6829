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
- Nothing is decoded here: workers do that (`_worker_function`).
"""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from async_batcher.cli._errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

Format: TypeAlias = Literal["jsonl", "lines", "files"]
Item: TypeAlias = tuple[int, bytes]  # its number, and its line

STREAM = "-"  # the name of standard input, and output

_CHUNK_BYTES = 1 << 18  # a few hundred lines, and little to keep
_BOM = b"\xef\xbb\xbf"


def open_items(
    source: str, form: Format, on_chunk: Callable[[bytes], None] = lambda _: None
) -> Generator[Item]:
    """Iterate over the items of a file, standard input or a directory.

    The input is opened when the first item is read, and closed at the end: only `next` raises
    OSError. ``on_chunk`` is called with all bytes of a file.
    """
    if source != STREAM and Path(source).is_dir():
        if form != "files":
            msg = f"{source!r} is a directory; --format files takes each file in it for an item"
            raise CommandError(msg)
        return _numbered_files(source)
    lines = enumerate(split_lines(read_chunks(source, on_chunk)), 1)
    return (item for item in lines if form == "lines" or item[1].strip())


def _numbered_files(folder: str) -> Generator[Item]:
    yield from enumerate(walk_files(folder), 1)


def item_label(item: Item, form: Format) -> str:
    """Name an item in a message."""
    return os.fsdecode(item[1]) if form == "files" else f"line {item[0]}"


def read_chunks(source: str, on_chunk: Callable[[bytes], None] = lambda _: None) -> Iterator[bytes]:
    """Read a file, a pipe or a terminal, and close it in the end.

    A buffered reader would not do: at exit the interpreter waits for a thread that reads from one.
    """
    descriptor = os.dup(0) if source == STREAM else os.open(source, os.O_RDONLY)
    try:
        while data := _read(descriptor):
            on_chunk(data)
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
    bom = _BOM
    for chunk in chunks:
        head, *rest = chunk.split(b"\n")
        started.append(head)
        if rest:
            for line in (b"".join(started).removeprefix(bom), *rest[:-1]):
                yield line.removesuffix(b"\r")
            started, bom = rest[-1:], b""
    if last := b"".join(started).removeprefix(bom):
        yield last.removesuffix(b"\r")


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


def read_error(source: str, exc: OSError) -> CommandError:
    if isinstance(exc, FileNotFoundError):
        return CommandError(f"there is no file {source!r}")
    return CommandError(f"{input_name(source)} cannot be read: {exc.strerror or exc}")


def input_name(source: str) -> str:
    return "standard input" if source == STREAM else repr(source)
