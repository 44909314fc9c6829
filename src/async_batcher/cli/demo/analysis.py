"""What the demo does to a file of Python source: count its functions and classes.

Worker processes import this module: it needs only the standard library. Nothing here is recursive:
source may be nested deeper than the stack allows.
"""

from __future__ import annotations

import ast
import contextlib
import time
import warnings
from pathlib import Path
from typing import NamedTuple

_ATTEMPTS = 10  # see `_parse`


class FileReport(NamedTuple):
    """What is in a file. One that cannot be read, decoded or parsed has a report, too."""

    path: str
    is_parsed: bool
    functions: int = 0  # and methods, but not lambdas
    classes: int = 0


class FileResult(NamedTuple):
    """The report on a file, the size of its batch, and its share of the CPU time in seconds."""

    report: FileReport
    batch_size: int
    cpu_seconds: float


def analyse_batch(batch: list[str]) -> list[FileResult]:
    """Analyse files, one after the other."""
    started = time.thread_time()
    reports = [analyse(path) for path in batch]
    share = (time.thread_time() - started) / len(batch)
    return [FileResult(report, len(batch), share) for report in reports]


def analyse(path: str) -> FileReport:
    """Say what is in one file."""
    try:
        tree = _parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return FileReport(path, is_parsed=False)  # the last two: nested too deeply
    functions = classes = 0
    for node in ast.walk(tree):
        functions += isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        classes += isinstance(node, ast.ClassDef)
    return FileReport(path, is_parsed=True, functions=functions, classes=classes)


def be_quiet() -> None:
    """Keep the parser from warning of what it finds in other people's source."""
    warnings.simplefilter("ignore", SyntaxWarning)
    warnings.simplefilter("ignore", DeprecationWarning)  # of an escape, before Python 3.12


def _parse(source: bytes) -> ast.Module:
    # Some releases of Python 3.11 and 3.12 count the depth of the tree in one place for all
    # threads, and raise if two of them parse at the same time:
    # https://github.com/python/cpython/issues/106905
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)
