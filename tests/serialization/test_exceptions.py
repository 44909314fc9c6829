"""Exceptions arrive as themselves: type, args, text, attributes, notes and chain, wherever the batch runs."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import sys
import threading
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._serialization.caller_exceptions import CallerExceptions, name_of
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.exception_copy import RemoteTraceback, chain, remote_traceback
from async_batcher._serialization.remote_exception import NotCarried, decode_exception, encode_exception
from async_batcher.exceptions import BatchError, PoolBrokenError
from tests.support import exception_kinds as kinds
from tests.support.exception_kinds import KINDS, UNPICKLABLE, made, shown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

FAIL = "tests.support.exception_kinds.fail"

METHODS = [
    pytest.param("fork", marks=pytest.mark.skipif(sys.platform != "linux", reason="unsafe elsewhere")),
    pytest.param("forkserver", marks=pytest.mark.slow),
    pytest.param("spawn", marks=pytest.mark.slow),
]
needs_workers = pytest.mark.skipif(sys.platform == "win32", reason="there is no WorkerPool")


def raised(exc: BaseException) -> BaseException:
    """The exception with a traceback."""
    try:
        raise exc  # noqa: TRY301
    except BaseException as caught:  # noqa: BLE001 - of any kind
        return caught


def arrived(exc: BaseException) -> BaseException:
    """The exception as it comes back from a worker."""
    return decode_exception(Codec(), encode_exception(Codec(worker=True), exc))


async def gather(batcher: Any, items: list[Any]) -> list[Any]:
    """What each of the calls, all made now, returned or raised."""
    return await asyncio.gather(*map(batcher, items), return_exceptions=True)


# One exception, copied.


@pytest.mark.parametrize("exc", list(kinds.builtin_exceptions()), ids=lambda exc: type(exc).__name__)
def test_every_builtin_exception_is_copied(exc: BaseException) -> None:
    """Several callers get equal objects; one that controls the program's flow is a BatchError that names it."""
    own = CallerExceptions.of_failed_batch(exc, 2, 2, "f")
    copies = [own.own(exc, 0), own.own(exc, 1)]
    assert len({id(one) for one in (*copies, exc)}) == 3
    for place, one in enumerate(copies, 1):
        assert one.__notes__ == [f"item {place} of 2 in a batch of f"]
        if type(exc).__name__ in kinds.CONTROL_FLOW:
            assert isinstance(one, BatchError)
            assert one.original_type == f"builtins.{type(exc).__name__}"
            assert str(exc) in str(one)
        else:
            assert shown(one) == shown(exc)


@pytest.mark.parametrize("exc", list(kinds.builtin_exceptions()), ids=lambda exc: type(exc).__name__)
def test_every_builtin_exception_is_carried(exc: BaseException) -> None:
    """It comes out of a worker as it went in."""
    assert shown(arrived(exc)) == shown(exc)


@pytest.mark.parametrize("kind", [*KINDS, *UNPICKLABLE])
def test_every_kind_is_copied(kind: str) -> None:
    """A copy has all that the original has, which is left as it was."""
    exc = made(kind)
    before = shown(exc)
    own = CallerExceptions.among_results([exc, exc], "f")
    copies = [own.own(exc, 0), own.own(exc, 1)]
    assert len({id(one) for one in (*copies, exc)}) == 3
    assert [shown(one) for one in copies] == [before] * 2
    assert shown(exc) == before
    assert not any("in a batch of" in note for note in vars(exc).get("__notes__", ()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_carried(kind: str) -> None:
    """It comes out of a worker as it went in, with its causes."""
    assert shown(arrived(made(kind))) == shown(made(kind))


@pytest.mark.parametrize("kind", UNPICKLABLE)
def test_state_that_cannot_be_pickled_is_shown(kind: str) -> None:
    """The exception is carried; what cannot be pickled of it is replaced by its repr."""
    exc = made(kind)
    there = arrived(exc)
    assert (type(there), str(there)) == (type(exc), str(exc))
    assert repr(there.args) == repr(exc.args)
    for name, value in vars(exc).items():
        assert repr(vars(there)[name]) == repr(value)
    assert kind != "a lock" or type(vars(there)["lock"]) is NotCarried


def test_a_note_is_added_past_the_class() -> None:
    """Also to what forbids attributes, and where its notes are of another kind."""
    odd = ValueError("odd")
    odd.__notes__ = "no list"  # type: ignore[assignment]
    for exc in (kinds.FrozenError(3), kinds.RudeError(3), odd):
        copied = CallerExceptions.of_failed_batch(exc, 2, 2, "f").own(exc, 1)
        assert vars(copied)["__notes__"] == ["item 2 of 2 in a batch of f"]


def test_the_chain_of_a_copy() -> None:
    """Cause, context, their suppression and the traceback are those of the original."""
    exc = raised(made("chain"))
    exc.__context__ = context = KeyError("context")
    exc.__suppress_context__ = False
    copied = CallerExceptions.of_failed_batch(exc, 2, 2, "f").own(exc, 0)
    assert copied.__cause__ is exc.__cause__
    assert copied.__context__ is context
    assert copied.__suppress_context__ is False
    assert copied.__traceback__ is exc.__traceback__


def test_an_attribute_error_leaves_its_object_behind() -> None:
    """The object may be all that the program has; copies in the same process keep it."""
    model = object()
    exc = AttributeError("no", name="predict", obj=model)
    copied = CallerExceptions.of_failed_batch(exc, 2, 2, "f").own(exc, 0)
    assert isinstance(copied, AttributeError)
    assert (copied.name, copied.obj) == ("predict", model)
    there = arrived(exc)
    assert isinstance(there, AttributeError)
    assert (there.name, there.obj) == ("predict", None)


def test_the_traceback_ends_the_chain() -> None:
    """It is the cause of the last cause, and shows where the exception was raised in the worker."""
    exc = raised(made("chain"))
    *links, last = chain(arrived(exc))
    assert [str(link) for link in links] == ["outer", "3: middle", "'inner'"]
    assert type(last) is RemoteTraceback
    assert "in raised" in str(last)
    assert last.pid == os.getpid()


def test_members_of_a_group_keep_their_causes() -> None:
    """They are carried with them."""
    member = kinds.KeywordOnlyError(retry_after=3)
    member.__cause__ = made("own number")
    there = arrived(ExceptionGroup("group", [member]))
    assert isinstance(there, ExceptionGroup)
    assert shown(there.exceptions[0]) == shown(member)
    assert type(there.exceptions[0].__cause__) is kinds.TwoArgumentsError


class _Unsteady(Exception):  # noqa: N818
    def __str__(self) -> str:
        return f"at {id(self):x}"


def test_an_uncarriable_cause_keeps_its_place() -> None:
    """A BatchError with its text stands for the one link."""
    exc = ValueError("outer")
    exc.__cause__ = _Unsteady()
    exc.__cause__.__cause__ = KeyError("inner")
    outer, middle, inner, _ = chain(arrived(exc))
    assert (type(outer), type(inner)) == (ValueError, KeyError)
    assert isinstance(middle, BatchError)
    assert middle.original_type == "tests.serialization.test_exceptions._Unsteady"
    assert str(exc.__cause__) in str(middle)


def test_a_class_that_pickles_well_does_so() -> None:
    """What it makes anew is not replaced."""
    there = arrived(kinds.LockedError("text"))
    assert isinstance(there, kinds.LockedError)
    assert type(there.lock) is type(threading.Lock())


def test_tracebacks_are_cleared_where_they_were_sent_from() -> None:
    """Those of the exception, its cause, its context and its members; the text has them."""
    links = [raised(ValueError(str(place))) for place in range(4)]
    exc = raised(ExceptionGroup("group", links[:2]))  # type: ignore[type-var]
    exc.__cause__, exc.__context__ = links[2], links[3]
    links[3].__context__ = exc  # a circle
    assert str(remote_traceback(arrived(exc))).count("in raised") == 4
    assert [link.__traceback__ for link in (exc, *links)] == [None] * 5


# One batch, and who gets what of it.


@pytest.fixture(params=["coroutine", "threads", "loop threads", "given threads"])
def in_process(request: pytest.FixtureRequest) -> Any:
    """Makes a batcher of a function that runs in this process."""
    executors: list[ThreadPoolExecutor] = []

    def make(function: Callable[[list[Any]], Any], **options: Any) -> Any:
        if request.param == "threads":
            return batched(function, executor="thread", max_workers=1, **options)
        if request.param == "given threads":
            executors.append(ThreadPoolExecutor(1))
            return batched(function, executor=executors[-1], **options)
        if request.param == "loop threads":
            return batched(function, **options)

        async def process_batch(batch: list[Any]) -> Any:
            return function(batch)

        return batched(process_batch, **options)

    yield make
    for executor in executors:
        executor.shutdown()


async def test_a_sole_caller_gets_the_object_itself(in_process: Any) -> None:
    """What this batch raised; without a note."""
    known: list[BaseException] = []

    def process_batch(batch: list[str]) -> None:
        known.append(made(batch[0]))
        raise known[-1]

    async with in_process(process_batch, max_batch_size=1) as batcher:
        for kind in [*KINDS, *UNPICKLABLE]:
            (error,) = await gather(batcher, [kind])
            assert error is known[-1], kind
            assert not any("in a batch of" in note for note in vars(error).get("__notes__", ()))


async def test_a_returned_exception_goes_as_it_is(in_process: Any) -> None:
    """It is in the results once, and was not raised; one that is there twice is copied."""
    once, twice = kinds.KeywordOnlyError(retry_after=1), kinds.KeywordOnlyError(retry_after=2)

    def process_batch(batch: list[int]) -> list[Any]:
        return [once, twice, twice, *batch[3:]]

    async with in_process(process_batch, max_batch_size=4) as batcher:
        first, second, third, fourth = await gather(batcher, [0, 1, 2, 3])
        assert first is once
        assert fourth == 3
        assert len({id(one) for one in (second, third, twice)}) == 3
        assert [shown(one) for one in (second, third)] == [shown(twice)] * 2
        assert [one.__notes__[0].partition(" in a batch of ")[0] for one in (second, third)] == ["item 2 of 4", "item 3 of 4"]


async def test_the_last_caller_that_stays_is_alone(in_process: Any) -> None:
    """Callers that were cancelled do not count."""
    known = kinds.KeywordOnlyError(retry_after=1)
    begun, go_on = asyncio.Event(), []

    def process_batch(batch: list[int]) -> None:
        go_on.append(len(batch))
        raise known

    async with in_process(process_batch, max_batch_size=2, max_queue_time=1000.0) as batcher:
        gone, stays = batcher.submit(1), asyncio.ensure_future(batcher(2))
        gone.cancel()
        begun.set()
        stays2 = asyncio.ensure_future(batcher(3))
        errors = await asyncio.gather(stays, stays2, return_exceptions=True)
        assert {type(error) for error in errors} == {kinds.KeywordOnlyError}
    assert go_on == [2]


@pytest.mark.parametrize("returned", [False, True])
async def test_a_cached_exception_does_not_grow(in_process: Any, returned: bool) -> None:  # noqa: FBT001
    """One object that is raised, or returned, again and again; neither tracebacks nor notes pile up in what callers get."""
    known = kinds.KeywordOnlyError(retry_after=1)

    def process_batch(batch: list[int]) -> list[Any]:
        if returned:
            return [known for _ in batch]
        raise known

    async def call(batcher: Any) -> BaseException:
        (error,) = await gather(batcher, [1])
        assert isinstance(error, BaseException)
        return error

    async with in_process(process_batch, max_queue_time=0) as batcher:
        depths, notes = [], []
        for _ in range(6):
            error = await call(batcher)
            depths.append(len(traceback.extract_tb(error.__traceback__)))
            notes.append(len(vars(error).get("__notes__", ())))
        assert len(set(depths[2:])) == 1
        assert max(depths) <= 2 * depths[0]
        assert set(notes) <= {0, 1}
        assert not hasattr(known, "__notes__")
        assert len(traceback.extract_tb(known.__traceback__)) <= max(depths)


async def test_a_cached_exception_keeps_no_more_than_one_batch(in_process: Any) -> None:
    """The items of all batches but the latest are freed."""

    class Item:
        pass

    known = kinds.KeywordOnlyError(retry_after=1)
    items: list[weakref.ref[Item]] = []

    def process_batch(batch: list[Item]) -> None:
        items.extend(map(weakref.ref, batch))
        raise known

    async with in_process(process_batch, max_batch_size=2) as batcher:
        for size in (1, 2, 1, 2, 1, 1):
            await gather(batcher, [Item() for _ in range(size)])
        gc.collect()
        assert [reference() for reference in items[:-1]] == [None] * 7


async def test_a_cached_exception_of_a_set_up_does_not_grow(in_process: Any) -> None:
    """Start raises the object the first time, then copies."""
    known = kinds.KeywordOnlyError(retry_after=1)

    def setup_worker() -> None:
        raise known

    depths = []
    for attempt in range(4):
        batcher = in_process(list, setup_worker=setup_worker)
        with pytest.raises(kinds.KeywordOnlyError) as caught:
            await batcher.start()
        assert (caught.value is known) is (attempt == 0)
        depths.append(len(traceback.extract_tb(known.__traceback__)))
        await batcher.stop()
    assert len(set(depths[1:])) == 1
    assert max(depths) == depths[0]


async def test_a_batcher_in_a_batcher(in_process: Any) -> None:
    """The traceback leads to where the inner batch raised it, also if that raises one object again and again."""
    cached = kinds.KeywordOnlyError(retry_after=1)

    def fail(batch: list[int]) -> None:
        raise kinds.KeywordOnlyError(retry_after=1) if batch[0] else cached

    async with in_process(fail, max_queue_time=0) as inner:

        async def outer(batch: list[int]) -> list[Any]:
            return [await inner(item) for item in batch]

        async with batched(outer, max_batch_size=2) as batcher:
            for item in (0, 1, 0, 1, 0):
                for error in await gather(batcher, [item] * 2):
                    names = [entry.name for entry in traceback.extract_tb(error.__traceback__)]
                    assert (names.count("outer"), names.count("fail"), names[-1]) == (1, 1, "fail")


async def test_a_set_up_that_exits(in_process: Any) -> None:
    """The error names the function that did."""

    def setup_worker() -> None:
        raise GeneratorExit

    batcher = in_process(list, setup_worker=setup_worker)
    for call in (batcher.start, functools.partial(batcher, 1)):
        with pytest.raises(BatchError, match=r"^setup_worker raised builtins\.GeneratorExit"):
            await call()
    await batcher.stop()


async def test_a_strict_call_for_many_is_one_caller(in_process: Any) -> None:
    """process_many gets the object itself; with return_exceptions each item has its own copy."""
    known = kinds.KeywordOnlyError(retry_after=1)

    def process_batch(batch: list[int]) -> None:
        raise kinds.KeywordOnlyError(retry_after=len(batch)) if batch[0] else known

    async with in_process(process_batch, max_batch_size=3) as batcher:
        with pytest.raises(kinds.KeywordOnlyError) as caught:
            await batcher.process_many([0, 1, 2])
        assert caught.value is known
        errors = await batcher.process_many([1, 2, 3], return_exceptions=True)
        assert len({id(error) for error in errors}) == 3
        assert [error.__notes__[0].partition(" in a batch of ")[0] for error in errors] == [
            f"item {place} of 3" for place in (1, 2, 3)
        ]


async def test_a_stream(in_process: Any) -> None:
    """Map raises the exception of an item, or yields it."""

    def process_batch(batch: list[int]) -> list[Any]:
        return [made("keyword only") if item == 1 else item for item in batch]

    async with in_process(process_batch, max_batch_size=4) as batcher:
        results = [result async for result in batcher.map(range(4), return_exceptions=True)]
        assert [results[0], *results[2:]] == [0, 2, 3]
        assert shown(results[1]) == shown(made("keyword only"))
        with pytest.raises(kinds.KeywordOnlyError, match="retry after 3"):
            async for _ in batcher.map(range(4)):
                pass


async def test_isolated_items(in_process: Any) -> None:
    """The guilty item's caller gets the object that its own run raised."""
    known: list[BaseException] = []

    def process_batch(batch: list[int]) -> list[int]:
        if 1 in batch:
            known.append(made("keyword only"))
            raise known[-1]
        return batch

    async with in_process(process_batch, max_batch_size=4, isolate_failures=True) as batcher:
        results = await gather(batcher, [0, 1, 2, 3])
        assert [results[0], *results[2:]] == [0, 2, 3]
        assert results[1] is known[-1]


async def test_start_raises_what_set_up_raised(in_process: Any) -> None:
    """The object itself."""
    known = kinds.KeywordOnlyError(retry_after=1)

    def setup_worker() -> None:
        raise known

    batcher = in_process(list, setup_worker=setup_worker)
    with pytest.raises(kinds.KeywordOnlyError) as caught:
        await batcher.start()
    assert caught.value is known
    await batcher.stop()


# Out of worker processes.


@pytest.fixture(params=METHODS)
async def pool(request: pytest.FixtureRequest) -> Any:
    """A pool of one worker."""
    async with WorkerPool(1, mp_context=request.param) as made_pool:
        yield made_pool


def _check(error: Any, kind: str, note: str) -> None:
    expected = made(kind)
    assert type(error) is type(expected), kind
    if kind in KINDS:
        assert shown(error) == shown(expected), kind
    remote = remote_traceback(error)
    assert remote is not None
    notes = vars(error)["__notes__"]
    assert notes[-1] == f"{note}, worker process {remote.pid}"
    assert remote.pid != os.getpid()


@needs_workers
async def test_out_of_a_batch_in_a_worker(pool: WorkerPool) -> None:
    """Alone and with neighbours, raised and returned."""
    async with batched(kinds.fail, executor=pool, max_batch_size=2) as batcher:
        for kind in [*KINDS, *UNPICKLABLE]:
            for how in ("raise", "return"):
                (alone,) = await gather(batcher, [(how, kind)])
                _check(alone, kind, f"item 1 of 1 in a batch of {FAIL}")
                both = await gather(batcher, [(how, kind)] * 2)
                assert both[0] is not both[1]
                for place, error in enumerate(both, 1):
                    _check(error, kind, f"item {place} of 2 in a batch of {FAIL}")


@needs_workers
async def test_out_of_a_call_in_a_worker(pool: WorkerPool) -> None:
    """WorkerPool.run raises what the function raised."""
    for kind in [*KINDS, *UNPICKLABLE]:
        error = None
        try:
            await pool.run(kinds.fail, [("raise", kind)])
        except BaseException as exc:  # noqa: BLE001 - of any kind
            error = exc
        _check(error, kind, f"a call of {FAIL}")


@needs_workers
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_out_of_an_executor(method: str) -> None:
    """The futures of as_executor have what the function raised; those of map too."""
    with WorkerPool(1, mp_context=method).as_executor() as executor:
        for kind in [*KINDS, *UNPICKLABLE]:
            _check(executor.submit(kinds.fail, [("raise", kind)]).exception(), kind, f"a call of {FAIL}")
        for chunksize in (1, 2):
            with pytest.raises(kinds.KeywordOnlyError) as caught:
                list(executor.map(kinds.fail, [[("raise", "keyword only")]] * 2, chunksize=chunksize))
            _check(caught.value, "keyword only", f"a call of {FAIL}")


@needs_workers
async def test_classes_of_the_program(pool: WorkerPool) -> None:
    """One that travels by value comes back as the caller's own; one that is made in the worker comes with its definition."""

    class Refusal(Exception):  # noqa: N818
        __slots__ = ("code",)

        def __init__(self, *, code: int) -> None:
            super().__init__(f"code {code}")
            self.code = code

    def refuse(batch: list[int]) -> list[int]:
        raise Refusal(code=batch[0])

    def invent(batch: list[int]) -> list[int]:
        class Invention(Exception):  # noqa: N818
            def __init__(self, *, code: int) -> None:
                super().__init__(f"code {code}")
                self.code = code

        raise Invention(code=batch[0])

    async with batched(refuse, executor=pool) as batcher:
        with pytest.raises(Refusal) as caught:
            await batcher(3)
        assert (caught.value.code, str(caught.value)) == (3, "code 3")
    async with batched(invent, executor=pool) as batcher:
        (error,) = await gather(batcher, [3])
        assert (type(error).__name__, error.code, str(error)) == ("Invention", 3, "code 3")


@needs_workers
async def test_set_up_in_a_worker(pool: WorkerPool) -> None:
    """Start raises it, and so does a batch."""
    setup: Any = functools.partial(kinds.fail, [("raise", "keyword only")])
    batcher: Any = batched(list, executor=pool, setup_worker=setup)
    for call in (batcher.start, functools.partial(batcher, 1)):
        with pytest.raises(kinds.KeywordOnlyError) as caught:
            await call()
        assert shown(caught.value) == shown(made("keyword only"))
        assert vars(caught.value)["__notes__"][-1].endswith(f", worker process {remote_traceback(caught.value).pid}")  # type: ignore[union-attr]
        assert FAIL in vars(caught.value)["__notes__"][-1] or call is not batcher.start
    await batcher.stop()


def _exit() -> None:
    raise SystemExit(3)


_cached = kinds.TwoArgumentsError(3, "x")


def _raise_cached(batch: list[str]) -> list[Any]:
    how = batch[0]
    if how == "raise":
        raise _cached
    try:
        _raise_cached(["raise"])
    except kinds.TwoArgumentsError as exc:
        if how == "return":
            return [exc for _ in batch]
        raise ValueError from exc
    raise AssertionError


@needs_workers
async def test_a_set_up_that_exits_in_a_worker(pool: WorkerPool) -> None:
    """The error names the function that did."""
    batcher: Any = batched(list, executor=pool, setup_worker=_exit)
    for call in (batcher.start, functools.partial(batcher, 1)):
        with pytest.raises(BatchError, match=r"^setup_worker raised builtins\.SystemExit"):
            await call()
    await batcher.stop()


@needs_workers
@pytest.mark.parametrize("how", ["raise", "return", "chain"])
async def test_a_cached_exception_does_not_grow_in_a_worker(pool: WorkerPool, how: str) -> None:
    """Its traceback is that of the latest batch, and complete for each of its callers."""
    async with batched(_raise_cached, executor=pool, max_batch_size=2) as batcher:
        texts = set()
        for _ in range(4):
            for error in await gather(batcher, [how] * 2):
                texts.add(str(remote_traceback(error)))
        assert len(texts) == 1
        assert texts.pop().count("    raise _cached\n") == 1
    if how == "raise":
        texts = set()
        for _ in range(4):
            with pytest.raises(kinds.TwoArgumentsError) as caught:
                await pool.run(_raise_cached, ["raise"])
            texts.add(str(remote_traceback(caught.value)))
        assert len(texts) == 1


@needs_workers
@pytest.mark.parametrize("method", METHODS)
async def test_an_initializer_in_a_worker(method: str) -> None:
    """It is the cause of the error that the pool is broken."""
    pool = WorkerPool(1, mp_context=method, initializer=kinds.fail, initargs=([("raise", "chain")],))
    with pytest.raises(PoolBrokenError) as caught:
        await pool.run(abs, -1)
    assert caught.value.__cause__ is not None
    assert shown(caught.value.__cause__) == shown(made("chain"))
    await pool.stop()


def _nested(method: str) -> Any:
    """A worker's exception, raised again by a batch in this process."""

    async def process_batch(batch: list[int]) -> list[int]:
        async with WorkerPool(1, mp_context=method) as pool:
            await pool.run(kinds.fail, [("raise", "keyword only")])
        return batch

    return process_batch


@needs_workers
@pytest.mark.parametrize("method", METHODS)
async def test_out_of_a_call_in_a_batch(method: str) -> None:
    """The notes name the worker's call and the batch, each once."""
    async with batched(_nested(method), max_batch_size=2) as batcher:
        for place, error in enumerate(await gather(batcher, [0, 1]), 1):
            first, second = error.__notes__
            assert first.startswith(f"a call of {FAIL}, worker process ")
            assert second == f"item {place} of 2 in a batch of {name_of(batcher.process_batch)}"


# Memory.


@pytest.fixture
def no_collector() -> Any:
    """Reference counting alone frees what is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def _caught(call: Callable[[], Awaitable[Any]]) -> weakref.ref[BaseException]:
    try:
        await call()
    except kinds.TwoArgumentsError as exc:
        return weakref.ref(exc)
    raise AssertionError


def _fail_now(*_: Any) -> None:
    raise kinds.TwoArgumentsError(3, "x")


async def _fail_async(batch: list[Any]) -> None:
    _fail_now(batch)


async def _fail_two(batcher: Any) -> None:
    other = batcher.submit(2)
    try:
        await batcher(1)
    finally:
        assert type(other.exception()) is kinds.TwoArgumentsError


async def _fail_map(batcher: Any) -> None:
    async for _ in batcher.map([1]):
        pass


def _ways(pool: WorkerPool | None) -> dict[str, tuple[Any, Callable[[Any], Awaitable[Any]]]]:
    def returned(batch: list[Any]) -> list[Any]:
        return [kinds.TwoArgumentsError(3, "x") for _ in batch]

    ways: dict[str, tuple[Any, Callable[[Any], Awaitable[Any]]]] = {
        "coroutine": (batched(_fail_async), lambda batcher: batcher(1)),
        "thread": (batched(_fail_now, executor="thread"), lambda batcher: batcher(1)),
        "returned": (batched(returned), lambda batcher: batcher(1)),
        "two": (batched(_fail_async, max_batch_size=2), _fail_two),
        "many": (batched(_fail_async), lambda batcher: batcher.process_many([1, 2])),
        "map": (batched(_fail_async), _fail_map),
        "setup": (batched(list, setup_worker=_fail_now), lambda batcher: batcher.start()),
    }
    if pool is not None:
        ways |= {
            "worker": (batched(_fail_now, executor=pool), lambda batcher: batcher(1)),
            "worker, setup": (batched(list, executor=pool, setup_worker=_fail_now), lambda batcher: batcher.start()),
            "run": (pool, lambda pool: pool.run(_fail_now)),
        }
    return ways


@pytest.mark.usefixtures("no_collector")
async def test_exceptions_are_freed_at_once() -> None:
    """What a caller has caught and dropped is freed by reference counting, however it came."""
    pool = WorkerPool(1) if sys.platform != "win32" else None
    left = []
    for way, (target, call) in _ways(pool).items():
        reference = await _caught(functools.partial(call, target))
        for _ in range(20):  # tasks and callbacks that are ending
            if reference() is None:
                break
            await asyncio.sleep(0.001)
        if reference() is not None:
            left.append(way)
        if target is not pool:
            await target.stop()
    if pool is not None:
        await pool.stop()
    assert left == []
