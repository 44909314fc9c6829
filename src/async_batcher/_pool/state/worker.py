"""What the pool knows of one worker, and of the work item that it has. Pure.

::

    STARTING --ready--> PREPARING <--> SPARE --> IDLE <--> BUSY

    ready, and without a work item --stop--> STOPPING --exits by itself--> EXITED
    BUSY --its batch is interrupted--> INTERRUPTED --reply--> STOPPING
    any of these --killed, or its channel ended--> EXITING --exit status--> EXITED

A worker runs one work item at a time. It has one while it is BUSY, or PREPARING. Another one may
wait at a BUSY worker: see `Assignment`.
"""

from __future__ import annotations

import enum
import math
import signal
from collections import OrderedDict
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from async_batcher._transport.protocol import MAX_CACHED_FUNCTIONS

if TYPE_CHECKING:
    from async_batcher._pool.work_item import WorkItem

# Reasons for killing a worker or for a failed start, as `WorkerCounts.crashed` shows them.
ABANDONED = "abandoned"  # all callers of its batch were cancelled
BATCHER_STOPPED = "batcher stopped"  # by force, while its set-up ran
CHANNEL_CLOSED = "closed channel"
CHANNEL_UNREADABLE = "unreadable channel"
INITIALIZER_FAILED = "initializer failed"
PRELOAD_FAILED = "preload failed"
SEND_FAILED = "send failed"
SETUP_TIMEOUT = "set-up timeout"
START_FAILED = "start failed"  # there was no process
START_TIMEOUT = "start timeout"
TEAR_DOWN_TIMEOUT = "tear-down timeout"
TIMEOUT = "timeout"

_INTERRUPTS = (ABANDONED, TIMEOUT)  # the worker may exit by itself before it is killed


class WorkerState(enum.Enum):
    """What a worker is doing."""

    STARTING = "starting"
    PREPARING = "preparing"  # sets up functions before it takes batches
    SPARE = "spare"  # ready, waits for the place of another worker
    IDLE = "idle"
    BUSY = "busy"
    INTERRUPTED = "interrupted"  # runs a batch that is to end; gets no other one
    STOPPING = "stopping"
    EXITING = "exiting"
    EXITED = "exited"


# Looked up for each batch; members of an enum are slow to look up in Python 3.11.
_BUSY, _PREPARING = WorkerState.BUSY, WorkerState.PREPARING

ALIVE = frozenset(
    {
        WorkerState.STARTING,
        WorkerState.PREPARING,
        WorkerState.SPARE,
        WorkerState.IDLE,
        WorkerState.BUSY,
    }
)


PublicState: TypeAlias = Literal["starting", "idle", "busy", "stopping", "exiting", "exited"]
_PUBLIC_STATES: dict[WorkerState, PublicState] = {
    WorkerState.STARTING: "starting",
    WorkerState.PREPARING: "starting",
    WorkerState.SPARE: "idle",
    WorkerState.IDLE: "idle",
    WorkerState.BUSY: "busy",
    WorkerState.INTERRUPTED: "exiting",
    WorkerState.STOPPING: "stopping",
    WorkerState.EXITING: "exiting",
    WorkerState.EXITED: "exited",
}


class Progress(NamedTuple):
    """What a worker's status page and channel show.

    Attributes:
        started_at: When it started its work item, on `time.monotonic`; None if it has not.
        started_seq: The number of the trip that it started last.
        is_setting_up: Whether it loads and sets up the function of its work item.
        bytes_sent: Bytes of a long message that it has received; grows while it reads.
        is_running: Whether its process has come as far as to be a worker.
        failure: What its own code has raised, in words; empty: nothing.
    """

    started_at: float | None = None
    is_setting_up: bool = False
    bytes_sent: int = 0
    started_seq: int = 0
    is_running: bool = True
    failure: str = ""


class StartFailure(NamedTuple):
    """Why a worker was never ready.

    Attributes:
        error: What was raised.
        why: The reason in words, if another start would fail, too.
        cause: As in `WorkerCounts.crashed`. Empty: what became of the process.
    """

    error: BaseException
    why: str = ""
    cause: str = ""


class Trip:
    """A work item at a worker, until the reply. As a command: send it.

    Attributes:
        worker: The worker.
        item: The work item.
        seq: Its number in the pool.
        with_function: Whether its function is sent, too.
        is_waiting: Whether the worker still runs another work item.
        is_staging: Whether it is being copied, and will be sent later.
        is_sent: Of one that waits: whether it has been sent.
        is_asked_back: Whether it is to be taken back, or could not be.
        has_begun: Of one that waits: whether it could not be, since the worker runs it.
        interrupt_reason: Why it is to be interrupted, if the worker still runs it; see
            `TimeLimits`. Empty: it is not.
        is_ahead: Whether the worker sets up the function before it takes batches.
        setup_timeout: Seconds for loading and setting up the function. None: it is set up.
        sent_at: When it was sent, or when the function was set up; later by `halts`.
        progressed_at: When the worker last received a part of the message; later by `halts`.
        halts: The end and the seconds of each halt of the program while the worker had it, if it
            has a time limit.
        bytes_sent: See `Progress`; then.
    """

    __slots__ = (
        "bytes_sent", "halts", "has_begun", "interrupt_reason", "is_ahead", "is_asked_back",
        "is_sent", "is_staging", "is_waiting", "item", "progressed_at", "sent_at", "seq",
        "setup_timeout", "with_function", "worker",
    )  # fmt: skip

    def __init__(
        self,
        worker: Worker,
        item: WorkItem,
        seq: int,
        now: float,
        is_ahead: bool,  # noqa: FBT001
    ) -> None:
        self.worker = worker
        self.item = item
        self.seq = seq
        self.is_ahead = is_ahead
        self.with_function = self.is_waiting = self.is_asked_back = self.has_begun = False
        self.is_staging = self.is_sent = False
        self.interrupt_reason = ""
        self.setup_timeout: float | None = None
        self.sent_at = self.progressed_at = now
        self.bytes_sent = 0
        self.halts: tuple[tuple[float, float], ...] = ()

    def halted_since(self, time: float) -> float:
        """Return for how many seconds after ``time`` the program was halted."""
        return sum(min(seconds, max(0.0, end - time)) for end, seconds in self.halts)

    @property
    def is_refresh(self) -> bool:
        """Whether its function is sent again, which may fail: so nothing waits behind it."""
        return self.with_function and self.setup_timeout is None


class LoadedFunctions:
    """The functions that a worker has loaded, as its own cache keeps them.

    Attributes:
        keys: Their keys.
        last: The key of the one that was used last; empty if it is not known.
        outdated: Those that must be sent again, since the program has bound a global anew.
    """

    def __init__(self) -> None:
        self.keys: OrderedDict[bytes, None] = OrderedDict()
        self.last = b""
        self.outdated: set[bytes] = set()

    def mark_outdated(self, key: bytes) -> None:
        if key in self.keys:
            self.last = b""
            self.outdated.add(key)

    def use(self, key: bytes) -> bool:
        """Note that the worker will use a function; return whether it must be sent."""
        self.last = key
        is_sent = key not in self.keys or key in self.outdated
        self.outdated.discard(key)
        self.keys[key] = None
        self.keys.move_to_end(key)
        if len(self.keys) > MAX_CACHED_FUNCTIONS:
            self.outdated.discard(self.keys.popitem(last=False)[0])
        return is_sent

    def discard(self, key: bytes) -> None:
        self.last = b""
        self.keys.pop(key, None)
        self.outdated.discard(key)


class Worker:
    """One worker.

    Attributes:
        number: What `worker_number` returns in it.
        ever_ready: Whether it has been ready for work items.
        start_failure: Why it was never ready, if that is known.
        has_replacement: Whether another worker is to take its place.
        retire_when_replaced: Whether it works until that one is ready.
        stopped: Whether it was stopped on purpose.
        deadline: When something must have happened; what depends on the state.
    """

    def __init__(self, now: float, start_timeout: float, number: int) -> None:
        self.number = number
        self.state = WorkerState.STARTING
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.created_at = now
        self.deadline = now + start_timeout
        self.trip: Trip | None = None
        self.functions = LoadedFunctions()
        self.batches = 0
        self.busy_seconds = 0.0
        self.ever_ready = False
        self.start_failure: StartFailure | None = None
        self.has_replacement = False
        self.retire_when_replaced = False
        self.stopped = False
        self._kill_reason: str | None = None

    @property
    def kill_reason(self) -> str:
        """Why the pool killed it, or interrupted its batch; empty if it exited before."""
        killed = self.exit_code in (None, -signal.SIGKILL)
        return self._kill_reason or "" if killed or self._kill_reason in _INTERRUPTS else ""

    @property
    def is_killed(self) -> bool:
        exits = self.state in (WorkerState.EXITING, WorkerState.EXITED)
        return exits and self._kill_reason is not None

    @property
    def has_crashed(self) -> bool:
        """Whether it exited after it had been ready, and the pool had not caused that."""
        is_wanted = not self.stopped and not self.kill_reason
        return self.state is WorkerState.EXITED and self.ever_ready and is_wanted

    @property
    def public_state(self) -> PublicState:
        """The state as `WorkerInfo` shows it."""
        return _PUBLIC_STATES[self.state]

    def is_alive(self) -> bool:
        """Tell whether it can take work items, or will."""
        return self.state in ALIVE

    def can_stop(self) -> bool:
        """Tell whether it has nothing to do, and would exit when asked to."""
        return self.trip is None and self.state in ALIVE and self.ever_ready

    def explain_start_failure(self, error: BaseException, why: str = "") -> None:
        """Give a failed start an error that says more, and a reason if it has none."""
        failure = self.start_failure or StartFailure(error, cause=START_FAILED)
        self.start_failure = failure._replace(error=error, why=failure.why or why)

    def mark_interrupted(self, reason: str) -> None:
        self.state = WorkerState.INTERRUPTED
        self._kill_reason = reason

    def mark_killed(self, reason: str) -> None:
        self.state = WorkerState.EXITING
        self._kill_reason = self._kill_reason or reason

    def end_trip(self, now: float) -> float:
        """Count the work item whose reply has come; return the seconds that it took."""
        trip, self.trip = self.trip, None
        assert trip is not None  # noqa: S101 - the caller has seen it
        seconds = now - trip.sent_at
        if self.state is _BUSY or self.state is _PREPARING:
            self.deadline = math.inf
        self.batches += 1
        self.busy_seconds += seconds
        return seconds

    def uncount(self, seconds: float) -> None:
        """Take a work item that took ``seconds`` out of the counts: it was not a batch."""
        self.batches -= 1
        self.busy_seconds -= seconds


def staying_workers(workers: list[Worker]) -> list[Worker]:
    """Return the workers that nothing replaces."""
    # One that was never ready counts until it has exited, which may delay the next start.
    return [
        worker
        for worker in workers
        if (worker.is_alive() or not worker.ever_ready) and not worker.has_replacement
    ]
