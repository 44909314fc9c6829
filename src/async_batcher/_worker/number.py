"""The number of a worker among those of its pool."""

from __future__ import annotations

_number: int | None = None


def worker_number() -> int | None:
    """Return the number of the worker process that calls this, below ``max_workers``.

    It is known before the pool's ``initializer`` and before any set-up, which may choose a device
    by it::

        def setup_worker(self):
            self.model = load_model(device=f"cuda:{worker_number() % torch.cuda.device_count()}")

    A new worker gets the lowest number that no other worker of the pool has. So a worker that takes
    the place of a crashed one gets its number. If all numbers are taken, a new worker gets that of
    the worker that it replaces, and both have it until that one has exited. Two workers that take
    batches never have the same number.

    Returns:
        The number, also in other threads of a worker, and in processes that it forks. None in a
        process that is no worker of a `WorkerPool`: the main process, the workers of a standard
        pool, and while modules of ``preload`` are imported.
    """
    return _number


def set_worker_number(number: int | None) -> None:
    global _number  # noqa: PLW0603 - it belongs to the process
    _number = number
