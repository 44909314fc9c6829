"""What an instance of a batcher is to Python: its ``repr``, its pickle, its missing attributes.

Everything that belongs to the library is in one slot, a `BatcherLifecycle`, so that the
``__dict__`` of an instance holds what user code put there.

Pickled (for a worker, if `process_batch` is a method) or copied are the options and what user code
put on the instance, never the running state. A given executor or factory stays behind, and so do
the functions that the batcher calls: ``on_batch``, ``on_failure``, ``key`` and ``limits``.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from async_batcher._batching.lifecycle import BatcherLifecycle

if TYPE_CHECKING:
    from async_batcher._batching.options import CheckedOptions

LIFECYCLE_ATTR = "_AsyncBatcher__lifecycle"  # the slot of `AsyncBatcher`

_STAYS_BEHIND: dict[str, Any] = dict.fromkeys(
    ("on_batch", "on_failure", "limits", "key", "key_concurrency")
)


class BatcherInstance:
    """The base of `AsyncBatcher`, without anything public."""

    __slots__ = ()

    def __repr__(self) -> str:
        """The class or function, the state, and the numbers of queued and running items."""
        name = getattr(self, "__qualname__", None)
        kind = type(self).__qualname__ if name is None else f"batched {name}"
        try:
            state = str(object.__getattribute__(self, LIFECYCLE_ATTR))
        except AttributeError:  # a repr in a debugger never raises
            state = "not initialised"
        return f"<{kind} {state}>"

    if not TYPE_CHECKING:  # to a type checker it would mean that every name exists

        def __getattr__(self, name: str) -> Any:
            """Explain why an attribute is missing, if the class or a thread is the reason."""
            if name == LIFECYCLE_ATTR:
                msg = (
                    f"{type(self).__name__}.__init__() must call super().__init__(), with the "
                    "options of AsyncBatcher"
                )
                raise RuntimeError(msg)
            from async_batcher._runners.slot_attributes import is_per_slot

            where = ""
            if is_per_slot(type(self), name):
                where = " here: setup_worker binds it for each thread that runs batches"
            msg = f"{type(self).__name__!r} object has no attribute {name!r}{where}"
            raise AttributeError(msg, name=name, obj=self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Make a batcher of the same options that has not started.

        A ``__reduce__`` of the user's class is respected.
        """
        if type(self).__reduce__ is not object.__reduce__:
            return self.__reduce__()  # type: ignore[return-value]
        options: CheckedOptions = getattr(self, LIFECYCLE_ATTR).options
        executor = options.executor if isinstance(options.executor, str | None) else None
        options = dataclasses.replace(options, executor=executor, **_STAYS_BEHIND)
        return (_unpickle, (type(self), options), self.__getstate__())

    def __getstate__(self) -> Any:
        """Return what user code put on the instance."""
        state = super().__getstate__()
        if not isinstance(state, tuple):
            return state
        attributes, slots = state
        slots = {name: value for name, value in slots.items() if name != LIFECYCLE_ATTR}
        return (attributes, slots) if slots else attributes


def _unpickle(cls: type[BatcherInstance], options: CheckedOptions) -> BatcherInstance:
    batcher = cls.__new__(cls)
    object.__setattr__(batcher, LIFECYCLE_ATTR, BatcherLifecycle(options))
    return batcher
