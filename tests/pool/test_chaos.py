"""Workers that are killed, halted and delayed under load: every call ends, with a true outcome."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import threading
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._transport import framing
from async_batcher._transport.protocol import MessageKind
from async_batcher.exceptions import BatchTimeoutError, WorkerDiedError
from tests.conftest import descendants
from tests.support import worker_functions as work
from tests.support.polling import wait_until
from tests.support.worker_pools import may_warn_of_fork

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

WORKERS = 3
TIMEOUT = 1.0  # seconds; longer than anything here takes by itself


class Chaos:
    """Sends signals to the workers of a pool; a seed decides when, to which one, and which."""

    def __init__(self, pool: WorkerPool, seed: int) -> None:
        self._pool = pool
        self._random = random.Random(seed)  # noqa: S311 - no secrets
        self._busy = True
        self.ended = 0  # calls
        self.killed: dict[int, set[int]] = {}  # by process id: the signals that it was sent
        self.stopped: set[int] = set()
        self.delayed: set[int] = set()  # which may take longer than meant on a busy machine

    async def run(self) -> None:
        """Send signals until `end` is called.

        What ends a worker waits for some calls to end, or a busy machine would do nothing else; but
        not for long, since a worker that was stopped while it loads the function is only helped by
        a kill.
        """
        loop = asyncio.get_running_loop()
        next_count, next_time = 0, 0.0
        while self._busy:
            await asyncio.sleep(self._random.choice([0, 0, 0.001, 0.003, 0.01]))
            pids = [
                worker.pid
                for worker in self._pool.workers()
                if worker.pid and worker.state in ("idle", "busy")
            ]
            if not pids:
                continue
            pid, what = (
                self._random.choice(pids),
                self._random.choice(["kill", "usr1", "segv", "stop", "term", "delay", "delay"]),
            )
            if what in ("kill", "usr1", "segv", "stop"):
                if self.ended < next_count and loop.time() < next_time:
                    continue
                next_count, next_time = self.ended + 4, loop.time() + 0.3
            if what == "stop":  # only a timeout helps
                self.stopped.add(pid)
                _send(pid, signal.SIGSTOP)
            elif what == "delay":
                self.delayed.add(pid)
                _send(pid, signal.SIGSTOP)
                await asyncio.sleep(self._random.choice([0, 0.002, 0.02]))
                if pid not in self.stopped:
                    _send(pid, signal.SIGCONT)
            elif what == "term":  # does nothing
                _send(pid, signal.SIGTERM)
            else:
                number = {"kill": signal.SIGKILL, "usr1": signal.SIGUSR1, "segv": signal.SIGSEGV}[
                    what
                ]
                self.killed.setdefault(pid, set()).add(number)
                _send(pid, number)

    def end(self) -> None:
        """Send no more signals."""
        self._busy = False


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_true(error: BaseException, chaos: Chaos) -> bool:
    """Tell whether what an error says has happened."""
    if type(error) is WorkerDiedError:
        return error.pid in chaos.killed and -(error.exit_code or 0) in chaos.killed[error.pid]
    return type(error) is BatchTimeoutError and any(
        str(pid) in str(error) for pid in chaos.stopped | chaos.delayed | set(chaos.killed)
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("seed", "calls"), [(1, 2000), (2, 2000)])
async def test_chaos_under_load(tmp_path: Path, seed: int, calls: int) -> None:
    """No call hangs, gets a wrong result or runs twice, even if workers are killed or halted."""
    file = tmp_path / "begun"
    file.touch()
    async with WorkerPool(WORKERS) as pool:
        batcher = batched(
            partial(work.noted_double, file),
            executor=pool,
            max_batch_size=2,
            max_queue_time=0.001,
            batch_timeout=TIMEOUT,
        )
        chaos = Chaos(pool, seed)
        trouble = asyncio.ensure_future(chaos.run())
        done = failed = 0
        lies: list[BaseException] = []
        unstarted: list[int] = []

        async def client(first: int) -> None:
            nonlocal done, failed
            for item in range(first, calls, 24):
                try:
                    result = await batcher(item)
                    chaos.ended += 1
                except (WorkerDiedError, BatchTimeoutError) as exc:
                    chaos.ended += 1
                    failed += 1
                    if isinstance(exc, WorkerDiedError) and not exc.may_have_run:
                        unstarted.append(item)
                    if not _is_true(exc, chaos):
                        lies.append(exc)
                else:
                    assert result == 2 * item
                    done += 1

        async with asyncio.timeout(200):
            await asyncio.gather(*(client(first) for first in range(24)))
            chaos.end()
            await trouble
            await batcher.stop()
        assert lies == []
        assert done + failed == calls
        assert chaos.killed
        victims = chaos.stopped | chaos.delayed | set(chaos.killed)
        assert failed <= 2 * len(victims), "a crash costs one batch"
        begun = Counter(map(int, file.read_text().split()))
        assert set(begun.values()) == {1}, "none runs twice"
        assert len(begun) > done, "some crash after they have begun"
        assert not begun.keys() & set(unstarted)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(sys.platform != "linux", reason="no way to count them")
@pytest.mark.parametrize(("method", "kills"), [("forkserver", 300), ("fork", 100)])
@may_warn_of_fork
async def test_many_crashes_leave_nothing(method: str, kills: int) -> None:
    """After hundreds of kills there are no more descriptors, threads and processes."""

    def counts() -> tuple[int, int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(descendants())  # noqa: PTH208 - of this process

    def has_been_noticed(pool: WorkerPool, pid: int) -> Callable[[], bool]:
        return lambda: pid not in [worker.pid for worker in pool.workers()]

    def are_idle(pool: WorkerPool) -> Callable[[], bool]:
        return lambda: [worker.state for worker in pool.workers()] == ["idle"] * 2

    async with WorkerPool(2, mp_context=method) as pool:
        assert await pool.run(len, bytes(200_000)) == 200_000
        before = None
        for number in range(kills):
            pid = await pool.run(os.getpid) if number % 2 else pool.workers()[0].pid
            assert pid is not None
            if number % 3:
                os.kill(pid, signal.SIGKILL)
                await wait_until(has_been_noticed(pool, pid))
            else:
                with pytest.raises(WorkerDiedError):
                    await pool.run(work.exit_now, 7)
            await wait_until(are_idle(pool))
            if number == 10:
                before = counts()
        assert before is not None
        await wait_until(
            lambda: all(now <= then for now, then in zip(counts(), before, strict=True))
        )


@pytest.mark.slow
async def test_a_crash_in_the_middle_of_a_reply(tmp_path: Path) -> None:
    """The batch fails as in any crash, and no caller hangs."""

    def half_way(folder: Path) -> bytes:
        (folder / "pid").write_text(str(os.getpid()))
        frame = framing.encode(MessageKind.REPLY, seq=1, body=bytes(60_000))[0]
        work.own_channel().sendall(frame[: len(frame) // 2])
        os._exit(6)

    async with WorkerPool(2) as pool, asyncio.timeout(work.DEADLINE):
        other = asyncio.ensure_future(pool.run(sum, range(1000)))
        with pytest.raises(WorkerDiedError) as caught:
            await pool.run(half_way, tmp_path)
        assert caught.value.pid == int((tmp_path / "pid").read_text())
        assert caught.value.exit_code == 6
        assert await other == 499_500
        assert await pool.run(abs, -1) == 1
