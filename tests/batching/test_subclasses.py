"""Subclasses of `AsyncBatcher`, their attributes and their copies."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher
from tests.support.batchers import process_all

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop


async def test_a_subclass_without_super_init_is_an_error() -> None:
    """The message names the class and the missing call."""

    class WithoutInit(AsyncBatcher[int, int]):
        def __init__(self) -> None:
            pass

        async def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    with pytest.raises(RuntimeError, match=r"WithoutInit.*super\(\).__init__\(\)"):
        await WithoutInit().process(1)


async def test_a_subclass_may_use_any_attribute_name() -> None:
    """The batcher stores nothing under a name that a subclass may use."""
    names = [
        "_queue", "_loop", "_state", "_session", "_life", "_options",
        "_timer", "_context", "_stop", "queue", "loop", "options",
        "session", "timer", "pool", "_pool", "_executor", "_is_running",
        "_current_task", "state", "runner", "name", "context",
    ]  # fmt: skip

    class AnyNames(AsyncBatcher[int, int]):
        def __init__(self) -> None:
            for name in names:
                setattr(self, name, "before")
            super().__init__(max_queue_time=0)
            assert vars(self) == dict.fromkeys(names, "before")
            for name in names:
                setattr(self, name, "after")

        async def process_batch(self, batch: list[int]) -> list[int]:
            assert vars(self) == dict.fromkeys(names, "after")
            return batch

    async with AnyNames() as batcher:
        assert await batcher.process(1) == 1
        assert vars(batcher) == dict.fromkeys(names, "after")


async def test_a_subclass_with_slots() -> None:
    """A subclass may have slots, and then no __dict__."""

    class Slotted(AsyncBatcher[int, int]):
        __slots__ = ("factor",)

        def __init__(self, factor: int) -> None:
            super().__init__()
            self.factor = factor

        async def process_batch(self, batch: list[int]) -> list[int]:
            return [item * self.factor for item in batch]

    async with Slotted(3) as batcher:
        assert not hasattr(batcher, "__dict__")
        assert await batcher.process(2) == 6
        twin = copy.copy(batcher)
    assert await twin.process(2) == 6
    await twin.stop()


class Scaled(AsyncBatcher[int, int]):
    """Can be pickled by reference."""

    def __init__(self, factor: int, **options: Any) -> None:
        super().__init__(**options)
        self.factor = factor

    async def process_batch(self, batch: list[int]) -> list[int]:
        """Multiply."""
        return [item * self.factor for item in batch]


@every_loop
@pytest.mark.parametrize(
    "twin_of",
    [copy.copy, copy.deepcopy, lambda batcher: pickle.loads(pickle.dumps(batcher))],  # noqa: S301
)
async def test_a_copy_is_a_batcher_of_its_own(twin_of: Callable[[Scaled], Scaled]) -> None:
    """A copied or unpickled batcher has the options and attributes, and is not started."""
    async with Scaled(3, max_batch_size=7, max_queue_time=0, concurrency=2) as batcher:
        waiting = batcher.submit(1)
        twin = twin_of(batcher)
        assert await waiting == 3
        assert not await twin.is_running()
        assert (twin.factor, twin.max_batch_size, twin.max_queue_time, twin.concurrency) == (
            3,
            7,
            0,
            2,
        )
        assert await twin.process(2) == 6
        await twin.stop()
        assert await batcher.process(3) == 9
        await batcher.stop()
    assert await twin_of(batcher).process(4) == 12, "a copy of a stopped batcher is not stopped"


async def test_subclasses_of_subclasses_and_super() -> None:
    """process_batch and setup_worker may call super()."""
    setups: list[str] = []

    class Root(AsyncBatcher[int, int]):
        def setup_worker(self) -> None:
            setups.append("root")

        async def process_batch(self, batch: list[int]) -> list[int]:
            assert setups == ["root", "derived"]
            return list(batch)

    class Base(Root):
        async def process_batch(self, batch: list[int]) -> list[int]:
            return [item + 1 for item in await super().process_batch(batch)]

    class Derived(Base):
        def setup_worker(self) -> None:
            super().setup_worker()
            setups.append("derived")

    async with Derived() as batcher:
        assert await process_all(batcher, 1, 2) == [2, 3]
        assert setups == ["root", "derived"]
