"""The command ``async-batcher map --each``: small batches at first."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import pytest

from async_batcher.cli.map.batch_size import BatchSize
from async_batcher.stats import BatchRecord
from tests.support.map_command import Running, finished, lines_of, numbers, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="pipes, signals and terminals of POSIX"
)


def _sizes(limit: int, seconds: Callable[[int], float]) -> list[int]:
    """Return the sizes of ten batches; ``seconds`` is how long a batch of a size takes."""
    size = BatchSize(limit)
    sizes = []
    for _ in range(10):
        sizes.append(size.value)
        run_time = seconds(size.value)
        size.update(BatchRecord(size.value, "full", 0.0, run_time, 0, None))
    return sizes


def test_batches_of_each_begin_small() -> None:
    """They grow to the limit if items are fast, and not beyond a quarter of a second."""
    assert _sizes(100, lambda _: 0.0) == [1, 2, 4, 8, 16, 32, 64, 100, 100, 100]
    assert _sizes(100, lambda size: 0.0001 + 1e-6 * size)[-1] == 100
    assert _sizes(100, lambda size: 0.03 * size) == [1, 2, 4, *[8] * 7]
    assert _sizes(100, lambda size: 5.0 * size) == [1] * 10
    assert _sizes(1, lambda _: 0.0) == [1] * 10


def test_batches_of_each_shrink_when_items_become_slow() -> None:
    """A slow batch makes the next one small; fast ones make it grow again."""
    size = BatchSize(64)
    for _ in range(6):
        size.update(BatchRecord(size.value, "full", 0.0, 0.0, 0, None))
    assert size.value == 64
    size.update(BatchRecord(64, "full", 0.0, 6.4, 0, None))
    assert size.value == 2
    size.update(BatchRecord(2, "full", 0.0, 0.001, 0, None))
    assert size.value == 4


@pytest.mark.slow
def test_batches_of_each_grow_in_a_run(work: Path) -> None:
    """The first batch of a run has one item, later ones have up to ``--max-batch-size``."""
    (work / "here.py").write_text(
        "import sys\ndef f(item):\n    return len(sys._getframe(1).f_locals['batch'])\n"
    )
    arguments = ["--each", "--max-batch-size", 8, "-o", "out"]
    assert run("here:f", numbers(work, 1000), *arguments) == (0, "", "")
    sizes = lines_of(work / "out")
    assert (sizes[0], max(sizes)) == (1, 8)


@pytest.mark.slow
def test_an_interrupted_run_of_slow_items_keeps_what_is_finished(work: Path) -> None:
    """With ``--each`` items are finished long before ``--max-batch-size`` of them would be."""
    (work / "here.py").write_text(
        "import time\nfrom work import begun\n"
        "def f(item):\n    begun(item)\n    time.sleep(0.3)\n    return item\n"
    )
    running = Running("here:f", numbers(work, 300), "-o", "out", "--each")
    running.items(12)
    assert running.end(signal.SIGINT)[0] == 130
    assert len(finished(work)) >= 4
