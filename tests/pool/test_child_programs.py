"""Programs that a batch has started, when the batch is ended, or its worker crashes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from async_batcher import WorkerPool, batched
from async_batcher.exceptions import WorkerDiedError
from tests.support import child_programs as programs
from tests.support import scripts
from tests.support.polling import wait_for_exit, wait_until
from tests.support.worker_pools import pids_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no event loop there watches sockets"),
    pytest.mark.slow,
]

_needs_setpriv = pytest.mark.skipif(shutil.which("setpriv") is None, reason="of util-linux")


async def _end(function: Callable[[Path], None], folder: Path) -> int:
    """End a batch when its program runs; return the program's process id when the worker is gone.

    Its caller is cancelled, which is the same to a batch as a time limit, and needs no clock.
    """

    def process_batch(batch: list[Path]) -> list[None]:
        function(batch[0])
        return [None]

    async with WorkerPool(1) as pool:
        batcher = batched(process_batch, executor=pool, cancel_abandoned=True)
        call = asyncio.ensure_future(batcher(folder))
        await wait_until((folder / "pid").exists)
        workers = pids_of(pool)
        call.cancel()
        await wait_for_exit(workers)
        await batcher.stop()
    return int((folder / "pid").read_text())


@pytest.mark.parametrize("function", [programs.run, programs.run_captured, programs.kill_group])
@pytest.mark.usefixtures("long_graces")
async def test_programs_that_end(function: Callable[[Path], None], tmp_path: Path) -> None:
    """`subprocess.run` ends its program, and a ``finally`` block can end a process group."""
    await wait_for_exit([await _end(function, tmp_path)])


@pytest.mark.parametrize("function", [programs.system, programs.popen, programs.run_in_shell])
async def test_programs_that_run_on(function: Callable[[Path], None], tmp_path: Path) -> None:
    """What C code waits for, what nothing kills, and what a shell runs."""
    pid = await _end(function, tmp_path)
    try:
        assert scripts.is_alive(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    await wait_for_exit([pid])


@_needs_setpriv
async def test_a_death_signal(tmp_path: Path) -> None:
    """It ends the program of a worker that crashes."""
    async with WorkerPool(1) as pool:
        with pytest.raises(WorkerDiedError, match="SIGKILL"):
            await pool.run(programs.crash, tmp_path)
    await wait_for_exit([int((tmp_path / "pid").read_text())])
