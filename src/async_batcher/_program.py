"""The user's function and its set-up, where they run: a worker process, a thread, or the event loop."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from async_batcher._outcome import Outcome, as_answers

if TYPE_CHECKING:
    from collections.abc import Callable


class Program:
    """The user's function and its set-up.

    Args:
        function: Called with the batch, a list.
        by_keyword: Whether to pass it as ``batch=``.
        setup: Called once, before the first batch; again before the next one if it raised.
    """

    def __init__(self, function: Callable[..., Any], *, by_keyword: bool, setup: Callable[[], None] | None) -> None:
        self.function = function
        self.by_keyword = by_keyword
        self.setup = setup
        self._lock = threading.Lock()
        self._is_set_up = setup is None

    def prepare(self) -> None:
        """Run the set-up if it has not been run."""
        if self._is_set_up or self.setup is None:
            return
        with self._lock:
            if not self._is_set_up:
                self.setup()
                self._is_set_up = True

    def call(self, batch: list[Any]) -> Any:
        """What the user's function returns for the batch."""
        return self.function(batch=batch) if self.by_keyword else self.function(batch)

    def run(self, batch: list[Any]) -> Outcome:
        """What comes of the batch, whatever the user's code does."""
        try:
            self.prepare()
            return as_answers(self.call(batch), len(batch))
        except BaseException as exc:  # noqa: BLE001 - SystemExit and the like are answers here
            return exc
