"""A worker's status page: a little memory that the worker writes and its parent reads, without a message.

It tells the parent, at any moment and after any death, which batch the worker has begun, and when: so whether a lost batch may
have run, and how long one has been running. A batch begins when its function has been loaded and set up.
"""

from __future__ import annotations

import mmap
import os
import struct

SIZE = mmap.PAGESIZE

_BEGIN = struct.Struct("=dQ")
_BEGUN_AT = struct.Struct("=d")
_NUMBER = struct.Struct("=Q")
_AT, _BEGUN, _PEAK, _PREPARED, _TEARS_DOWN = 0, 8, 16, 24, 32  # where each stands


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

    def mark_started(self, number: int, now: float) -> None:
        """The batch of that number begins; ``now`` is `time.monotonic`, which all processes of a system share."""
        _BEGIN.pack_into(self._page, _AT, now, number)  # the number last: who sees it sees the time too

    def started_at(self, number: int) -> float | None:
        """When the batch of that number began; None if it has not."""
        (begun,) = _NUMBER.unpack_from(self._page, _BEGUN)
        return float(_BEGUN_AT.unpack_from(self._page, _AT)[0]) if begun == number else None

    def prepare(self, number: int) -> None:
        """Before the batch of that number begins, its function is loaded and set up."""
        _NUMBER.pack_into(self._page, _PREPARED, number)

    def is_preparing(self, number: int) -> bool:
        """Whether the function is being loaded and set up for the batch of that number, or has been without the batch's begin."""
        return bool(_NUMBER.unpack_from(self._page, _PREPARED)[0] == number) and self.started_at(number) is None

    @property
    def tears_down(self) -> bool:
        """Whether a set-up has run in the worker that has a tear-down."""
        return bool(_NUMBER.unpack_from(self._page, _TEARS_DOWN)[0])

    @tears_down.setter
    def tears_down(self, value: bool) -> None:
        _NUMBER.pack_into(self._page, _TEARS_DOWN, value)

    @property
    def peak_rss(self) -> int:
        """Bytes of resident memory at most, as far as the worker has told; 0 where the system tells better."""
        return int(_NUMBER.unpack_from(self._page, _PEAK)[0])

    @peak_rss.setter
    def peak_rss(self, value: int) -> None:
        _NUMBER.pack_into(self._page, _PEAK, value)

    def close(self) -> None:
        """Give the page back."""
        self._page.close()
