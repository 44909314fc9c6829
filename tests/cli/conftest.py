"""Fixtures for the tests of the command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.map_command import work_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(name="work")
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to a folder with the user's module of `tests.support.map_command`."""
    yield from work_folder(tmp_path, monkeypatch)
