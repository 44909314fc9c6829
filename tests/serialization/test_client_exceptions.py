"""Exceptions of client libraries arrive as themselves: ``except TheirError`` works."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._serialization.exception_copy import state_of
from tests.support import client_exceptions as clients

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the clients
    pytest.mark.leaves_things,  # some clients start threads and open files when they are imported
]

PLACES = [
    "coroutine",
    "thread",
    pytest.param("workers", marks=pytest.mark.skipif(sys.platform == "win32", reason="no pool")),
]


@pytest.fixture(params=clients.CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    """Return the name of a client library that is installed."""
    name: str = request.param
    try:
        clients.imported(name)
    except ImportError as exc:
        pytest.skip(f"the dependency group clients is not installed: {exc}")
    return name


@pytest.fixture(params=PLACES)
async def batcher(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """A batcher that fails as its items say."""
    if request.param == "coroutine":

        async def fail(batch: list[Any]) -> list[Any]:
            return clients.fail(batch)

        async with batched(fail, max_batch_size=2) as made:
            yield made
    elif request.param == "thread":
        async with batched(clients.fail, max_batch_size=2, executor="thread") as made:
            yield made
    else:
        method = (
            "fork" if sys.platform == "linux" else "spawn"
        )  # a fork has imported the client already
        async with (
            WorkerPool(1, mp_context=method) as pool,
            batched(clients.fail, max_batch_size=2, executor=pool) as made,
        ):
            yield made


def _attributes(exc: BaseException) -> dict[str, str]:
    """Return the attributes as text: many of the objects cannot be compared."""
    state = state_of(exc)
    values = {name: value for _, name, value in state.fields} | state.attributes
    values.pop("__notes__", None)
    return {name: _shown(value) for name, value in values.items()}


def _shown(value: Any) -> str:
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


async def test_an_exception_of_a_client(client: str, batcher: Any) -> None:
    """Type, text, args and attributes; raised and returned; for one caller and several."""
    _, cls = clients.imported(client)
    expected = clients.made(client)
    for how in ("raise", "return"):
        for size in (1, 2):
            errors = await asyncio.gather(*[batcher((how, client))] * size, return_exceptions=True)
            for error in errors:
                assert isinstance(error, cls)
                assert type(error).__qualname__ == type(expected).__qualname__
                assert str(error) == str(expected)
                assert repr(error.args) == repr(expected.args)
                assert _attributes(error) == _attributes(expected)
