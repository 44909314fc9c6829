"""A virtual environment of its own for a rival that cannot share ours: async-batcher 0.2.2 has our import name, Ray is large.

Made on demand under ``.tox/rivals`` (which git ignores) with the running Python, and used again by later runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = Path(__file__).parent.parent / ".tox" / "rivals"
_PATIENCE = 300  # seconds for one step; a slow network must not hang a run for ever

_VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name.partition("[")[0]) for name in sys.argv[1:]}))
"""


class NotAvailableError(Exception):
    """A rival cannot be had here; the message says why, in one line."""


def python_with(pins: Mapping[str, str]) -> Path:
    """The Python of an environment that holds exactly these versions; makes it if need be.

    Args:
        pins: Distributions, with their extras if any (``"ray[serve]"``), and their versions; the first one names the environment.

    Raises:
        NotAvailableError: It cannot be made, as without a network.
    """
    name, version = next(iter(pins.items()))
    folder = FOLDER / f"{name.partition('[')[0]}-{version}-{sys.implementation.cache_tag}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if _holds(python, pins):
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], "making a virtual environment")
    requirements = [f"{name}=={version}" for name, version in pins.items()]
    # What is not imported need not be compiled: of Ray's packages most are not, and it takes a quarter of the time.
    options = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    _run([str(python), "-m", "pip", "install", *options, *requirements], "pip install")
    if not _holds(python, pins):
        msg = "pip installed something else"
        raise NotAvailableError(msg)
    return python


def _holds(python: Path, pins: Mapping[str, str]) -> bool:
    try:
        finished = subprocess.run(  # noqa: S603 - our own command
            [str(python), "-I", "-c", _VERSIONS, *pins], capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return bool(json.loads(finished.stdout) == dict(pins))


def _run(command: list[str], step: str) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)  # noqa: S603 - our own command
    except subprocess.CalledProcessError as exc:
        lines = (exc.stderr or exc.stdout or "").strip().splitlines()
        # Only the name of the first line's error: the rest may hold paths, and this ends up in a file that is published.
        msg = f"{step} failed: {next((line for line in lines if line.startswith('ERROR')), f'exit status {exc.returncode}')}"
        raise NotAvailableError(msg) from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        msg = f"{step} failed: {type(exc).__name__}"
        raise NotAvailableError(msg) from exc
