"""The mark on an output that is complete: of which run it is, for a later ``--resume``.

The mark is an extended attribute of the file: it needs no second file, and is renamed and removed
with the output. It does not count once the file has been changed. Only Linux has it, on most file
systems; without it, an output is not known to be complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from async_batcher.cli.map.journal import RunHeader

if TYPE_CHECKING:
    from pathlib import Path

_ATTRIBUTE = "user.async_batcher.run"


class CompletedRun(NamedTuple):
    """A run whose output is in its place."""

    header: RunHeader
    done: int  # finished items
    failed: int  # how many of them failed

    def mark(self, file: int) -> None:
        """Mark an open file; nothing may be written to it afterwards."""
        if sys.platform == "linux":
            state = _state(os.fstat(file))
            mark = {**self._asdict(), "header": self.header._asdict(), "state": state}
            text = json.dumps(mark).encode()
            with contextlib.suppress(OSError):  # the file system has no such attributes
                os.setxattr(file, _ATTRIBUTE, b"%d %b" % (crc32(text), text))

    @property
    def description(self) -> str:
        failed = f", {self.failed:,} of them failed" if self.failed else ""
        return f"is complete ({self.done:,} items{failed})"


def find_completed(path: Path) -> CompletedRun | None:
    """Return the run that has completed a file. None: it is not known, or the file was changed."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            checksum, _, text = os.getxattr(path, _ATTRIBUTE).partition(b" ")
            mark = json.loads(text) if int(checksum) == crc32(text) else {}
            if mark["state"] == _state(path.stat()):
                return CompletedRun(RunHeader(**mark["header"]), mark["done"], mark["failed"])
    return None


def _state(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns]
