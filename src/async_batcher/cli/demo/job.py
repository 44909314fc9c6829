"""The work of the demo: count the functions and classes that source files define.

Worker processes import this module: it imports nothing that they do not need.
"""

from __future__ import annotations

import ast
import contextlib
import os
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

_PARSE_ATTEMPTS = 10  # see `_parse`


class TimedRun(NamedTuple):
    """Where and when a batch ran. All processes of a machine share the clock."""

    pid: int
    thread: int
    began: float
    ended: float
    cpu_seconds: float


class FileResult(NamedTuple):
    """What is in a file. One that cannot be read, decoded or parsed has a result, too."""

    path: str
    is_parsed: bool
    functions: int  # and methods, but not lambdas
    classes: int
    run: TimedRun


def analyse_batch(batch: list[str]) -> list[FileResult]:
    """Analyse files, one after the other."""
    began, cpu_began = time.perf_counter(), time.thread_time()
    counts = [(path, *count_definitions(path)) for path in batch]
    cpu_seconds, ended = time.thread_time() - cpu_began, time.perf_counter()
    run = TimedRun(os.getpid(), threading.get_ident(), began, ended, cpu_seconds)
    return [FileResult(*found, run) for found in counts]


def count_definitions(path: str) -> tuple[bool, int, int]:
    """Return whether a file can be parsed, and how many functions and classes it defines."""
    try:
        nodes = list(ast.walk(_parse(Path(path).read_bytes())))  # not recursive: depth is no limit
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return False, 0, 0  # the last two: nested too deeply
    functions = sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in nodes)
    return True, functions, sum(isinstance(node, ast.ClassDef) for node in nodes)


def _parse(source: bytes) -> ast.Module:
    # Some releases of Python 3.11 and 3.12 count the depth of the tree in one place for all
    # threads, and raise if two of them parse at the same time:
    # https://github.com/python/cpython/issues/106905
    for _ in range(_PARSE_ATTEMPTS):
        with contextlib.suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)


def silence_parser() -> None:
    """Keep the parser from warning of what it finds in other people's source."""
    warnings.simplefilter("ignore", SyntaxWarning)
    warnings.simplefilter("ignore", DeprecationWarning)  # of an escape, before Python 3.12
