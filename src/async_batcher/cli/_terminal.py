"""What the commands show: progress on standard error, tables, and standard output kept clean."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SECONDS_BETWEEN_LINES = 5.0  # often enough to see progress, and no flood in a long run


def stderr_is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


@contextlib.contextmanager
def redirected_stdout() -> Iterator[IO[bytes]]:
    """Send what is printed, in workers too, to standard error; yield the real standard output."""
    if sys.stdout is not None:
        sys.stdout.flush()
    with os.fdopen(os.dup(1), "wb", buffering=0) as file:
        os.dup2(2, 1)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield file
        finally:
            with contextlib.suppress(OSError):
                if sys.stdout is not None:
                    sys.stdout.flush()  # user code may have kept a reference to it
            os.dup2(file.fileno(), 1)


class ProgressReporter:
    """Show progress on standard error, if that is a terminal.

    A bar where tqdm is installed, otherwise a line of text every few seconds.

    Args:
        total: Number of items. None: unknown.
        done: Items that are finished already; they do not count for the rate.
        failed: How many of them failed. None: failures are not shown.
        unit: What is counted. Empty: nothing is, and only `status` is shown.
        title: Shown before the count.
        is_shown: Whether to show anything but the lines given to `say`.
        stays: Whether the bar stays on the terminal in the end.
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        done: int = 0,
        failed: int | None = None,
        unit: str = "",
        title: str = "",
        is_shown: bool = True,
        stays: bool = False,
    ) -> None:
        self._total = total
        self._done_before = self._done = done
        self._failed = failed
        self._unit = unit
        self._title = f"{title}: " if title else ""
        self._began = time.monotonic()
        self._next_line = self._began
        self._bar: Any = None
        self._prints_lines = is_shown and stderr_is_terminal()
        if self._prints_lines:
            with contextlib.suppress(ImportError):
                self._bar = self._new_bar(stays=stays)
                self._prints_lines = False
        if unit:
            self.show(done, failed)

    def show(self, done: int, failed: int | None = None) -> None:
        """Show how many items are finished, and how many of those have failed."""
        self._done = done
        if self._bar is not None:
            if failed is not None and (failed != self._failed or not self._bar.postfix):
                self._bar.set_postfix_str(f"{failed:,} failed", refresh=False)
            self._bar.update(done - self._bar.n)
        self._failed = failed
        if self._prints_lines and time.monotonic() >= self._next_line:
            self._print(self._progress())

    def status(self, text: str) -> None:
        """Show what is being done."""
        if self._bar is not None:
            self._bar.set_description_str(text)
        elif self._prints_lines and time.monotonic() >= self._next_line:
            self._print(text)

    def say(self, line: str) -> None:
        """Write a line to standard error, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif sys.stderr is not None:
            print(line, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
        elif self._prints_lines and self._unit:
            self._print(self._progress())

    def _new_bar(self, *, stays: bool) -> Any:
        import threading

        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # the default lock starts a process
        tqdm.monitor_interval = 0  # no monitor thread
        return tqdm(
            total=self._total, initial=self._done, unit=f" {self._unit}", desc=self._title or None,
            file=sys.stderr, dynamic_ncols=True, mininterval=0.1, leave=stays,
            bar_format=None if self._unit else "{desc}",
        )  # fmt: skip

    def _print(self, line: str) -> None:
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        print(line, file=sys.stderr)

    def _progress(self) -> str:
        seconds = time.monotonic() - self._began
        new = self._done - self._done_before
        line = progress_line(self._done, self._total, new, seconds, self._unit, self._failed)
        return self._title + line


def progress_line(
    done: int, total: int | None, new: int, seconds: float, unit: str, failed: int | None
) -> str:
    """Describe progress in words; ``new`` of the finished items have taken ``seconds``."""
    rate = new / seconds if seconds > 0 else 0.0
    of = "" if total is None else f" of {total:,}"
    words = [f"{done:,}{of} {unit}", f"{rate:,.1f} {unit}/s"]
    if total is not None and total > done and rate > 0:
        minutes, left = divmod(round((total - done) / rate), 60)
        hours, minutes = divmod(minutes, 60)
        words.append(f"{hours}:{minutes:02d}:{left:02d} left")
    if failed is not None:
        words.append(f"{failed:,} failed")
    return ", ".join(words)
