"""Large ``bytes`` beside a pickle."""

from __future__ import annotations

import gc
import pickle
import sys
import weakref
from fractions import Fraction
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher._serialization.codec import Codec
from async_batcher._serialization.out_of_band import (
    MIN_BUFFER_SIZE,
    BufferPickler,
    wrap_large_bytes,
)

SIZES = st.sampled_from([0, 1, MIN_BUFFER_SIZE - 1, MIN_BUFFER_SIZE, MIN_BUFFER_SIZE + 1])
LEAVES = st.integers() | SIZES.map(bytes) | SIZES.map(bytearray) | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=4)
    ),
    max_leaves=20,
)


def crossed(value: Any) -> tuple[Any, int]:
    """Return what arrives, and the number of buffers."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(wrap_large_bytes(value), 5, buffer_callback=buffers.append)
    received = [memoryview(bytearray(buffer)) for buffer in buffers]
    return pickle.loads(data, buffers=received), len(buffers)  # noqa: S301


def types(value: Any) -> Any:
    """Return the types of a value and of all that is in it."""
    if isinstance(value, dict):
        return (dict, list(value), types(list(value.values())))
    return (
        (type(value), [types(entry) for entry in value])
        if isinstance(value, list | tuple)
        else type(value)
    )


@given(VALUES)
def test_values_are_equal_on_the_other_side(value: Any) -> None:
    """Equal, of the same types; the original value does not change."""
    before = repr(value)
    there, _ = crossed(value)
    assert there == value
    assert types(there) == types(value)
    assert repr(value) == before


def test_large_bytes_travel_out_of_band() -> None:
    """In a batch, also in its dicts, and in the arguments of a call; they arrive as plain bytes."""
    items = [bytes([n]) * MIN_BUFFER_SIZE for n in range(3)]
    assert crossed(items) == (items, 3)
    call: Any = [(len, (items, 1), {"key": items[0]})]
    assert crossed(call) == (call, 3)
    records = [{"name": "a", "content": item, "more": [item]} for item in items]
    assert crossed(records) == (records, 3)
    (first, *_), _ = crossed([bytearray(MIN_BUFFER_SIZE), b"small"])
    assert type(first) is bytearray


def test_an_object_in_two_places_stays_one_object() -> None:
    """As with pickle: bytes, and the list that they are in."""
    large = bytes(MIN_BUFFER_SIZE)
    batch = [large, large]
    there, count = crossed([batch, batch])
    assert count == 1
    assert there[0] is there[1]
    assert there[0][0] is there[0][1]


@pytest.mark.parametrize(
    "value",
    [
        None,
        1,
        "text",
        [1, 2],
        [b"small"],
        {"a": bytes(MIN_BUFFER_SIZE - 1)},
        dict.fromkeys(range(2_000), bytes(MIN_BUFFER_SIZE)),
        list(range(10_000)),
        object,
    ],
)
def test_a_value_without_large_bytes_is_not_copied(value: object) -> None:
    """The same object is pickled."""
    assert wrap_large_bytes(value) is value


def test_a_list_that_holds_itself() -> None:
    """It arrives as with pickle."""
    value: list[Any] = [bytes(MIN_BUFFER_SIZE)]
    value.append(value)
    there, _ = crossed(value)
    assert there[0] == value[0]
    assert there[1][0] == value[0]


def packed(packer: BufferPickler, value: Any) -> tuple[Any, int]:
    """Return what arrives from a pickler, and the number of its buffers."""
    data, buffers = packer.dumps(value)
    return pickle.loads(data, buffers=[bytearray(buffer) for buffer in buffers]), len(buffers)  # noqa: S301


@settings(max_examples=40)
@given(st.lists(VALUES | st.just([bytes(100_000)]) | st.just(list(range(30_000))), max_size=6))
def test_pickles_of_one_pickler_are_independent(values: list[Any]) -> None:
    """Each is complete, also small ones after large ones, and the same value again."""
    packer = BufferPickler()
    for value in [*values, *values]:
        assert packed(packer, value)[0] == value
    assert packed(packer, [bytes(100_000)] * 2)[1] == 1
    assert packed(packer, [1, 2]) == ([1, 2], 0)


def test_in_band_nothing_travels_beside_the_pickle() -> None:
    """Neither large bytes nor buffers; one pickle after the other."""
    packer = BufferPickler(out_of_band=False)
    wrapped = pickle.PickleBuffer(bytearray(MIN_BUFFER_SIZE))
    for value in ([1, 2], [bytes(200_000)], [bytes(MIN_BUFFER_SIZE)] * 3, "text"):
        assert packed(packer, value) == (value, 0)
    assert packed(packer, [wrapped]) == ([bytearray(MIN_BUFFER_SIZE)], 0)


class Counted:
    """Counts how often it is pickled."""

    def __init__(self, times: list[int]) -> None:
        self.times = times

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a number."""
        self.times.append(1)
        return (int, (7,))


@pytest.mark.parametrize(
    "large",
    [[], ["x" * 300_000], [list(range(200_000))], [bytes(200_000)]],
    ids=["small", "text", "list", "bytes"],
)
def test_many_objects_are_pickled_once(large: list[Any]) -> None:
    """A large pickle is made in one pass, unless large bytes can travel out of band."""
    times: list[int] = []
    things = [Counted(times) for _ in range(1_000)]
    value, count = packed(BufferPickler(), [things, *large])
    assert value == [[7] * 1_000, *large]
    has_bytes = any(type(one) is bytes for one in large)
    assert count == has_bytes
    assert len(times) == (2_000 if has_bytes else 1_000)


class Nested:
    """Pickles something else while it is pickled."""

    def __init__(self, packer: BufferPickler, fails: bool) -> None:
        self.packer = packer
        self.fails = fails

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the inner value."""
        inner, _ = packed(self.packer, ["inner", bytearray(10)])
        if self.fails:
            raise ZeroDivisionError
        return (list, (inner,))


def test_a_pickler_in_use_is_not_reused() -> None:
    """By user code that pickles meanwhile; nor is one that has failed."""
    packer = BufferPickler()
    for _ in range(3):
        assert packed(packer, (1, Nested(packer, fails=False), 2)) == (
            (1, ["inner", bytearray(10)], 2),
            0,
        )
        with pytest.raises(ZeroDivisionError):
            packer.dumps([1, Nested(packer, fails=True)])
        assert packed(packer, [1, 2]) == ([1, 2], 0)


class Thing:
    """An object that can be pickled and weakly referenced."""


def test_what_was_pickled_is_not_kept() -> None:
    """The pickler that is kept refers to nothing that it has pickled."""
    packer, thing = BufferPickler(), Thing()
    packer.dumps([thing])
    watched = weakref.ref(thing)
    del thing
    gc.collect()
    assert watched() is None


# Tensors; those of the real torch are in test_tensors.py.


class _Tensor:
    """The parts of a tensor that the pickler uses."""

    __slots__ = ("__dict__", "array")

    def __init__(self, array: Any) -> None:
        self.array = array

    def numpy(self) -> Any:
        """Return the array."""
        return self.array

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Tensor, (self.array.tolist(),))


def _torch() -> Any:
    torch: Any = ModuleType("torch")
    torch.Tensor, torch.from_numpy = _Tensor, _Tensor
    torch._tensor = SimpleNamespace(_rebuild_from_type_v2=object())
    torch._utils = SimpleNamespace(
        _rebuild_tensor_v2=object(), _rebuild_tensor_v3=object(), _rebuild_qtensor=object()
    )
    return torch


def test_a_tensor_travels_out_of_band_once_torch_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also by an older pickler; torch pickles tensors with attributes, and those with gaps."""
    np = pytest.importorskip("numpy")
    packer, tensor = BufferPickler(), _Tensor(np.arange(float(MIN_BUFFER_SIZE)))
    assert not packer.dumps([1])[1]
    assert not packer.dumps(tensor)[1]
    monkeypatch.setitem(sys.modules, "torch", _torch())
    assert not packer.dumps([1])[1]
    data, buffers = packer.dumps([tensor, [tensor]])
    assert len(data) < MIN_BUFFER_SIZE
    assert len(buffers) == 1
    first, (second,) = pickle.loads(data, buffers=buffers)  # noqa: S301
    assert first is second
    assert np.shares_memory(first.array, tensor.array)
    assert not packer.dumps(_Tensor(np.arange(2.0 * MIN_BUFFER_SIZE)[::2]))[1]
    vars(tensor)["label"] = "cat"
    assert not packer.dumps(tensor)[1]


@pytest.mark.parametrize(
    "torch", [None, ModuleType("torch"), MagicMock()], ids=["blocked", "begun", "mocked"]
)
def test_what_only_looks_like_torch_changes_nothing(
    torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that must not be imported, is still being imported, or is a mock of torch."""
    monkeypatch.setitem(sys.modules, "torch", torch)
    packer = BufferPickler()
    for value in ([1], [Fraction(1, 3)]):
        assert pickle.loads(packer.dumps(value)[0]) == value  # noqa: S301
        assert BufferPickler(out_of_band=False).dumps(value) == (pickle.dumps(value, 5), [])
        codec = Codec()
        assert codec.loads(codec.dumps(lambda value=value: value))() == value


@pytest.mark.parametrize("kind", [dict, list])
def test_a_container_that_contains_itself_stays_one_object(kind: type) -> None:
    """Large bytes beside it are not wrapped."""
    value: Any = kind()
    if kind is dict:
        value.update(data=bytes(MIN_BUFFER_SIZE), me=value)
    else:
        value += [bytes(MIN_BUFFER_SIZE), value]
    assert wrap_large_bytes(value) is value
