"""`Lifecycle` and `Session`, with sessions that record what they are asked to do."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher._eventloop.lifecycle import Lifecycle, Session
from async_batcher.exceptions import BatcherStoppedError
from tests.support.polling import turn

if TYPE_CHECKING:
    from collections.abc import Callable

variable = contextvars.ContextVar[str]("variable", default="unset")


class RecordingSession(Session):
    """A session on the running loop that drains and ends when the test says so."""

    noun = "thing"

    def __init__(self) -> None:
        context = contextvars.copy_context()
        context.run(variable.set, "owner's context")
        super().__init__(asyncio.get_running_loop(), context)
        self.may_drain = asyncio.Event()
        self.may_end = asyncio.Event()
        self.events: list[str] = []

    async def drain(self) -> None:
        """Wait for the test, or for `fail_all`."""
        self.events.append("drain")
        await self.may_drain.wait()

    def fail_all(self) -> None:
        """End the drain."""
        self.events.append("fail")
        self.may_drain.set()

    async def end(self) -> None:
        """Wait for the test."""
        self.events.append("end by force" if self.forced else "end")
        await self.may_end.wait()
        self.events.append(f"ended, {variable.get()}")

    def close_without_loop(self) -> None:
        """Note it."""
        self.events.append("closed without loop")

    def close_now(self) -> None:
        """Note it."""
        self.events.append("closed now")


def make_lifecycle(
    close_orphan: Callable[[RecordingSession], None] | None = None,
) -> Lifecycle[RecordingSession]:
    """Return a lifecycle that has not begun."""
    return Lifecycle("thing", close_orphan)


async def started() -> tuple[Lifecycle[RecordingSession], RecordingSession]:
    """Return a lifecycle and its session."""
    lifecycle = make_lifecycle()
    return lifecycle, lifecycle.get(RecordingSession)


def stop(lifecycle: Lifecycle[Any], **options: Any) -> asyncio.Task[None]:
    """Stop in a task."""
    return asyncio.create_task(lifecycle.stop(**{"force": False, "timeout": None, **options}))


async def test_the_first_use_makes_a_session_and_later_ones_share_it() -> None:
    """The state says so, until it is stopped; a start allows another session."""
    lifecycle = make_lifecycle()
    states = [(lifecycle.state, lifecycle.is_running)]
    session = lifecycle.get(RecordingSession)
    states.append((lifecycle.state, lifecycle.is_running))
    assert lifecycle.get(RecordingSession) is session
    stopping = stop(lifecycle)
    await turn(1)
    states.append((lifecycle.state, lifecycle.is_running))
    session.may_drain.set()
    session.may_end.set()
    await stopping
    states.append((lifecycle.state, lifecycle.is_running))
    assert states == [
        ("not started", False), ("running", True), ("stopping", False), ("stopped", False),
    ]  # fmt: skip
    with pytest.raises(BatcherStoppedError, match=r"thing has been stopped; start\(\) reopens"):
        lifecycle.get(RecordingSession)
    lifecycle.is_stopped = False
    assert lifecycle.get(RecordingSession) is not session
    assert session.events == ["drain", "end", "ended, owner's context"]


async def test_a_session_that_cannot_be_made() -> None:
    """The next use tries again."""
    lifecycle = make_lifecycle()
    with pytest.raises(ZeroDivisionError):
        lifecycle.get(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert lifecycle.state == "not started"
    assert lifecycle.get(RecordingSession) is lifecycle.session


def test_another_loop_is_refused_until_the_first_has_closed() -> None:
    """Then the session is closed without its loop, and the next one is on the new loop."""
    lifecycle = make_lifecycle()

    async def use() -> RecordingSession:
        return lifecycle.get(RecordingSession)

    with asyncio.Runner() as second:
        with asyncio.Runner() as first:
            session = first.run(use())
            for call in (use(), lifecycle.stop(force=True, timeout=None)):
                with pytest.raises(RuntimeError, match="this thing runs on another event loop"):
                    second.run(call)
            assert first.run(use()) is session
            assert session.events == []
        assert not lifecycle.is_running
        other = second.run(use())
        assert other is not session
        assert session.events == ["closed without loop"]
    assert other.events == []


def test_a_stop_after_the_loop_has_closed() -> None:
    """It closes the session without its loop, and the owner stays stopped."""
    lifecycle, session = asyncio.run(started())
    asyncio.run(lifecycle.stop(force=False, timeout=None))
    assert session.events == ["closed without loop"]
    assert lifecycle.state == "stopped"


def test_a_forked_child_cannot_use_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets an error while the loop is open, and leaves the parent's session alone after."""
    lifecycle = make_lifecycle()

    async def use() -> RecordingSession:
        return lifecycle.get(RecordingSession)

    parent = os.getpid()
    with asyncio.Runner() as inherited:
        session = inherited.run(use())
        monkeypatch.setattr(os, "getpid", lambda: parent + 1)
        in_child = lifecycle.is_running
        with pytest.raises(RuntimeError, match=r"before os.fork\(\); make a new thing"):
            asyncio.run(use())
        monkeypatch.undo()
        assert (lifecycle.is_running, in_child) == (True, False)
        monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    assert asyncio.run(use()) is not session
    assert session.events == []


async def test_a_stop_that_exceeds_its_timeout_is_forced() -> None:
    """The end is awaited before the error is raised."""
    lifecycle, session = await started()
    stopping = stop(lifecycle, timeout=0.0)
    while "end by force" not in session.events:
        await turn(1)
    assert not stopping.done()
    session.may_end.set()
    with pytest.raises(TimeoutError, match=r"the thing did not stop within 0\.0 seconds"):
        await stopping
    assert session.events == ["drain", "fail", "end by force", "ended, owner's context"]
    assert lifecycle.state == "stopped"


async def test_a_forced_stop_does_not_drain() -> None:
    """It fails all work, and ends."""
    lifecycle, session = await started()
    session.may_end.set()
    await stop(lifecycle, force=True)
    assert session.events == ["fail", "end by force", "ended, owner's context"]


@pytest.mark.parametrize("stage", ["drain", "end"])
async def test_a_cancelled_stop_is_forced_and_returns_after_the_end(stage: str) -> None:
    """However often it is cancelled."""
    lifecycle, session = await started()
    stopping = stop(lifecycle)
    await turn(1)
    if stage == "end":
        session.may_drain.set()
        await turn(3)
    assert session.events[-1] == stage
    for _ in range(3):
        stopping.cancel()
        await turn(2)
        assert not stopping.done()
    session.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert session.events[-1] == "ended, owner's context"
    assert session.forced
    assert lifecycle.state == "stopped"


@pytest.mark.parametrize("stop_first", [False, True])
async def test_an_end_that_the_loop_cancels_with_its_stop_is_begun_again(stop_first: bool) -> None:
    """As `asyncio.run` does when the program ends: it cancels all tasks, in any order."""
    lifecycle, session = await started()
    stopping = stop(lifecycle)
    session.may_drain.set()
    while "end" not in session.events:
        await turn(1)
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in sorted(tasks, key=lambda task: task is stopping, reverse=stop_first):
        task.cancel()
    await turn(5)
    assert session.events[-1] == "end by force"
    session.may_end.set()
    await asyncio.wait([stopping])
    assert stopping.cancelled()
    assert session.events[-1] == "ended, owner's context"


async def test_stops_share_one_end() -> None:
    """A later one forces the first, which returns without an error."""
    lifecycle, session = await started()
    stops = [stop(lifecycle), stop(lifecycle), stop(lifecycle, force=True)]
    session.may_end.set()
    await asyncio.gather(*stops)
    assert [event for event in session.events if event.startswith("end")] == [
        "end by force", "ended, owner's context",
    ]  # fmt: skip


async def test_a_start_while_a_stop_drains() -> None:
    """The end of the stop leaves the new session running."""
    lifecycle, session = await started()
    stopping = stop(lifecycle)
    await turn(1)
    lifecycle.is_stopped = False
    other = lifecycle.get(RecordingSession)
    assert other is not session
    session.may_drain.set()
    session.may_end.set()
    await stopping
    assert lifecycle.session is other
    assert lifecycle.is_running
    assert other.events == []


async def test_the_session_of_a_lost_owner_is_closed_on_its_loop() -> None:
    """Not one that a stop has ended."""
    lifecycle = make_lifecycle(RecordingSession.close_now)
    sessions = [lifecycle.get(RecordingSession)]
    sessions[0].may_end.set()
    await stop(lifecycle, force=True)
    lifecycle.is_stopped = False
    sessions.append(lifecycle.get(RecordingSession))
    del lifecycle
    gc.collect()
    await turn(1)
    assert "closed now" not in sessions[0].events
    assert sessions[1].events == ["closed now"]


def test_the_session_of_a_lost_owner_is_closed_without_a_closed_loop() -> None:
    """Nothing can be called on that loop."""

    async def lose() -> RecordingSession:
        lifecycle = make_lifecycle(RecordingSession.close_now)
        kept.append(lifecycle)
        return lifecycle.get(RecordingSession)

    kept: list[Lifecycle[RecordingSession]] = []
    session = asyncio.run(lose())
    kept.clear()
    gc.collect()
    assert session.events == ["closed without loop"]
