"""Modules that exist in this process only."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def unimportable_module(folder: Path, name: str, text: str) -> Iterator[types.ModuleType]:
    """Load a module from a file that is not on the path, and remove it again."""
    file = folder / "source.py"
    file.write_text(textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]
