"""The pass over an input before a run: how many items there are, and a digest to compare later."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from async_batcher.cli._items import open_items, read_error

if TYPE_CHECKING:
    from async_batcher.cli._items import Format

_DIGEST_BYTES = 16


class InputFingerprint(NamedTuple):
    """How many items an input holds, and a digest of all its bytes.

    Of files that it names, or that are in a directory, the digest covers paths, sizes and
    modification times. ``state`` is size and modification time of the input before it was read.
    """

    items: int
    digest: str
    path: str
    state: bytes

    def has_changed(self) -> bool:
        return _state_of(os.fsencode(self.path)) != self.state


def is_rereadable(path: str) -> bool:
    """Tell whether an input can be read twice: a regular file or a directory, not a pipe."""
    return Path(path).is_file() or Path(path).is_dir()


def read_fingerprint(path: str, form: Format) -> InputFingerprint:
    """Read an input once."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    state = _state_of(os.fsencode(path))
    count = 0
    try:
        for _, raw in open_items(path, form, digest.update):
            count += 1
            if form == "files":
                digest.update(b"%d:%s %s;" % (len(raw), raw, _state_of(raw)))
    except OSError as exc:
        raise read_error(path, exc) from exc
    return InputFingerprint(count, digest.hexdigest(), path, state)


def _state_of(path: bytes) -> bytes:
    try:
        status = Path(os.fsdecode(path)).stat()
    except (OSError, ValueError):  # no such file: reading the item reports that
        return b"none"
    return b"%d %d" % (status.st_size, status.st_mtime_ns)
