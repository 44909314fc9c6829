"""How far a run is, on a terminal: a bar where tqdm is installed, else a line every few seconds; nothing in a pipe."""

from __future__ import annotations

import sys
import time
from typing import Protocol

_SECONDS = 5.0  # between two lines without a bar: often enough to see that it goes on, and no flood in a long run


class Display(Protocol):
    """Shows how far a run is."""

    def show(self, done: int, failed: int) -> None:
        """So many items are finished, of which so many failed."""

    def say(self, line: str) -> None:
        """Write a line of text to standard error."""

    def close(self) -> None:
        """Show the last figures, and no more."""


def display(total: int | None, done: int, failed: int, *, is_shown: bool) -> Display:
    """What shows how far a run is, on standard error.

    Args:
        total: Items in all; None: not known.
        done: Items that were finished before, which do not count for the speed.
        failed: How many of them failed.
        is_shown: Whether to show anything; not where standard error is no terminal.
    """
    if not is_shown or not is_terminal():
        return Nothing()
    try:
        return Bar(total, done, failed)
    except ImportError:
        return Lines(total, done, failed)


def is_terminal() -> bool:
    """Whether standard error is one."""
    return sys.stderr is not None and sys.stderr.isatty()


class Nothing:
    """Shows nothing."""

    def show(self, done: int, failed: int) -> None:
        """Not shown."""

    def say(self, line: str) -> None:
        """Write a line of text."""
        if sys.stderr is not None:
            print(line, file=sys.stderr)

    def close(self) -> None:
        """Nothing to do."""


class Bar:
    """A bar of tqdm.

    Raises:
        ImportError: It is not installed.
    """

    def __init__(self, total: int | None, done: int, failed: int) -> None:
        import threading

        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own is one of multiprocessing, which starts a process
        tqdm.monitor_interval = 0  # nor a thread
        self._bar = tqdm(total=total, initial=done, unit=" items", file=sys.stderr, dynamic_ncols=True, mininterval=0.1)
        self._failed = -1
        self.show(done, failed)

    def show(self, done: int, failed: int) -> None:
        """Move on."""
        if failed != self._failed:
            self._failed = failed
            self._bar.set_postfix_str(f"{failed:,} failed", refresh=False)
        self._bar.update(done - self._bar.n)

    def say(self, line: str) -> None:
        """Write a line of text above the bar."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave it as it is."""
        self._bar.refresh()
        self._bar.close()


class Lines:
    """Lines of text: the first at once, then one every few seconds, and one at the end."""

    def __init__(self, total: int | None, done: int, failed: int) -> None:
        self._total = total
        self._before = self._done = done
        self._failed = failed
        self._began = time.monotonic()
        self._shown = self._began - _SECONDS

    def show(self, done: int, failed: int) -> None:
        """Say so, if it is time."""
        self._done, self._failed = done, failed
        now = time.monotonic()
        if now - self._shown >= _SECONDS:
            self._shown = now
            self.say(progress_line(self._done, self._failed, self._total, self._done - self._before, now - self._began))

    def say(self, line: str) -> None:
        """Write a line of text."""
        print(line, file=sys.stderr)

    def close(self) -> None:
        """Say how far it came."""
        self.say(progress_line(self._done, self._failed, self._total, self._done - self._before, time.monotonic() - self._began))


def progress_line(done: int, failed: int, total: int | None, recent: int, seconds: float) -> str:
    """How far a run is, in words.

    Args:
        done: Items that are finished.
        failed: How many of them failed.
        total: Items in all; None: not known.
        recent: How many of those that are finished took ``seconds``.
        seconds: See ``recent``.
    """
    rate = recent / seconds if seconds > 0 else 0.0
    words = [f"{done:,} items" if total is None else f"{done:,} of {total:,} items", f"{rate:,.1f} items/s"]
    if total is not None and total > done and rate > 0:
        minutes, left = divmod(round((total - done) / rate), 60)
        hours, minutes = divmod(minutes, 60)
        words.append(f"{hours}:{minutes:02d}:{left:02d} left")
    words.append(f"{failed:,} failed")
    return ", ".join(words)
