"""The decisions of a pool, driven with events in any order; processes are simulated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from async_batcher._pool.state import commands
from async_batcher._pool.state.ledger import WorkerLedger
from async_batcher._pool.state.pool_state import PoolState
from async_batcher._pool.state.supervisor import PoolLimits
from async_batcher._pool.state.time_limits import INTERRUPT_GRACE, MIN_BEGIN_TIMEOUT
from async_batcher._pool.state.worker import (
    ABANDONED,
    TIMEOUT,
    Progress,
    StartFailure,
    Trip,
    Worker,
    WorkerState,
)
from async_batcher._pool.work_item import WorkItem
from async_batcher._transport.protocol import MAX_CACHED_FUNCTIONS
from async_batcher.exceptions import BatchTimeoutError
from tests.support.worker_pools import FakeFunction

if TYPE_CHECKING:
    from collections.abc import Callable

START_TIMEOUT = 10.0
MAX_MEMORY = 100
ROUNDING = 1e-6  # seconds

# The number of the last trip, and a number to tell apart what comes after it: the order of the
# state's decisions, whenever the commands are carried out.
Turn: TypeAlias = "tuple[int, int]"


class Process:
    """A simulated worker process.

    Attributes:
        trip: What it has, and has not finished.
        waiting: What was sent ahead.
        has_token: Whether it has taken the token of ``trip``, or needs none.
        replies: What it has finished; the parent has not read that yet.
        declined: Those of them that it hands back, since the batch before raised `Later`.
        started_at: When it started the work item of ``trip``.
        halted: Seconds for which the program was halted since then.
        started_seq: The number of the trip that it started last.
        is_setting_up: Whether it sets up the function of that trip.
        interrupted_at: When its work item was interrupted, later by halts; None: it was not.
        known_trip: The trip that the parent knows to be the current one.
        known_at: Since when, later by halts.
        batches: How many batches it has begun.
        must_exit: Whether it was stopped or killed.
        abandoned_seq: The number of the trip that it was asked to end early.
        copies: What is being copied for it, and not sent yet.
    """

    def __init__(self) -> None:
        self.trip: Trip | None = None
        self.waiting: Trip | None = None
        self.has_token = False
        self.replies: list[Trip] = []
        self.declined: list[Trip] = []
        self.started_seq = 0
        self.started_at: float | None = None
        self.halted = 0.0
        self.is_setting_up = False
        self.interrupted_at: float | None = None
        self.known_trip: Trip | None = None
        self.known_at = 0.0
        self.batches = 0
        self.must_exit = False
        self.abandoned_seq = 0
        self.copies: list[Trip] = []

    @property
    def is_interrupted(self) -> bool:
        """Whether its work item was interrupted."""
        return self.interrupted_at is not None

    def seconds(self, now: float) -> float:
        """Return for how long its work item has run, without halts; 0 if it has not begun."""
        return 0.0 if self.started_at is None else now - self.started_at - self.halted

    def note_trip(self, worker: Worker, now: float) -> None:
        """Note since when the parent knows what it runs."""
        if self.known_trip is not worker.trip:
            self.known_trip, self.known_at = worker.trip, now

    def halt(self, seconds: float) -> None:
        """Do nothing for some time."""
        self.known_at += seconds
        if self.started_at is not None:
            self.halted += seconds
        if self.interrupted_at is not None:
            self.interrupted_at += seconds

    def progress(self, trip: Trip | None) -> Progress:
        """Return what its status page shows of a trip."""
        if trip is None or trip is not self.trip:
            return Progress(started_seq=self.started_seq)
        return Progress(self.started_at, self.is_setting_up, started_seq=self.started_seq)

    def finish(self) -> None:
        """Finish the work item, and take the one that waits."""
        assert self.trip is not None
        self.replies.append(self.trip)
        self.trip, self.waiting, self.started_at = self.waiting, None, None
        self.has_token = False

    def put_off(self) -> None:
        """Raise `Later`, and hand back what waits."""
        self.finish()
        if self.trip is not None:
            self.declined.append(self.trip)
            self.replies.append(self.trip)
            self.trip = None

    def decline(self) -> None:
        """Hand the work item back, which was abandoned during the set-up."""
        assert self.trip is not None
        self.declined.append(self.trip)
        self.finish()

    def give_back(self) -> set[int]:
        """Lose what waits, and what has come to its turn if the token has not been taken."""
        given = set() if self.waiting is None else {self.waiting.seq}
        self.waiting = None
        if self.trip is not None and not self.has_token:
            given.add(self.trip.seq)
            self.trip = None
        return given


class PoolMachine(RuleBasedStateMachine):
    """Carries out the commands of a `PoolState` on simulated processes, and checks promises."""

    items = Bundle("items")

    @initialize(
        size=st.integers(1, 3),
        max_tasks=st.none() | st.integers(1, 3),
        max_memory=st.none() | st.just(MAX_MEMORY),
        seconds=st.sampled_from([0.0, 100.0, 1e6, 1e6]),
        resubmits=st.booleans(),
        has_setups=st.booleans(),
        is_started=st.booleans(),
    )
    def set_up(
        self,
        size: int,
        max_tasks: int | None,
        max_memory: int | None,
        seconds: float,
        resubmits: bool,
        has_setups: bool,
        is_started: bool,
    ) -> None:
        """A pool of any size, with any limits; callers may submit while a reply is read."""
        self.now = 100.0
        self.may_stop_at = self.now + seconds
        self.ledger = WorkerLedger()
        self.state = PoolState(PoolLimits(size, START_TIMEOUT, max_tasks, max_memory), self.ledger)
        self.size = size
        self.processes: dict[Worker, Process] = {}
        self.outcomes: dict[WorkItem, Any] = {}
        self.begun: set[WorkItem] = set()
        self.sent: set[WorkItem] = set()  # also what was requeued after that
        self.arrivals: dict[WorkItem, Turn] = {}
        self.turns: dict[Any, Turn] = {}  # by client: since when it waits for its turn
        self.in_front: set[Any] = set()  # clients that came first since something was requeued
        self.withdrawn: set[WorkItem] = set()
        self.recalled: set[WorkItem] = set()  # while no worker had them
        self.submitted: list[WorkItem] = []
        self.large: set[WorkItem] = set()  # copied by a helper thread before they are sent
        self.refreshes: set[Trip] = set()  # with a function that the worker has loaded
        self.memory = 0
        self.refuses = False
        self.resubmits = resubmits
        self.stopping = False
        self.time_passes = False
        self.max_tasks = max_tasks
        self.has_setups = has_setups
        self.outdated: list[Worker] = []
        self.functions = [
            FakeFunction(bytes([number]), has_setup=has_setups and number > 1)
            for number in range(4)
        ]
        if is_started:
            self.state.started(self.now)
            self.carry_out()
            self.get_going()

    # --- commands

    def carry_out(self) -> None:
        """Do what the state says, as the driver does."""
        queue = self.state.assignment.commands
        while queue:
            command = queue.popleft()
            worker: Any = getattr(command, "worker", None)
            process = self.processes.get(worker)
            match command:
                case commands.StartWorker():
                    if self.refuses:
                        self.state.worker_events.start_refused(worker, OSError("no"), self.now)
                    else:
                        self.processes[worker] = Process()
                case Trip() as trip:
                    assert process is not None
                    assert not process.must_exit, "a worker that exits gets no work"
                    assert not process.is_interrupted, "a worker that was interrupted gets no work"
                    if not trip.is_staging:
                        self.check_turn(trip)
                        self.check_max_tasks(trip, process)
                        if trip.is_refresh:
                            self.refreshes.add(trip)
                    self.send(trip, process)
                case commands.TakeBack(trip):
                    process = self.processes.get(trip.worker)
                    taken = process.give_back() if process else set()
                    if process and not trip.is_sent:
                        taken.add(trip.seq)
                    self.state.worker_events.taken_back(trip.worker, taken, self.now)
                case commands.Abandon(trip):
                    if trip.worker in self.processes:
                        process = self.processes[trip.worker]
                        process.abandoned_seq = max(process.abandoned_seq, trip.seq)
                case commands.InterruptBatch(trip):
                    process = self.processes.get(trip.worker)
                    assert process is not None
                    assert trip.item.verdict or not self.is_open(trip.item), "a caller waits"
                    process.interrupted_at = self.now
                case commands.StopWorker():
                    assert process is not None
                    assert process.trip is None, "a worker that is stopped has nothing to do"
                    process.must_exit = True
                    is_replaced = worker in self.outdated and not process.is_interrupted
                    if is_replaced and not self.stopping:
                        self.check_capacity(worker)
                case commands.KillWorker():
                    if process is not None:
                        if self.time_passes and not self.stopping:
                            self.check_grace(worker, process)
                        process.must_exit = True
                case commands.CloseWorker():
                    self.processes.pop(worker, None)
                case commands.CheckWorker():
                    trip = worker.trip  # before the reply is read
                    if process:
                        self.drain(worker, process)
                    if worker not in self.processes:
                        process = None
                    progress = process.progress(trip) if process else Progress()
                    self.state.time_limits.checked(worker, trip, progress, self.now)
                case commands.MeasureMemory():
                    self.state.worker_events.memory_measured(worker, self.memory, self.now)
                case commands.Resolve(item, outcome):
                    is_stopped = isinstance(outcome, RuntimeError)  # by force
                    is_late = item.counts_until_end and isinstance(outcome, BatchTimeoutError)
                    if (item.verdict is not None or is_late) and not is_stopped:
                        assert not self.may_run(item), "it has ended"
                    elif isinstance(outcome, BatchTimeoutError):
                        self.check_timeout(item)
                    self.resolve(item, outcome)

    def send(self, trip: Trip, process: Process) -> None:
        """Send a work item, copy it first, or hold it, as `WorkerHandle.send` does."""
        current = trip.worker.trip
        if trip.is_asked_back:
            return
        if current is not trip:
            if not trip.is_waiting:
                return
            if current is not None and current.is_staging:
                trip.is_staging = True
                return
        was_held, trip.is_staging = trip.is_staging, False
        if trip.item in self.large:
            assert trip not in process.copies, "it is copied once"
            trip.is_staging = True
            process.copies.append(trip)
            self.state.worker_events.staging(trip)
            return
        self.put(trip, process)
        if was_held:
            self.state.worker_events.sent(trip, self.now)

    def put(self, trip: Trip, process: Process) -> None:
        """Have a worker receive a work item."""
        assert process.waiting is None, "one work item waits at a worker"
        assert trip.item not in self.begun, "no work item runs twice"
        assert trip.item not in self.outcomes
        assert not any(trip in one.copies for one in self.processes.values())
        trip.is_sent = trip.is_waiting
        if process.trip is not None:
            assert trip.is_waiting, "one work item at a time"
            process.waiting = trip
        else:
            process.trip, process.started_at = trip, None
            process.has_token = not trip.is_waiting
            process.is_setting_up = trip.setup_timeout is not None

    def end_copy(self, trip: Trip, process: Process) -> None:
        """Send what has been copied, if it is still wanted."""
        worker = trip.worker
        process.copies.remove(trip)
        trip.is_staging = False
        is_wanted = not trip.is_asked_back and (worker.trip is trip or trip.is_waiting)
        if worker.is_alive() and is_wanted:
            self.put(trip, process)
            self.state.worker_events.sent(trip, self.now)
        self.carry_out()

    def check_turn(self, trip: Trip) -> None:
        """Check that a batch which is sent for the first time is the next one of the next client.

        What was requeued comes first. A client in whose queue something was requeued may stay
        first when that is cancelled.
        """
        item, queue = trip.item, self.state._backlog.queue
        if item.is_setup_only or item.is_tear_down:
            return
        self.note_requeued()
        if item not in self.sent:
            sent = [one.item for one in self.state.assignment.commands if type(one) is Trip]
            for other in {*queue, *sent} - self.sent - {item}:
                arrival = self.arrivals.get(other)
                if arrival is None or arrival > (trip.seq, 0):
                    continue
                if other.client == item.client:
                    assert arrival > self.arrivals[item], "a client's batches run in their order"
                elif item.client not in self.in_front:
                    assert self.turns[other.client] > self.turns[item.client], "clients take turns"
        self.sent.add(item)
        self.turns[item.client] = (trip.seq, 0)
        self.in_front.discard(item.client)

    def note_requeued(self) -> None:
        """Note which clients have the first turn, since something of theirs was requeued."""
        self.in_front.update(one.client for one in self.state._backlog.queue if one in self.sent)

    def check_max_tasks(self, trip: Trip, process: Process) -> None:
        """Check that a worker gets no more batches than it may run.

        Where functions have set-ups it goes on until its replacement is ready, unless it is 1.
        """
        if self.max_tasks is None or trip.item.is_setup_only or trip.item.is_tear_down:
            return
        count = process.batches + (trip.worker.trip in process.copies)
        if process.trip is not None and process.started_at is None:
            count += not (process.trip.item.is_setup_only or process.trip.item.is_tear_down)
        if count >= self.max_tasks:
            assert self.has_setups, "a worker runs no more batches than it may"
            assert self.max_tasks > 1, "a worker runs one batch"
            assert not trip.is_waiting, "nothing is sent ahead to a worker that is to be replaced"
            spares = [spare.number for spare in self.state.supervisor.spares]
            assert trip.worker.number not in spares, "the replacement is ready"

    def may_run(self, item: WorkItem) -> bool:
        """Tell whether a worker runs an item, or may begin it."""
        return any(
            process.trip is not None
            and process.trip.item is item
            and not (process.must_exit and process.started_at is None)
            for process in self.processes.values()
        )

    def check_timeout(self, item: WorkItem) -> None:
        """Check that a batch has run for as long as it may, and still runs."""
        found = [one for one in self.processes.values() if one.trip and one.trip.item is item]
        assert len(found) == 1, "a worker runs what has timed out"
        assert item.timeout is not None
        assert found[0].seconds(self.now) >= item.timeout - ROUNDING, "not before its time limit"

    def check_grace(self, worker: Worker, process: Process) -> None:
        """Check that a worker has had the time to end what was interrupted, or to begin."""
        if process.interrupted_at is not None:
            assert self.now - process.interrupted_at >= INTERRUPT_GRACE - ROUNDING
        elif worker.kill_reason == TIMEOUT:
            trip = process.known_trip
            assert trip is not None
            assert process.started_at is None or process.trip is not trip
            limit = max(trip.item.timeout or 0.0, MIN_BEGIN_TIMEOUT)
            assert self.now - process.known_at >= limit - ROUNDING, "it may begin until then"

    def check_capacity(self, old: Worker) -> None:
        """Check that another worker has taken the place of one that a restart stops."""
        max_tasks = self.state.supervisor.limits.max_tasks
        if max_tasks is None or old.batches < max_tasks:
            active = self.state.supervisor.active()
            assert old.number in [worker.number for worker in active], "capacity is kept"

    def resolve(self, item: WorkItem, outcome: Any) -> None:
        """Note an outcome, once."""
        assert item not in self.outcomes, "a work item is resolved once"
        assert item not in self.withdrawn
        self.outcomes[item] = outcome

    # --- callers

    @rule(
        target=items,
        client=st.integers(0, 2),
        function=st.integers(0, 3),
        timeout=st.none() | st.sampled_from([0.5, 5.0]),
        until_end=st.booleans(),
        large=st.booleans(),
    )
    def submit(
        self, client: int, function: int, timeout: float | None, until_end: bool, large: bool
    ) -> WorkItem:
        """A call comes."""
        chosen = self.functions[function]
        return self.submit_to(chosen, client, timeout, until_end=until_end, large=large)

    @rule(
        target=items,
        calls=st.lists(
            st.tuples(
                st.integers(0, 2),
                st.integers(0, 3),
                st.sampled_from([None, 0.5, 5.0]),
                st.booleans(),
            ),
            min_size=2,
            max_size=6,
        ),
    )
    def submit_several(self, calls: list[tuple[int, int, float | None, bool]]) -> Any:
        """Calls come at the same time."""
        return multiple(
            *(
                self.submit_to(self.functions[function], client, timeout, large=large)
                for client, function, timeout, large in calls
            )
        )

    def submit_to(
        self,
        function: Any,
        client: Any,
        timeout: float | None = None,
        *,
        until_end: bool = False,
        large: bool = False,
    ) -> WorkItem:
        """Submit a batch."""
        item = WorkItem(function, None, client, timeout, counts_until_end=until_end)
        item.items = (False, b"", ())  # it is a batch
        self.submitted.append(item)
        if large:
            self.large.add(item)
        self.arrivals[item] = (self.state.assignment._last_seq, len(self.submitted))
        if client not in self.state._backlog.queue.queues:
            self.turns[client] = self.arrivals[item]
        self.state.submitted(item, self.now)
        self.carry_out()
        return item

    def is_open(self, item: WorkItem) -> bool:
        """Tell whether a caller still waits for an item."""
        return item not in self.outcomes and item not in self.withdrawn

    @rule(item=items, force=st.booleans())
    def cancel(self, item: WorkItem, force: bool) -> None:
        """All callers of an item are cancelled."""
        if self.is_open(item):
            self.state.cancelled(item, self.now, force=force)
            self.carry_out()

    @rule(client=st.integers(0, 2))
    def recall(self, client: int) -> None:
        """The batches of a client are to return to the queue, if they have not begun."""
        processes = self.processes.values()
        declined = {trip.item for process in processes for trip in process.declined}
        taken = {process.trip.item for process in processes if process.trip and process.has_token}
        at_once = set()
        for item in self.submitted:
            if item.client is client and self.is_open(item) and item not in self.begun:
                if item in declined:
                    self.recalled.add(item)
                elif item not in taken:
                    worker = self.state.assignment.worker_of(item)
                    if worker is None or (worker.trip is not None and worker.trip.is_staging):
                        at_once.add(item)
        self.recalled |= at_once
        self.state.recalled(client, self.now)
        assert not any(
            type(command) is Trip and command.item in self.recalled
            for command in self.state.assignment.commands
        ), "one is sent meanwhile"
        self.carry_out()
        assert not any(map(self.is_open, at_once))

    @rule(item=items)
    def withdraw(self, item: WorkItem) -> None:
        """The only caller of an item leaves."""
        if self.is_open(item):
            self.withdrawn.add(item)
            self.state.withdrawn(item, self.now)
            self.carry_out()

    @rule(client=st.integers(0, 2))
    def abort(self, client: int) -> None:
        """A batcher is stopped by force."""
        in_setup = [worker for worker, process in self.processes.items() if process.is_setting_up]
        self.state.aborted(client, RuntimeError("stopped"), self.now, in_setup=in_setup)
        self.carry_out()
        assert not [item for item in self.submitted if item.client == client and self.is_open(item)]

    @rule(function=st.integers(2, 3))
    def preload(self, function: int) -> None:
        """A batcher is started."""
        chosen: Any = self.functions[function]
        items = [WorkItem(chosen, None) for _ in range(self.size)]
        count = self.state.preloaded(chosen, items, self.now)
        self.submitted += items[:count]
        self.carry_out()

    @rule(function=st.integers(0, 3))
    def forget(self, function: int) -> None:
        """A batcher is stopped."""
        self.state.forgotten(self.functions[function].key, self.now)
        self.carry_out()

    @rule(function=st.integers(0, 3))
    def tear_downs_take_too_long(self, function: int) -> None:
        """A stop by force does not wait for tear-downs."""
        self.state.tear_downs_expired(self.functions[function].key, self.now)
        self.carry_out()

    @rule(function=st.integers(0, 3))
    def rebind(self, function: int) -> None:
        """A global that a function uses is bound anew, so the function is sent once more."""
        self.state.refreshed(self.functions[function].key, self.now)
        self.carry_out()

    # --- workers

    def choose(
        self, data: st.DataObject, condition: Callable[[Worker, Process], object]
    ) -> tuple[Worker, Process] | None:
        """Choose a worker for which a condition holds."""
        found = [entry for entry in self.processes.items() if condition(*entry)]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        """A process is ready."""
        chosen = self.choose(data, lambda worker, _: worker.state is WorkerState.STARTING)
        if chosen:
            self.state.worker_events.ready(chosen[0], self.now)
            self.carry_out()

    @rule()
    def restart(self) -> None:
        """All workers are to be replaced."""
        supervisor = self.state.supervisor
        active, has_spares = supervisor.active(), bool(supervisor.spares)
        self.outdated = self.state.restarted(self.now)
        assert set(active) <= {*self.outdated}
        assert has_spares or supervisor.active() == active, "all work on for now"
        self.carry_out()

    @rule(data=st.data())
    def copied(self, data: st.DataObject) -> None:
        """A helper thread has copied a work item."""
        chosen = self.choose(data, lambda _, process: process.copies)
        if chosen:
            process = chosen[1]
            self.end_copy(data.draw(st.sampled_from(process.copies)), process)

    @rule(data=st.data())
    def copied_but_not_sent(self, data: st.DataObject) -> None:
        """A helper thread has copied a work item, which cannot be sent."""
        chosen = self.choose(
            data,
            lambda worker, process: worker.is_alive() and worker.trip in process.copies,
        )
        if chosen:
            worker, process = chosen
            trip: Any = worker.trip
            process.copies.remove(trip)
            trip.is_staging = False
            self.state.worker_events.send_failed(worker, OSError("no"), self.now, trip)
            self.carry_out()

    @rule(data=st.data())
    def take_token(self, data: st.DataObject) -> None:
        """A process takes the token of what it runs next, and does not start that yet."""
        chosen = self.choose(data, lambda _, process: process.trip)
        if chosen:
            chosen[1].has_token = True

    @rule(data=st.data(), seconds=st.sampled_from([0.0, 0.3]))
    def begin(self, data: st.DataObject, seconds: float) -> None:
        """A process starts its work item, at once or a little later."""
        chosen = self.choose(data, lambda _, process: process.trip and process.started_at is None)
        if chosen:
            self.wait(seconds)
            worker, process = chosen
            if worker in self.processes and process.trip and process.started_at is None:
                self.start_item(worker, process)

    def start_item(self, worker: Worker, process: Process) -> None:
        """Have a worker set up the function, and start its work item."""
        assert process.trip is not None
        process.has_token = True
        item = process.trip.item
        if process.is_setting_up:
            trip, process.is_setting_up = process.trip, False
            is_wanted = process.abandoned_seq != trip.seq
            if not is_wanted:
                process.decline()
            self.state.worker_events.set_up(worker, trip.seq, self.now)
            if not is_wanted:
                self.carry_out()
                return
        process.started_at, process.started_seq = self.now, process.trip.seq
        process.halted = 0.0
        if not item.is_tear_down and not item.is_setup_only:
            assert item not in self.begun, "no work item runs twice"
            assert item not in self.recalled, "what was taken back does not begin"
            self.begun.add(item)
            process.batches += 1
        self.carry_out()

    @rule()
    def get_going(self) -> None:
        """All processes get ready, and start what they have."""
        for worker, process in list(self.processes.items()):
            if worker.state is WorkerState.STARTING and not process.must_exit:
                self.state.worker_events.ready(worker, self.now)
                self.carry_out()
            if process.trip is not None and process.started_at is None:
                self.start_item(worker, process)

    @rule(data=st.data(), is_read=st.lists(st.booleans(), min_size=2, max_size=8))
    def go_on(self, data: st.DataObject, is_read: list[bool]) -> None:
        """Processes do what is next; the parent may read their replies later."""
        for reads in is_read:
            chosen = self.choose(
                data,
                lambda worker, process: (
                    not process.must_exit and (worker.state is WorkerState.STARTING or process.trip)
                ),
            )
            if chosen is None:
                return
            worker, process = chosen
            if worker.state is WorkerState.STARTING:
                self.state.worker_events.ready(worker, self.now)
                self.carry_out()
            elif process.started_at is None:
                self.start_item(worker, process)
            else:
                process.finish()
                if reads:
                    self.drain(worker, process)

    @rule(data=st.data())
    def reply(self, data: st.DataObject) -> None:
        """A process replies."""
        chosen = self.choose(data, lambda _, process: process.started_at is not None)
        if chosen:
            self.answer(*chosen)

    @rule(data=st.data())
    def reply_unread(self, data: st.DataObject) -> None:
        """A process replies, which the parent reads later."""
        chosen = self.choose(data, lambda _, process: process.started_at is not None)
        if chosen:
            chosen[1].finish()

    @rule(data=st.data(), is_read=st.booleans())
    def raise_later(self, data: st.DataObject, is_read: bool) -> None:
        """A batch raises `Later`, and its worker does not begin what waits there."""
        chosen = self.choose(data, lambda _, process: process.started_at is not None)
        if chosen:
            worker, process = chosen
            process.put_off()
            if is_read:
                self.drain(worker, process)

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """The parent reads what a process has replied."""
        chosen = self.choose(data, lambda _, process: process.replies)
        if chosen:
            self.drain(*chosen)

    def answer(self, worker: Worker, process: Process) -> None:
        """Have a worker reply."""
        process.finish()
        self.drain(worker, process)

    def drain(self, worker: Worker, process: Process) -> None:
        """Read what a worker has replied, unless it was killed."""
        while process.replies:
            trip = process.replies.pop(0)
            if trip in process.declined:
                process.declined.remove(trip)
                self.read_decline(worker, trip)
            elif not worker.is_killed:
                self.read_reply(worker, trip)

    def read_decline(self, worker: Worker, trip: Trip) -> None:
        """Read that a worker does not begin what was sent ahead."""
        if worker.is_killed or worker.trip is not trip:
            return
        seconds = self.state.worker_events.reply_came(worker, self.now)
        if trip.item in self.state.pending:
            events = self.state.worker_events
            events.lacked(worker, trip.item, seconds, self.now, function=False)
        self.state.worker_events.reply_read(worker, self.now)
        self.carry_out()

    def read_reply(self, worker: Worker, trip: Trip) -> None:
        """Read a reply; the driver ignores replies that nothing waits for."""
        if worker.trip is not trip:
            return
        item, events = trip.item, self.state.worker_events
        if item.is_tear_down or item.is_setup_only:
            seconds = events.reply_came(worker, self.now)
            if item.is_tear_down:
                events.torn_down(worker, item, seconds)
            else:
                events.prepared(worker, item, seconds, was_set_up=True)
                self.deliver(item)
            events.reply_read(worker, self.now)
            self.carry_out()
        elif self.resubmits:
            events.reply_came(worker, self.now)
            self.deliver(item)
            self.submit_to(item.function, item.client)
            events.reply_read(worker, self.now)
            self.carry_out()
        else:
            events.finished(worker, self.now)
            self.carry_out()
            self.deliver(item)

    def deliver(self, item: WorkItem) -> None:
        """Pass results on, as the driver does."""
        if item in self.state.pending:
            self.state.pending.pop(item, None)
            self.resolve(item, "results")

    @rule(data=st.data())
    def set_up_raises(self, data: st.DataObject) -> None:
        """A worker replies that a set-up ahead of its batches has raised."""
        chosen = self.choose(
            data,
            lambda worker, process: (
                process.trip
                and worker.trip is process.trip
                and process.trip.item.is_setup_only
                and not process.must_exit
            ),
        )
        if chosen:
            worker, process = chosen
            assert process.trip is not None
            item, process.trip, process.is_setting_up = process.trip.item, process.waiting, False
            process.waiting, process.started_at = None, None
            events, error = self.state.worker_events, RuntimeError("no")
            seconds = events.reply_came(worker, self.now)
            events.prepared(worker, item, seconds, was_set_up=False)
            if item in self.state.pending:
                events.setup_failed(worker, error, self.now)
                self.state.pending.pop(item, None)
                self.resolve(item, error)
            events.reply_read(worker, self.now)
            self.carry_out()

    @rule(data=st.data())
    def lack(self, data: st.DataObject) -> None:
        """A worker asks for what its work item needs."""
        chosen = self.choose(
            data,
            lambda worker, process: (
                process.trip
                and process.started_at is None
                and worker.trip is process.trip
                and process.trip.item.items
                and not process.replies
            ),
        )
        if chosen:
            worker, process = chosen
            trip, process.is_setting_up = process.trip, False
            assert trip is not None
            process.trip, process.waiting = process.waiting, None
            seconds = self.state.worker_events.reply_came(worker, self.now)
            if trip.item in self.state.pending:
                self.state.worker_events.lacked(worker, trip.item, seconds, self.now, function=True)
            self.state.worker_events.reply_read(worker, self.now)
            self.carry_out()

    @rule(data=st.data(), channel_first=st.booleans(), code=st.sampled_from([-9, -11, 0, 1]))
    def exit(self, data: st.DataObject, channel_first: bool, code: int) -> None:
        """A worker crashes, or exits as it should."""
        chosen = self.choose(data, lambda *_: True)
        if not chosen:
            return
        worker, process = chosen
        if channel_first:
            self.state.worker_events.channel_ended(worker, self.now)
            self.carry_out()
        self.end_process(worker, process, code)

    def end_process(self, worker: Worker, process: Process, code: int) -> None:
        """Report the exit of a process."""
        worker.exit_code = code
        self.drain(worker, process)
        if worker not in self.processes:
            return
        progress = process.progress(worker.trip)
        before = self.interrupts()
        self.state.worker_events.exited(worker, progress, self.now)
        if process.is_interrupted and not self.state.supervisor.closing:
            assert self.interrupts() == before + 1, "it counts, however it has exited"
        self.processes.pop(worker, None)
        self.carry_out()

    def interrupts(self) -> int:
        """Return how many workers have exited that were interrupted."""
        crashed = self.ledger.counts().crashed
        return crashed.get(TIMEOUT, 0) + crashed.get(ABANDONED, 0)

    @rule(data=st.data())
    def initializer_raises(self, data: st.DataObject) -> None:
        """A process exits since its initializer raised."""
        chosen = self.choose(data, lambda worker, _: worker.state is WorkerState.STARTING)
        if chosen:
            worker, process = chosen
            worker.start_failure = StartFailure(RuntimeError("no"), "the initializer raised")
            self.end_process(worker, process, 1)

    @rule(data=st.data())
    def sending_fails(self, data: st.DataObject) -> None:
        """A work item cannot be sent."""
        chosen = self.choose(
            data, lambda worker, process: worker.trip is not None and worker.trip is process.trip
        )
        if chosen:
            worker, process = chosen
            trip, process.trip, process.started_at = process.trip, None, None
            self.state.worker_events.send_failed(worker, OSError("no"), self.now, trip)
            self.carry_out()

    @rule(memory=st.sampled_from([0, 200]), refuses=st.booleans())
    def change_the_machine(self, memory: int, refuses: bool) -> None:
        """Memory is used up, or free again."""
        self.memory, self.refuses = memory, refuses

    # --- time and stops

    @rule(seconds=st.sampled_from([0.1, 0.6, 2.0, 40.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.note_trips()
        self.now += seconds
        if self.state.assignment.wake_at <= self.now:
            self.state.time_limits.tick(self.now)
            self.carry_out_in_time()

    def note_trips(self) -> None:
        """Note what the parent knows, before time passes."""
        for worker, process in self.processes.items():
            process.note_trip(worker, self.now)

    def carry_out_in_time(self) -> None:
        """Do what the state says since time has passed."""
        self.time_passes = True
        self.carry_out()
        self.time_passes = False

    @rule(data=st.data(), seconds=st.sampled_from([-0.01, 0.0, 0.1]))
    def reach_the_time_limit(self, data: st.DataObject, seconds: float) -> None:
        """A batch runs nearly as long as it may, or longer; or something is due."""
        times = [
            process.started_at + process.halted + process.trip.item.timeout
            for process in self.processes.values()
            if process.trip and process.started_at is not None and process.trip.item.timeout
        ]
        if self.state.assignment.wake_at < math.inf:
            times.append(self.state.assignment.wake_at)
        if times:
            self.wait(max(0.0, data.draw(st.sampled_from(times)) - self.now + seconds))

    @rule(
        target=items,
        call=st.tuples(st.integers(0, 2), st.integers(0, 3)),
        flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        delay=st.sampled_from([0.0, 0.3]),
        halts=st.tuples(*[st.sampled_from([0.0, 0.6])] * 2),
        seconds=st.sampled_from([-0.01, 0.0, 0.1]),
    )
    def run_long(
        self,
        call: tuple[int, int],
        flags: tuple[bool, bool, bool],
        delay: float,
        halts: tuple[float, float],
        seconds: float,
    ) -> WorkItem:
        """A call comes, begins late, and runs nearly as long as it may, or longer."""
        client, function = call
        until_end, is_loaded, waits_at_worker = flags
        if is_loaded:
            self.submit_to(self.functions[function], client)
            self.get_going()
            self.step()
        before = None
        if waits_at_worker:
            before = self.submit_to(self.functions[function], client)
            self.get_going()
        item = self.submit_to(self.functions[function], client, 0.5, until_end=until_end)
        self.wait(delay)
        for worker, process in list(self.processes.items()):
            if process.trip and process.trip.item is before and process.started_at is not None:
                self.answer(worker, process)
        self.halt(halts[0])
        self.get_going()
        self.halt(halts[1])
        for process in list(self.processes.values()):
            if process.trip and process.trip.item is item and process.started_at is not None:
                self.wait(0.5 - process.seconds(self.now) + seconds)
        return item

    @rule(seconds=st.sampled_from([0.6, 40.0]))
    def halt(self, seconds: float) -> None:
        """Time passes in which the whole program is halted: no worker has exceeded a limit."""
        due = [worker for worker in self.processes if worker.deadline <= self.now]
        self.note_trips()
        self.now += seconds
        for process in self.processes.values():
            process.halt(seconds)
        self.state.time_limits.tick(self.now, seconds)
        for command in self.state.assignment.commands:
            if isinstance(command, commands.KillWorker | commands.CheckWorker):
                assert command.worker in due or self.state.supervisor.closing
        self.carry_out_in_time()

    @precondition(lambda self: not self.stopping and self.now >= self.may_stop_at)
    @rule()
    def refuse_new_work(self) -> None:
        """A stop begins."""
        self.state.close()

    @precondition(lambda self: self.now >= self.may_stop_at)
    @rule(force=st.booleans(), with_tear_downs=st.booleans())
    def stop(self, force: bool, with_tear_downs: bool) -> None:
        """All workers are to stop."""
        if not force and self.state.has_unfinished_work():
            return
        self.stopping = True
        tearing_down = [
            worker
            for worker in self.processes
            if with_tear_downs and (worker.trip is None or worker.trip.item.is_tear_down)
        ]
        self.state.shut_down(self.now, force=force, tearing_down=tearing_down if force else ())
        self.carry_out()
        if force:
            assert not [item for item in self.submitted if self.is_open(item)]

    # --- promises

    @invariant()
    def no_worker_is_idle_while_something_waits(self) -> None:
        """No worker is idle while something waits for any worker, or for it."""
        supervisor, backlog = self.state.supervisor, self.state._backlog
        if self.max_tasks is not None and not (self.has_setups and self.max_tasks > 1):
            idle = [self.processes[worker].batches for worker in supervisor.idle]
            assert all(count < self.max_tasks for count in idle), "it is replaced"
        assert not (supervisor.idle and len(backlog.queue))
        assert not (supervisor.idle and any(not t.is_asked_back for t in supervisor.ahead.values()))
        for worker in supervisor.ahead:
            assert worker.trip is not None or not worker.is_alive()
        for client in list(backlog.queue.queues)[:1]:
            key = backlog.queue.queues[client][0].key
            for worker in supervisor.workers:
                could_wait = supervisor.may_wait_at(worker) and worker not in backlog.assigned
                has_loaded = key in worker.functions.keys and key not in worker.functions.outdated
                assert not (could_wait and has_loaded and worker.trip not in self.refreshes)
        for worker in supervisor.idle:
            assert worker.state is WorkerState.IDLE
            assert worker not in backlog.assigned
        assert len(set(supervisor.idle)) == len(supervisor.idle)

    @invariant()
    def what_is_copied_is_sent(self) -> None:
        """What has not been sent is being copied, or held behind what is being copied."""
        for worker, process in self.processes.items():
            current, waiting = worker.trip, self.state.supervisor.ahead.get(worker)
            if not worker.is_alive():
                continue
            if current is not None and current.is_staging:
                assert current in process.copies
                assert worker.deadline == math.inf, "its time has not begun"
                assert waiting is None or waiting.is_staging
            elif waiting is not None and waiting.is_staging:
                assert waiting in process.copies

    @invariant()
    def limits_are_kept(self) -> None:
        """There are as many workers as there may be."""
        supervisor = self.state.supervisor
        assert len(supervisor.active()) <= self.size
        alive = [worker for worker in supervisor.workers if worker.is_alive()]
        replaced = [worker for worker in alive if worker.has_replacement]
        assert len(alive) <= self.size + len(replaced)
        if self.max_tasks is not None and not (self.has_setups and self.max_tasks > 1):
            for process in self.processes.values():
                assert process.batches <= self.max_tasks, "a worker runs no more than it may"
        self.note_requeued()

    @invariant()
    def numbers_are_distinct(self) -> None:
        """No two workers that take batches, or will, have the same number."""
        supervisor = self.state.supervisor
        staying = [one for one in supervisor.workers if one.is_alive() and not one.has_replacement]
        for workers in (supervisor.active(), staying):
            numbers = [worker.number for worker in workers]
            assert len(set(numbers)) == len(numbers)
        assert all(0 <= worker.number < self.size for worker in supervisor.workers)

    @invariant()
    def everything_is_watched(self) -> None:
        """What is due makes the timer fire in time."""
        supervisor = self.state.supervisor
        deadlines = [worker.deadline for worker in supervisor.workers]
        assert self.state.assignment.wake_at <= min([supervisor.retry_at, *deadlines])
        for worker in supervisor.workers:
            if worker.state in (WorkerState.STARTING, WorkerState.STOPPING, WorkerState.EXITING):
                assert worker.deadline < math.inf
            if worker.state is WorkerState.INTERRUPTED:
                assert worker.deadline <= self.now + INTERRUPT_GRACE

    @invariant()
    def time_limits_are_kept(self) -> None:
        """A batch that has exceeded its time limit has its outcome, and its worker ends."""
        for worker, process in self.processes.items():
            process.note_trip(worker, self.now)
            trip = process.trip
            if process.interrupted_at is not None:
                has_ended = self.now - process.interrupted_at < INTERRUPT_GRACE + ROUNDING
                assert process.must_exit or has_ended, "it is killed"
            if trip is None or trip.item.timeout is None or process.started_at is None:
                continue
            seconds, verdict = process.seconds(self.now), trip.item.verdict
            if isinstance(verdict, BatchTimeoutError):
                assert seconds >= trip.item.timeout - ROUNDING, "not before its time limit"
            if process.must_exit or process.known_trip is not trip:  # a reply has not been read
                continue
            if min(seconds, self.now - process.known_at) > trip.item.timeout + ROUNDING:
                assert process.is_interrupted
                assert verdict is not None or not self.is_open(trip.item)

    @invariant()
    def no_worker_goes_on_without_callers(self) -> None:
        """A worker knows that the batch which it runs has no callers."""
        for process in self.processes.values():
            trip = process.trip
            if trip is None or not process.has_token or process.must_exit:
                continue
            item = trip.item
            if item in self.begun and (item.is_abandoned or item in self.outcomes):
                assert process.abandoned_seq == trip.seq or process.is_interrupted

    @invariant()
    def open_work_is_known(self) -> None:
        """An item that is not resolved waits or is at a worker, and workers come for it."""
        backlog = self.state._backlog
        waiting = {*backlog.queue, *(item for items in backlog.assigned.values() for item in items)}
        waiting.update(trip.item for trip in self.state.supervisor.ahead.values())
        for item in self.submitted:
            if self.is_open(item):
                assert item in backlog.pending
                assert item in waiting or self.state.assignment.worker_of(item) is not None
        if waiting and not self.stopping:
            supervisor = self.state.supervisor
            assert supervisor.workers or supervisor.retry_at < math.inf

    def teardown(self) -> None:
        """From any state, everything ends when the machine does its part."""
        if not hasattr(self, "state"):
            return
        self.refuses, self.memory, self.resubmits = False, 0, False
        for _ in range(2_000):
            if not self.state.has_unfinished_work():
                break
            self.step()
        else:
            pytest.fail(f"work goes on for ever: {self.state._backlog.pending}")
        supervisor = self.state.supervisor
        for _ in range(200):
            is_restarted = all(worker.state is WorkerState.EXITED for worker in self.outdated)
            if is_restarted or supervisor.restart.error or self.state.assignment.closing:
                break
            assert supervisor.start_error is None or supervisor.workers, "the restart goes on"
            self.step()
        else:
            pytest.fail("a restart never ends")
        if not self.state.assignment.closing:
            self.state.started(self.now)
            self.carry_out()
        for _ in range(200):
            if len(supervisor.active()) == self.size or self.state.assignment.closing:
                break
            if supervisor.start_error is not None:
                self.state.started(self.now)  # the next call tries again
                self.carry_out()
            self.step()
        else:
            states = [(worker.state, worker.number) for worker in supervisor.workers]
            pytest.fail(f"the workers are not all there: {states}")
        self.stopping = True
        self.state.shut_down(self.now, force=False, tearing_down=())
        self.carry_out()
        for _ in range(200):
            if not self.state.supervisor.workers:
                break
            self.step()
        assert not self.state.supervisor.workers
        assert not [item for item in self.submitted if self.is_open(item)]

    @rule()
    def step(self) -> None:
        """Every process does what it has to."""
        for worker, process in list(self.processes.items()):
            for trip in list(process.copies):
                self.end_copy(trip, process)
            if process.must_exit:
                self.end_process(worker, process, 0)
            elif worker.state is WorkerState.STARTING:
                self.state.worker_events.ready(worker, self.now)
                self.carry_out()
            elif process.replies:
                self.drain(worker, process)
            elif process.trip is not None:
                if process.started_at is None:
                    self.start_item(worker, process)
                if process.started_at is not None:
                    self.answer(worker, process)
        self.wait(0.3)


TestPoolState = PoolMachine.TestCase
TestPoolState.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("why", ["", "the initializer raised"])
def test_failed_starts_that_overlap_end_the_wait(why: str) -> None:
    """A call fails although a worker is always starting, since none has ever been ready."""
    state = PoolState(PoolLimits(2, START_TIMEOUT), WorkerLedger())
    function: Any = FakeFunction(b"0", has_setup=False)
    item = WorkItem(function, None)
    state.submitted(item, 0.0)
    now = 0.0
    for number in range(100):
        now += 3.0
        state.time_limits.tick(now)
        worker = state.supervisor.workers[0]
        worker.exit_code = 1
        error = RuntimeError(f"no licence {number}")
        worker.start_failure = StartFailure(error, why)
        state.worker_events.exited(worker, Progress(), now)
        if item not in state.pending:
            break
    resolved = [c for c in state.assignment.commands if isinstance(c, commands.Resolve)]
    assert "no licence" in str(resolved[0].outcome)
    assert number < 10


def test_a_restart_that_fails_while_a_worker_runs_its_last_batch() -> None:
    """The worker is replaced all the same, so that another restart can replace the others."""
    state = PoolState(PoolLimits(1, START_TIMEOUT, max_tasks=2), WorkerLedger())
    function: Any = FakeFunction(b"0", has_setup=True)

    def submit() -> None:
        item = WorkItem(function, None)
        item.items = (False, b"", ())
        state.submitted(item, 0.0)

    submit()
    (worker,) = state.supervisor.workers
    state.worker_events.ready(worker, 0.0)
    state.worker_events.set_up(worker, 1, 0.0)
    state.worker_events.finished(worker, 10.0)
    state.restarted(10.0)
    submit()
    _, replacement = state.supervisor.workers
    replacement.exit_code = 1
    replacement.start_failure = StartFailure(RuntimeError("no"), "the initializer raised")
    state.worker_events.exited(replacement, Progress(), 10.0)
    assert state.supervisor.restart.error is not None
    state.time_limits.tick(20.0)
    assert state.supervisor.workers == [worker]
    state.worker_events.finished(worker, 20.0)
    assert worker.retire_when_replaced
    assert len(state.supervisor.workers) == 2


def test_a_restart_after_failed_starts() -> None:
    """It starts workers again, as a call does, and replaces the one that was late."""
    state = PoolState(PoolLimits(2, START_TIMEOUT), WorkerLedger())
    state.started(0.0)
    late, now = state.supervisor.workers[0], 0.0
    while state.supervisor.start_error is None:
        now += 3.0
        state.time_limits.tick(now, 3.0)  # so that no start takes too long
        other = state.supervisor.workers[-1]
        other.exit_code = 3
        state.worker_events.exited(other, Progress(), now)
    state.worker_events.ready(late, now)
    assert state.supervisor.workers == [late]
    state.restarted(now)
    state.time_limits.tick(now + 10.0, 10.0)
    _, *others = state.supervisor.workers
    for worker in others:
        state.worker_events.ready(worker, now + 10.0)
    assert late.retire_when_replaced
    assert [worker.number for worker in state.supervisor.workers].count(late.number) == 2


def test_the_last_worker_crashes_while_another_start_is_delayed() -> None:
    """The delay is that of a pool without workers."""
    state = PoolState(PoolLimits(2, START_TIMEOUT), WorkerLedger())
    state.started(0.0)
    first, now = state.supervisor.workers[0], 0.0
    state.worker_events.ready(first, now)
    for _ in range(6):
        now = max(now, state.assignment.wake_at if state.supervisor.retry_at < math.inf else now)
        state.time_limits.tick(now)
        other = state.supervisor.workers[-1]
        assert other is not first
        other.exit_code = 3
        state.worker_events.exited(other, Progress(), now)
    assert state.supervisor.retry_at == now + 5.0
    first.exit_code = 3
    state.worker_events.exited(first, Progress(), now)
    assert state.assignment.wake_at == state.supervisor.retry_at == now + 1.0


def test_more_functions_than_a_worker_keeps() -> None:
    """A new worker gets ready all the same; it has loaded the last ones."""
    state = PoolState(PoolLimits(1, START_TIMEOUT), WorkerLedger())
    functions: list[Any] = [
        FakeFunction(bytes([n]), has_setup=False) for n in range(MAX_CACHED_FUNCTIONS + 3)
    ]
    state.started(0.0)
    (worker,) = state.supervisor.workers
    for function in functions:
        state.preloaded(function, [], 0.0)
    state.worker_events.ready(worker, 0.0)
    for _ in functions:
        if worker.trip is not None:
            item = worker.trip.item
            state.worker_events.reply_came(worker, 0.0)
            state.worker_events.prepared(worker, item, 0.0, was_set_up=True)
            state.pending.pop(item, None)
            state.worker_events.reply_read(worker, 0.0)
    assert worker.state is WorkerState.IDLE
    assert list(worker.functions.keys) == [function.key for function in functions[3:]]


@pytest.mark.parametrize("how", ["cancelled", "interrupted", "withdrawn", "aborted"])
def test_a_batch_that_is_cancelled_while_it_is_copied(how: str) -> None:
    """Its worker, which has nothing yet, goes on; the copy is not sent."""
    state, worker, (trip,) = _running(None)
    trip.is_staging = True
    if how == "withdrawn":
        state.withdrawn(trip.item, 1.0)
    elif how == "aborted":
        state.aborted(trip.item.client, RuntimeError("stopped"), 1.0, in_setup=[])
    else:
        state.cancelled(trip.item, 1.0, force=how == "interrupted")
    assert trip.item not in state.pending
    assert (commands.Resolve in _types(state)) == (how != "withdrawn")
    assert commands.Abandon not in _types(state)
    assert worker.state is WorkerState.IDLE
    assert worker.trip is None


def test_a_stop_by_force_while_a_batch_is_copied() -> None:
    """The worker, which goes on, gets none of the batcher's other batches."""
    state, worker, (trip,) = _running(None)
    trip.is_staging = True
    function: Any = FakeFunction(b"1", has_setup=False)
    item = WorkItem(function, None, trip.item.client)
    item.items = (False, b"", ())
    state.submitted(item, 1.0)
    state.aborted(item.client, RuntimeError("stopped"), 1.0, in_setup=[])
    assert _types(state).count(commands.Resolve) == 2
    assert not {Trip, commands.Abandon} & {*_types(state)}
    assert worker.state is WorkerState.IDLE


def test_what_is_held_behind_a_copy_is_sent() -> None:
    """When that is sent, or not to be sent; at once, and once."""
    for is_cancelled in (False, True):
        state, _, (first, second) = _running(None, None)
        first.is_staging = second.is_staging = True
        if is_cancelled:
            state.cancelled(first.item, 1.0, force=False)
        else:
            first.is_staging = False
            state.worker_events.sent(first, 1.0)
        assert [one for one in state.assignment.commands if type(one) is Trip] == [second]


def test_a_batch_that_is_copied_has_no_deadline() -> None:
    """Nor has it one if its worker is checked because of the batch before."""
    state, worker, (first, second) = _running(None, 5.0)
    second.is_staging = True
    state.worker_events.finished(worker, 1.0)
    assert worker.trip is second
    state.time_limits.checked(worker, second, Progress(started_seq=first.seq), 1.0)
    assert worker.deadline == math.inf
    second.is_staging = False
    state.worker_events.sent(second, 9.0)
    assert worker.deadline == 14.0


def test_a_refresh_that_was_not_sent() -> None:
    """The next batch takes it along. It is no set-up, so the batch can be interrupted."""
    state, worker, (first,) = _running(None)
    state.worker_events.finished(worker, 1.0)
    state.refreshed(first.item.key, 1.0)
    function: Any = first.item.function
    for _ in range(2):
        item = WorkItem(function, None)
        item.items = (False, b"", ())
        state.submitted(item, 2.0)
        trip = worker.trip
        assert trip is not None
        assert trip.is_refresh
        trip.is_staging = True  # it is being copied
        state.cancelled(item, 3.0, force=True)
        assert worker.state is WorkerState.IDLE


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_function_that_is_loaded_although_the_pool_has_forgotten_it(has_begun: bool) -> None:
    """No set-up is reported. A cancelled batch that has begun is interrupted anyway."""
    state, worker, (first,) = _running(None)
    state.worker_events.finished(worker, 1.0)
    worker.functions.discard(first.item.key)
    item = WorkItem(first.item.function, None)
    item.items = (False, b"", ())
    state.submitted(item, 2.0)
    trip = worker.trip
    assert trip is not None
    assert trip.setup_timeout is not None
    state.cancelled(item, 3.0, force=True)
    now = state.assignment.wake_at
    state.time_limits.tick(now)
    assert commands.CheckWorker(worker) in state.assignment.commands
    started_at, started_seq = (2.5, trip.seq) if has_begun else (None, 0)
    progress = Progress(started_at=started_at, started_seq=started_seq)
    state.time_limits.checked(worker, trip, progress, now)
    assert worker.state is (WorkerState.INTERRUPTED if has_begun else WorkerState.EXITING)


def test_a_batch_that_begins_although_it_was_cancelled_in_the_set_up() -> None:
    """With ``force`` it is interrupted as soon as the set-up has ended, not before."""
    state = PoolState(PoolLimits(1, START_TIMEOUT), WorkerLedger())
    function: Any = FakeFunction(b"0", has_setup=True)
    item = WorkItem(function, None)
    item.items = (False, b"", ())
    state.submitted(item, 0.0)
    (worker,) = state.supervisor.workers
    state.worker_events.ready(worker, 0.0)
    trip = worker.trip
    assert trip is not None
    state.cancelled(item, 1.0, force=True)
    state.time_limits.checked(worker, trip, Progress(is_setting_up=True), 1.1)
    assert worker.is_alive()
    state.assignment.commands.clear()
    state.worker_events.set_up(worker, trip.seq, 1.2)
    assert commands.CheckWorker(worker) in state.assignment.commands
    progress = Progress(started_at=1.2, started_seq=trip.seq)
    state.time_limits.checked(worker, trip, progress, 1.2)
    assert worker.state is WorkerState.INTERRUPTED


def _running(*timeouts: float | None) -> tuple[PoolState, Worker, list[Trip]]:
    """Return a pool whose worker runs the first of some work items; the next one waits there."""
    state = PoolState(PoolLimits(1, START_TIMEOUT, max_memory=MAX_MEMORY), WorkerLedger())
    function: Any = FakeFunction(b"0", has_setup=False)
    trips: list[Any] = []
    for timeout in timeouts:
        item = WorkItem(function, None, timeout=timeout)
        item.items = (False, b"", ())
        state.submitted(item, 0.0)
        worker = state.supervisor.workers[0]
        if not trips:
            state.worker_events.ready(worker, 0.0)
            state.worker_events.set_up(worker, 1, 0.0)
        trips.append(state.assignment.commands.pop())
    state.assignment.commands.clear()
    return state, worker, trips


def test_a_halt_is_added_to_the_time_limit() -> None:
    """A batch may run for its time limit, as a program that is not halted counts it."""
    state, worker, (trip,) = _running(5.0)
    limits, progress = state.time_limits, Progress(started_at=0.0, started_seq=trip.seq)
    limits.tick(42.0, 40.0)
    assert not state.assignment.commands
    limits.checked(worker, trip, progress, 44.9)
    assert worker.is_alive()
    limits.checked(worker, trip, progress, 45.1)
    assert worker.state is WorkerState.INTERRUPTED


def test_a_halt_before_a_batch_begins_is_not_added() -> None:
    """While its function is set up, or another batch runs, its time limit does not count yet."""
    state, worker, (trip,) = _running(5.0)
    limits = state.time_limits
    limits.tick(42.0, 40.0)
    progress = Progress(started_at=43.0, started_seq=trip.seq)
    limits.tick(45.0, 1.0)
    limits.checked(worker, trip, progress, 48.9)
    assert worker.is_alive()
    limits.checked(worker, trip, progress, 49.1)
    assert worker.state is WorkerState.INTERRUPTED


@pytest.mark.parametrize("has_replied", [False, True])
def test_a_time_limit_of_a_batch_after_which_one_waits(has_replied: bool) -> None:
    """The one that waits is taken back first; if the worker has started it, the first is done."""
    state, worker, (first, second) = _running(5.0, 5.0)
    limits, queue = state.time_limits, state.assignment.commands
    progress = Progress(started_at=0.0, started_seq=first.seq)
    limits.checked(worker, first, progress, 5.1)
    assert [type(queue.popleft()) for _ in "12"] == [commands.TakeBack, commands.CheckWorker]
    state.worker_events.taken_back(worker, set() if has_replied else {second.seq}, 5.1)
    if has_replied:
        state.worker_events.finished(worker, 5.1)
        limits.checked(worker, second, Progress(started_at=5.1, started_seq=second.seq), 5.2)
        assert worker.state is WorkerState.BUSY
        assert worker.trip is second
    else:
        limits.checked(worker, first, progress, 5.2)
        assert worker.state is WorkerState.INTERRUPTED
        assert second.item in state._backlog.queue


def _types(state: PoolState) -> list[type]:
    return [type(command) for command in state.assignment.commands]


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_batch_after_which_the_next_one_has_begun(timeout: float | None) -> None:
    """It has ended, although its reply has not been read: it is not put back, or interrupted."""
    state, worker, (first, second) = _running(timeout, 5.0)
    progress = Progress(started_at=None, started_seq=second.seq)
    if timeout is None:
        state.cancelled(first.item, 9.0, force=True)
    state.time_limits.checked(worker, first, progress, 9.0)
    assert worker.state is WorkerState.BUSY
    assert worker.trip is first
    assert first.item not in state._backlog.queue
    assert worker.deadline < 9.1, "it is checked again"


def test_a_waiting_batch_without_callers_that_has_begun() -> None:
    """With ``force`` it is interrupted as soon as the reply to the one before is read."""
    state, worker, (_, second) = _running(None, None)
    state.cancelled(second.item, 1.0, force=True)
    state.worker_events.taken_back(worker, set(), 1.0)
    state.assignment.commands.clear()
    state.worker_events.finished(worker, 2.0)
    assert commands.CheckWorker in _types(state)
    progress = Progress(started_at=1.5, started_seq=second.seq)
    state.time_limits.checked(worker, second, progress, 2.0)
    assert worker.state is WorkerState.INTERRUPTED


def test_a_waiting_batch_that_cannot_be_sent() -> None:
    """It fails alone; the batch that runs is not affected."""
    state, worker, (first, second) = _running(None, None)
    state.worker_events.send_failed(worker, MemoryError(), 1.0, second)
    assert _types(state) == [commands.Resolve]
    assert worker.trip is first
    assert worker.is_alive()


def test_a_waiting_batch_is_not_overtaken_for_long() -> None:
    """It is taken back from a worker that is busy for long, and the next worker gets it."""
    state = PoolState(PoolLimits(2, START_TIMEOUT), WorkerLedger())
    function: Any = FakeFunction(b"0", has_setup=False)

    def submit() -> WorkItem:
        item = WorkItem(function, None)
        item.items = (False, b"", ())
        state.submitted(item, 0.0)
        return item

    state.started(0.0)
    for worker in state.supervisor.workers:
        state.worker_events.ready(worker, 0.0)
    slow, fast = (state.assignment.worker_of(submit()) for _ in "12")
    assert slow is not None
    assert fast is not None
    waiting = submit()
    assert state.supervisor.ahead[slow].item is waiting
    submit()
    for _ in range(50):
        submit()
        state.worker_events.finished(fast, 1.0)
        taken = [c for c in state.assignment.commands if isinstance(c, commands.TakeBack)]
        if taken:
            break
    assert taken == [commands.TakeBack(state.supervisor.ahead[slow])]
    state.worker_events.taken_back(slow, {taken[0].trip.seq}, 1.0)
    assert state.supervisor.ahead[fast].item is waiting


def test_an_idle_worker_gets_another_batch_if_the_first_one_has_begun() -> None:
    """What could not be taken back from one worker leaves the idle worker to the others."""
    state = PoolState(PoolLimits(3, START_TIMEOUT), WorkerLedger())
    function: Any = FakeFunction(b"0", has_setup=False)

    def submit() -> None:
        item = WorkItem(function, None)
        item.items = (False, b"", ())
        state.submitted(item, 0.0)

    state.started(0.0)
    for worker in state.supervisor.workers:
        state.worker_events.ready(worker, 0.0)
    for _ in range(5):
        submit()
    first, second = state.supervisor.ahead
    (other,) = [worker for worker in state.supervisor.workers if worker not in (first, second)]
    state.assignment.commands.clear()
    state.worker_events.finished(other, 1.0)
    assert list(state.assignment.commands) == [commands.TakeBack(state.supervisor.ahead[first])]
    state.assignment.commands.clear()
    state.worker_events.taken_back(first, set(), 1.0)
    assert list(state.assignment.commands) == [commands.TakeBack(state.supervisor.ahead[second])]


@pytest.mark.parametrize("how", ["stopped by force", "unreadable", "cannot be sent to"])
def test_what_waits_at_a_worker_is_taken_back_before_a_kill(how: str) -> None:
    """The worker may come to it before the signal does; another worker need not wait for that."""
    state, worker, (first, second) = _running(None, None)
    if how == "stopped by force":
        state.shut_down(1.0, force=True, tearing_down=())
    elif how == "unreadable":
        state.worker_events.channel_ended(worker, 1.0, ValueError("no message"))
    else:
        state.worker_events.send_failed(worker, OSError("no"), 1.0, first)
    done = [c for c in state.assignment.commands if not isinstance(c, commands.Resolve)]
    assert done[:2] == [commands.TakeBack(second), commands.KillWorker(worker)]
    state.assignment.commands.clear()
    state.worker_events.taken_back(worker, {second.seq}, 1.0)
    assert (second.item in state._backlog.queue) == (how != "stopped by force")
    state.worker_events.exited(worker, Progress(started_seq=first.seq), 2.0)
    assert list(state._backlog.queue) == ([] if how == "stopped by force" else [second.item])


@pytest.mark.parametrize("why", ["memory", "restart"])
def test_what_waits_at_a_worker_that_is_to_be_replaced(why: str) -> None:
    """It is taken back, and runs once, on the replacement, which is ready before the batch ends."""
    state, worker, (first, second) = _running(None, None)
    if why == "memory":
        state.worker_events.memory_measured(worker, MAX_MEMORY + 1, 1.0)
    else:
        state.restarted(1.0)
    assert commands.TakeBack(second) in state.assignment.commands
    state.worker_events.taken_back(worker, {second.seq}, 1.0)
    assert list(state._backlog.queue) == [second.item]
    assert not state.supervisor.ahead, "nothing is sent to it again"
    (replacement,) = [one for one in state.supervisor.workers if one is not worker]
    state.worker_events.ready(replacement, 2.0)
    state.assignment.commands.clear()
    assert worker.trip is first
    state.worker_events.finished(worker, 3.0)
    assert worker.state is WorkerState.STOPPING
    assert state.assignment.worker_of(second.item) is replacement
    trips = [c for c in state.assignment.commands if isinstance(c, Trip)]
    assert [trip.item for trip in trips] == [second.item]
