"""Threads that pickle and unpickle at the same time."""

from __future__ import annotations

import threading
import time
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from async_batcher._pool.pickled_function import PickledFunction
from async_batcher._serialization.by_value import Registry, SentValue
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.out_of_band import BufferPickler
from async_batcher._worker.user_function import UserFunction
from tests.support.modules import unimportable_module
from tests.support.threads import run_together

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

ROUNDS = 40


def test_a_class_gets_one_id() -> None:
    """With two, a worker would create two classes, and an instance of one is none of the other."""
    for _ in range(ROUNDS):
        registry = Registry()
        local = type("Local", (), {})
        ids = run_together(lambda _, r=registry, c=local: r.register_class(c))  # type: ignore[misc]
        assert set(ids) == {registry.class_ids[local]}


def test_a_version_belongs_to_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two objects with one version, a worker would keep the first that arrives."""
    is_still = SentValue.is_still

    def slow_is_still(self: SentValue, value: Any) -> bool:
        time.sleep(0.001)
        return is_still(self, value)

    codec = Codec(registry=Registry())
    names: dict[str, Any] = {"__name__": "home", "value": []}
    exec("def function():\n    return value", names)  # noqa: S102 - with globals of its own
    codec.dumps_checked(names["function"])
    monkeypatch.setattr(SentValue, "is_still", slow_is_still)

    def pickle(number: int) -> Any:
        names["value"] = [number]
        _, trace = codec.dumps_checked(names["function"])
        return [sent for (_, name), (_, sent) in trace._sent.items() if name == "value"]

    sent = [*chain(*run_together(pickle))]
    objects = {one.version: one._value for one in sent}
    assert len(objects) > 1
    assert all(objects[one.version] is one._value for one in sent)


def test_names_of_modules_are_read_while_others_pickle(tmp_path: Path) -> None:
    """What a thread iterates over does not change, as more modules travel by value."""
    registry = Registry()
    with unimportable_module(tmp_path, "only_here", "def function(): pass") as module:
        before = registry.by_value_modules
        Codec(registry=registry).dumps_checked(module.function)
        assert list(before) == []
        assert list(registry.by_value_modules) == [b"only_here"]


class SlowDictionary(WeakKeyDictionary[type, Any]):
    """Lets other threads run while it is read."""

    def values(self) -> Any:
        """Yield the values."""
        for value in super().values():
            time.sleep(0)
            yield value


def test_definitions_are_read_while_others_pickle() -> None:
    """A worker may ask for them at any time."""
    codec = Codec(registry=Registry())
    codec._definitions = SlowDictionary()
    classes = [type(f"Local{number}", (), {"__module__": "__main__"}) for number in range(60)]

    def pickle(number: int) -> None:
        for cls in classes[number::6]:
            codec.dumps_checked(cls())
            assert codec.definitions()

    run_together(pickle)
    assert len(codec.definitions()) == len(classes)


def test_picklers_are_not_shared() -> None:
    """Each thread gets the pickle of its own value."""
    pickler = BufferPickler()
    lone = BufferPickler()

    def pickle(number: int) -> bool:
        value = [number] * 50
        expected, _ = lone.dumps(value) if number == 0 else BufferPickler().dumps(value)
        return all(pickler.dumps(value)[0] == expected for _ in range(300))

    assert all(run_together(pickle))


def test_a_function_always_has_a_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is sent while the function is pickled anew, by value, travels with one."""
    function = PickledFunction(
        UserFunction(lambda batch: batch, by_keyword=False, setup=None), runs_main=True
    )
    key, _ = function.pickle()
    begun, go_on = threading.Event(), threading.Event()
    dumps = PickledFunction._dumps

    def slow_dumps(self: PickledFunction) -> Any:
        begun.set()
        assert go_on.wait(20)
        return dumps(self)

    monkeypatch.setattr(PickledFunction, "_dumps", slow_dumps)

    def use(number: int) -> Any:
        if number == 0:
            function.send_by_value()
        else:
            assert begun.wait(20)
            payload = function.payload
            go_on.set()
            assert payload is not None
        return function.key

    (new_key, _) = run_together(use, threads=2)
    assert new_key != key
    assert not function.codec.runs_main
