"""What importing the batcher costs, beside `import asyncio`; each in a fresh interpreter."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.children import OLD, OLD_VERSION, OURS, python_for

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.contest import Contest, Round

_IMPORT = """
import sys, time
began = time.perf_counter()
import {module}
took = time.perf_counter() - began
import importlib.metadata, json
named = "async_batcher" in sys.modules
print(json.dumps([took, importlib.metadata.version("async-batcher") if named else None, sorted(sys.modules)]))
"""
_NOT_WANTED = {"uvloop", "cloudpickle", "multiprocessing", "numpy"}  # nobody who only imports the batcher needs them


def _measure(python: Path | str, module: str) -> tuple[dict[str, float], str | None, set[str]]:
    began = time.perf_counter()
    finished = subprocess.run(  # noqa: S603 - our own command
        [str(python), "-I", "-c", _IMPORT.format(module=module)], capture_output=True, text=True, timeout=60, check=True
    )
    whole = time.perf_counter() - began
    seconds, version, modules = json.loads(finished.stdout)
    return {"seconds": seconds, "process_seconds": whole}, version, set(modules)


def _import(python: Path | str, module: str) -> dict[str, float]:
    return _measure(python, module)[0]


def _ours() -> tuple[dict[str, str], Round]:
    _, version, modules = _measure(sys.executable, "async_batcher.batcher")
    assert not modules & _NOT_WANTED
    return {"version": version or ""}, functools.partial(_import, sys.executable, "async_batcher.batcher")


def _old() -> tuple[dict[str, str], Round]:
    python = python_for(OLD, "asyncio")
    version = _measure(python, "async_batcher.batcher")[1]
    assert version == OLD_VERSION
    return {"version": version}, functools.partial(_import, python, "async_batcher.batcher")


def _asyncio() -> tuple[dict[str, str], Round]:
    return {"version": f"Python {platform.python_version()}"}, functools.partial(_import, sys.executable, "asyncio")


def test_import(contest: Contest) -> None:
    """Seconds in the import statement alone, and of the whole process; neither uvloop nor cloudpickle is imported."""
    rivals = {"import asyncio": _asyncio, OLD: _old, OURS: _ours}
    load = {"module": "async_batcher.batcher"}
    contest.run(rivals, measure="seconds", rounds=3 if contest.quick else 41, question="import", loop="none", load=load)
