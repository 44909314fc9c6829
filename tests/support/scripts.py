"""Programs in processes of their own: for ``__main__``, for the exit, and for signals."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.support.worker_functions import DEADLINE

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Return the environment of a program that may import the tests."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "", "PYTHONUNBUFFERED": "1"}


def script(folder: Path, text: str) -> Path:
    """Write a program."""
    file = folder / "program.py"
    file.write_text(textwrap.dedent(text))
    return file


def run_script(folder: Path, text: str, *, how: str = "file") -> str:
    """Run a program, which must exit with 0 and print nothing to standard error.

    Args:
        folder: The folder that it is written to, and runs in.
        text: The program.
        how: "file", "stdin" (read from standard input) or "command" (``-c``).

    Returns:
        Its standard output.
    """
    done = run_any(folder, text, how=how)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def run_any(folder: Path, text: str, *, how: str = "file") -> subprocess.CompletedProcess[str]:
    """Run a program, with any exit status."""
    file = script(folder, text)
    arguments = {"file": [str(file)], "stdin": [], "command": ["-c", file.read_text()]}[how]
    with file.open() as source:
        return subprocess.run(
            [sys.executable, *arguments],
            stdin=source if how == "stdin" else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
            env=environment(),
            timeout=2 * DEADLINE,
        )


def start(folder: Path, text: str) -> subprocess.Popen[str]:
    """Start a program in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(script(folder, text))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(),
        start_new_session=True,
    )


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path("/proc", str(pid), "stat")
    try:
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
