"""Code of the user's that writes to, or replaces, descriptors that are the pool's."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from async_batcher import WorkerPool, batched
from async_batcher._pool.pickled_function import PickledFunction
from async_batcher._pool.replies import ReplyReader
from async_batcher._pool.state.commands import Resolve
from async_batcher._pool.state.ledger import WorkerLedger
from async_batcher._pool.state.pool_state import PoolState
from async_batcher._pool.state.supervisor import PoolLimits
from async_batcher._pool.state.worker import Progress
from async_batcher._pool.work_item import WorkItem
from async_batcher._transport import framing
from async_batcher._transport.protocol import (
    CODEC_PICKLE,
    ENVELOPE,
    PICKLE,
    MessageKind,
    ReplyKind,
    encode_reply,
)
from async_batcher._transport.token_pipe import TokenReader
from async_batcher._worker.user_function import UserFunction
from async_batcher.exceptions import PoolBrokenError, WorkerDiedError
from tests.support import worker_functions as work
from tests.support.damage import damaged
from tests.support.polling import wait_until
from tests.support.worker_pools import METHODS, may_warn_of_fork, no_backoff, pids_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="no event loop there watches sockets"
)

LINE = b"2026-01-01 12:00:00 INFO a line of a log\n"


def write_to_channel(data: bytes) -> str:
    """Write something to the worker's channel."""
    work.own_channel().sendall(data)
    return "written"


def write_each_to_channel(batch: list[bytes]) -> list[str]:
    """Write each item to the worker's channel."""
    return list(map(write_to_channel, batch))


@may_warn_of_fork
@pytest.mark.parametrize(
    "method",
    [METHODS[0], *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS[1:])],
)
async def test_a_call_that_writes_to_the_channel(tmp_path: Path, method: str) -> None:
    """It fails with the reason, its worker is replaced, and other calls go on."""
    async with WorkerPool(2, mp_context=method) as pool, asyncio.timeout(work.DEADLINE):
        other = asyncio.ensure_future(pool.run(work.note_pid_and_wait, tmp_path, [1]))
        await wait_until(lambda: work.noted(tmp_path, "pid"))
        with pytest.raises(
            WorkerDiedError, match="a file descriptor that is not its own"
        ) as caught:
            await pool.run(write_to_channel, LINE)
        assert caught.value.may_have_run
        assert pool.worker_counts().crashed == {"unreadable channel": 1}
        assert await pool.run(abs, -1) == 1
        (tmp_path / "go").touch()
        assert await other == [1]


@pytest.mark.parametrize("data", [b"\0", LINE * 5000])
async def test_what_is_written_to_the_channel(data: bytes) -> None:
    """It does not matter what it is: the batch fails, and no caller hangs."""
    async with (
        WorkerPool(1) as pool,
        batched(write_each_to_channel, executor=pool) as batcher,
        asyncio.timeout(work.DEADLINE),
    ):
        with pytest.raises(WorkerDiedError):
            await batcher.process_many([data, b""])
        assert await batcher(b"") == "written"


async def test_an_idle_worker_that_writes_to_the_channel(tmp_path: Path) -> None:
    """It is replaced before it gets another call."""

    def write_later(folder: Path) -> int:
        def write() -> None:
            work.wait_for(folder / "go")
            write_to_channel(LINE)

        threading.Thread(target=write).start()
        return os.getpid()

    async with WorkerPool(1) as pool, asyncio.timeout(work.DEADLINE):
        pid = await pool.run(write_later, tmp_path)
        (tmp_path / "go").touch()
        await wait_until(lambda: pid not in pids_of(pool))
        assert await pool.run(abs, -1) == 1
        assert pool.worker_counts().crashed == {"unreadable channel": 1}


async def test_a_message_for_which_there_is_no_memory() -> None:
    """Its batch fails with that error, and the pool goes on."""

    def reply_with_much() -> None:
        fields = (MessageKind.REPLY, PICKLE, 1, 0, 0, False, bytes(16))
        header = framing._HEADER.pack(framing._MARK, 2**60, 0, 0, *fields)
        work.own_channel().sendall(header)

    async with WorkerPool(1) as pool, asyncio.timeout(work.DEADLINE):
        with pytest.raises(MemoryError, match="no memory for 1,152,921,504,606,846,976 bytes"):
            await pool.run(reply_with_much)
        assert await pool.run(abs, -1) == 1


@pytest.mark.usefixtures("long_graces")
async def test_a_worker_that_cannot_read_its_channel(capfd: pytest.CaptureFixture[str]) -> None:
    """It exits, and another one runs the call that it has not begun."""
    async with WorkerPool(1) as pool, asyncio.timeout(work.DEADLINE):
        assert await pool.run(abs, -1) == 1
        (handle,) = pool.dispatcher().workers()
        handle._channel.send([LINE * 3])
        assert await pool.run(abs, -2) == 2
        assert pool.worker_counts().crashed == {"exit code 70": 1}
    assert "FrameError: not a message of the pool: b'2026-01-01" in capfd.readouterr().err


@pytest.mark.usefixtures("long_graces")
async def test_another_file_in_the_place_of_the_token_pipe(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The worker exits, and the call that was sent ahead runs on another one."""

    def replace(folder: Path) -> int:
        (reader,) = (one for one in gc.get_objects() if isinstance(one, TokenReader))
        with open("/dev/zero", "rb") as file:  # noqa: PTH123 - pathlib is not needed otherwise
            os.dup2(file.fileno(), reader._fd)
        work.note(folder, "replaced")
        work.wait_for(folder / "go")
        return os.getpid()

    def call(folder: Path, name: str) -> int:
        return replace(folder) if name == "replace" else os.getpid()

    async with WorkerPool(1) as pool, asyncio.timeout(work.DEADLINE):
        pid = await pool.run(call, tmp_path, "")
        first = asyncio.ensure_future(pool.run(call, tmp_path, "replace"))
        await wait_until(lambda: work.noted(tmp_path, "replaced"))
        ahead = asyncio.ensure_future(pool.run(call, tmp_path, ""))
        (tmp_path / "go").touch()
        assert await first == pid
        assert await ahead != pid
    assert "ValueError: not a token of the pool" in capfd.readouterr().err


async def test_a_preloaded_module_that_writes_to_the_fork_server_s_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool fails with the reason; it does not wait until the start times out."""
    (tmp_path / "writes_elsewhere.py").write_text(
        "import gc, socket\n"
        "for one in gc.get_objects():\n"
        "    if isinstance(one, socket.socket):\n"
        "        one.sendall(b'a line of a log')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    no_backoff(monkeypatch)
    pool = WorkerPool(1, mp_context="forkserver", preload=["writes_elsewhere"])
    with pytest.raises(PoolBrokenError, match="a module of preload writes to a file descriptor"):
        async with asyncio.timeout(work.DEADLINE):
            await pool.start()
    await pool.stop()


# Replies that are no replies.

FUNCTION = PickledFunction(UserFunction(len, by_keyword=False, setup=None))


class Reader:
    """A `ReplyReader`, and a worker that runs a work item.

    Attributes:
        outcomes: What the callers got.
        item: The work item.
        state: The state of the pool.
    """

    def __init__(self, items: list[Any] | None) -> None:
        self.outcomes: list[Any] = []
        self.state = PoolState(PoolLimits(1), WorkerLedger())
        self.item = WorkItem(
            FUNCTION,
            items,
            on_outcome=self.outcomes.append,
        )
        self.state.started(0.0)
        (worker,) = self.state.supervisor.workers
        worker.pid = 1
        self.state.worker_events.ready(worker, 1.0)
        self.state.submitted(self.item, 2.0)
        driver: Any = SimpleNamespace(
            changes=SimpleNamespace(futures=[], notify=lambda: None),
            waker=None,
            carry_out=self._carry_out,
        )
        self._handle: Any = SimpleNamespace(worker=worker, progress=lambda _: Progress())
        self._reader = ReplyReader(driver, self.state)
        assert worker.trip is not None
        self._trip = worker.trip

    def read(self, form: int, body: bytes, buffers: list[Any]) -> None:
        """Read a reply."""
        are_bytes = False
        message = framing.Message(
            MessageKind.REPLY, form, self._trip.seq, 0, 0, are_bytes, bytes(16), (), body, buffers
        )
        self._reader.read(self._handle, self._trip, message)

    def _carry_out(self) -> None:
        commands = self.state.assignment.commands
        while commands:
            command = commands.popleft()
            if isinstance(command, Resolve):
                command.item.resolve(command.outcome)

    def check(self) -> None:
        """Check that the callers have an outcome, or the work item is sent again."""
        if not self.outcomes:
            trip = self._handle.worker.trip
            assert trip is not self._trip
            assert trip.item is self.item
            return
        (outcome,) = self.outcomes
        if isinstance(outcome, BaseException):
            assert str(outcome)
        else:
            assert len(outcome) == len(self.item._batch or [])
        assert self.item not in self.state.pending


KINDS = st.sampled_from([int(kind) for kind in ReplyKind] + [0, 99])
CONTENT = st.recursive(
    st.none() | st.integers(-2, 3) | st.binary(max_size=5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)
REPLIES = (
    CONTENT
    | st.tuples(KINDS)
    | st.tuples(KINDS, CONTENT)
    | st.tuples(KINDS, st.lists(st.tuples(KINDS, CONTENT)))
)
ITEMS = st.lists(st.integers(), min_size=1, max_size=3)


@given(ITEMS | st.none(), REPLIES)
@example([1], (int(ReplyKind.READY),))
@example([1], (int(ReplyKind.TORN_DOWN),))
@example(None, 5)
def test_a_reply_of_any_content(items: list[int] | None, reply: Any) -> None:
    """The callers get an error or results, one for each item."""
    reader = Reader(items)
    reader.read(ENVELOPE, pickle.dumps(reply), [])
    reader.check()


@given(ITEMS, st.sampled_from([PICKLE, CODEC_PICKLE, ENVELOPE, 77]), st.data())
def test_a_damaged_reply(items: list[int], form: int, data: st.DataObject) -> None:
    """The callers get an error, results, or the work item is sent again; nothing is raised."""
    results = pickle.dumps([[item, "x"] for item in items], 5)
    _, body, _ = encode_reply((ReplyKind.DONE_EACH, [(ReplyKind.DONE, (False, results, []))]))
    body = data.draw(damaged(results if form == PICKLE else body) | st.binary(max_size=50))
    # With these, pickle makes room for as many numbered objects as they say; up to 64 GB.
    body = body.translate(None, b"rp")
    reader = Reader(items)
    reader.read(form, body, [])
    reader.check()
