"""`Codec`, pickled exceptions, and the search for what cannot be pickled, in one process."""

from __future__ import annotations

import enum
import importlib
import pickle
import sys
import textwrap
import threading
import types
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest

from async_batcher._serialization.by_value import Registry
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.diagnostics import pickling_error, unpickling_error
from async_batcher._serialization.exception_copy import RemoteTraceback
from async_batcher._serialization.remote_exception import decode_exception, encode_exception
from async_batcher._serialization.unpickler import UnknownClassError
from async_batcher._worker.run_batch import RemoteCall
from async_batcher.exceptions import BatchError, SerializationError, WorkerDiedError
from tests.support import worker_functions as work
from tests.support.exception_kinds import uncarriable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def here() -> Codec:
    """The caller's side."""
    return Codec()


@pytest.fixture
def there() -> Codec:
    """The worker's side."""
    return Codec(worker=True, registry=Registry())


def local_class() -> Any:
    """Return a class that travels by value."""

    class Item:
        count = 0

        def double(self) -> int:
            return 2

    return Item


# Codec.


@pytest.mark.parametrize(
    "value",
    [None, 1, "text", [1, {"a": (2, 3)}], work.Point(1, 2), work.Colour.RED, len, work.double],
)
def test_what_can_be_imported_is_a_plain_pickle(here: Codec, there: Codec, value: object) -> None:
    """`pickle.loads` alone can read it."""
    own, data, buffers = here.dumps(value)
    assert isinstance(data, bytes)
    assert not own
    assert there.loads((own, data, buffers)) == value
    assert pickle.loads(data) == value  # noqa: S301


def test_a_text_that_looks_like_the_main_module(here: Codec, there: Codec) -> None:
    """Data with the text ``__main__`` takes the codec's own pickler, and arrives."""
    blob = here.dumps(["__main__", "__mp_main__"])
    assert there.loads(blob) == ["__main__", "__mp_main__"]


def send_definitions(here: Codec, there: Codec) -> None:
    """Give a worker the definitions that it has asked for."""
    for definition in here.definitions():
        there.loads(definition)


def test_a_class_is_a_reference_until_the_worker_asks(here: Codec, there: Codec) -> None:
    """It asks once for the definition of an unknown class, and keeps the class unchanged."""
    cls = local_class()
    blob = here.dumps([cls(), cls()])
    with pytest.raises(UnknownClassError):
        there.loads(blob)
    send_definitions(here, there)
    first, second = there.loads(blob)
    copied = type(first)
    assert copied is type(second)
    assert copied is not cls
    copied.count = 5
    copied.double = lambda _: 6
    send_definitions(here, there)
    (third, _) = there.loads(here.dumps([cls(), cls()]))
    assert type(third) is copied
    assert (copied.count, third.double()) == (5, 6)


def test_a_class_that_comes_back_is_the_original(here: Codec, there: Codec) -> None:
    """It is a reference, so that nothing changes the caller's class."""
    cls = local_class()
    there.loads(here.dumps_checked(cls, define=True)[0])
    copied = there.loads(here.dumps(cls))
    own, data, buffers = there.dumps([copied(), copied])
    assert isinstance(data, bytes)
    assert own
    assert b"double" not in data
    instance, itself = here.loads((own, data, buffers))
    assert itself is cls
    assert type(instance) is cls


def test_a_class_of_the_worker_is_defined_each_time(here: Codec, there: Codec) -> None:
    """The caller's side may have freed it; until then it is one class."""
    cls = local_class()
    first = here.loads(there.dumps(cls()))
    second = here.loads(there.dumps(cls()))
    assert type(first) is type(second)
    assert type(first) is not cls
    assert first.double() == 2
    assert there.loads(here.dumps(first)).__class__ is cls, (
        "and on its way there again it is the worker's own"
    )


def test_classes_of_two_workers_stay_apart(here: Codec) -> None:
    """Workers number their classes independently."""
    one, other = Codec(worker=True, registry=Registry()), Codec(worker=True, registry=Registry())
    first, second = local_class(), local_class()
    assert type(here.loads(one.dumps(first()))) is not type(here.loads(other.dumps(second())))


def test_an_incomplete_class_is_discarded(here: Codec, there: Codec) -> None:
    """A class whose definition cannot be unpickled is not kept."""

    class Item:
        part: Any = work.CrashAtUnpickle("raise")

    blob = here.dumps(Item())
    (definition,) = here.definitions()
    with pytest.raises(ArithmeticError):
        there.loads(definition)
    with pytest.raises(UnknownClassError):
        there.loads(blob)


def test_freed_classes_have_no_definitions(here: Codec) -> None:
    """Neither ids nor definitions are kept for classes that are not in use."""
    for _ in range(5):
        here.dumps(local_class()())
    import gc

    gc.collect()
    assert here.definitions() == []


def test_another_codec_does_not_redefine_a_class() -> None:
    """A second definition of a class does not change the class that the first one created."""
    cls = local_class()
    made = []
    for _ in range(2):
        here, there = Codec(), Codec(worker=True, registry=Registry())
        copied = there.loads(here.dumps_checked(cls, define=True)[0])
        made.append((copied, there))  # a worker keeps its codec
        copied.count += 1
    assert cls.count == 0
    assert [copied.count for copied, _ in made] in ([1, 1], [2, 2])


def test_modules_registered_by_value(here: Codec) -> None:
    """What the user has registered with cloudpickle travels by value."""
    module = types.ModuleType("tests_by_value")
    code = "def process_batch(batch):\n    return ['found in the code'] * len(batch)"
    exec(code, module.__dict__)  # noqa: S102
    sys.modules["tests_by_value"] = module
    cloudpickle.register_pickle_by_value(module)
    try:
        own, data, buffers = here.dumps(module.process_batch)
        assert isinstance(data, bytes)
        assert own
        assert b"found in the code" in data
    finally:
        cloudpickle.unregister_pickle_by_value(module)
        del sys.modules["tests_by_value"]
    assert Codec(worker=True, registry=Registry()).loads((own, data, buffers))([1]) == [
        "found in the code"
    ]


def test_a_function_behind_a_decorator(
    here: Codec, there: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function that an importable decorated function wraps is pickled as a reference."""
    text = """
        import functools

        def original(batch):
            return batch

        kept = original
        original = functools.wraps(original)(lambda batch: batch)
        """
    (tmp_path / "tests_decorated.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    kept = importlib.import_module("tests_decorated").kept
    own, data, buffers = here.dumps(kept)
    assert isinstance(data, bytes)
    assert len(data) < 200
    assert there.loads((own, data, buffers)) is kept


def test_local_enum_members(here: Codec, there: Codec) -> None:
    """A member comes back as that very member."""

    class Colour(enum.Enum):
        RED = 1

    blob = here.dumps(Colour.RED)
    send_definitions(here, there)
    assert here.loads(there.dumps(there.loads(blob))) is Colour.RED


def test_slots_survive(here: Codec, there: Codec) -> None:
    """An instance of a local class with ``__slots__`` makes the round trip."""

    class Item:
        __slots__ = ("value",)

        def __init__(self) -> None:
            self.value = 3

    blob = here.dumps(Item())
    send_definitions(here, there)
    copied = there.loads(blob)
    assert copied.value == 3
    back = here.loads(there.dumps(copied))
    assert type(back) is Item
    assert back.value == 3


def test_a_remote_call_consists_of_builtins() -> None:
    """An executor's own pickler accepts it, and unpickling it runs no user code."""
    job = RemoteCall(b"key", (False, b"program", []), None, [(True, b"item", [])])
    copied = pickle.loads(pickle.dumps(job))  # noqa: S301
    assert (copied.key, copied.function, copied.definitions, copied.items) == (
        job.key,
        job.function,
        None,
        job.items,
    )
    assert copied.facts is None
    facts: Any = ((False, b"key", []), 2, 1.5, None)
    job.facts = facts
    assert pickle.loads(pickle.dumps(job)).facts == facts  # noqa: S301


# Exceptions.


def raised(exc: BaseException) -> BaseException:
    """Return the exception with a traceback."""
    try:
        raise exc  # noqa: TRY301
    except BaseException as caught:  # noqa: BLE001 - it is the call's
        return caught


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("text", 1),
        work.FrankError("frank", code=7),
        work.FalsyError(),
        KeyError("key"),
        OSError(2, "no such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "reason"),
        WorkerDiedError("died", pid=5, exit_code=-9, may_have_run=False),
        SystemExit(3),
        ExceptionGroup("group", [ValueError(1)]),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_an_exception_arrives_as_itself(here: Codec, there: Codec, exc: BaseException) -> None:
    """Type, args and attributes arrive; the traceback of the worker becomes the cause."""
    arrived = decode_exception(here, encode_exception(there, raised(exc)))
    assert type(arrived) is type(exc)
    assert repr(arrived) == repr(exc)
    assert arrived.__dict__ == exc.__dict__
    assert type(arrived.__cause__) is RemoteTraceback
    assert "in raised" in str(arrived.__cause__)
    assert type(exc).__name__ in str(arrived.__cause__)


class _Unprintable(Exception):  # noqa: N818
    def __str__(self) -> str:
        msg = "no text either"
        raise ValueError(msg)


class _NotItself(Exception):  # noqa: N818
    def __reduce__(self) -> Any:
        return (str, ("something else",))


class _ExitsPickled(Exception):  # noqa: N818
    def __reduce__(self) -> Any:
        raise SystemExit


@pytest.mark.parametrize(
    "exc",
    [work.PickyError(404, "gone"), _NotItself("not itself"), _ExitsPickled("hello")],
    ids=lambda exc: type(exc).__name__,
)
def test_an_exception_that_plain_pickle_changes(
    here: Codec, there: Codec, exc: BaseException
) -> None:
    """It arrives as itself, from its class, args and state."""
    arrived = decode_exception(here, encode_exception(there, raised(exc)))
    assert (type(arrived), str(arrived), arrived.args) == (type(exc), str(exc), exc.args)
    assert "in raised" in str(arrived.__cause__)


def test_an_exception_that_cannot_be_reproduced(here: Codec, there: Codec) -> None:
    """A BatchError with its type and message replaces it."""
    exc = uncarriable("hello")
    arrived = decode_exception(here, encode_exception(there, raised(exc)))
    assert type(arrived) is BatchError
    assert arrived.original_type.endswith("UncarriableError")
    assert str(exc) in str(arrived)
    assert "in raised" in str(arrived.__cause__)


def test_an_exception_whose_str_fails(here: Codec, there: Codec) -> None:
    """It arrives."""
    arrived = decode_exception(here, encode_exception(there, raised(_Unprintable())))
    assert type(arrived) is _Unprintable
    assert "_Unprintable" in str(arrived.__cause__)


def test_an_exception_with_a_chain(here: Codec, there: Codec) -> None:
    """Its causes arrive; the traceback is at the end of the chain."""
    error = ValueError("outer")
    error.__cause__ = raised(work.PickyError(404, "inner"))
    arrived = decode_exception(here, encode_exception(there, raised(error)))
    assert type(arrived.__cause__) is work.PickyError
    assert str(arrived.__cause__) == "404: inner"
    assert type(arrived.__cause__.__cause__) is RemoteTraceback
    assert "PickyError: 404: inner" in str(arrived.__cause__.__cause__)
    assert "ValueError: outer" in str(arrived.__cause__.__cause__)


def test_an_exception_in_a_circle_of_causes(here: Codec, there: Codec) -> None:
    """The chain ends where it would repeat."""
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    arrived = decode_exception(here, encode_exception(there, first))
    assert type(arrived) is ValueError
    assert type(arrived.__cause__) is KeyError
    assert type(arrived.__cause__.__cause__) is RemoteTraceback


def test_an_exception_of_a_local_class(here: Codec, there: Codec) -> None:
    """A class that the caller has sent comes back as the caller's; one of the worker by value."""

    class Refusal(Exception):  # noqa: N818
        pass

    copied = there.loads(here.dumps_checked(Refusal, define=True)[0])
    assert type(decode_exception(here, encode_exception(there, raised(copied("no"))))) is Refusal

    class Foreign(Exception):  # noqa: N818
        pass

    arrived = decode_exception(here, encode_exception(there, raised(Foreign("no"))))
    assert type(arrived).__name__ == "Foreign"
    assert arrived.args == ("no",)


# What cannot be pickled, and where it is.


class _Holder:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class _Slotted:
    __slots__ = ("guard",)

    def __init__(self) -> None:
        self.guard = threading.Lock()


class _Rogue:
    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        work.fail_by(self.how)

    def __getstate__(self) -> Any:
        work.fail_by(self.how)


def _over(value: Any) -> Callable[[], Any]:
    return lambda: value


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (threading.Lock, "it (a _thread.lock)"),
        (lambda: [1, threading.Lock()], "it[1] (a _thread.lock)"),
        (lambda: {"a": {2: threading.Lock()}}, "it['a'][2] (a _thread.lock)"),
        (lambda: {(1, 2): threading.Lock()}, "a value of it (a _thread.lock)"),
        (lambda: _Holder(x=1, lock=threading.Lock()), "it.lock (a _thread.lock)"),
        (lambda: _Holder(x=_Holder(deep=[threading.Lock()])), "it.x.deep[0] (a _thread.lock)"),
        (_Slotted, "it.guard (a _thread.lock)"),
        (lambda: _over(threading.Lock()), "it: closure variable 'value' (a _thread.lock)"),
        (
            lambda: _over(_over(threading.Lock())),
            "it: closure variable 'value': closure variable 'value' (a _thread.lock)",
        ),
        (
            lambda: _over(_Holder(lock=threading.Lock())),
            "it: closure variable 'value'.lock (a _thread.lock)",
        ),
    ],
)
def test_the_innermost_part_is_named(make: Callable[[], Any], path: str) -> None:
    """The message has the path to the culprit; the cause is what pickling raised."""
    value = make()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - TypeError or PicklingError, as Python's version has it
        Codec().dumps(value)
    error = pickling_error("it", value, caught.value)
    assert type(error) is SerializationError
    assert str(error).startswith(path), str(error)
    assert error.__cause__ is caught.value


@pytest.mark.parametrize("how", ["raise", "exit"])
@pytest.mark.parametrize(
    "wrap", [lambda value: value, lambda value: [value], lambda value: _Holder(part=value)]
)
def test_the_search_survives_user_code(how: str, wrap: Callable[[Any], Any]) -> None:
    """If pickling a part raises anything, even SystemExit, the search ends with the error."""
    error = pickling_error("it", wrap(_Rogue(how)), ValueError("as it was"))
    assert "as it was" in str(error)


def test_the_search_ends_in_cycles() -> None:
    """It visits objects that refer to each other once."""
    one, other = _Holder(), _Holder(lock=threading.Lock())
    one.other, other.one = other, one  # type: ignore[attr-defined]
    assert "it.other.lock" in str(pickling_error("it", one, ValueError()))


def test_the_search_has_a_maximum_depth() -> None:
    """In deeply nested lists it stops, and the path in the message stays short."""
    nested: list[Any] = [threading.Lock()]
    for _ in range(2000):
        nested = [nested]
    assert len(str(pickling_error("it", nested, RecursionError()))) < 2000


def test_the_search_visits_a_part_once_per_level() -> None:
    """The number of calls of user code does not grow exponentially with the depth."""
    asked = []

    class Counted:
        def __reduce__(self) -> Any:
            asked.append(1)
            msg = "no"
            raise ValueError(msg)

    value: Any = Counted()
    for _ in range(10):
        value = [value, value]
    pickling_error("it", value, ValueError())
    assert len(asked) < 100


def test_an_unpickling_error_names_the_object_and_the_cause() -> None:
    """The original exception is its cause."""
    cause = ArithmeticError("this hurts")
    error = unpickling_error("result", cause)
    assert type(error) is SerializationError
    assert "result" in str(error)
    assert "builtins.ArithmeticError: this hurts" in str(error)
    assert error.__cause__ is cause
