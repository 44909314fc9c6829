"""The replacement of all workers of a pool on request, one after another. Pure.

Rules:

- A worker works until its replacement is ready. The next one is replaced when it has exited, so
  that one process exists beside the usual ones.
- If a replacement cannot be started, or one of its set-ups fails, the restart fails. The workers
  that are left work on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_batcher._pool.state.commands import LogWarning
from async_batcher._pool.state.worker import WorkerState, staying_workers
from async_batcher._serialization.exception_text import one_line
from async_batcher.exceptions import PoolBrokenError

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Iterable

    from async_batcher._pool.state.commands import Command
    from async_batcher._pool.state.worker import Worker


class Restart:
    """The workers that are still to be replaced.

    Attributes:
        outdated: Those workers, and those of them that have not exited yet.
        error: Why the last restart failed, until the next one begins.
    """

    def __init__(self, commands: deque[Command]) -> None:
        self.outdated: list[Worker] = []
        self.error: PoolBrokenError | None = None
        self._commands = commands

    def begin(self, workers: list[Worker]) -> None:
        self.outdated = list(workers)
        self.error = None

    def advance(self, candidates: Iterable[Worker]) -> Worker | None:
        """Order the replacement of the first candidate that needs one, if none is under way.

        Returns:
            That candidate. What waits there is to be taken back.
        """
        self.outdated = [one for one in self.outdated if one.state is not WorkerState.EXITED]
        if any(one.retire_when_replaced or not one.is_alive() for one in self.outdated):
            return None
        worker = next((one for one in candidates if one in self.outdated), None)
        if worker is not None:
            worker.has_replacement = worker.retire_when_replaced = True
        return worker

    def waits_for(self, worker: Worker) -> bool:
        """Tell whether a worker is to replace one of those."""
        return worker not in self.outdated and any(
            one.retire_when_replaced and one.number == worker.number for one in self.outdated
        )

    def fail(self, why: str, cause: BaseException, workers: list[Worker]) -> None:
        """Have the workers that are left work on.

        Args:
            why: Why, in words.
            cause: What a replacement has raised.
            workers: All workers of the pool.
        """
        staying = {worker.number for worker in staying_workers(workers)}
        for worker in self.outdated:
            if worker.number not in staying:  # else its replacement is there
                worker.has_replacement = worker.retire_when_replaced = False
        self.outdated = []
        self.error = PoolBrokenError(
            f"the workers could not be restarted ({why}): {one_line(cause).rstrip('.')}. Those "
            "that were not replaced work on"
        )
        self.error.__cause__ = cause
        self._commands.append(LogWarning(str(self.error)))
