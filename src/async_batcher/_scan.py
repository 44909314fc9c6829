"""The pass over an input before a run that can be resumed: how many items there are, and whether they are the same as before."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from async_batcher._formats import InputError, chunks, files_below, is_directory, items, lines, unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from async_batcher._formats import Format

_DIGEST = 16  # bytes


class Scan(NamedTuple):
    """What an input is.

    Attributes:
        items: How many there are.
        digest: Of all bytes of a file; of files that are named by it, or are in a directory, of path, size and time of change.
        path: The input.
        state: Of a file: its size and time of change, as they were before it was read.
    """

    items: int
    digest: str
    path: str
    state: bytes

    def has_changed(self) -> bool:
        """Whether the file is not what it was."""
        return _state_of(os.fsencode(self.path)) != self.state


def is_regular(path: str) -> bool:
    """Whether an input can be read twice: it is a regular file or a directory, no pipe."""
    return Path(path).is_file() or Path(path).is_dir()


def scan(path: str, form: Format) -> Scan:
    """Read an input once.

    Raises:
        InputError: It cannot be read.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST)
    state = _state_of(os.fsencode(path))
    count = 0

    def seen(pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            digest.update(piece)
            yield piece

    try:
        source = enumerate(files_below(path), 1) if is_directory(path) else items(lines(seen(chunks(path))), form)
        for _, raw in source:
            count += 1
            if form == "files":
                digest.update(b"%d:%s %s;" % (len(raw), raw, _state_of(raw)))
    except OSError as exc:
        raise InputError(unreadable(path, exc)) from exc
    return Scan(count, digest.hexdigest(), path, state)


def _state_of(path: bytes) -> bytes:
    try:
        status = Path(os.fsdecode(path)).stat()
    except (OSError, ValueError):  # it is not there, or no path: its item will say so
        return b"none"
    return b"%d %d" % (status.st_size, status.st_mtime_ns)
