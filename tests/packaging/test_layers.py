"""The layers of the package: a package imports only from packages below it, and a worker imports no asyncio."""

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
    {"exceptions", "stats", "loops"},
    {"_eventloop"},
    {"_serialization"},
    {"_transport"},
    {"_worker"},
    {"_pool"},
    {"_runners"},
    {"_batching"},
    {"batcher"},
    {"decorator"},
    {"integrations"},
    {"cli", "__main__"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}

# Imports of optional parts that are above: each is made inside a function, when an option asks for it.
OPTIONAL = {
    ("_batching.lifecycle", "integrations.opentelemetry"),
    ("batcher", "integrations.opentelemetry"),
}

# What a worker imports; asyncio would take it longer than all the rest.
WORKER_SIDE = ("_worker", "_serialization", "_transport.framing", "_transport.shared_memory", "_transport.status_page")


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> int:
    """The number of a module's layer."""
    return LAYER_OF[module.partition(".")[0]]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports(module: str) -> set[str]:
    """The dotted names that a module imports, also inside functions, but not for type checkers."""
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
    """The modules of the package among imported names."""
    own = {name.removeprefix("async_batcher.") for name in names if name.startswith("async_batcher.")}
    return {name if name in FILES else name.rpartition(".")[0] for name in own}


# Read before any test runs: CPython 3.11 may fail to parse while it collects what a test has left.
IMPORTS = {module: _imports(module) for module in FILES if module}
CLASSES = [
    (node.name, module)
    for module in FILES
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8")))
    if isinstance(node, ast.ClassDef)
]


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_a_module_imports_from_its_own_layer_or_from_below(module: str) -> None:
    """Anywhere but for type checkers; optional parts are imported when an option asks for them."""
    for other in _own(IMPORTS[module]):
        if not other:
            assert layer(module) == len(LAYERS) - 1, "only the command imports the package itself, whose names are lazy"
        elif (module, other) not in OPTIONAL:
            assert layer(other) <= layer(module), f"{module} imports {other}, which is above it"


def test_modules_do_not_import_each_other_in_circles() -> None:
    """One can be read after the other, inside a package too."""
    graph = {module: {other for other in _own(names) if (module, other) not in OPTIONAL} for module, names in IMPORTS.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as exc:
        pytest.fail(f"a circle: {' -> '.join(exc.args[1])}")


@pytest.mark.parametrize("module", [module for module in IMPORTS if module.startswith(WORKER_SIDE)])
def test_the_worker_side_imports_no_asyncio(module: str) -> None:
    """Nor anything of the package that does."""
    assert not [name for name in IMPORTS[module] if name.partition(".")[0] == "asyncio"]
    assert all(other.startswith((*WORKER_SIDE, "exceptions")) for other in _own(IMPORTS[module]))


@pytest.mark.slow
def test_a_worker_loads_no_asyncio() -> None:
    """The module that a worker process runs, and the one of the fork server, load what a batch needs and no more."""
    program = "import sys, async_batcher._worker.main, async_batcher._worker.fork_server; print(*sys.modules)"
    done = subprocess.run(  # noqa: S603 - of ours
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=scripts.environment()
    )
    loaded = set(done.stdout.split())
    assert "async_batcher._worker.run_batch" in loaded
    assert not loaded & {"asyncio", "ssl", "uvloop", "multiprocessing", "concurrent.futures.process", "numpy"}
    assert not {name for name in loaded if name.startswith(("async_batcher._pool", "async_batcher._batching"))}


@pytest.mark.parametrize(
    "package", sorted(module for module in FILES if FILES[module].name == "__init__.py" and module[:1] == "_")
)
def test_private_packages_import_nothing_themselves(package: str) -> None:
    """A worker that imports one module of a package imports no other."""
    assert FILES[package].read_text(encoding="utf-8") == ""


def test_no_two_classes_share_a_name() -> None:
    """A name in a traceback, or in a debugger, says which one it is."""
    names = Counter(name for name, _ in CLASSES)
    assert {name: [module for other, module in CLASSES if other == name] for name, count in names.items() if count > 1} == {}


def test_the_map_in_the_docstring_names_every_package() -> None:
    """And it is short enough to be read."""
    text = async_batcher.__doc__ or ""
    listed = re.findall(r"(?m)^``([\w]+)``", text)
    packages = {module for module in FILES if module and "." not in module and FILES[module].name == "__init__.py"}
    assert packages <= set(listed)
    assert set(listed) <= set(FILES)
    assert len(re.findall(r"(?m)^``", text)) <= 20
