"""Fixtures of the tests of serialization."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.support import worker_functions as work
from tests.support.modules import unimportable_module

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A pool of one worker for all tests of a module, which see what earlier batches left."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        executor.submit(time.sleep, 0).result(work.DEADLINE)
        yield executor


@pytest.fixture
def module(tmp_path: Path) -> Iterator[types.ModuleType]:
    """A module that no other process can import, with the text of a small program."""
    text = """
        model = None
        count = 0

        def bind(value):
            global model
            model = value

        def read():
            return model

        def bump():
            global count
            count += 1
            return count

        def countdown(n):
            return [n, *countdown(n - 1)] if n else []

        class Point:
            def __init__(self, x):
                self.x = x

            def with_model(self):
                return (self.x, model)
        """
    with unimportable_module(tmp_path, "tests_only_here", text) as loaded:
        yield loaded
