"""The work that the demo has done: what is in a file of Python source, found with the standard library's own parser.

::

    paths of a batch --> analyse_batch --> analyse --> ast.parse --> walk --> one Answer per file: its Report, and what it took

Rules:

- A file that cannot be read, decoded or parsed is an answer like any other: a `Report` whose ``is_parsed`` is false.
- The same function runs on the event loop, in threads and in worker processes, which import this module; so it is light.
- Nothing here is recursive: source may be nested deeper than the stack allows.
"""

from __future__ import annotations

import ast
import contextlib
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)
_ATTEMPTS = 10  # see `_parse`


class Report(NamedTuple):
    """What is in a file.

    Attributes:
        path: The path as it was given.
        is_parsed: Whether it could be read and parsed; otherwise all that follows is 0 or empty.
        functions: Functions and methods, ``async`` ones too; a lambda is part of the function around it.
        classes: Classes.
        branches: See `branches_of`.
        most_complex: The qualified name of the function with the most branches, the first of several; empty without functions.
        complexity: 1 + the branches of that function, those of functions inside it not counted; 0 without functions.
    """

    path: str
    is_parsed: bool
    functions: int = 0
    classes: int = 0
    branches: int = 0
    most_complex: str = ""
    complexity: int = 0


class Answer(NamedTuple):
    """What a caller gets for a file.

    Attributes:
        report: What is in it.
        batch_size: How many files were in its batch.
        cpu_seconds: Its share of the batch's processor time, in seconds: all files of a batch have the same.
    """

    report: Report
    batch_size: int
    cpu_seconds: float


class Stopped(Exception):  # noqa: N818 - not an error
    """The batch was told to stop; nobody waits for its answers."""


def analyse_batch(batch: list[str], is_stopped: Callable[[], bool] = bool) -> list[Answer]:
    """Analyse files, one after the other.

    Args:
        batch: Their paths.
        is_stopped: Asked before each file whether to give up; a thread can be ended by nothing else.

    Returns:
        One answer for each.

    Raises:
        Stopped: It was told to give up.
    """
    started = time.thread_time()
    reports = []
    for path in batch:
        if is_stopped():
            raise Stopped
        reports.append(analyse(path))
    share = (time.thread_time() - started) / len(batch)
    return [Answer(report, len(batch), share) for report in reports]


def _parse(source: bytes) -> ast.Module:
    # Some releases of Python 3.11 and 3.12 keep the depth of the tree in one place for all threads, and say so when two of them
    # make a tree at the same time: https://github.com/python/cpython/issues/106905. It is the other thread's turn then.
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)


def analyse(path: str) -> Report:
    """What is in one file."""
    try:
        tree = _parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # the last is also "nested too deeply"
        return Report(path, is_parsed=False)
    return _walk(path, tree)


def be_quiet() -> None:
    """Let the parser not warn of what it finds in other people's source."""
    warnings.simplefilter("ignore", SyntaxWarning)
    warnings.simplefilter("ignore", DeprecationWarning)  # before Python 3.12 the category of an invalid escape


def branches_of(node: ast.AST) -> int:
    """How many ways a node adds to those through its function, as in McCabe's cyclomatic complexity.

    One for each ``if``, ``elif`` and conditional expression, loop, ``except`` and ``case``; for each ``for`` and ``if`` of a
    comprehension; for each ``and`` and ``or``.
    """
    if isinstance(node, _BRANCHES):
        return 1
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    if isinstance(node, ast.comprehension):
        return 1 + len(node.ifs)
    return 0


class _Function:
    """A function on the way through the tree; its decorators, defaults and annotations count as part of it."""

    __slots__ = ("branches", "line", "name")

    def __init__(self, name: str, line: int) -> None:
        self.name = name
        self.line = line
        self.branches = 0


def _walk(path: str, tree: ast.AST) -> Report:
    functions: list[_Function] = []
    classes = branches = 0
    waiting: list[tuple[ast.AST, str, _Function | None]] = [(tree, "", None)]  # a node, the names and the function around it
    while waiting:
        node, scope, function = waiting.pop()
        if isinstance(node, _FUNCTIONS):
            function = _Function(scope + node.name, node.lineno)
            functions.append(function)
            scope = f"{function.name}."
        elif isinstance(node, ast.ClassDef):
            classes += 1
            scope = f"{scope}{node.name}."
        elif count := branches_of(node):
            branches += count
            if function is not None:
                function.branches += count
        waiting.extend([(child, scope, function) for child in ast.iter_child_nodes(node)])
    most = max(functions, key=lambda found: (found.branches, -found.line), default=None)
    return Report(
        path,
        is_parsed=True,
        functions=len(functions),
        classes=classes,
        branches=branches,
        most_complex=most.name if most is not None else "",
        complexity=1 + most.branches if most is not None else 0,
    )
