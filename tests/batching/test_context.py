"""The context variables that a batch sees."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from async_batcher import batched

pytestmark = pytest.mark.usefixtures("no_noise")
every_loop = pytest.mark.every_loop


WHO: contextvars.ContextVar[str] = contextvars.ContextVar("WHO", default="unset")


@every_loop
@pytest.mark.parametrize("where", ["coroutine", "loop threads", "thread"])
async def test_batches_run_in_the_context_of_construction(where: str) -> None:
    """Each runs in a copy of it, without variables of callers or of other batches."""

    def who(batch: list[str]) -> list[str]:
        seen = WHO.get()
        WHO.set("a batch")
        return [seen for _ in batch]

    async def async_who(batch: list[str]) -> list[str]:
        return who(batch)

    WHO.set("the maker")
    if where == "coroutine":
        batcher = batched(async_who, max_batch_size=1)
    else:
        batcher = batched(who, max_batch_size=1, executor="thread" if where == "thread" else None)

    async def call(name: str) -> str:
        WHO.set(name)
        result = await batcher.process(name)
        assert WHO.get() == name
        return result

    calls = [asyncio.create_task(call(name)) for name in ("first", "second")]
    assert await asyncio.gather(*calls) == ["the maker", "the maker"]
    WHO.set("the caller")
    assert await batcher.process("third") == "the maker"
    assert WHO.get() == "the caller"
    await batcher.stop()
