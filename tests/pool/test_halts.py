"""Programs that are halted with all their processes: docker pause, Ctrl-Z."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.support import scripts
from tests.support import worker_functions as work

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

_WAITING = """
    import asyncio, os, time
    from pathlib import Path
    from async_batcher import batched
    from async_batcher.loops import run
    GO = Path("go")

    def wait(batch):
        os.write(1, b"begun\\n")
        while not GO.exists():
            time.sleep(0.01)
        return batch

    async def wait_on_loop(batch):
        os.write(1, b"begun\\n")
        while not GO.exists():
            await asyncio.sleep(0.01)
        return batch

    async def main():
        batchers = [
            batched(wait, executor="process", max_workers=1, batch_timeout=LIMIT),
            batched(wait, executor="thread", max_workers=1, batch_timeout=LIMIT),
            batched(wait_on_loop, batch_timeout=LIMIT),
        ]
        await batchers[0].start()
        print(await asyncio.gather(*(batcher(21) for batcher in batchers)))
        for batcher in batchers:
            await batcher.stop()

    run(main(), loop=LOOP)
"""


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_halted_program(tmp_path: Path, loop: str) -> None:
    """The time does not count for ``batch_timeout``, wherever the batch runs."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    text = _WAITING.replace("LIMIT", "4.0").replace("LOOP", repr(loop))
    with scripts.start(tmp_path, text) as program:
        try:
            assert program.stdout is not None
            assert [program.stdout.readline() for _ in range(3)] == ["begun\n"] * 3
            os.killpg(program.pid, signal.SIGSTOP)
            time.sleep(5.0)  # no event: nothing may happen
            os.killpg(program.pid, signal.SIGCONT)
            (tmp_path / "go").touch()
            output, errors = program.communicate(timeout=work.DEADLINE)
        finally:
            program.kill()
    assert (program.returncode, output, errors) == (0, "[21, 21, 21]\n", "")
