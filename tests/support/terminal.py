"""A program that runs on a terminal, as a user sees it."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class OnTerminal:
    """The command with a terminal for its standard error; its process group is that of the terminal's Ctrl-C."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path | None = None) -> None:
        """Start it, in a folder."""
        self.terminal, theirs = os.openpty()
        import termios  # not on Windows

        termios.tcsetwinsize(theirs, (24, 100))
        self.shown = self.output = b""
        self.process = subprocess.Popen(  # noqa: S603 - of ours
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={**environment, "COLUMNS": "100"},
            start_new_session=True,
            cwd=folder,
        )
        os.close(theirs)

    def wait_for(self, text: bytes) -> None:
        """Read what it shows until that is there."""
        while text not in self.shown:
            assert self._read(), self.shown.decode()

    def press_ctrl_c(self) -> None:
        """Interrupt it and all that it started, as the terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> int:
        """Read until no process that it started is left, all of which have the terminal open; the exit status."""
        while self._read():
            pass
        self.output = self.process.communicate()[0]
        return self.process.returncode

    def close(self) -> None:
        """Leave nothing."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process.wait()
        os.close(self.terminal)

    def _read(self) -> bool:
        try:
            read = os.read(self.terminal, 65_536)
        except OSError:  # Linux says so when nobody has it open any more
            return False
        self.shown += read
        return bool(read)
