"""Exceptions are copied and pickled with type, args, text, attributes, notes and chain."""

from __future__ import annotations

import os
import threading

import pytest

from async_batcher._serialization.caller_exceptions import CallerExceptions
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.exception_copy import RemoteTraceback, chain, remote_traceback
from async_batcher._serialization.remote_exception import (
    NotCarried,
    decode_exception,
    encode_exception,
)
from async_batcher.exceptions import BatchError
from tests.support import exception_kinds as kinds
from tests.support.exception_kinds import KINDS, UNPICKLABLE, made, shown


def raised(exc: BaseException) -> BaseException:
    """Return the exception with a traceback."""
    try:
        raise exc  # noqa: TRY301
    except BaseException as caught:  # noqa: BLE001 - of any kind
        return caught


def arrived(exc: BaseException) -> BaseException:
    """Return the exception as it comes back from a worker."""
    return decode_exception(Codec(), encode_exception(Codec(worker=True), exc))


@pytest.mark.parametrize(
    "exc", list(kinds.builtin_exceptions()), ids=lambda exc: type(exc).__name__
)
def test_every_builtin_exception_is_copied(exc: BaseException) -> None:
    """Several callers get equal objects, or a BatchError for control flow."""
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


@pytest.mark.parametrize(
    "exc", list(kinds.builtin_exceptions()), ids=lambda exc: type(exc).__name__
)
def test_every_builtin_exception_is_pickled(exc: BaseException) -> None:
    """It comes out of a worker as it went in."""
    assert shown(arrived(exc)) == shown(exc)


@pytest.mark.parametrize("kind", [*KINDS, *UNPICKLABLE])
def test_every_kind_is_copied(kind: str) -> None:
    """A copy has all that the original has; the original does not change."""
    exc = made(kind)
    before = shown(exc)
    own = CallerExceptions.among_results([exc, exc], "f")
    copies = [own.own(exc, 0), own.own(exc, 1)]
    assert len({id(one) for one in (*copies, exc)}) == 3
    assert [shown(one) for one in copies] == [before] * 2
    assert shown(exc) == before
    assert not any("in a batch of" in note for note in vars(exc).get("__notes__", ()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_pickled(kind: str) -> None:
    """It comes out of a worker as it went in, with its causes."""
    assert shown(arrived(made(kind))) == shown(made(kind))


@pytest.mark.parametrize("kind", UNPICKLABLE)
def test_state_that_cannot_be_pickled_is_shown(kind: str) -> None:
    """The exception arrives; its repr replaces each part that cannot be pickled."""
    exc = made(kind)
    there = arrived(exc)
    assert (type(there), str(there)) == (type(exc), str(exc))
    assert repr(there.args) == repr(exc.args)
    for name, value in vars(exc).items():
        assert repr(vars(there)[name]) == repr(value)
    assert kind != "a lock" or type(vars(there)["lock"]) is NotCarried


def test_every_class_can_get_a_note() -> None:
    """Also one that forbids attributes, and one whose notes are not a list."""
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
    """Its object may be as large as the program's data; copies in the same process keep it."""
    model = object()
    exc = AttributeError("no", name="predict", obj=model)
    copied = CallerExceptions.of_failed_batch(exc, 2, 2, "f").own(exc, 0)
    assert isinstance(copied, AttributeError)
    assert (copied.name, copied.obj) == ("predict", model)
    there = arrived(exc)
    assert isinstance(there, AttributeError)
    assert (there.name, there.obj) == ("predict", None)


def test_the_remote_traceback_ends_the_chain() -> None:
    """It is the cause of the last cause, and shows where the worker raised the exception."""
    exc = raised(made("chain"))
    *links, last = chain(arrived(exc))
    assert [str(link) for link in links] == ["outer", "3: middle", "'inner'"]
    assert type(last) is RemoteTraceback
    assert "in raised" in str(last)
    assert last.pid == os.getpid()


def test_members_of_a_group_keep_their_causes() -> None:
    """They are pickled with the group."""
    member = kinds.KeywordOnlyError(retry_after=3)
    member.__cause__ = made("own number")
    there = arrived(ExceptionGroup("group", [member]))
    assert isinstance(there, ExceptionGroup)
    assert shown(there.exceptions[0]) == shown(member)
    assert type(there.exceptions[0].__cause__) is kinds.TwoArgumentsError


def test_a_cause_that_cannot_be_pickled_keeps_its_position() -> None:
    """A BatchError with its text replaces that one link."""
    exc = ValueError("outer")
    exc.__cause__ = kinds.uncarriable("middle")
    exc.__cause__.__cause__ = KeyError("inner")
    outer, middle, inner, _ = chain(arrived(exc))
    assert (type(outer), type(inner)) == (ValueError, KeyError)
    assert isinstance(middle, BatchError)
    assert middle.original_type.endswith("UncarriableError")
    assert "middle" in str(middle)


class _Unset:
    pass


_UNSET = _Unset()


class _UnsetError(Exception):
    """Has a text that depends on which object a part is, as that of jsonschema's errors does."""

    def __init__(self, text: str, value: object = _UNSET) -> None:
        super().__init__(text)
        self.value = value

    def __str__(self) -> str:
        text: str = self.args[0]
        return text if self.value is _UNSET else f"{text}: {type(self.value).__name__}"


def test_a_text_that_depends_on_identity() -> None:
    """The exception arrives; a note has the text that it had in the worker."""
    there = arrived(_UnsetError("bad"))
    assert (type(there), there.args, str(there)) == (_UnsetError, ("bad",), "bad: _Unset")
    assert there.__notes__ == ["its text in the worker: bad"]
    assert not hasattr(arrived(_UnsetError("bad", 3)), "__notes__")


def test_an_exception_may_create_its_parts_again() -> None:
    """What its class creates when it is unpickled is not replaced by a repr."""
    there = arrived(kinds.LockedError("text"))
    assert isinstance(there, kinds.LockedError)
    assert type(there.lock) is type(threading.Lock())


def test_sent_tracebacks_are_cleared() -> None:
    """Those of the exception, its cause, context and members; the text has them."""
    links = [raised(ValueError(str(place))) for place in range(4)]
    exc = raised(ExceptionGroup("group", links[:2]))  # type: ignore[type-var]
    exc.__cause__, exc.__context__ = links[2], links[3]
    links[3].__context__ = exc  # a circle
    assert str(remote_traceback(arrived(exc))).count("in raised") == 4
    assert [link.__traceback__ for link in (exc, *links)] == [None] * 5
