"""Which functions workers set up before they take batches, and how long that may take. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from async_batcher._transport.protocol import MAX_CACHED_FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Container, MutableMapping

    from async_batcher._pool.pickled_function import PickledFunction

SETUP_TIMEOUT_FACTOR = 4.0  # times the seconds that the function's last set-up took
ABANDONED_SETUP_TIMEOUT = 2.0  # seconds at first; doubles after each that was killed
MAX_FAILED_SETUPS = 3  # in a row; a crash may be no fault of the set-up


class FunctionSetups:
    """The functions that new workers of a pool load first, with or without a set-up.

    Those of batchers that were dropped without a stop are forgotten. A worker keeps no more than
    `MAX_CACHED_FUNCTIONS`; if there are more, it loads the last ones.

    A set-up that crashes its worker again and again, or never returns, is left to the function's
    next batch. So it delays the batches of no other function.

    Attributes:
        functions: The functions that a new worker loads and sets up first, by their keys.
        start_seconds: Seconds that the last worker took to start, without set-ups.
    """

    def __init__(self, start_timeout: float) -> None:
        self.functions: MutableMapping[bytes, PickledFunction] = WeakValueDictionary()
        self.start_seconds = 0.0
        self._start_timeout = start_timeout
        self._last_seconds: dict[bytes, float] = {}
        self._abandoned_timeouts: dict[bytes, float] = {}
        self._failed: dict[bytes, int] = {}

    def has_setups(self) -> bool:
        return any(function.has_setup for function in self.functions.values())

    def ready_seconds(self) -> float:
        """Return the seconds that a new worker probably takes to start and run all set-ups."""
        return self.start_seconds + sum(self._last_seconds.get(key, 0.0) for key in self.functions)

    def add(self, function: PickledFunction) -> None:
        self.functions[function.key] = function
        for facts in (self._last_seconds, self._failed):
            for key in facts.keys() - self.functions.keys():
                del facts[key]

    def next_missing(self, loaded: Container[bytes]) -> PickledFunction | None:
        """Return the next function that a new worker loads; None: it has loaded all."""
        functions = list(self.functions.values())[-MAX_CACHED_FUNCTIONS:]
        return next((function for function in functions if function.key not in loaded), None)

    def on_done(self, key: bytes, seconds: float) -> None:
        self._last_seconds[key] = seconds
        self._failed.pop(key, None)
        self._abandoned_timeouts.pop(key, None)

    def on_failed(self, key: bytes) -> None:
        """Count a worker that exited while it set up a function ahead of its batches."""
        self._failed[key] = self._failed.get(key, 0) + 1
        if self._failed[key] >= MAX_FAILED_SETUPS:
            self._remove(key)

    def on_abandoned_timeout(self, key: bytes) -> None:
        """Allow the next set-up without callers twice as long, so that a slow one can finish."""
        last = self._abandoned_timeouts.get(key, 0.0)
        self._abandoned_timeouts[key] = 2 * max(ABANDONED_SETUP_TIMEOUT, last)

    def timeout(self, key: bytes) -> float:
        """Return the seconds that a set-up may take while no caller waits without a timeout."""
        return max(self._start_timeout, self._expected(key))

    def abandoned_timeout(self, key: bytes) -> float:
        """Return the seconds that a set-up may take when all callers were cancelled."""
        wanted = max(
            ABANDONED_SETUP_TIMEOUT, self._expected(key), self._abandoned_timeouts.get(key, 0.0)
        )
        return min(wanted, self.timeout(key))

    def forget(self, key: bytes) -> None:
        self._remove(key)
        self._abandoned_timeouts.pop(key, None)

    def _expected(self, key: bytes) -> float:
        return SETUP_TIMEOUT_FACTOR * self._last_seconds.get(key, 0.0)

    def _remove(self, key: bytes) -> None:
        self.functions.pop(key, None)
        self._last_seconds.pop(key, None)
        self._failed.pop(key, None)
