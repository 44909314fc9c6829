"""Signatures, suggestions and `repr`."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), r"predict() takes one item, but none was given"),
        (
            (1, 2),
            r"predict() takes one item, but 2 were given; call predict.process_many() for many",
        ),
    ],
)
async def test_a_call_with_a_wrong_number_of_items(args: tuple[Any, ...], message: str) -> None:
    """The error names the user's function."""
    call: Any = batched(predict)
    with pytest.raises(TypeError) as caught:
        await call(*args)
    assert str(caught.value) == message


class Scaler:
    """Has a batcher of a method, as the error for `batched` on a method shows it."""

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.scale = batched(self._scale, executor="process", max_workers=1)

    def _scale(self, batch: list[int]) -> list[int]:
        return [self.factor * item for item in batch]

    def __call__(self, batch: list[int]) -> list[int]:
        """Do the same."""
        return self._scale(batch)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (predict, "predict"),
        (functools.partial(functools.partial(predict)), "predict"),
        (Scaler(1), "Scaler"),
        (max, "max"),
    ],
)
@pytest.mark.skipif(sys.version_info < (3, 12), reason="async functions cannot be marked")
def test_a_call_that_is_never_awaited_is_named(function: Any, name: str) -> None:
    """Python's warning has the name of the user's function."""
    call = batched(function)
    with pytest.warns(RuntimeWarning, match=rf"^coroutine '{name}' was never awaited"):
        call(("a", 1))
    assert repr(call) == f"<batched {name} not started>"


async def test_a_batched_function_is_known_to_be_async() -> None:
    """Frameworks look at ``__call__``; it takes the item by name, too."""
    call = batched(predict)
    assert inspect.iscoroutinefunction(call.__call__)
    assert inspect.iscoroutine(coroutine := call(item=("a", 1), timeout=5.0))
    assert await coroutine == 1.0
    await call.stop()


async def test_batched_on_a_method_shows_the_way_out() -> None:
    """A decorator in the class body has no instance; ``__init__`` has one, as the error shows."""
    with pytest.raises(TypeError) as caught:

        class Wrong:
            @batched  # type: ignore[arg-type]
            def scale(self, batch: list[int]) -> list[int]:
                return batch

    message = str(caught.value)
    assert "Wrong.scale(self, batch: 'list[int]') -> 'list[int]' must take one argument" in message
    assert message.endswith(". Decorate a method in __init__: self.scale = batched(self._scale)")
    scaler = Scaler(3)
    async with scaler.scale:
        assert await scaler.scale(4) == 12


async def test_a_builtin_that_returns_nothing_is_a_batch_function(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such as print: it is called with the batch, and each result is None."""
    batcher: BatchedFunction[int, None] = batched(print)
    async with batcher as show:
        assert await show.process_many([1, 2]) == [None, None]
    assert capsys.readouterr().out == "[1, 2]\n"


@pytest.mark.parametrize("items", ["abc", b"abc", bytearray(b"abc")])
async def test_one_string_is_not_many_items(items: Any) -> None:
    """Its characters are hardly meant; the error shows both ways to say what is."""
    message = (
        rf"^items: must be an iterable of items, not one {type(items).__name__}; write \[item\]"
    )
    async with make_batcher(lambda batch: batch) as batcher:
        with pytest.raises(TypeError, match=message):
            await batcher.process_many(items)
        with pytest.raises(TypeError, match=message):
            batcher.map(items)
        assert await batcher.process_many(list("abc")) == ["a", "b", "c"]


async def test_process_many_with_what_is_no_iterable() -> None:
    """It names the argument; an async iterable is for map()."""

    async def items() -> AsyncGenerator[int, None]:
        yield 1

    call: Any = make_batcher(predict)
    with pytest.raises(TypeError, match=r"process_many\(\) takes an iterable; map\(\) takes"):
        await call.process_many(items())
    with pytest.raises(TypeError, match="not iterable"):
        await call.process_many(5)
    await call.stop()


class FewQueued(AsyncBatcher[int, int]):
    """Has options that do not fit together."""

    def __init__(self) -> None:
        super().__init__(max_batch_size=100, max_queue_size=10)

    def process_batch(self, batch: list[int]) -> list[int]:
        """Return the batch."""
        return batch


def test_a_batch_larger_than_the_queue_is_warned_of() -> None:
    """Such a batch never fills; the program runs all the same, as with 0.2.2."""
    message = "^max_batch_size=100: no batch can be that large.* max_queue_size=10 items$"
    options: Any = {"max_batch_size": 100, "max_queue_size": 10}
    for make in (
        lambda: batched(predict, **options), lambda: batched(**options)(predict), FewQueued
    ):  # fmt: skip
        with pytest.warns(UserWarning, match=message) as warned:
            make()
        assert [warning.filename for warning in warned] == [__file__]
    batched(predict, max_batch_size=10, max_queue_size=10)
    batched(predict, max_queue_size=10)
    batched(predict, max_batch_size=100)


class Named(AsyncBatcher[int, int]):
    """Has attributes with the names of a batcher's methods, and with likely new names."""

    start = stop = stats = process = process_many = submit = run = is_running = 3  # type: ignore[assignment]
    map = 3  # type: ignore[assignment]
    flush = explain = 3  # type: ignore[assignment]
    name = loop = session = queue = options = pool = state = 3

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
