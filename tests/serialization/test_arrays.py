"""Arrays of NumPy and Arrow: what is beside their pickles, and that they arrive as from pickle.

How each type travels is in ``test_types_table.py``.
"""

from __future__ import annotations

import copyreg
import pickle
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import pytest

from async_batcher._serialization import arrays
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.out_of_band import BufferPickler
from async_batcher._worker.plain_pickler import PlainPickler

if TYPE_CHECKING:
    from collections.abc import Callable

np = pytest.importorskip("numpy")

ROWS, COLUMNS = 60, 100


def table(dtype: Any = "f4") -> Any:
    """Return an array of which others are views."""
    return (np.arange(ROWS * COLUMNS) % 251).astype(dtype).reshape(ROWS, COLUMNS)


def crossed(value: Any, pickler: BufferPickler | None = None) -> tuple[Any, int, int]:
    """Return what arrives, the size of the pickle, and that of its buffers."""
    data, beside = (pickler or BufferPickler()).dumps(value)
    received = [bytearray(buffer) for buffer in beside]
    return pickle.loads(data, buffers=received), len(data), sum(map(len, received))  # noqa: S301


def read_only(array: Any) -> Any:
    """Return it, read-only."""
    array.flags.writeable = False
    return array


def records(*fields: tuple[str, str]) -> Any:
    """Return a structured array."""
    return np.ones(3_000, dtype=[("a", "i4"), *fields])


ARRAYS: dict[str, Callable[[], Any]] = {
    "plain": table,
    "fortran": lambda: np.asfortranarray(table()),
    "column": lambda: table()[:, 7:100],
    "every second, backwards": lambda: table()[::-2, ::2],
    "transposed": lambda: table().T,
    "repeated": lambda: np.broadcast_to(table()[:9], (5, 9, COLUMNS)),
    "dates": lambda: table("M8[D]"),
    "dates in Fortran's order": lambda: np.asfortranarray(table("M8[D]")),
    "dates with gaps": lambda: table("M8[D]")[:, ::3],
    "durations": lambda: table("m8[us]"),
    "records": lambda: records(("b", "S7")),
    "records with dates": lambda: records(("b", "M8[s]")),
    "records with gaps": lambda: records(("b", "M8[s]"))[::2],
    "one very long record": lambda: np.zeros((), dtype=[("a", "M8[s]", 5000)]),
    "texts": lambda: table("U5"),
    "no bytes": lambda: table("V0"),
    "no row": lambda: table()[:0],
    "one number": lambda: np.array(7.0),
    "small": lambda: table()[:1, 1::2],
    "small dates": lambda: table("M8[D]")[:1],
    "objects": lambda: np.array([1, "two", None] * 1000, dtype=object),
    "objects with gaps": lambda: np.array([1, "two", None] * 1000, dtype=object)[::2],
    "records with objects": lambda: records(("b", "O")),
    "read-only": lambda: read_only(table()),
    "read-only dates": lambda: read_only(table("M8[D]")),
    "read-only dates in Fortran's order": lambda: read_only(np.asfortranarray(table("M8[D]"))),
    "read-only records": lambda: read_only(records()),
    "read-only records with dates": lambda: read_only(records(("b", "M8[s]"))),
    "masked": lambda: np.ma.masked_array(table(), table() > 200, fill_value=7),
    "masked, with gaps": lambda: np.ma.masked_array(table(), table() > 200)[:, ::3],
    "masked records": lambda: np.ma.masked_array(records(("b", "S7")), fill_value=(1, b"two")),
    "masked, read-only": lambda: np.ma.masked_array(read_only(table()), copy=False),
    "masked dates": lambda: np.ma.masked_array(table("M8[D]"), table() > 200),
    "masked objects": lambda: np.ma.masked_array([1, "two", None] * 1000, dtype=object),
    "masked, small": lambda: np.ma.masked_array([1, 2, 3], [1, 0, 0]),
    "masked matrix": lambda: np.ma.masked_array(table().view(np.matrix)),
    "matrix": lambda: table().view(np.matrix),
    "record array": lambda: records().view(np.recarray),
}


def traits(array: Any) -> Any:
    """Return all that must be as from pickle."""
    flags = array.flags
    extra: tuple[Any, ...] = ()
    if isinstance(array, np.ma.MaskedArray):
        extra = (np.ma.getmaskarray(array).tolist(), repr(array.fill_value), array.hardmask)
    order = (flags.c_contiguous, flags.f_contiguous)
    content = array.tolist() if array.dtype.hasobject else np.asarray(array).tobytes()
    return (type(array), array.dtype, array.shape, flags.writeable, order, content, extra)


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_arrives_as_from_pickle(name: str) -> None:
    """Type, values, layout, and whether it is writable; with each of the picklers."""
    array = ARRAYS[name]()
    before = traits(array)
    expected = traits(pickle.loads(pickle.dumps(array, 5)))  # noqa: S301
    assert traits(crossed(array)[0]) == expected
    assert traits(crossed(array, BufferPickler(out_of_band=False))[0]) == expected
    for out_of_band in (True, False):
        codec = Codec(out_of_band=out_of_band)
        assert traits(codec.loads(codec.dumps(lambda: array))()) == expected
    assert traits(array) == before


@pytest.mark.parametrize("name", [name for name in ARRAYS if "object" not in name])
def test_what_is_changed_on_one_side_stays_there(name: str) -> None:
    """An array that arrives shares no memory with the one that was sent, nor two with each other."""
    array = ARRAYS[name]()
    before = array.tobytes()
    (first, again), second = (crossed([array, array])[0], crossed(array)[0])
    assert first is again
    for arrived in (first, second):
        if arrived.flags.writeable and arrived.size:
            arrived[...] = np.zeros(1, arrived.dtype)[0]
    assert array.tobytes() == before


def test_a_memmap_arrives_in_memory(tmp_path: Any) -> None:
    """As from pickle: of its type, without its file, writable; a slice without the rest."""
    table().tofile(tmp_path / "table")
    for mode in ("r", "r+", "c"):
        mapped = np.memmap(tmp_path / "table", dtype="f4", mode=mode, shape=(ROWS, COLUMNS))
        for view in (mapped, mapped[5:9], mapped[:, ::2], mapped[:0], mapped[3]):
            arrived, inside, beside = crossed(view)
            assert traits(arrived) == traits(pickle.loads(pickle.dumps(view, 5)))  # noqa: S301
            assert getattr(arrived, "filename", None) is None
            assert inside + beside < view.nbytes + 1_000
            if view.size:
                arrived[...] = -1
        assert (mapped == table()).all()
        assert mapped.flags.writeable == (mode != "r")


def test_what_the_user_has_registered_takes_precedence() -> None:
    """With copyreg, before or after a pickler was used; nothing is registered there."""
    packer, view, codec = BufferPickler(), table()[:, ::2], Codec()
    crossed(view, packer)
    assert np.ndarray not in copyreg.dispatch_table
    for text in ("first", "second"):
        copyreg.pickle(np.ndarray, lambda _, text=text: (str, (text,)))  # type: ignore[misc]
        try:
            assert crossed(view, packer)[0] == text
            assert codec.loads(codec.dumps(lambda: view))() == text
        finally:
            del copyreg.dispatch_table[np.ndarray]
    assert (crossed(view, packer)[0] == view).all()


class Registered:
    """Has a reducer in copyreg."""


def test_a_class_that_is_registered_later() -> None:
    """Its reducer counts, although the pickler was used before."""
    packer = BufferPickler()
    packer.dumps([Registered()])
    as_text: Any = lambda _: (str, ("registered",))  # noqa: E731 - of no type that fits
    copyreg.pickle(Registered, as_text)
    try:
        assert crossed([Registered()], packer)[0] == ["registered"]
    finally:
        del copyreg.dispatch_table[Registered]
    assert type(crossed(Registered(), packer)[0]) is Registered


@pytest.mark.parametrize("stand_in", [None, ModuleType("pyarrow"), MagicMock()])
@pytest.mark.parametrize("name", ["numpy", "numpy.ma", "pyarrow"])
def test_what_only_looks_like_a_package(
    name: str, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that must not be imported, is still being imported, or is a mock."""
    view = table()[:, ::2]
    monkeypatch.setitem(sys.modules, name, stand_in)
    arrays._reducers.cache_clear()
    try:
        assert not {None, stand_in} & set(arrays.reducers())
        data, _ = BufferPickler().dumps([1, {"a": 2}])
        assert pickle.loads(data) == [1, {"a": 2}]  # noqa: S301
    finally:
        monkeypatch.undo()
        arrays._reducers.cache_clear()
    assert (crossed(view)[0] == view).all()


def test_results_of_a_worker_travel_together() -> None:
    """In one pickle of plain data, which all of these are."""
    plain = BufferPickler(PlainPickler)
    values = [ARRAYS[name]() for name in ("dates", "column", "masked")]
    arrived, inside, beside = crossed(values, plain)
    assert all(bool((one == other).all()) for one, other in zip(arrived, values, strict=True))
    assert inside < 1_000 < beside


# Arrow


def arrow_arrays(pa: Any) -> dict[str, Any]:
    """Return long arrays of many kinds."""
    count = 50_000
    numbers, texts = np.arange(count), [f"text {n % 1000}" for n in range(count)]
    some = pa.array([None if n % 3 else n for n in range(count)])
    made = {
        "numbers": pa.array(numbers),
        "some": some,
        "booleans": pa.array(numbers % 2 == 0),
        "texts": pa.array(texts),
        "long texts": pa.array(texts, pa.large_string()),
        "dates": pa.array(numbers.astype("M8[s]")),
        "decimals": pa.array(numbers).cast(pa.decimal128(25, 2)),
        "lists": pa.array([[n, n + 1] for n in range(count)]),
        "structs": pa.StructArray.from_arrays([pa.array(numbers), pa.array(texts)], ["a", "b"]),
        "categories": pa.array(texts).dictionary_encode(),
        "nothing": pa.nulls(count),
        "fixed": pa.array([b"12345678"] * count, pa.binary(8)),
        "runs": pa.RunEndEncodedArray.from_arrays(numbers[1:], numbers[1:] % 7),
        "union": pa.UnionArray.from_sparse(
            pa.array(numbers % 2, pa.int8()), [pa.array(numbers), pa.array(texts)]
        ),
    }
    if hasattr(pa, "string_view"):
        long = [f"{text}, too long for the view itself" for text in texts]
        made["text views"] = pa.array(long, pa.string_view())
    if hasattr(pa, "uuid"):
        made["of an extension"] = pa.ExtensionArray.from_storage(
            pa.uuid(), pa.array([b"0123456789abcdef"] * count, pa.binary(16))
        )
    return made


WHOLE = {"text views"}  # of which Arrow copies the views, not the texts


def test_a_slice_of_arrow_travels_as_its_own_bytes() -> None:
    """Of each kind of array, in batches and tables, out of band or not; it is equal and valid."""
    pa = pytest.importorskip("pyarrow")
    made = arrow_arrays(pa)
    for name, whole in made.items():
        for part in (whole[1_001:1_300], whole[:7], whole[-5:], whole[9:9], whole):
            arrived, inside, beside = crossed(part)
            arrived.validate(full=True)
            assert arrived.type == part.type, name
            assert arrived.equals(part), name
            if part is not whole:
                is_own = inside + beside < 70 * len(part) + 20_000
                assert is_own == (name not in WHOLE), name
            again = pickle.loads(BufferPickler(out_of_band=False).dumps(part)[0])  # noqa: S301
            assert again.equals(part), name
    table = pa.table({name: made[name] for name in ("numbers", "some", "texts", "categories")})
    for part in (table.slice(100, 500), table.slice(100, 500).combine_chunks().to_batches()[0]):
        arrived, inside, beside = crossed(part)
        assert arrived.equals(part)
        assert arrived.schema == part.schema
        assert inside + beside < 60_000
    codec = Codec()
    part = made["texts"][5:900]
    payload = codec.dumps(lambda: part)
    assert memoryview(payload[1]).nbytes < 30_000
    assert codec.loads(payload)().equals(part)


def test_an_array_that_arrow_cannot_measure_or_copy() -> None:
    """Arrow pickles it, as a kind that is new in it."""

    class Unknown:
        nbytes = 10

        def __init__(self, error: type[Exception]) -> None:
            self.get_total_buffer_size = MagicMock(side_effect=error)

        def __reduce__(self) -> tuple[Any, ...]:
            return (str, ("unknown",))

    for error in (NotImplementedError, ValueError):
        assert arrays._reduce_arrow(Unknown(error)) == (str, ("unknown",))


def test_the_rows_of_a_table_take_as_much_as_the_table() -> None:
    """However many slices of one table a batch has."""
    pa = pytest.importorskip("pyarrow")
    whole = pa.table({"n": np.arange(100_000), "t": ["text"] * 100_000})
    parts = [whole.slice(start, 1_000) for start in range(0, 100_000, 1_000)]
    arrived, inside, beside = crossed(parts)
    assert inside + beside < 2 * whole.nbytes
    assert pa.concat_tables(arrived).equals(whole)
