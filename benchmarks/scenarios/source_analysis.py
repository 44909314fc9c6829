"""The work on one file of Python source: parse it, and count what is in it.

It is the work of `async-batcher demo`, written here again, because a benchmark must stay the same
from release to release and runs where this project is not installed.
"""

from __future__ import annotations

import ast
import contextlib
import warnings
from pathlib import Path
from typing import NamedTuple

PARSE_ATTEMPTS = 10
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)


# Source of others may have invalid escapes: DeprecationWarning before Python 3.12, SyntaxWarning
# since. Threads share the filters, so each process sets them once.
warnings.simplefilter("ignore", SyntaxWarning)
warnings.simplefilter("ignore", DeprecationWarning)


class Report(NamedTuple):
    """What a file contains.

    Attributes:
        functions: Number of functions and methods.
        classes: Number of classes.
        branches: Sum of `branches_of` over all nodes.
        most_complex: Qualified name of the function with the most branches, the first of several.
        complexity: One more than the branches of that function.
    """

    functions: int
    classes: int
    branches: int
    most_complex: str
    complexity: int


class _Function:
    __slots__ = ("branches", "line", "name")

    def __init__(self, name: str, line: int) -> None:
        self.name = name
        self.line = line
        self.branches = 0


def analyse(path: str) -> Report:
    """Report on one file, without recursion, because source may be nested deeper than the stack."""
    functions: list[_Function] = []
    classes = branches = 0
    pending: list[tuple[ast.AST, str, _Function | None]] = [(_parse(path), "", None)]
    while pending:
        node, scope, function = pending.pop()
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
        pending.extend([(child, scope, function) for child in ast.iter_child_nodes(node)])
    most = max(functions, key=lambda found: (found.branches, -found.line), default=None)
    name, complexity = (most.name, 1 + most.branches) if most else ("", 0)
    return Report(len(functions), classes, branches, name, complexity)


def branches_of(node: ast.AST) -> int:
    """Return what a node adds to McCabe's cyclomatic complexity of its function."""
    if isinstance(node, _BRANCHES):
        return 1
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    if isinstance(node, ast.comprehension):
        return 1 + len(node.ifs)
    return 0


def _parse(path: str) -> ast.Module:
    source = Path(path).read_bytes()
    # Some releases of Python 3.11 and 3.12 raise SystemError when two threads parse at a time:
    # https://github.com/python/cpython/issues/106905.
    for _ in range(PARSE_ATTEMPTS):
        with contextlib.suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)
