"""A worker's status page: memory that it shares with its parent, in place of messages.

It shows the parent, at any moment and after any crash, which batch the worker has begun and when. A
batch begins when its function has been loaded and set up. It shows the worker, which is busy,
whether its batch has been abandoned, and whether it is to be interrupted.

A process whose own code fails, which may be before it is a worker, writes there what was raised.
"""

from __future__ import annotations

import mmap
import os

SIZE = mmap.PAGESIZE

# Places of the fields, of 8 bytes each: a time, then numbers.
_STARTED_AT, _STARTED, _SETTING_UP, _PEAK_RSS, _TEARS_DOWN, _ABANDONED = range(6)
_INTERRUPTED, _IS_RUNNING = 6, 7

# Where the text of what ended the process begins, and its largest size in bytes.
FAILURE_OFFSET, FAILURE_SIZE = 64, 2000


class StatusPage:
    """The page, on either side.

    Args:
        fd: The descriptor of shared memory of `SIZE` bytes; closed here, the page stays.
    """

    __slots__ = ("_numbers", "_page", "_times")

    def __init__(self, fd: int) -> None:
        try:
            self._page = mmap.mmap(fd, SIZE)
        finally:
            os.close(fd)
        self._numbers = memoryview(self._page).cast("Q")
        self._times = memoryview(self._page).cast("d")

    def mark_started(self, seq: int, now: float) -> None:
        """Note that a batch begins at ``now``, on `time.monotonic`, which all processes share."""
        self._times[_STARTED_AT] = now
        self._numbers[_STARTED] = seq  # last: a parent that sees it sees the time too

    def started_at(self, seq: int) -> float | None:
        """Return when a batch began; None if it has not."""
        return self._times[_STARTED_AT] if self._numbers[_STARTED] == seq else None

    @property
    def started_seq(self) -> int:
        """The sequence number of the batch that began last."""
        return self._numbers[_STARTED]

    def mark_setting_up(self, seq: int) -> None:
        """Note that the function of a batch is about to be loaded and set up."""
        self._numbers[_SETTING_UP] = seq

    def is_setting_up(self, seq: int) -> bool:
        """Tell whether loading the function of a batch has started, and the batch has not."""
        return self._numbers[_SETTING_UP] == seq > self._numbers[_STARTED]

    @property
    def is_running(self) -> bool:
        """Whether the process has come as far as to be a worker."""
        return bool(self._numbers[_IS_RUNNING])

    @property
    def failure(self) -> str:
        """What the process's own code has raised, in words; empty: nothing."""
        text, _, _ = self._page[FAILURE_OFFSET:].partition(b"\0")
        return " ".join(text.decode(errors="replace").split()).rstrip(": ")

    @failure.setter
    def failure(self, value: str) -> None:
        text = value.encode(errors="replace")[:FAILURE_SIZE]
        self._page[FAILURE_OFFSET : FAILURE_OFFSET + len(text)] = text

    def mark_running(self) -> None:
        self._numbers[_IS_RUNNING] = 1

    @property
    def tears_down(self) -> bool:
        """Whether a set-up that has a tear-down has run in the worker."""
        return bool(self._numbers[_TEARS_DOWN])

    @tears_down.setter
    def tears_down(self, value: bool) -> None:
        self._numbers[_TEARS_DOWN] = value

    @property
    def peak_rss(self) -> int:
        """The worker's peak resident memory in bytes; 0 where the parent can read it itself."""
        return self._numbers[_PEAK_RSS]

    @peak_rss.setter
    def peak_rss(self, value: int) -> None:
        self._numbers[_PEAK_RSS] = value

    @property
    def abandoned_seq(self) -> int:
        """The sequence number of the batch that was abandoned last; the parent writes it."""
        return self._numbers[_ABANDONED]

    @abandoned_seq.setter
    def abandoned_seq(self, value: int) -> None:
        self._numbers[_ABANDONED] = value

    def mark_interrupted(self, seq: int) -> None:
        """Have `claim_interrupt` return True for a batch, once."""
        self._numbers[_INTERRUPTED] = seq

    def claim_interrupt(self, seq: int) -> bool:
        """Tell whether a batch is to be interrupted, and has not been."""
        if self._numbers[_INTERRUPTED] != seq:
            return False
        self._numbers[_INTERRUPTED] = 0
        return True

    def close(self) -> None:
        self._numbers.release()
        self._times.release()
        self._page.close()
