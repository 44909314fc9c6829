"""Functions for workers that run another program, which does not end by itself.

Where the program is to be ended, it first reads a line, which it gets when it is waited for.
"""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def _script(folder: Path) -> str:
    """Return a program, for a shell, that writes its process id to a file."""
    return (
        f"read line; echo $$ > {folder}/pid.part; mv {folder}/pid.part {folder}/pid; exec sleep 60"
    )


def _command(folder: Path) -> list[str]:
    return ["/bin/sh", "-c", _script(folder)]


def _shell_command(folder: Path) -> str:
    """Return a command that a shell runs as a child, rather than in its own place."""
    return f"/bin/sh -c '{_script(folder)}'; true"


def run(folder: Path) -> None:
    """Run it in the usual way."""
    subprocess.run(_command(folder), check=True, input=b"\n")


def run_captured(folder: Path) -> None:
    """Read its output."""
    subprocess.run(_command(folder), check=True, input=b"\n", capture_output=True)


def run_in_shell(folder: Path) -> None:
    """Have a shell run it."""
    subprocess.run(_shell_command(folder), check=True, shell=True)  # noqa: S602 - the case


def system(folder: Path) -> None:
    """Wait for it in C code."""
    os.system(_shell_command(folder))  # noqa: S605 - the case


def popen(folder: Path) -> None:
    """Wait for it, and leave it alone if that is interrupted."""
    subprocess.Popen(_command(folder)).wait()


def kill_group(folder: Path) -> None:
    """Kill a shell and what it runs: they are a process group."""
    program = subprocess.Popen(  # noqa: S602 - the case
        _shell_command(folder), shell=True, stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        program.communicate(b"\n")
    finally:
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()


def crash(folder: Path) -> None:
    """Crash when it runs."""
    with subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *_command(folder)]):  # noqa: S607
        while not (folder / "pid").exists():
            pass
        os.kill(os.getpid(), signal.SIGKILL)
