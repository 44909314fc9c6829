"""``on_failure``: policies that `retry` and `isolate` make, and those of the user's own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest

from async_batcher import AsyncBatcher, Later, isolate, retry
from async_batcher._batching.failures.policies import FailurePolicies, RecentCount
from async_batcher.exceptions import (
    AsyncBatchException,
    BatcherStoppedError,
    BatchTimeoutError,
    WorkerDiedError,
)
from tests.support.batchers import package_logs
from tests.support.polling import turn
from tests.support.virtual_clock import FAKE, FakeBatcher, now, virtual_loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher.stats import BatchRecord

pytestmark = pytest.mark.usefixtures("no_noise")
virtual_clock = pytest.mark.virtual_clock

KINDS: dict[str, Callable[[], BaseException]] = {
    "value": lambda: ValueError("bad"),
    "connection": lambda: ConnectionResetError("reset"),
    "crash": lambda: WorkerDiedError("crashed", pid=1),
    "timeout": lambda: BatchTimeoutError("too long"),
    "exit": lambda: SystemExit(3),
}


def decide(policy: Any, error: BaseException, attempt: int = 1) -> Any:
    """Return what one policy says: seconds, "isolate", "fail" or None."""
    decision = policy(error, attempt)
    return decision.after if isinstance(decision, Later) else decision


def resolved(batcher: FakeBatcher) -> tuple[int, int]:
    """Return how many items have a result, and how many failed."""
    stats = batcher.stats()
    return stats.done, stats.failed


# ---- which exceptions match


@pytest.mark.parametrize(
    ("types", "matching"),
    [
        ((), {"value", "connection"}),
        ((ValueError,), {"value"}),
        ((OSError,), {"connection"}),
        ((KeyError, ConnectionError), {"connection"}),
        ((Exception,), {"value", "connection"}),
        ((BaseException,), {"value", "connection", "exit"}),
        ((WorkerDiedError,), {"crash"}),
        ((BatchTimeoutError,), {"timeout"}),
        ((TimeoutError,), set()),
        ((AsyncBatchException,), {"crash", "timeout"}),
        ((Exception, WorkerDiedError), {"value", "connection", "crash"}),
    ],
)
def test_which_exceptions_are_retried(
    types: tuple[type[BaseException], ...], matching: set[str]
) -> None:
    """By type and base; a crash or a timeout of the batch only if the package's type is named."""
    policy = retry(*types)
    assert {kind for kind, make in KINDS.items() if decide(policy, make()) is not None} == matching
    assert {
        kind for kind, make in KINDS.items() if decide(policy, later_from(make())) is not None
    } == matching


def later_from(cause: BaseException) -> Later:
    """Return what ``raise Later() from cause`` raises."""
    later = Later()
    later.__cause__ = cause
    return later


@pytest.mark.parametrize(
    ("types", "matching"),
    [
        ((), set(KINDS)),
        ((ValueError,), {"value"}),
        ((OSError,), {"connection", "timeout"}),
        ((WorkerDiedError, SystemExit), {"crash", "exit"}),
    ],
)
def test_which_exceptions_are_isolated(
    types: tuple[type[BaseException], ...], matching: set[str]
) -> None:
    """All, or those of the types; a `Later` is not a failure."""
    policy = isolate(*types)
    assert {kind for kind, make in KINDS.items() if decide(policy, make()) is not None} == matching
    assert decide(policy, Later()) is decide(policy, later_from(ValueError())) is None


def test_a_later_without_a_cause() -> None:
    """A policy for any exception limits it, too; one for others does not."""
    assert decide(retry(attempts=2), Later(), 2) == "fail"
    assert decide(retry(Later, attempts=2), Later(), 2) == "fail"
    assert decide(retry(ValueError), Later()) is None


def test_the_time_before_each_try() -> None:
    """``backoff`` times ``factor`` for each further try, up to ``max_backoff``."""
    policy = retry(backoff=0.5, factor=3, max_backoff=10, attempts=9)
    assert [decide(policy, ValueError(), attempt) for attempt in range(1, 10)] == [
        *(0.5, 1.5, 4.5, 10.0, 10.0, 10.0, 10.0, 10.0),
        None,
    ]
    constant = retry(backoff=2.0, factor=1.0, attempts=5000)
    assert {decide(constant, ValueError(), attempt) for attempt in (1, 2, 4999)} == {2.0}
    assert decide(retry(attempts=5000), ValueError(), 4999) == 5.0
    at_once = retry(backoff=0, attempts=5000)
    assert {decide(at_once, ValueError(), attempt) for attempt in (1, 2, 4999)} == {0.0}


def test_a_backoff_beyond_the_default_maximum() -> None:
    """It is not cut; a smaller maximum than the default backoff is one."""
    policy = retry(backoff=7, attempts=9)
    assert {decide(policy, ValueError(), attempt) for attempt in (1, 2, 8)} == {7.0}
    policy = retry(max_backoff=0.01)
    assert {decide(policy, ValueError(), attempt) for attempt in (1, 2, 3)} == {0.01}
    assert decide(retry(backoff=7, max_backoff=7), ValueError()) == 7.0


def test_the_defaults() -> None:
    """Four tries, after 20, 40 and 80 ms."""
    policy = retry()
    assert [decide(policy, ValueError(), attempt) for attempt in range(1, 5)] == [
        *(0.02, 0.04, 0.08),
        None,
    ]


# ---- in a batcher


@virtual_clock
@pytest.mark.parametrize("returned", [False, True])
async def test_failed_items_run_again(returned: bool) -> None:
    """At the times of the policy, until the attempts are used up; the first run counts."""
    batcher = FakeBatcher(on_failure=retry(ValueError, attempts=3, backoff=1.0), max_queue_time=0)
    calls = [batcher.call(item) for item in range(2)]
    await turn()
    times = [now()]
    for _ in range(2):
        error = ValueError()
        batcher.runner.end(0, [error, error] if returned else error)
        assert batcher.stats().queued == 2
        count = len(batcher.batches)
        for _ in range(500):
            await asyncio.sleep(0.01)
            if len(batcher.batches) > count:
                break
        times.append(now())
    assert [times[1] - times[0], times[2] - times[1]] == pytest.approx([1.0, 2.0], abs=0.011)
    assert batcher.batches == [[0, 1]] * 3
    batcher.runner.end(0, [0, ValueError("last")] if returned else ValueError("last"))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    if returned:
        assert outcomes[0] == 0
    assert str(outcomes[1]) == "last"
    assert resolved(batcher) == ((1, 1) if returned else (0, 2))
    assert batcher.stats().retried == 4
    await batcher.stop()


@virtual_clock
async def test_a_retry_holds_no_slot_and_does_not_pause() -> None:
    """Other batches run meanwhile."""
    batcher = FakeBatcher(on_failure=retry(backoff=5.0))
    first = batcher.call("first")
    await turn()
    batcher.runner.end(0, ValueError())
    second = batcher.call("second")
    await turn()
    assert batcher.batches == [["first"], ["second"]]
    batcher.runner.end()
    assert await second == "second"
    await asyncio.sleep(5.1)
    batcher.runner.end()
    assert await first == "first"
    await batcher.stop()


@virtual_clock
async def test_an_exception_that_no_policy_matches() -> None:
    """The caller gets it at once."""
    batcher = FakeBatcher(on_failure=[retry(OSError), isolate(LookupError)])
    calls = [batcher.call(item) for item in range(2)]
    await turn()
    batcher.runner.end(0, ZeroDivisionError("bad"))
    for call in calls:
        with pytest.raises(ZeroDivisionError, match="bad"):
            await call
    assert len(batcher.batches) == 1
    await batcher.stop()


@virtual_clock
async def test_the_first_policy_that_matches_decides() -> None:
    """A `retry` whose attempts are used up matches no longer, and leaves it to the next one."""
    policies = [retry(ConnectionError, attempts=2, backoff=1), isolate(ConnectionError)]
    batcher = FakeBatcher(on_failure=[*policies, retry(OSError, backoff=4)])
    calls = [batcher.call(item) for item in range(2)]
    await turn()
    batcher.runner.end(0, ConnectionError())
    await asyncio.sleep(1.1)
    assert batcher.batches == [[0, 1]] * 2
    batcher.runner.end(0, ConnectionError())
    await turn()
    assert batcher.batches[2:] == [[0]]
    batcher.runner.end()
    await turn()
    assert batcher.batches[3:] == [[1]]
    batcher.runner.end(0, ConnectionError())
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [int, ConnectionError]
    call = batcher.call(2)
    await turn()
    batcher.runner.end(0, OSError())
    await asyncio.sleep(3.9)
    assert len(batcher.batches) == 5
    await asyncio.sleep(0.2)
    assert len(batcher.batches) == 6
    batcher.runner.end()
    assert await call == 2
    await batcher.stop()


@virtual_clock
async def test_items_of_one_batch_that_were_tried_at_different_times() -> None:
    """Each has its own count, and fails or comes back by it."""
    records: list[BatchRecord] = []
    batcher = FakeBatcher(on_failure=retry(attempts=2, backoff=1.0), on_batch=records.append)
    old = batcher.call("old")
    await turn()
    batcher.runner.end(0, ValueError())
    await asyncio.sleep(0.5)
    busy = batcher.call("busy")
    await asyncio.sleep(0.6)
    new = batcher.call("new")
    await turn()
    batcher.runner.end()
    assert batcher.batches[2:] == [["old", "new"]]
    batcher.runner.end(0, ValueError("second"))
    with pytest.raises(ValueError, match="second"):
        await old
    assert not new.done()
    await asyncio.sleep(1.1)
    batcher.runner.end()
    assert [await new, await busy] == ["new", "busy"]
    assert [(r.size, r.attempt, r.failed) for r in records] == [
        *((1, 1, 0), (1, 1, 0), (2, 2, 1), (1, 2, 0)),
    ]
    await batcher.stop()


@virtual_clock
async def test_a_crash_is_retried_only_by_name() -> None:
    """It may have repeated side effects."""
    for named in (False, True):
        types = (WorkerDiedError, Exception) if named else (Exception,)
        batcher = FakeBatcher(on_failure=retry(*types, backoff=1.0))
        call = batcher.call("a")
        await turn()
        batcher.runner.end(0, KINDS["crash"]())
        await asyncio.sleep(1.1)
        assert len(batcher.batches) == 1 + named
        if named:
            batcher.runner.end()
            assert await call == "a"
        else:
            with pytest.raises(WorkerDiedError):
                await call
        await batcher.stop()


@virtual_clock
async def test_a_batch_that_timed_out_and_runs_on_fails_its_items() -> None:
    """As in a thread: it keeps its slot, so nothing of it runs again."""
    batcher = FakeBatcher(on_failure=retry(BatchTimeoutError))
    call = batcher.call("a")
    await turn()
    batcher.runner.on_timeouts[0](BatchTimeoutError("too long"))
    with pytest.raises(BatchTimeoutError):
        await call
    batcher.runner.end()
    assert resolved(batcher) == (0, 1)
    assert len(batcher.batches) == 1
    await batcher.stop()


@virtual_clock
async def test_only_items_without_a_result_are_retried() -> None:
    """A generator that raises half way has delivered the others."""
    batcher = FakeBatcher(on_failure=retry(backoff=1.0))
    calls = [batcher.call(item) for item in range(4)]
    await turn()
    batcher.runner.yield_results(3, results=[0, ValueError(), 2])
    batcher.runner.end(0, ValueError())
    await asyncio.sleep(1.1)
    assert batcher.batches[1:] == [[1, 3]]
    batcher.runner.end()
    assert [await call for call in calls] == [0, 1, 2, 3]
    await batcher.stop()


@virtual_clock
async def test_a_stop_waits_for_retries_and_a_forced_one_does_not() -> None:
    """Their callers get a `BatcherStoppedError` then."""
    for force in (False, True):
        batcher = FakeBatcher(on_failure=retry(backoff=4.0))
        call = batcher.call("a")
        await turn()
        batcher.runner.end(0, ValueError())
        stop = asyncio.create_task(batcher.stop(force=force))
        await asyncio.sleep(4.1)
        if force:
            with pytest.raises(BatcherStoppedError):
                await call
        else:
            batcher.runner.end()
            assert await call == "a"
        await stop
        assert virtual_loop().timers() == 0


# ---- what is logged


@virtual_clock
async def test_the_log_says_that_items_run_again(caplog: pytest.LogCaptureFixture) -> None:
    """At the level INFO; an error is logged only when callers get it."""
    caplog.set_level("INFO", "async_batcher")
    batcher = FakeBatcher(on_failure=retry(attempts=2, backoff=1.0))
    calls = [batcher.call(item) for item in range(2)]
    await turn()
    batcher.runner.end(0, ValueError("bad"))
    await asyncio.sleep(1.1)
    batcher.runner.end(0, ValueError("bad"))
    await asyncio.gather(*calls, return_exceptions=True)
    assert [(record.levelname, record.message) for record in package_logs(caplog)] == [
        ("INFO", f"{FAKE}: 2 items run again: ValueError: bad"),
        ("ERROR", f"{FAKE}: a batch of 2 items failed: ValueError: bad"),
    ]
    await batcher.stop()


@virtual_clock
async def test_the_log_of_a_failed_batch_whose_last_part_is_retried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its summary is not left out."""
    batcher = FakeBatcher(on_failure=[retry(OSError, backoff=1.0), isolate()])
    calls = [batcher.call(item) for item in range(2)]
    await turn()
    batcher.runner.end(0, ValueError("bad"))
    batcher.runner.end(0, ValueError("bad"))
    batcher.runner.end(0, OSError("busy"))
    assert [record.message for record in package_logs(caplog)] == [
        f"{FAKE}: a batch of 2 items failed: ValueError: bad",
        f"{FAKE}: of a failed batch of 2 items, 1 failed alone, in 2 reruns",
    ]
    await asyncio.sleep(1.1)
    batcher.runner.end()
    with pytest.raises(ValueError, match="bad"):
        await calls[0]
    assert await calls[1] == 1
    await batcher.stop()


# ---- retry and isolate together


@virtual_clock
async def test_a_part_of_a_failed_batch_is_retried() -> None:
    """What fails alone gets its error; what is put back runs with new items."""
    batcher = FakeBatcher(on_failure=[retry(OSError, attempts=2, backoff=1.0), isolate(ValueError)])
    calls = [batcher.call(item) for item in range(4)]
    await turn()
    batcher.runner.end(0, OSError())
    await asyncio.sleep(1.1)
    assert batcher.batches[1:] == [[0, 1, 2, 3]]
    batcher.runner.end(0, ValueError("bad"))
    assert batcher.batches[2:] == [[0, 1]]
    batcher.runner.end(0, OSError("again"))
    assert [str(call.exception()) for call in calls[:2] if call.done()] == []
    await turn()
    assert [str(call.exception()) for call in calls[:2]] == ["again", "again"]
    assert batcher.batches[3:] == [[2, 3]]
    batcher.runner.end(0, ValueError("bad"))
    batcher.runner.end(0, ValueError("bad"))
    batcher.runner.end()
    with pytest.raises(ValueError, match="bad"):
        await calls[2]
    assert await calls[3] == 3
    assert resolved(batcher) == (1, 3)
    await batcher.stop()


@virtual_clock
async def test_isolation_of_a_batch_with_items_that_came_back() -> None:
    """Each half keeps the attempts of its items."""
    seen: list[tuple[str, int]] = []

    def policy(error: BaseException, attempt: int) -> Any:
        seen.append((str(error), attempt))
        return "isolate" if str(error) == "split" else Later(1.0)

    batcher = FakeBatcher(on_failure=policy)
    old = batcher.call("old")
    await turn()
    batcher.runner.end(0, ValueError("busy"))
    await asyncio.sleep(0.9)
    busy = batcher.call("busy")
    await asyncio.sleep(0.2)
    new = batcher.call("new")
    await turn()
    batcher.runner.end()
    assert batcher.batches[2:] == [["old", "new"]]
    batcher.runner.end(0, ValueError("split"))
    assert batcher.batches[3:] == [["old"]]
    batcher.runner.end(0, ValueError("busy"))
    batcher.runner.end(0, ValueError("busy"))
    assert seen == [("busy", 1), ("split", 2), ("split", 1), ("busy", 2), ("busy", 1)]
    await asyncio.sleep(1.1)
    assert batcher.batches[5:] == [["old", "new"]]
    batcher.runner.end()
    assert [await old, await new, await busy] == ["old", "new", "busy"]
    assert resolved(batcher) == (3, 0)
    await batcher.stop()


@virtual_clock
async def test_isolate_of_an_exception_that_was_returned() -> None:
    """The item stood alone already."""
    batcher = FakeBatcher(on_failure=isolate())
    calls = [batcher.call(item) for item in range(2)]
    await turn()
    batcher.runner.end(0, [ValueError("bad"), 1])
    with pytest.raises(ValueError, match="bad"):
        await calls[0]
    assert await calls[1] == 1
    assert len(batcher.batches) == 1
    await batcher.stop()


# ---- the budget


@virtual_clock
async def test_the_budget_limits_retries() -> None:
    """A share of the first tries of the last minute, plus 10; beyond it items fail."""
    batcher = FakeBatcher(on_failure=retry(budget=0.5, backoff=1.0, attempts=2), max_batch_size=100)
    calls = [batcher.call(item) for item in range(20)]
    await turn()
    batcher.runner.end(0, ValueError())  # 20 of them: 10 + 0.5 * 20
    assert batcher.stats().queued == 20
    await asyncio.sleep(1.1)
    batcher.runner.end()
    await asyncio.wait(calls)
    more = [batcher.call(item) for item in range(4)]
    await turn()
    batcher.runner.end(0, ValueError())  # 2 of them
    await turn()
    assert [call.done() for call in more] == [False, False, True, True]
    note = "not retried: the budget of retry(attempts=2) is used up"
    assert all(note in more[index].exception().__notes__ for index in (2, 3))  # type: ignore[union-attr]
    await asyncio.sleep(1.1)
    batcher.runner.end()
    await asyncio.gather(*more, return_exceptions=True)
    assert resolved(batcher) == (22, 2)
    await asyncio.sleep(62)
    last = [batcher.call(item) for item in range(20)]
    await turn()
    batcher.runner.end(0, [ValueError() for _ in range(20)])
    assert batcher.stats().queued == 20
    await asyncio.sleep(1.1)
    batcher.runner.end()
    await asyncio.wait(last)
    await batcher.stop()


@virtual_clock
async def test_what_the_budget_does_not_count() -> None:
    """A `Later` of the batch function; nothing without a budget; reruns are no first tries."""
    for error, budget in ((Later(1.0), 0.0), (ValueError(), None)):
        batcher = FakeBatcher(on_failure=retry(budget=budget, backoff=1.0), max_batch_size=100)
        calls = [batcher.call(item) for item in range(30)]
        await turn()
        batcher.runner.end(0, error)
        assert batcher.stats().queued == 30
        await asyncio.sleep(1.1)
        batcher.runner.end()
        await asyncio.wait(calls)
        await batcher.stop()


@virtual_clock
async def test_later_tries_and_reruns_do_not_raise_the_budget() -> None:
    """Only first tries do."""
    policies = [retry(OSError, budget=1.0, backoff=1.0, factor=1, attempts=99), isolate()]
    batcher = FakeBatcher(on_failure=policies)
    calls = [batcher.call(item) for item in range(2)]
    await turn()
    batcher.runner.end(0, ValueError())
    for _ in range(20):
        if not batcher.runner.running:
            break
        batcher.runner.end(0, OSError())
        await asyncio.sleep(2.1)
    await asyncio.gather(*calls, return_exceptions=True)
    assert batcher.stats().retried == 12
    await batcher.stop()


@virtual_clock
@pytest.mark.parametrize("key_concurrency", [None, 1])
async def test_parts_that_are_recalled_are_no_first_tries(key_concurrency: int | None) -> None:
    """Neither what waited at a worker after a `Later`, nor what waited to run after its key."""
    policies = [retry(OSError, budget=1.0, backoff=1.0, factor=1, attempts=99), isolate(ValueError)]
    batcher = FakeBatcher(
        on_failure=policies,
        concurrency=2,
        max_batch_size=4,
        key=lambda _: 0,
        key_concurrency=key_concurrency,
    )
    batcher.runner.begins_at_most = 1
    calls = [batcher.call(item) for item in range(4)]
    await turn()
    batcher.runner.end(0, ValueError())
    assert batcher.batches[1:] == ([[0, 1]] if key_concurrency else [[0, 1], [2, 3]])
    batcher.runner.end(0, Later(1.0))
    assert batcher.stats().queued == 4
    for _ in range(20):
        await asyncio.sleep(1.1)
        if not batcher.runner.running:
            break
        batcher.runner.end(0, OSError())
    await asyncio.gather(*calls, return_exceptions=True)
    assert batcher.stats().retried == 2 + 4 + 10
    await batcher.stop()


def test_a_recent_count() -> None:
    """It forgets what is older than a minute, and keeps no more than its seconds."""
    count = RecentCount()
    for second in range(1000):
        count.add(float(second), 2)
        assert len(count._steps) <= 61
    assert count.total(999.0) == 120
    assert count.total(1020.0) == 78
    assert count.total(2000.0) == 0


# ---- policies of the user's own


def policies(*functions: Any) -> FailurePolicies:
    """Return the policies of a batcher."""
    return FailurePolicies(functions, "name")


def test_what_a_policy_may_return() -> None:
    """A `Later`, "isolate", "fail", or None: then the next policy decides."""
    for decision, verdict in (
        (Later(3.0), 3.0),
        (Later(), 0.04),
        ("isolate", "isolate"),
        ("fail", None),
        (None, 7.0),
    ):
        function = Mock(return_value=decision)
        after = Mock(return_value=Later(7.0))
        error = ValueError()
        assert policies(function, after).decide(error, 2, 0.0) == verdict
        function.assert_called_once_with(error, 2)
        assert after.called == (decision is None)


def test_without_a_policy_that_matches() -> None:
    """An exception fails the item; a `Later` puts it off."""
    nothing = policies(Mock(return_value=None))
    assert nothing.decide(ValueError(), 1, 0.0) is None
    assert nothing.decide(Later(3.0), 100, 0.0) == 3.0
    assert nothing.decide(Later(), 3, 0.0) == 0.08
    assert not policies()
    assert policies().decide(Later(3.0), 1, 0.0) == 3.0


@virtual_clock
@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        (LookupError("policy"), "LookupError: policy"),
        (12, "TypeError: it returned 12, not a Later, 'isolate', 'fail' or None"),
        ("retry", "TypeError: it returned 'retry', not a Later, 'isolate', 'fail' or None"),
        (Later, "TypeError: it returned <class 'async_batcher.failures.Later'>, not a Later"),
        (True, "TypeError: it returned True, not a Later"),
        ([], "TypeError: it returned [], not a Later"),
    ],
    ids=["raises", "12", "retry", "Later", "True", "[]"],
)
async def test_a_policy_that_fails(
    behaviour: Any, text: str, returned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The items get their own error; the log says so once."""

    def broken(_error: BaseException, _attempt: int) -> Any:
        if isinstance(behaviour, Exception):
            raise behaviour
        return behaviour

    batcher = FakeBatcher(on_failure=[broken, retry(backoff=1.0)])
    for _ in range(2):
        calls = [batcher.call(item) for item in range(3)]
        await turn()
        batcher.runner.end(0, [ZeroDivisionError("x")] * 3 if returned else ZeroDivisionError("x"))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [repr(outcome) for outcome in outcomes] == ["ZeroDivisionError('x')"] * 3
    assert resolved(batcher) == (0, 6)
    logged = [record for record in package_logs(caplog) if "on_failure" in record.message]
    assert len(logged) == 1
    start = f"{FAKE}: a policy of on_failure failed, so the items get their error: "
    assert logged[0].message.startswith(start)
    assert text in logged[0].message
    assert "broken" in logged[0].message
    await batcher.stop()


@virtual_clock
async def test_a_policy_by_message_and_attempt() -> None:
    """As in the documentation: the exception itself says when."""

    class ThrottledError(Exception):
        retry_after = 2.0

    def on_throttling(exception: BaseException, attempt: int) -> Any:
        if isinstance(exception, ThrottledError) and attempt < 3:
            return Later(exception.retry_after)
        return None

    batcher = FakeBatcher(on_failure=[on_throttling, isolate(ValueError)])
    call = batcher.call("a")
    await turn()
    for _ in range(2):
        batcher.runner.end(0, ThrottledError())
        await asyncio.sleep(1.9)
        assert not batcher.runner.running
        await asyncio.sleep(0.2)
    batcher.runner.end(0, ThrottledError())
    with pytest.raises(ThrottledError):
        await call
    assert len(batcher.batches) == 3
    await batcher.stop()


@virtual_clock
async def test_a_policy_that_isolates_some_items_of_a_batch_and_fails_others() -> None:
    """Each caller has an exception of its own."""

    def policy(_error: BaseException, attempt: int) -> Any:
        return {1: Later(1.0), 2: "isolate"}[attempt]

    def mixed(error: BaseException, attempt: int) -> Any:
        return "fail" if attempt == 1 and str(error) == "mixed" else policy(error, attempt)

    batcher = FakeBatcher(on_failure=mixed)
    old = [batcher.call("old"), batcher.call("older")]
    await turn()
    batcher.runner.end(0, ValueError("busy"))
    await asyncio.sleep(0.9)
    busy = batcher.call("busy")
    await asyncio.sleep(0.2)
    new = batcher.call("new")
    await turn()
    batcher.runner.end()
    error = BatcherStoppedError("mixed")  # it cannot be isolated
    batcher.runner.end(0, error)
    outcomes = await asyncio.gather(*old, new, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["mixed"] * 3
    assert len({id(outcome) for outcome in outcomes}) == 3
    assert await busy == "busy"
    await batcher.stop()


def test_policies_show_what_they_do() -> None:
    """In a log line of one that fails, and in a debugger."""
    assert repr(retry(OSError, attempts=3)) == "retry(OSError, attempts=3)"
    assert repr(isolate(ValueError, OSError)) == "isolate(ValueError, OSError)"


# ---- bad arguments


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: retry("x"), TypeError, "retry('x'): must be classes of exceptions"),  # type: ignore[arg-type]
        (lambda: retry(int), TypeError, "retry(<class 'int'>): must be classes"),  # type: ignore[arg-type]
        (lambda: retry(ValueError()), TypeError, "retry(ValueError()): must be"),  # type: ignore[arg-type]
        (lambda: isolate(3), TypeError, "isolate(3): must be classes of exceptions"),  # type: ignore[arg-type]
        (lambda: retry(attempts=0), ValueError, "attempts=0: must be at least 1"),
        (lambda: retry(attempts=1.5), TypeError, "attempts=1.5: must be an int"),  # type: ignore[arg-type]
        (lambda: retry(attempts=True), TypeError, "attempts=True: must be an int"),
        (lambda: retry(backoff=-1), ValueError, "backoff=-1: must be a finite number"),
        (lambda: retry(backoff="1"), TypeError, "backoff='1': must be a number, not str"),  # type: ignore[arg-type]
        (lambda: retry(factor=float("nan")), ValueError, "factor=nan: must be a finite"),
        (lambda: retry(max_backoff=float("inf")), ValueError, "max_backoff=inf: must be a finite"),
        (lambda: retry(max_backoff="1"), TypeError, "max_backoff='1': must be a number"),  # type: ignore[arg-type]
        (
            lambda: retry(backoff=7, max_backoff=5.0),
            ValueError,
            "backoff=7 is more than max_backoff=5.0",
        ),
        (lambda: retry(budget=-0.1), ValueError, "budget=-0.1: must be a finite number"),
        (lambda: retry(budget="all"), TypeError, "budget='all': must be a number, not str"),  # type: ignore[arg-type]
    ],
    ids=range(15),
)
def test_bad_arguments(make: Callable[[], object], error: type[Exception], text: str) -> None:
    """The error names the argument and its value."""
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)


@pytest.mark.parametrize("value", ["isolate", 3, [isolate(), None], ValueError, [Later]])
def test_what_is_no_policy(value: Any) -> None:
    """Functions of an exception and a number are; exception classes are not."""

    class Local(AsyncBatcher[int, int]):
        async def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    with pytest.raises(TypeError, match=r"on_failure=.*: must be a list of policies"):
        Local(on_failure=value)
