"""The layers of the package, and the limits on the size of its parts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import async_batcher
from tests.support import scripts

PACKAGE = Path(async_batcher.__file__).parent

# From the bottom.
LAYERS = [
    {"exceptions", "failures", "limits", "stats", "loops"},
    {"_eventloop"},
    {"_serialization"},
    {"_transport"},
    {"_worker", "current"},
    {"_pool"},
    {"_runners"},
    {"_batching"},
    {"batcher"},
    {"decorator"},
    {"integrations"},
    {"cli", "__main__"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}

# What a worker imports. Importing asyncio would take longer than everything else together.
WORKER_SIDE = (
    "_worker",
    "_serialization",
    "_transport.descriptors",
    "_transport.framing",
    "_transport.protocol",
    "_transport.shared_memory",
    "_transport.status_page",
    "_transport.token_pipe",
    "_transport.worker_channel",
    "current",
    "exceptions",
    "failures",
)


# The decisions of a pool: no time, no I/O, no event loop. `signal` has the number of SIGKILL.
PURE = "_pool.state"
PURE_IMPORTS = {"__future__", "collections", "enum", "math", "signal", "typing", "weakref"}
OWN_PURE_IMPORTS = {
    "_pool.errors",
    "_pool.processes.exit_status",  # names of exit codes
    "_pool.work_item",
    "_serialization.exception_text",
    "_transport.protocol",
    "exceptions",
    "stats",
}
# What does I/O, or could, without an import.
IMPURE_NAMES = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> int:
    """Return the number of a module's layer."""
    return LAYER_OF[module.partition(".")[0]]


def _is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def _imports(module: str) -> set[str]:
    """Return the dotted names that a module imports, except for type checkers."""
    found: set[str] = set()
    remaining: list[ast.AST] = [ast.parse(FILES[module].read_text(encoding="utf-8"))]
    while remaining:
        node = remaining.pop()
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        remaining += [child for child in ast.iter_child_nodes(node) if not _is_type_checking(child)]
    return found


def _own(names: set[str]) -> set[str]:
    """Return the modules of the package among imported names."""
    own = {
        name.removeprefix("async_batcher.") for name in names if name.startswith("async_batcher.")
    }
    return {name if name in FILES else name.rpartition(".")[0] for name in own}


# Read before any test runs: CPython 3.11 may fail to parse while it collects what a test has left.
IMPORTS = {module: _imports(module) for module in FILES if module}
CLASSES = [
    (node, module)
    for module in FILES
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8")))
    if isinstance(node, ast.ClassDef)
]
PURE_TREES = {
    module: ast.parse(FILES[module].read_text(encoding="utf-8"))
    for module in FILES
    if module.startswith(PURE)
}
LINES = {
    module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()
}

MAX_ATTRIBUTES = 16
MAX_METHODS = 25
MAX_LINES = 350
MAX_LINES_OF = {"batcher": 420}
MAX_FILES = 15


def attributes_of(node: ast.ClassDef) -> set[str]:
    """Return the names that methods assign to ``self``, and those in ``__slots__``."""
    found: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            if isinstance(child.value, ast.Name) and child.value.id == "self":
                found.add(child.attr)
        elif isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) == "__slots__":
            slots = ast.literal_eval(child.value)
            found.update([slots] if isinstance(slots, str) else slots)
    return found


def methods_of(node: ast.ClassDef) -> list[str]:
    """Return the names of the methods and properties that the class itself defines."""
    return [
        child.name
        for child in node.body
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        and not any("overload" in ast.unparse(decorator) for decorator in child.decorator_list)
    ]


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_a_module_imports_from_its_own_layer_or_from_below(module: str) -> None:
    """Except for type checkers."""
    for other in _own(IMPORTS[module]):
        if not other:
            assert layer(module) == len(LAYERS) - 1, (
                "only the command imports the package itself, whose names are lazy"
            )
        else:
            assert layer(other) <= layer(module), f"{module} imports {other}, which is above it"


def test_modules_do_not_import_each_other_in_cycles() -> None:
    """Inside a package, too."""
    graph = {module: _own(names) for module, names in IMPORTS.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as exc:
        pytest.fail(f"a circle: {' -> '.join(exc.args[1])}")


@pytest.mark.parametrize("module", [module for module in IMPORTS if module.startswith(WORKER_SIDE)])
def test_the_worker_side_imports_no_asyncio(module: str) -> None:
    """Nor a module of the package that does."""
    assert not [name for name in IMPORTS[module] if name.partition(".")[0] == "asyncio"]
    assert all(other.startswith((*WORKER_SIDE, "exceptions")) for other in _own(IMPORTS[module]))


@pytest.mark.parametrize("module", sorted(PURE_TREES))
def test_the_decisions_of_a_pool_are_pure(module: str) -> None:
    """Their modules import nothing that tells the time, does I/O or runs an event loop."""
    others = {name.partition(".")[0] for name in IMPORTS[module]} - {"async_batcher"}
    assert others <= PURE_IMPORTS
    own = _own(IMPORTS[module])
    assert {name for name in own if not name.startswith(PURE)} <= OWN_PURE_IMPORTS
    for node in ast.walk(PURE_TREES[module]):
        if isinstance(node, ast.Name):
            assert node.id not in IMPURE_NAMES
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "signal":
            assert node.attr.startswith("SIG"), "only the numbers of signals"


@pytest.mark.slow
def test_a_worker_loads_no_asyncio() -> None:
    """The main modules of worker and fork server load what a batch needs and no more."""
    modules = "async_batcher._worker.main, async_batcher._worker.fork_server"
    program = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=scripts.environment(),
    )
    loaded = set(done.stdout.split())
    assert "async_batcher._worker.run_batch" in loaded
    assert not loaded & {
        "asyncio",
        "ssl",
        "uvloop",
        "multiprocessing",
        "concurrent.futures.process",
        "numpy",
    }
    assert not {
        name
        for name in loaded
        if name.startswith(("async_batcher._pool", "async_batcher._batching"))
    }


@pytest.mark.parametrize(
    "package",
    sorted(name for name, path in FILES.items() if path.name == "__init__.py" and name[:1] == "_"),
)
def test_the_init_of_a_private_package_is_empty(package: str) -> None:
    """A worker that imports one module of a package imports no other module of it."""
    assert FILES[package].read_text(encoding="utf-8") == ""


def test_no_two_classes_share_a_name() -> None:
    """The name of a class, in a traceback or a debugger, identifies it."""
    modules: dict[str, list[str]] = {}
    for node, module in CLASSES:
        modules.setdefault(node.name, []).append(module)
    assert {name: found for name, found in modules.items() if len(found) > 1} == {}


def test_private_classes_are_small() -> None:
    """At most 16 attributes and 25 methods each."""
    large = {
        f"{module}.{node.name}"
        for node, module in CLASSES
        if node.name not in async_batcher.__all__
        and (len(attributes_of(node)) > MAX_ATTRIBUTES or len(methods_of(node)) > MAX_METHODS)
    }
    assert not large


def test_modules_are_short() -> None:
    """At most 350 lines each."""
    long = {name for name, lines in LINES.items() if lines > MAX_LINES_OF.get(name, MAX_LINES)}
    assert not long


def test_packages_have_few_files() -> None:
    """At most 15 modules each; more are a sub-package."""
    files = Counter(path.parent for path in FILES.values() if path.name != "__init__.py")
    large = {
        folder.relative_to(PACKAGE).as_posix()
        for folder, count in files.items()
        if count > MAX_FILES
    }
    assert not large


def test_the_limits_count_what_they_say() -> None:
    """Assignments to ``self`` in any method, slots, methods without overloads."""
    source = """
class Example:
    __slots__ = ("one", "two")
    def __init__(self):
        self.two, self.three = 1, 2
        self.four: int = 4
        other.five = self.six
    @overload
    def method(self): ...
    def method(self):
        self.seven += 1
    @property
    def value(self): ...
"""
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    assert attributes_of(node) == {"one", "two", "three", "four", "seven"}
    assert methods_of(node) == ["__init__", "method", "value"]


def test_the_map_in_the_docstring_names_every_package() -> None:
    """In at most 20 lines; the text above the map names the public ones."""
    text = async_batcher.__doc__ or ""
    listed = set(re.findall(r"(?m)^``([\w]+)``", text))
    public = set(re.findall(r"`async_batcher\.(\w+)`", text))
    packages = {
        module
        for module in FILES
        if module and "." not in module and FILES[module].name == "__init__.py"
    }
    assert packages <= listed | public
    assert listed | public <= set(FILES)
    assert len(listed) <= 20
