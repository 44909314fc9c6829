"""A worker's status page: memory that the worker writes and its parent reads, without a message.

It shows the parent, at any moment and after any crash, which batch the worker has begun and when. A
batch begins when its function has been loaded and set up.
"""

from __future__ import annotations

import mmap
import os
import struct

SIZE = mmap.PAGESIZE

_START = struct.Struct("=dQ")
_TIME = struct.Struct("=d")
_NUMBER = struct.Struct("=Q")
# Offsets of the fields.
_STARTED_AT, _STARTED, _PEAK_RSS, _PREPARED, _TEARS_DOWN = 0, 8, 16, 24, 32


class StatusPage:
    """The page, on either side.

    Args:
        fd: The descriptor of shared memory of `SIZE` bytes; closed here, the page stays.
    """

    __slots__ = ("_page",)

    def __init__(self, fd: int) -> None:
        try:
            self._page = mmap.mmap(fd, SIZE)
        finally:
            os.close(fd)

    def mark_started(self, seq: int, now: float) -> None:
        """Note that a batch begins at ``now``, on `time.monotonic`, which all processes share."""
        # The number last: a parent that sees the number sees the time too.
        _START.pack_into(self._page, _STARTED_AT, now, seq)

    def started_at(self, seq: int) -> float | None:
        """Return when a batch began; None if it has not."""
        (started,) = _NUMBER.unpack_from(self._page, _STARTED)
        return float(_TIME.unpack_from(self._page, _STARTED_AT)[0]) if started == seq else None

    def prepare(self, seq: int) -> None:
        """Note that the function of a batch is about to be loaded and set up."""
        _NUMBER.pack_into(self._page, _PREPARED, seq)

    def is_preparing(self, seq: int) -> bool:
        """Tell whether loading the function of a batch has started, and the batch has not."""
        (prepared,) = _NUMBER.unpack_from(self._page, _PREPARED)
        return bool(prepared == seq) and self.started_at(seq) is None

    @property
    def tears_down(self) -> bool:
        """Whether a set-up that has a tear-down has run in the worker."""
        return bool(_NUMBER.unpack_from(self._page, _TEARS_DOWN)[0])

    @tears_down.setter
    def tears_down(self, value: bool) -> None:
        _NUMBER.pack_into(self._page, _TEARS_DOWN, value)

    @property
    def peak_rss(self) -> int:
        """The worker's peak resident memory in bytes; 0 where the parent can read it itself."""
        return int(_NUMBER.unpack_from(self._page, _PEAK_RSS)[0])

    @peak_rss.setter
    def peak_rss(self, value: int) -> None:
        _NUMBER.pack_into(self._page, _PEAK_RSS, value)

    def close(self) -> None:
        self._page.close()
