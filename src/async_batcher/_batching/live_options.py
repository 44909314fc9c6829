"""The options that are attributes of a batcher: what is in effect, and may be changed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from async_batcher._batching.instance import LIFECYCLE_ATTR
from async_batcher._batching.user_code import check_functions

if TYPE_CHECKING:
    from async_batcher._batching.lifecycle import BatcherLifecycle
    from async_batcher._batching.options import ExecutorOption


class LiveOptions:
    """The properties of `AsyncBatcher`."""

    __slots__ = ()

    @property
    def max_batch_size(self) -> int | None:
        """Items of a batch at most. It may be set, for batches still in the queue."""
        return _lifecycle_of(self).options.max_batch_size

    @max_batch_size.setter
    def max_batch_size(self, value: int | None) -> None:
        _lifecycle_of(self).update_options(max_batch_size=value)

    @property
    def max_queue_time(self) -> float:
        """The number in effect, also if the option is None. It may be set."""
        return _lifecycle_of(self).max_queue_time

    @max_queue_time.setter
    def max_queue_time(self, value: float | None) -> None:
        _lifecycle_of(self).update_options(max_queue_time=value)

    @property
    def concurrency(self) -> int:
        """Batches that run at a time; -1: no limit.

        It may be set while the batcher is not running. If ``executor`` is a factory and no
        ``concurrency`` was given: 1 until the factory has been called.
        """
        return _lifecycle_of(self).concurrency

    @concurrency.setter
    def concurrency(self, value: int | None) -> None:
        _lifecycle_of(self).update_options(concurrency=value)

    @property
    def executor(self) -> ExecutorOption:
        """Where batches run, as it was given. It may be set while the batcher is not running."""
        return _lifecycle_of(self).options.executor

    @executor.setter
    def executor(self, value: ExecutorOption) -> None:
        batcher: Any = self
        check_functions(batcher, dataclasses.replace(_lifecycle_of(self).options, executor=value))
        _lifecycle_of(self).update_options(executor=value)


def _lifecycle_of(batcher: Any) -> BatcherLifecycle:
    return getattr(batcher, LIFECYCLE_ATTR)  # type: ignore[no-any-return]
