"""What batchers have used of a `Limit`: what is queued, and what was dispatched lately. Pure."""

from __future__ import annotations

import math
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from async_batcher._batching.scheduler import Scheduler
    from async_batcher.limits import Limit

# Seconds beyond the span of a rate. Some loops count milliseconds, and their timers fire early.
_RATE_MARGIN = 0.002
# Parts of the span of a rate, in each of which what was dispatched is summed up.
_STEPS = 10_000
# Seconds between the batches of batchers that wait for one rate, so that each has its turn.
_TURN_TIME = 0.002
_UNKNOWN: Final = (-1.0, -math.inf)

_turns = count(1)


class LimitState:
    """The state of one `Limit`, for all batchers that share it.

    Attributes:
        members: Those of them that run.
        max_cost: What a batch may cost at most.
    """

    __slots__ = (
        "_allowed", "_awaited", "_by", "_dispatched", "_held_until", "_in_span", "_items",
        "_max_queued", "_queued", "_rate", "_seconds", "counts_batches", "max_cost", "members",
    )  # fmt: skip

    def __init__(self, limit: Limit) -> None:
        self._by: Any = limit.by
        self.counts_batches = limit.by == "batches"
        self._max_queued = math.inf if limit.queued is None else float(limit.queued)
        self._queued = 0.0
        self._items = 0
        rate = (math.inf, 0.0) if limit.rate is None else limit.rate
        self._rate, self._seconds = float(rate[0]), float(rate[1])
        self._dispatched: deque[tuple[float, float]] = deque()  # when, and for what cost
        self._in_span = 0.0
        self._allowed = _UNKNOWN  # for a batch of what cost, and when
        self._held_until: WeakKeyDictionary[LimitStates, float] = WeakKeyDictionary()
        # Until when others wait for its turn; infinity: it is behind them now.
        self._awaited: WeakKeyDictionary[LimitStates, float] = WeakKeyDictionary()
        per_batch = math.inf if limit.per_batch is None else float(limit.per_batch)
        self.max_cost = math.inf if self.counts_batches else min(per_batch, self._rate)
        self.members: WeakSet[LimitStates] = WeakSet()

    @property
    def limits_queue(self) -> bool:
        return self._max_queued < math.inf

    @property
    def has_rate(self) -> bool:
        return self._rate < math.inf

    def cost_of(self, item: Any) -> float:
        """Return what an item costs.

        Raises:
            TypeError: ``by`` did not return a number.
            ValueError: The number is NaN or negative, or the item can never be queued or run.
            Exception: What ``by`` raised.
        """
        if self._by is None:
            return 1.0
        if self.counts_batches:
            return 0.0
        returned = self._by(item)
        if not hasattr(type(returned), "__float__"):
            msg = (
                f"the function of Limit(by=...) returned {returned!r:.100} for the item; it must "
                "return a number"
            )
            raise TypeError(msg)
        cost = float(returned)
        if not cost >= 0:
            msg = (
                f"the function of Limit(by=...) returned {returned!r:.100} for the item; a cost "
                "must be 0 or more"
            )
            raise ValueError(msg)
        for name, limit in (("queued", self._max_queued), ("rate", self._rate)):
            if cost > limit:
                msg = f"the item costs {cost:g}, more than {name}={limit:g}: it can never run"
                raise ValueError(msg)
        return cost

    def restart(self, now: float) -> None:
        """Forget what was queued on an event loop that has closed, and its clock."""
        self._queued, self._items = 0.0, 0
        self._held_until.clear()
        self._awaited.clear()
        self._allowed = _UNKNOWN
        if self._dispatched and self._dispatched[-1][0] > now + self._seconds:
            self._dispatched.clear()
            self._in_span = 0.0

    # --- the queue

    def __str__(self) -> str:
        """What is queued, and what may be."""
        return f"{self._queued:g} queued, queued={self._max_queued:g} of a Limit"

    def has_capacity(self, cost: float) -> bool:
        return self._queued + cost <= self._max_queued

    def enqueue(self, cost: float) -> None:
        if self.limits_queue:  # otherwise a cost may be infinite
            self._queued += cost
            self._items += 1

    def dequeue(self, cost: float) -> None:
        if self.limits_queue:
            self._items -= 1
            self._queued = self._queued - cost if self._items else 0.0  # without rounding errors

    # --- the rate

    def free_at(self, cost: float, now: float, member: LimitStates) -> float:
        """Return when a batch of that cost may be dispatched; ``now`` if it may be at once.

        Those that share a rate take turns: one that waits for it is not overtaken by one that
        dispatched a batch after it.
        """
        if self._rate == math.inf:
            return now
        at = self._allowed_at(cost, now)
        if len(self.members) > 1:
            for other, until in self._held_until.items():
                if until > now and other.last_turn < member.last_turn:
                    at = max(at, until + _TURN_TIME)
                    self._awaited[other] = max(until, self._awaited.get(other, until))
            self._held_until[member] = at
        return at

    def passes_on(self, member: LimitStates, now: float, *, waits: bool) -> bool:
        """Tell whether others wait longer for the turn of a batcher than they have to.

        Args:
            member: The batcher.
            now: When.
            waits: Whether it waits for the rate itself.
        """
        if not waits:
            self._held_until.pop(member, None)
        awaited = self._awaited.get(member, now)
        if awaited <= now or awaited <= self._held_until.get(member, now):
            return False
        del self._awaited[member]  # they are woken, and look again
        return True

    def waiting(self, now: float) -> set[LimitStates]:
        """Return the batchers that wait for the rate."""
        return {member for member, until in self._held_until.items() if until > now}

    def _allowed_at(self, cost: float, now: float) -> float:
        of_cost, at = self._allowed
        if cost != of_cost or at <= now:
            at = self._find_allowed(cost, now)
            self._allowed = cost, at
        return at

    def _find_allowed(self, cost: float, now: float) -> float:
        dispatched, span = self._dispatched, self._seconds + _RATE_MARGIN
        while dispatched and dispatched[0][0] + span <= now:
            self._in_span -= dispatched.popleft()[1]
        if not dispatched:
            self._in_span = 0.0  # without rounding errors
            return now
        left = self._in_span
        if left + cost <= self._rate:
            return now
        for at, used in dispatched:
            left -= used
            if left + cost <= self._rate:
                return at + span
        return dispatched[-1][0] + span

    def dispatch(self, cost: float, now: float, member: LimitStates) -> None:
        if self._rate == math.inf:
            return
        self._allowed = _UNKNOWN
        self._held_until.pop(member, None)
        if self._awaited.pop(member, now) > now:
            self._awaited[member] = math.inf
        self._in_span += cost
        at = now
        if self._dispatched:
            last, used = self._dispatched[-1]
            at = max(now, last)  # a callback's time may be that of a timer that fired early
            step = self._seconds / _STEPS
            if at // step == last // step:  # as if all of it were as late as this
                self._dispatched.pop()
                cost += used
        self._dispatched.append((at, cost))


class LimitStates:
    """The states of all limits of one batcher.

    Attributes:
        states: One for each limit.
        max_costs: What a batch may cost at most, for each limit.
        scheduler: The batcher's, while it runs.
        last_turn: Numbers the last batch, among those of all batchers.
        has_due: Whether anything of the batcher may wait for a rate.
    """

    __slots__ = (
        "__weakref__", "_has_released", "has_due", "last_turn", "max_costs", "scheduler", "states",
    )  # fmt: skip

    def __init__(self, limits: Iterable[Limit] = ()) -> None:
        self.states = [state_of(limit) for limit in dict.fromkeys(limits)]
        self.max_costs = [state.max_cost for state in self.states]
        self._has_released = self.has_due = False
        self.scheduler: Scheduler | None = None
        self.last_turn = 0

    @property
    def have_rates(self) -> bool:
        return any(state.has_rate for state in self.states)

    def costs_of(self, item: Any) -> tuple[float, ...]:
        """Return what an item costs, for each limit; see `LimitState.cost_of`."""
        return tuple(state.cost_of(item) for state in self.states)

    def have_capacity(self, costs: Iterable[float]) -> bool:
        return all(map(LimitState.has_capacity, self.states, costs))

    def enqueue(self, costs: Iterable[float]) -> None:
        for state, cost in zip(self.states, costs, strict=True):
            state.enqueue(cost)

    def dequeue(self, costs: Iterable[float]) -> None:
        self._has_released = True
        for state, cost in zip(self.states, costs, strict=True):
            state.dequeue(cost)

    def join(self, scheduler: Scheduler) -> None:
        """Share the limits with other batchers.

        Raises:
            RuntimeError: One of them runs on another event loop.
        """
        for state in self.states:
            others = [member.scheduler for member in state.members if member.is_running]
            if any(other is not None and other.loop is not scheduler.loop for other in others):
                msg = "a Limit may be shared only by batchers that run on one event loop"
                raise RuntimeError(msg)
            if not others:
                state.restart(scheduler.loop.time())
        self.scheduler = scheduler
        for state in self.states:
            state.members.add(self)

    def leave(self) -> None:
        self.scheduler = None
        for state in self.states:
            state.members.discard(self)

    @property
    def is_running(self) -> bool:
        """Whether its event loop is open, and not that of the parent process."""
        scheduler = self.scheduler
        return scheduler is not None and not (scheduler.loop.is_closed() or scheduler.is_inherited)

    def sharers(self) -> set[Scheduler]:
        """Return the others that share the queue of a limit."""
        return self._others(state.members for state in self.states if state.limits_queue)

    def _others(self, members: Iterable[Iterable[LimitStates]]) -> set[Scheduler]:
        others = {member.scheduler for group in members for member in group if member.is_running}
        return {other for other in others if other is not None and other is not self.scheduler}

    def take_sharers(self) -> set[Scheduler]:
        """Return them if that has capacity again."""
        released, self._has_released = self._has_released, False
        return self.sharers() if released else set()

    def take_waiting(self, now: float) -> set[Scheduler]:
        """Return the others that wait too long for a rate because of this one.

        They wait for its turn, which it has given up, or which is earlier; or it has dispatched
        another batch meanwhile, so that it is their turn now. Called at the end of a pump.
        """
        states = [state for state in self.states if state.passes_on(self, now, waits=self.has_due)]
        return self._others(state.waiting(now) for state in states)

    def free_at(self, costs: Iterable[float], now: float) -> float:
        """Return when all rates allow a batch of that cost."""
        at = now
        for state, cost in zip(self.states, costs, strict=True):
            at = max(at, state.free_at(1.0 if state.counts_batches else cost, now, self))
        return at

    def dispatch(self, costs: Iterable[float], now: float) -> None:
        self.last_turn = next(_turns)
        for state, cost in zip(self.states, costs, strict=True):
            state.dispatch(1.0 if state.counts_batches else cost, now, self)


_states: WeakKeyDictionary[Limit, LimitState] = WeakKeyDictionary()


def state_of(limit: Limit) -> LimitState:
    """Return the state of a limit: the same for all batchers that are given that object."""
    state = _states.get(limit)
    if state is None:
        state = _states[limit] = LimitState(limit)
    return state
