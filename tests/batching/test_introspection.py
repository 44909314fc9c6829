"""Signatures, suggestions and `repr`."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterable, Sequence  # noqa: TC003 - evaluated
from typing import Any

import pytest

import async_batcher
from async_batcher import AsyncBatcher, BatchedFunction, batched
from async_batcher._batching import options as options_module
from tests.support import scripts
from tests.support.batchers import make_batcher


def test_declared_and_checked_options_agree() -> None:
    """Typed keywords, checked options and signatures have the same names and types."""
    checked = {
        field.name: field.type for field in dataclasses.fields(options_module.CheckedOptions)
    }
    typed = {
        name: reference.__forward_arg__
        for name, reference in options_module.BatcherOptions.__annotations__.items()
        if name not in options_module._DEPRECATED
    }
    assert typed == checked
    cases: list[tuple[Any, list[str]]] = [
        (AsyncBatcher, []),
        (AsyncBatcher.__init__, ["self"]),
        (batched, ["function", "setup_worker"]),
    ]
    for function, others in cases:
        parameters = dict(inspect.signature(function).parameters)
        for other in others:
            del parameters[other]
        assert {name: parameter.annotation for name, parameter in parameters.items()} == checked
        for name, parameter in parameters.items():
            assert parameter.default == getattr(options_module.CheckedOptions(), name)
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


def test_the_docstrings_describe_every_option() -> None:
    """Each option of the signature once, and what a set-up does; no reference is left open."""
    assert AsyncBatcher.__doc__ is not None
    described = re.findall(r"(?m)^    (\w+): ", AsyncBatcher.__doc__.partition("Raises:")[0])
    options = [field.name for field in dataclasses.fields(options_module.CheckedOptions)]
    assert described == [*options, "batch_size"]
    text = AsyncBatcher.setup_worker.__doc__
    assert text is not None
    assert text.startswith("Prepare a worker; optional.\n\nIt runs before a worker's first batch")
    assert "See `Batche" not in AsyncBatcher.__doc__ + text


@pytest.mark.slow
def test_without_docstrings() -> None:
    """``python -OO`` removes them."""
    program = (
        "import async_batcher as a; "
        "print(a.AsyncBatcher.__doc__, a.AsyncBatcher.setup_worker.__doc__)"
    )
    done = subprocess.run(
        [sys.executable, "-OO", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=scripts.environment(),
    )
    assert done.stdout == "None None\n"


def predict(batch: list[tuple[str, int]]) -> list[float]:
    """Return the numbers as floats."""
    return [float(number) for _, number in batch]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_batch_sise", "max_batch_size"),
        ("timeout", "item_timeout|batch_timeout"),
        ("xyz", None),
        ("setup_workers", "setup_worker"),
    ],
)
def test_an_unknown_option_suggests_a_known_one(name: str, hint: str | None) -> None:
    """The message names the function or class, and the option that was probably meant."""
    text = rf"got an unexpected keyword argument '{name}'" + (
        rf"\. Did you mean '({hint})'\?$" if hint else "$"
    )
    with pytest.raises(TypeError, match=r"^batched\(predict\) " + text):
        make_batcher(predict, **{name: 1})
    with pytest.raises(TypeError, match=r"^batched\(\) " + text):
        make_batcher(None, **{name: 1})

    class Predictor(AsyncBatcher[Any, Any]):
        process_batch = staticmethod(predict)

    if hint != "setup_worker":
        with pytest.raises(TypeError, match=r"^Predictor\(\) " + text):
            Predictor(**{name: 1})  # type: ignore[arg-type]


def test_an_option_of_the_pool_is_said_to_be_one() -> None:
    """The message shows where it goes."""
    with pytest.raises(TypeError, match=r"'preload'; it is one of .*WorkerPool\(preload=\.\.\.\)$"):
        make_batcher(predict, preload=["json"])


def test_the_signature_of_a_batched_function() -> None:
    """It has one parameter, the item, with the batch's element type where it is known."""

    def untyped(batch, rest=()):  # type: ignore[no-untyped-def]  # noqa: ARG001
        return batch

    def unresolved(batch: list[Missing]) -> Missing:  # type: ignore[name-defined]  # noqa: F821
        return batch

    async def sequence(batch: Sequence[bytes]) -> Iterable[str]:
        return [str(item) for item in batch]

    async def generated(batch: list[bytes]) -> AsyncGenerator[int, None]:
        for item in batch:
            yield len(item)

    def plain(batch: list) -> dict[str, int]:  # type: ignore[type-arg]  # noqa: ARG001
        return {}

    empty = inspect.Signature.empty
    for function, item, result in [
        (predict, tuple[str, int], float),
        (untyped, empty, empty),
        (unresolved, empty, empty),
        (sequence, bytes, str),
        (plain, empty, empty),
        (max, empty, empty),
        (generated, bytes, int),
    ]:
        signature = inspect.signature(batched(function))  # type: ignore[call-overload]
        assert [(p.name, p.annotation) for p in signature.parameters.values()] == [("item", item)]
        assert signature.return_annotation == result
    assert str(inspect.signature(batched(predict))) == "(item: tuple[str, int]) -> float"
    assert list(inspect.signature(BatchedFunction).parameters) == [
        "function",
        "setup_worker",
        "options",
    ]


class Named(AsyncBatcher[int, int]):
    """Has attributes with the names of a batcher's methods, and with likely new names."""

    start = stop = stats = process = process_many = submit = run = is_running = 3  # type: ignore[assignment]
    map = 3  # type: ignore[assignment]
    name = flush = loop = session = queue = options = pool = state = 3

    def process_batch(self, batch: list[int]) -> list[int]:
        """Return twice each item."""
        return [item * 2 for item in batch]


@pytest.mark.parametrize("executor", [None, "thread", "process"])
async def test_a_subclass_may_replace_public_methods(executor: Any) -> None:
    """The batcher calls none of its public methods by name."""
    batcher = Named(executor=executor)
    async with batcher:
        assert "running" in repr(batcher)
        assert await AsyncBatcher.process(batcher, 1) == 2
        assert await AsyncBatcher.process_many(batcher, [1, 2]) == [2, 4]
        assert [item async for item in AsyncBatcher.map(batcher, [1, 2])] == [2, 4]
        assert AsyncBatcher.stats(batcher).done == 5
    running = asyncio.ensure_future(AsyncBatcher.run(batcher))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    client = pytest.importorskip("prometheus_client")
    from async_batcher.integrations.prometheus import export_metrics

    registry = client.CollectorRegistry()
    export_metrics(batcher, registry=registry)
    labels = {"batcher": "Named", "outcome": "done"}
    assert registry.get_sample_value("async_batcher_items_total", labels) == 5.0


async def test_repr_shows_the_state_and_the_counts() -> None:
    """It has the class or function, the state, and the numbers of items."""

    class Predictor(AsyncBatcher[int, int]):
        def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    class Unfinished(Predictor):
        def __init__(self) -> None:
            self.seen = repr(self)

    assert Unfinished().seen.endswith(".Unfinished not initialised>")
    batcher = make_batcher(predict, max_queue_time=60.0)
    assert repr(batcher) == "<batched predict not started>"
    call = asyncio.ensure_future(batcher.process(("a", 1)))
    await asyncio.sleep(0)
    assert repr(batcher) == "<batched predict running, 1 queued, 0 running>"
    await batcher.stop()
    assert await call == 1.0
    assert repr(batcher) == "<batched predict stopped>"
    assert repr(Predictor()).endswith(".Predictor not started>")
    assert repr(batched(predict, name="prices")) == "<batched predict 'prices' not started>"


def test_package_has_a_version_and_public_names() -> None:
    """`dir` lists the public names for completion."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", async_batcher.__version__)
    assert {"BatchedFunction", "AsyncBatcher", "__version__"} <= set(dir(async_batcher))
