"""The map in the package's docstring holds: who imports whom, what is public, what costs nothing until it is used."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import async_batcher
from async_batcher import exceptions
from tests import scripts

PACKAGE = Path(async_batcher.__file__).parent
MODULES = sorted(module.name.removeprefix("async_batcher.") for module in pkgutil.walk_packages([str(PACKAGE)], "async_batcher."))


def rows() -> list[str]:
    """The modules of the table, from the top down; one that is only named in the text of a line comes right after it."""
    lines = re.findall(r"^``.*$", async_batcher.__doc__ or "", flags=re.MULTILINE)
    named = ["__main__", *(name for line in lines for name in re.findall(r"``([\w.]+)``", line) if name in MODULES)]
    return list(dict.fromkeys(named))


def row_of(module: str) -> int:
    """How far down a module is; what is inside a package of the table is in its row."""
    names = rows()
    return names.index(module if module in names else module.partition(".")[0])


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(module: str) -> set[str]:
    """The modules of this package that a module imports, anywhere but for type checkers."""
    found = set()
    waiting: list[ast.AST] = [ast.parse(_file(module).read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "async_batcher":
            assert node.module is not None
            base = node.module.removeprefix("async_batcher").removeprefix(".")
            for alias in node.names:
                inside = f"{base}.{alias.name}".removeprefix(".")
                found.add(inside if inside in MODULES else base)
        elif isinstance(node, ast.Import):
            found.update(
                alias.name.removeprefix("async_batcher.") for alias in node.names if alias.name.startswith("async_batcher")
            )
        waiting.extend(
            child for child in ast.iter_child_nodes(node) if not (isinstance(child, ast.If) and _is_type_checking(child))
        )
    return found


# Before any test runs: CPython 3.11 may fail to parse while it collects what a test has left, if that prints a traceback.
IMPORTED = {module: imported(module) for module in MODULES}


def test_every_module_is_in_the_table() -> None:
    """Each module, or the package that it is in, has a line or is named in one."""
    assert {module.partition(".")[0] for module in MODULES} <= set(rows())
    listed = re.findall(r"^``([\w.]+)``", async_batcher.__doc__ or "", flags=re.MULTILINE)
    assert set(listed) <= set(MODULES)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_from_below(module: str) -> None:
    """A module imports only from rows below its own, or, inside a package, from its siblings."""
    package = module.partition(".")[0]
    for other in IMPORTED[module]:
        assert other, "not from the package itself, whose names are resolved lazily"
        if other.partition(".")[0] != package:
            assert row_of(other) > row_of(module), f"{module} imports {other}, which is above it"


@pytest.mark.parametrize("package", [module for module in MODULES if any(m.startswith(f"{module}.") for m in MODULES)])
def test_siblings_do_not_import_each_other_in_circles(package: str) -> None:
    """Inside a package, too, one can be read after the other."""
    waiting = {module: IMPORTED[module] for module in MODULES if module.startswith(f"{package}.")}
    while waiting:
        free = [module for module, others in waiting.items() if not others & set(waiting)]
        assert free, f"a circle among {sorted(waiting)}"
        for module in free:
            del waiting[module]


@pytest.mark.parametrize("module", ["", *MODULES])
def test_all_lists_what_is_public(module: str) -> None:
    """A public module's ``__all__`` is what it defines without an underscore; a private one has none, or the same."""
    if module == "__main__":
        pytest.skip("runs the command")
    try:
        loaded = importlib.import_module(f"async_batcher.{module}".removesuffix("."))
    except ImportError as exc:
        if "pip install 'async-batcher[" not in str(exc):  # of an extra that is not installed
            raise
        pytest.skip(str(exc))
    listed = getattr(loaded, "__all__", None)
    if module == "":
        assert listed is not None
        assert listed == sorted(listed)
        assert {name for name in dir(loaded) if name in listed} == set(listed)
        assert all(getattr(loaded, name) is not None for name in listed)
        return
    defined = {
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == loaded.__name__ and not name.isupper()
        and (inspect.isclass(value) or inspect.isfunction(value))
    }  # fmt: skip
    private = any(part.startswith("_") for part in module.split("."))
    if listed is None:
        assert private or module in ("runners", "pool", "loops", "cli"), f"{module} is public and has no __all__"
        return
    if not private:
        # A helper that other modules of the package share is public to them, not to users.
        assert set(listed) <= defined
        assert all(name in listed or not _is_documented_as_public(loaded.__name__, name) for name in defined)


def _is_documented_as_public(module: str, name: str) -> bool:
    return name in async_batcher.__all__ or module.endswith((".exceptions", ".batcher", ".stats"))


def _loaded_by(statement: str) -> set[str]:
    done = subprocess.run(  # noqa: S603 - of ours
        [sys.executable, "-c", f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"],
        capture_output=True, text=True, check=True, env=scripts.environment(),
    )  # fmt: skip
    return set(done.stdout.split())


HEAVY = {
    "uvloop",
    "cloudpickle",
    "multiprocessing",
    "concurrent.futures.process",
    "concurrent.futures.thread",
    "concurrent.futures.interpreter",
    "numpy",
}


@pytest.mark.slow
@pytest.mark.parametrize("module", ["batcher", "loops", "exceptions"])
def test_importing_is_cheap(module: str) -> None:
    """What only some programs use is imported when it is used."""
    with_asyncio = _loaded_by("import asyncio")  # what it brings along is not ours
    assert not (_loaded_by(f"import async_batcher.{module}") - with_asyncio) & HEAVY


@pytest.mark.slow
def test_the_package_alone_loads_next_to_nothing() -> None:
    """Its names are resolved lazily, so that a worker can import what is below without asyncio."""
    assert not _loaded_by("import async_batcher") & {"asyncio", "concurrent.futures", *HEAVY}
    loaded = _loaded_by("import async_batcher._worker.run_batch")
    needed = {"cloudpickle"}
    assert not loaded & {"asyncio", "async_batcher.batcher", "async_batcher._runners.base", "socket", "ssl", *HEAVY} - needed


def test_the_package_resolves_its_names() -> None:
    """Each, once asked for; no others."""
    for name in async_batcher.__all__:
        assert name in dir(async_batcher)
        assert getattr(async_batcher, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        async_batcher.nonsense  # noqa: B018


_KNOWN: dict[str, dict[str, Any]] = {
    "BatchError": {"original_type": "builtins.SystemExit"},
    "WorkerDiedError": {"pid": 7, "exit_code": -9, "may_have_run": False},
}


@pytest.mark.parametrize("name", exceptions.__all__)
def test_errors_can_be_pickled_and_copied(name: str) -> None:
    """With their message and what they know; and they are all of one tree."""
    cls = getattr(exceptions, name)
    attributes = _KNOWN.get(name, {})
    error = cls("what happened", **attributes)
    error.add_note("a note")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for twin in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301
            assert type(twin) is cls
            assert twin.args == ("what happened",)
            assert str(twin) == "what happened"
            assert {key: getattr(twin, key) for key in attributes} == attributes
            assert twin.__notes__ == ["a note"]
    assert issubclass(cls, exceptions.AsyncBatchException)


def test_the_tree_of_errors_is_drawn_in_full() -> None:
    """The drawing at the top of the module names every class, and those that it also is."""
    assert exceptions.__doc__ is not None
    for name in exceptions.__all__:
        (line,) = re.findall(rf"^.*\b{name}\b.*$", exceptions.__doc__, flags=re.MULTILINE)
        also = re.findall(r"\(also (\w+)\)", line)
        bases = [base.__name__ for base in getattr(exceptions, name).__bases__ if base.__module__ == "builtins"]
        assert also == [base for base in bases if base != "Exception"], line
