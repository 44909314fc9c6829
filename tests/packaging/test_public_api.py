"""What is public: the names, what they cost until they are used, and the errors."""

from __future__ import annotations

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
from tests.support import scripts

PACKAGE = Path(async_batcher.__file__).parent
MODULES = sorted(
    module.name.removeprefix("async_batcher.")
    for module in pkgutil.walk_packages([str(PACKAGE)], "async_batcher.")
)


def test_batched_has_few_options() -> None:
    """What a wrapper around the batch function can do is a recipe of the README, not an option."""
    options = inspect.signature(async_batcher.batched).parameters
    assert len(options.keys() - {"function"}) <= 17


@pytest.mark.parametrize("module", ["", *MODULES])
def test_all_lists_what_is_public(module: str) -> None:
    """A public module's ``__all__`` has all that it defines without an underscore."""
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
        if not name.startswith("_") and not name.isupper()
        and getattr(value, "__module__", None) == loaded.__name__
        and (inspect.isclass(value) or inspect.isfunction(value))
    }  # fmt: skip
    private = any(part.startswith("_") for part in module.split("."))
    if listed is None:
        assert private or module.partition(".")[0] in ("integrations", "loops", "cli"), (
            f"{module} is public and has no __all__"
        )
        return
    if not private:
        # A helper that other modules of the package share is public to them, not to users.
        assert set(listed) <= defined
        assert all(
            name in listed or not _is_documented_as_public(loaded.__name__, name)
            for name in defined
        )


def _is_documented_as_public(module: str, name: str) -> bool:
    return name in async_batcher.__all__ or module.endswith((".exceptions", ".batcher", ".stats"))


def _loaded_by(statement: str) -> set[str]:
    before = "import sys; before = set(sys.modules)"
    program = f"{before}; {statement}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", program],
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
def test_importing_loads_no_heavy_module(module: str) -> None:
    """What only some programs use is imported on first use."""
    with_asyncio = _loaded_by("import asyncio")  # what it brings along is not ours
    assert not (_loaded_by(f"import async_batcher.{module}") - with_asyncio) & HEAVY


@pytest.mark.slow
def test_importing_the_package_loads_no_asyncio() -> None:
    """Its names are resolved lazily, so that a worker can import modules without asyncio."""
    assert not _loaded_by("import async_batcher") & {"asyncio", "concurrent.futures", *HEAVY}
    loaded = _loaded_by("import async_batcher._worker.run_batch")
    needed = {"cloudpickle"}
    assert (
        not loaded
        & {"asyncio", "async_batcher.batcher", "async_batcher._runners", "socket", "ssl", *HEAVY}
        - needed
    )


def test_the_package_resolves_its_names() -> None:
    """All names in ``__all__``, and no others."""
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
    """With message, attributes and notes; all are subclasses of AsyncBatchException."""
    cls = getattr(exceptions, name)
    attributes = _KNOWN.get(name, {})
    error = cls("what happened", **attributes)
    error.add_note("a note")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301
        for twin in (pickled, copy.copy(error), copy.deepcopy(error)):
            assert type(twin) is cls
            assert twin.args == ("what happened",)
            assert str(twin) == "what happened"
            assert {key: getattr(twin, key) for key in attributes} == attributes
            assert twin.__notes__ == ["a note"]
    assert issubclass(cls, exceptions.AsyncBatchException)


def test_the_tree_of_errors_is_drawn_in_full() -> None:
    """The drawing in the module docstring has every class, with its builtin base."""
    assert exceptions.__doc__ is not None
    for name in exceptions.__all__:
        (line,) = re.findall(rf"^.*\b{name}\b.*$", exceptions.__doc__, flags=re.MULTILINE)
        also = re.findall(r"\(also (\w+)\)", line)
        bases = [
            base.__name__
            for base in getattr(exceptions, name).__bases__
            if base.__module__ == "builtins"
        ]
        assert also == [base for base in bases if base != "Exception"], line
