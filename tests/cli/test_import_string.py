"""Import strings: finding the user's function, and pickling it by name."""

from __future__ import annotations

import pickle
import sys
from typing import TYPE_CHECKING

import pytest

from async_batcher.cli._errors import CommandError
from async_batcher.cli._import_string import import_function

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to a temporary folder; forget the modules that a test imports from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


_MODULE = """
from async_batcher import AsyncBatcher, batched

def double(batch): return [2 * n for n in batch]
async def slow(batch): return batch
def two(a, b): return a
number = 5
class Batcher(AsyncBatcher):
    def setup_worker(self): self.is_set_up = True
    def process_batch(self, batch): return batch
    @staticmethod
    def plain(batch): return batch
ready = Batcher()
decorated = batched(double)
"""


def test_functions_that_are_found(folder: Path) -> None:
    """A function is found by module or file, in a class, or as the function of a batcher."""
    (folder / "found_here.py").write_text(_MODULE)
    module = import_function("found_here:double")
    assert (module.name, module.module, module.function([1]), module.setup) == (
        "found_here:double",
        "found_here",
        [2],
        None,
    )
    assert import_function("found_here:decorated").function([1]) == [2]
    assert import_function("found_here:Batcher.plain").function([1]) == [1]
    ready = import_function("found_here:ready")
    assert ready.setup is not None
    ready.setup()
    assert sys.modules["found_here"].ready.is_set_up
    (folder / "below").mkdir()
    (folder / "below" / "found_there.py").write_text(_MODULE)
    assert import_function("below/found_there.py:double").module == "found_there"
    assert sys.path[0] == str(folder / "below")


def test_a_function_crosses_by_name(folder: Path) -> None:
    """A function is pickled as its name, and a worker imports the module."""
    (folder / "by_name.py").write_text(_MODULE)
    target = import_function("by_name:double")
    data = pickle.dumps(target)
    assert b"by_name" in data
    assert pickle.loads(data) == target  # noqa: S301 - our own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "'wrong' does not name a function: write MODULE:FUNCTION or FILE.py:FUNCTION"),
        ("wrong.thing", "did you mean 'wrong:thing'?"),
        (":f", "does not name a function"),
        (
            "wrong_module_that_is_none:f",
            r"No module named 'wrong_module_that_is_none' \(tried: .*, then",
        ),
        ("json.nothing:f", "No module named 'json.nothing'"),
        (
            "broken:f",
            r"module 'broken' cannot be imported: ZeroDivisionError: .* \(.*broken.py, line 2\)",
        ),
        ("exits:f", "module 'exits' cannot be imported: SystemExit: no"),
        (
            "lacks:f",
            r"module 'lacks' cannot be imported: ModuleNotFoundError: No module named 'missing_one' \(.*lacks.py",
        ),
        ("syntax:f", "module 'syntax' cannot be imported: SyntaxError: "),
        ("there:doubel", "'there' has no 'doubel'; did you mean 'double'?"),
        ("there:double.more", "'there.double' has no 'more'"),
        ("there:number", "'there:number' is not a function but of type int"),
        ("there:slow", "is an async function"),
        ("there:two", r"takes \(a, b\); it must take one argument"),
        ("there:Batcher", "is a class; name an instance"),
        ("none.py:f", "there is no file 'none.py'"),
        ("./there:f", "the name of a module's file ends in '.py'"),
        ("json.py:f", "'json' is the name of another module"),
    ],
)
def test_functions_that_are_not_found(folder: Path, name: str, message: str) -> None:
    """One line says which module was tried and what is wrong."""
    (folder / "there.py").write_text(_MODULE)
    (folder / "there").touch()
    (folder / "broken.py").write_text("\n1 / 0\n")
    (folder / "exits.py").write_text("import sys; sys.exit('no')")
    (folder / "lacks.py").write_text("import missing_one")
    (folder / "syntax.py").write_text("def")
    (folder / "json.py").touch()
    with pytest.raises(CommandError, match=message) as caught:
        import_function(name)
    assert "\n" not in str(caught.value)
