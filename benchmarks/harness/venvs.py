"""Virtual environments for libraries that cannot share this one.

async-batcher 0.2.2 has this project's import name, and Ray is large. An environment is made when
it is first needed, with the running Python, under ``.tox/libraries``; later runs use it again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import subprocess
import sys
from typing import TYPE_CHECKING

from benchmarks.harness.machine import ROOT
from benchmarks.libraries.base import NotAvailableError
from benchmarks.libraries.names import DISTRIBUTION, OLD, OLD_VERSION, RAY_SERVE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FOLDER = ROOT / ".tox" / "libraries"
STEP_TIMEOUT = 300  # seconds; a slow network must not hang a run

# What each environment holds, and what else it has in the version that is installed here.
_PINS = {OLD: {DISTRIBUTION: OLD_VERSION}, RAY_SERVE: {"ray[serve]": "2.60.0"}}
_SAME_AS_HERE = {OLD: ["uvloop", "scikit-learn", "scipy", "numpy"], RAY_SERVE: ["uvloop"]}

_VERSIONS = """
import importlib.metadata, json, sys
version = importlib.metadata.version
print(json.dumps({name: version(name.partition("[")[0]) for name in sys.argv[1:]}))
"""


def has_own_venv(library: str) -> bool:
    """Return whether the library runs in an environment of its own."""
    return library in _PINS


def python_for(library: str, loop: str) -> Path | str:
    """Return the Python that runs a library: the running one, or that of its environment.

    Raises:
        NotAvailableError: The environment cannot be made.
    """
    if not has_own_venv(library):
        return sys.executable
    pins = _PINS[library]
    here = {}
    for name in _SAME_AS_HERE[library]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            here[name] = importlib.metadata.version(name)
    try:
        return python_with({**pins, **here})
    except NotAvailableError:
        if loop == "uvloop":
            raise
        return python_with(pins)


def python_with(pins: Mapping[str, str]) -> Path:
    """Return the Python of an environment with exactly these versions; make it if necessary.

    Args:
        pins: Versions by distribution with its extras, such as ``"ray[serve]"``. The first one
            names the environment.

    Raises:
        NotAvailableError: The environment cannot be made, for example without a network.
    """
    name, version = next(iter(pins.items()))
    folder = FOLDER / f"{name.partition('[')[0]}-{version}-{sys.implementation.cache_tag}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if _has(python, pins):
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], "making a virtual environment")
    requirements = [f"{name}=={version}" for name, version in pins.items()]
    # Most of Ray's packages are never imported, and compiling them takes as long again.
    options = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    _run([str(python), "-m", "pip", "install", *options, *requirements], "pip install")
    if not _has(python, pins):
        msg = "pip installed other versions"
        raise NotAvailableError(msg)
    return python


def _has(python: Path, pins: Mapping[str, str]) -> bool:
    command = [str(python), "-I", "-c", _VERSIONS, *pins]
    try:
        finished = subprocess.run(  # noqa: S603 - our own command
            command, capture_output=True, text=True, timeout=STEP_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return bool(json.loads(finished.stdout) == dict(pins))


def _run(command: list[str], step: str) -> None:
    try:
        subprocess.run(  # noqa: S603 - our own command
            command, capture_output=True, text=True, timeout=STEP_TIMEOUT, check=True
        )
    except subprocess.CalledProcessError as exc:
        lines = (exc.stderr or exc.stdout or "").strip().splitlines()
        # The first error only: other lines may hold paths, and results are published.
        default = f"exit status {exc.returncode}"
        error = next((line for line in lines if line.startswith("ERROR")), default)
        msg = f"{step} failed: {error}"
        raise NotAvailableError(msg) from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        msg = f"{step} failed: {type(exc).__name__}"
        raise NotAvailableError(msg) from exc
