"""Count the calls that one item makes: ``python -m benchmarks.harness.hops [--src PATH | A B]``.

The item is alone in its batch, in steady state, with ``executor="process"``. Calls of functions of
the package are counted with `sys.setprofile` in the program and in its worker, from Python 3.12 on
in all of their threads. When a coroutine is resumed, that counts as a call. The numbers vary by
less than one percent from run to run and from machine to machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.harness.checkouts import CheckoutError, check_source, checked_out, run_against
from benchmarks.harness.machine import ROOT

if TYPE_CHECKING:
    from types import CodeType, FrameType

WARM_UP_ITEMS = 300
COUNTED_ITEMS = 200
START, STOP = -1, -2  # items that make the worker start and stop counting


class Hops(NamedTuple):
    """Calls for each item."""

    parent: float
    worker: float

    @property
    def total(self) -> float:
        """Calls in the program and in its worker."""
        return self.parent + self.worker


class CallCounter:
    """Counts calls of functions whose source is below a folder.

    Args:
        folder: The folder of the package.
    """

    def __init__(self, folder: str) -> None:
        self.counts: Counter[CodeType] = Counter()
        self._folder = folder

    def start(self) -> None:
        """Count from now on."""
        self._set(self._on_event)

    def stop(self) -> None:
        """Count no more."""
        self._set(None)

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(self._folder):
            self.counts[frame.f_code] += 1

    def _set(self, function: Any) -> None:
        if sys.version_info >= (3, 12):
            threading.setprofile_all_threads(function)
        else:
            sys.setprofile(function)


_counters: list[CallCounter] = []


def process_batch(batch: list[int]) -> list[Any]:
    """Return the items. `START` and `STOP` control the counter of the worker."""
    (item,) = batch
    if item == START:
        _counters.append(CallCounter(_package_folder()))
        _counters[0].start()
    elif item == STOP:
        _counters[0].stop()
        return [_counters.pop().counts.total()]
    return batch


def _package_folder() -> str:
    import async_batcher

    return str(Path(async_batcher.__file__).parent)


async def count() -> Hops:
    """Count in this process and in its worker."""
    from async_batcher import batched

    batcher: Any = batched(
        process_batch, executor="process", max_workers=1, max_batch_size=1, max_queue_time=0
    )
    counter = CallCounter(_package_folder())
    async with batcher:
        for item in range(WARM_UP_ITEMS):
            assert await batcher.process(item) == item
        counter.start()
        for item in range(COUNTED_ITEMS):
            assert await batcher.process(item) == item
        counter.stop()
        await batcher.process(START)
        for item in range(COUNTED_ITEMS):
            assert await batcher.process(item) == item
        # The second half of START and the first half of STOP make up one more item.
        in_worker = await batcher.process(STOP)
    return Hops(counter.counts.total() / COUNTED_ITEMS, in_worker / (COUNTED_ITEMS + 1))


def count_against(source: Path) -> Hops:
    """Count in a new process that imports the package from ``source``."""
    # The worker imports the batch function by name, so it must not be of the main module.
    program = "from benchmarks.harness import hops; hops.print_count()"
    return Hops(*json.loads(run_against(source, "-c", program)))


def print_count() -> None:
    """Count in this process, and print the result for `count_against`."""
    check_source()
    print(json.dumps(asyncio.run(count())))


def main(arguments: list[str] | None = None) -> int:
    """Count and print.

    Returns:
        The exit status: 0, or 2 if a revision does not exist.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness.hops",
        description="Count the calls that one item makes, alone in its batch.",
    )
    parser.add_argument("revisions", nargs="*", help="two commits; . is the working tree")
    parser.add_argument("--src", type=Path, default=ROOT / "src", help="a folder with the package")
    given = parser.parse_args(arguments)
    if len(given.revisions) not in (0, 2):
        parser.error("give two revisions, or none")
    if not given.revisions:
        _print(str(given.src), count_against(given.src.resolve()))
        return 0
    try:
        with checked_out(given.revisions) as sources:
            found = [count_against(source) for source in sources]
    except CheckoutError as exc:
        print(exc, file=sys.stderr)
        return 2
    for revision, hops_found in zip(given.revisions, found, strict=True):
        _print(revision, hops_found)
    before, after = found
    print(f"ratio: {after.total / before.total:.2f}")
    return 0


def _print(name: str, hops: Hops) -> None:
    parent, worker, total = hops.parent, hops.worker, hops.total
    print(f"{name}: parent {parent:.1f}, worker {worker:.1f}, total {total:.1f} calls per item")


if __name__ == "__main__":
    sys.exit(main())
