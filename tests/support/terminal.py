"""A program that runs on a terminal, as for a user."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class OnTerminal:
    """A command whose standard error is a terminal that sends Ctrl-C to its process group."""

    def __init__(
        self, command: list[str], environment: dict[str, str], folder: Path | None = None
    ) -> None:
        """Start the command in a folder."""
        self.terminal, child_end = os.openpty()
        import termios  # not on Windows

        termios.tcsetwinsize(child_end, (24, 100))
        self.shown = self.output = b""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=child_end,
            env={**environment, "COLUMNS": "100"},
            start_new_session=True,
            cwd=folder,
        )
        os.close(child_end)

    def wait_for(self, text: bytes) -> None:
        """Read until the terminal shows a text."""
        while text not in self.shown:
            assert self._read(), self.shown.decode()

    def press_ctrl_c(self) -> None:
        """Interrupt the process group, as the terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> int:
        """Read until every process has closed the terminal; return the exit status."""
        while self._read():
            pass
        self.output = self.process.communicate()[0]
        return self.process.returncode

    def close(self) -> None:
        """Kill the command if it runs, and close all files."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process.wait()
        os.close(self.terminal)

    def _read(self) -> bool:
        try:
            read = os.read(self.terminal, 65_536)
        except OSError:  # Linux, when no process has it open
            return False
        self.shown += read
        return bool(read)
