"""How items and results of each type travel between a program and the workers of a `WorkerPool`.

Each row of `TABLE` is checked where its package is installed, by the codec and in a pool. The README
has the same table.
"""

from __future__ import annotations

import array
import ctypes
import functools
import importlib.util
import io
import mmap
import sys
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from async_batcher import WorkerPool, batched
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.out_of_band import BufferPickler
from async_batcher._transport import framing
from async_batcher._transport.channel import Channel
from async_batcher._transport.protocol import ReplyKind
from async_batcher._transport.shared_memory import SharedBlock
from async_batcher._worker import run_batch
from async_batcher._worker.plain_pickler import PlainPickler
from async_batcher.exceptions import SerializationError
from tests.support import value_kinds as kinds
from tests.support import worker_functions as work

if TYPE_CHECKING:
    from collections.abc import Callable

    from async_batcher._serialization.codec import Payload

ROOT = Path(__file__).parents[2]

MB = 1 << 20
LARGE = 2 * MB  # bytes of a value
SLACK = 8_192  # bytes of all that is not the content of a value

# The words of the table. How the content of a value gets to the function, and back:
IN_PLACE = "in place"  # once written to shared memory, and used there
BESIDE = "beside"  # once written to shared memory, and copied from there
PICKLED = "pickled"  # copied into the pickle, and out of it again
# Whether the value there can be changed in place:
YES, NO, NEVER = "yes", "no", "immutable"
# What of a large value travels with a part of it:
OWN, WHOLE = "its own", "the whole"


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        types: The first cell.
        item: How it gets to the function.
        result: How it gets to the caller.
        writable: Whether item and result can be changed in place.
        makes: Functions that make a large value, by what is special about it.
        parts: Functions that make a small part of a large value.
        part: How much travels with such a part.
        note: The last cell: what arrives, if that is of another type, and what else is to be known.
        arrives: The type that arrives, if it is another.
        needs: The package that the values are made with.
    """

    types: str
    item: str
    result: str
    writable: str
    makes: dict[str, Callable[[], Any]]
    parts: dict[str, Callable[[], Any]] = {}  # noqa: RUF012 - of no row is it changed
    part: str = ""
    note: str = ""
    arrives: str = ""
    needs: str = ""


def _np() -> Any:
    import numpy

    return numpy


def _numbers(dtype: str = "f8", size: int = LARGE) -> Any:
    np = _np()
    width = np.dtype(dtype).itemsize
    return (np.arange(size // width) % 251).astype(dtype)


def _square(dtype: str = "f4") -> Any:
    whole = _numbers(dtype)
    side = int(len(whole) ** 0.5)
    return whole[: side * side].reshape(side, side)


def _records() -> Any:
    made = _np().zeros(LARGE // 16, dtype=[("a", "i4"), ("b", "S4"), ("c", "M8[s]")])
    made["a"] = 7
    return made


def _read_only() -> Any:
    made = _numbers()
    made.flags.writeable = False
    return made


def _memmap(mode: str = "r") -> Any:
    with tempfile.NamedTemporaryFile() as file:
        _numbers().tofile(file.name)
        return _np().memmap(file.name, dtype="f8", mode=mode)


def _masked() -> Any:
    whole = _numbers("f4")
    return _np().ma.masked_array(whole, whole > 200, fill_value=-1)


def _objects() -> Any:
    return _np().array([f"{n:60}" for n in range(LARGE // 60)], dtype=object)


def _torch() -> Any:
    import torch

    return torch


def _tensor(dtype: str = "float32", count: int = LARGE // 4) -> Any:
    torch = _torch()
    return torch.arange(count).remainder(100).to(getattr(torch, dtype)).reshape(-1, 256)


def _pandas() -> Any:
    import pandas

    return pandas


def _frame() -> Any:
    return _pandas().DataFrame({name: _numbers(size=LARGE // 4) for name in "abcd"})


def _dates() -> Any:
    pd = _pandas()
    return pd.DataFrame({"t": pd.date_range("2026", periods=LARGE // 8, freq="s")})


def _categories() -> Any:
    return _pandas().Categorical.from_codes(_numbers("i1") % 4, categories=list("abcd"))


def _words(dtype: Any) -> Any:
    return _pandas().Series([f"{n:60}" for n in range(LARGE // 60)], dtype=dtype)


def _arrow_frame() -> Any:
    return _frame().convert_dtypes(dtype_backend="pyarrow")


def _pa() -> Any:
    import pyarrow

    return pyarrow


def _table() -> Any:
    count = LARGE // 20
    return _pa().table({"n": _numbers(size=8 * count), "w": ["some words"] * count})


def _pl() -> Any:
    import polars

    return polars


def _polars_frame() -> Any:
    return _pl().DataFrame({name: _numbers(size=LARGE // 4) for name in "abcd"})


def _image() -> Any:
    from PIL import Image

    return Image.fromarray(_numbers("u1", 3 << 20).reshape(1024, 1024, 3))


def _sub(kind: str) -> Callable[[], Any]:
    return lambda: _square().view(getattr(_np(), kind))


def _eighth(make: Callable[[], Any]) -> Callable[[], Any]:
    def part() -> Any:
        whole = make()
        whole = getattr(whole, "iloc", whole)
        length = len(make())
        return whole[length // 8 : length // 4]

    return part


TABLE = [
    Row(
        "`numpy.ndarray`",
        IN_PLACE,
        BESIDE,
        YES,
        {
            "plain": _numbers,
            "big-endian": lambda: _numbers(">i4"),
            "in Fortran's order": lambda: _np().asfortranarray(_square()),
            "transposed": lambda: _square().T,
            "images with the channel first": lambda: (
                _numbers("u1").reshape(-1, 64, 64, 4).transpose(0, 3, 1, 2)
            ),
            "backwards": lambda: _numbers()[::-1],
            "every second": lambda: _numbers(size=2 * LARGE)[::2],
            "dates": lambda: _numbers("M8[s]"),
            "durations": lambda: _numbers("m8[ms]"),
            "structured": _records,
            "text": lambda: _numbers("U4"),
            "repeated": lambda: _np().broadcast_to(_numbers(size=4096), (512, 512)),
        },
        {
            "rows": _eighth(_square),
            "columns": lambda: _square()[:, 16:100],
            "dates": _eighth(lambda: _numbers("M8[s]")),
            "records": _eighth(_records),
        },
        OWN,
        needs="numpy",
    ),
    Row(
        "`numpy.ndarray`, read-only",
        IN_PLACE,
        BESIDE,
        NO,
        {"numbers": _read_only},
        {"slice": _eighth(_read_only)},
        OWN,
        needs="numpy",
    ),
    Row(
        "`numpy.memmap`",
        IN_PLACE,
        BESIDE,
        YES,
        {
            "read-only": _memmap,
            "copy on write": lambda: _memmap("c"),
            "backwards": lambda: _memmap()[::-1],
        },
        {"slice": _eighth(_memmap)},
        OWN,
        "without its file",
        needs="numpy",
    ),
    Row(
        "`numpy.ma.MaskedArray`",
        IN_PLACE,
        BESIDE,
        YES,
        {"numbers": _masked, "without a mask": lambda: _np().ma.masked_array(_numbers())},
        {"slice": _eighth(_masked)},
        OWN,
        needs="numpy",
    ),
    Row(
        "other subclasses of `ndarray`",
        PICKLED,
        PICKLED,
        YES,
        {"matrix": _sub("matrix"), "records": lambda: _records().view(_np().recarray)},
        {"slice": _eighth(_sub("matrix"))},
        OWN,
        needs="numpy",
    ),
    Row(
        "`numpy.ndarray` of objects",
        PICKLED,
        PICKLED,
        YES,
        {"texts": _objects},
        {"slice": _eighth(_objects)},
        OWN,
        needs="numpy",
    ),
    Row(
        "`torch.Tensor` on the CPU",
        IN_PLACE,
        BESIDE,
        YES,
        {
            "plain": _tensor,
            "bfloat16": lambda: _tensor("bfloat16", LARGE // 2),
            "with a gradient": lambda: _tensor().requires_grad_(),
            "transposed": lambda: _tensor().T,
            "every second": lambda: _tensor(count=LARGE // 2)[:, ::2],
        },
        {
            "rows": _eighth(_tensor),
            "columns": lambda: _tensor()[:, 4:16],
            "rows of bfloat16": _eighth(lambda: _tensor("bfloat16", LARGE // 2)),
        },
        OWN,
        needs="torch",
    ),
    Row(
        "`pandas.DataFrame`, `Series`, `Categorical` of numbers or dates",
        IN_PLACE,
        BESIDE,
        YES,
        {
            "frame": _frame,
            "dates": _dates,
            "series": lambda: _pandas().Series(_numbers()),
            "categorical": _categories,
        },
        {
            "rows": _eighth(_frame),
            "a column": lambda: _frame()[["b"]].iloc[:20_000],
            "dates": _eighth(_dates),
            "series": lambda: _frame()["a"].iloc[:20_000],
            "categorical": _eighth(_categories),
        },
        OWN,
        needs="pandas",
    ),
    Row(
        "`pandas.Index` of numbers or dates",
        IN_PLACE,
        BESIDE,
        NEVER,
        {
            "numbers": lambda: _pandas().Index(_numbers()),
            "dates": lambda: _dates().set_index("t").index,
        },
        {"slice": lambda: _pandas().Index(_numbers())[:20_000]},
        OWN,
        needs="pandas",
    ),
    Row(
        "pandas, of Python objects",
        PICKLED,
        PICKLED,
        YES,
        {"texts": lambda: _words(object)},
        {"slice": _eighth(lambda: _words(object))},
        OWN,
        needs="pandas",
    ),
    Row(
        "pandas, of Arrow's types",
        IN_PLACE,
        BESIDE,
        YES,
        {"frame": _arrow_frame, "texts": lambda: _words("string[pyarrow]")},
        {
            "rows": _eighth(_arrow_frame),
            "texts": _eighth(lambda: _words("string[pyarrow]")),
        },
        OWN,
        needs="pandas, pyarrow",
    ),
    Row(
        "`pyarrow.Table`, `RecordBatch`, `ChunkedArray`, `Array`",
        IN_PLACE,
        BESIDE,
        NEVER,
        {
            "table": _table,
            "record batch": lambda: _table().to_batches()[0],
            "chunked": lambda: _table()["w"],
            "numbers": lambda: _pa().array(_numbers()),
            "texts": lambda: _table()["w"].chunk(0),
        },
        {
            "table": _eighth(_table),
            "record batch": _eighth(lambda: _table().to_batches()[0]),
            "chunked": _eighth(lambda: _table()["w"]),
            "numbers": _eighth(lambda: _pa().array(_numbers())),
            "texts": _eighth(lambda: _table()["w"].chunk(0)),
        },
        OWN,
        "a part of a `string_view` takes all texts along",
        needs="pyarrow",
    ),
    Row(
        "`polars.DataFrame`, `Series`",
        PICKLED,
        PICKLED,
        NEVER,
        {"frame": _polars_frame, "series": lambda: _pl().Series(_numbers())},
        {
            "rows": _eighth(_polars_frame),
            "series": lambda: _polars_frame()["a"][:20_000],
        },
        OWN,
        needs="polars",
    ),
    Row("`PIL.Image`", PICKLED, PICKLED, YES, {"picture": _image}, needs="PIL"),
    Row(
        "`bytes`, also in lists, tuples and dicts",
        BESIDE,
        BESIDE,
        NEVER,
        {
            "alone": lambda: bytes(LARGE),
            "in a list": lambda: [bytes(LARGE)],
            "in a tuple": lambda: (1, bytes(LARGE)),
            "in a dict": lambda: {"name": "a", "content": bytes(LARGE)},
        },
    ),
    Row("`bytearray`, also there", BESIDE, BESIDE, YES, {"alone": lambda: bytearray(LARGE)}),
    Row(
        "`bytes` in an attribute",
        PICKLED,
        PICKLED,
        NEVER,
        {"of a dataclass": lambda: kinds.Document("a", bytes(LARGE))},
    ),
    Row(
        "`memoryview`",
        PICKLED,
        PICKLED,
        NEVER,
        {"of bytes": lambda: memoryview(bytes(LARGE))},
        {"slice": _eighth(lambda: memoryview(bytearray(LARGE)))},
        OWN,
        "arrives as `bytes`",
        "bytes",
    ),
    Row(
        "`array.array`, `io.BytesIO`",
        PICKLED,
        PICKLED,
        YES,
        {
            "array": lambda: array.array("d", bytes(LARGE)),
            "file": lambda: io.BytesIO(bytes(LARGE)),
        },
    ),
    Row("`str`", PICKLED, PICKLED, NEVER, {"text": lambda: "some text " * (LARGE // 10)}),
    Row(
        "`mmap.mmap`, arrays of ctypes",
        "refused",
        "refused",
        NEVER,
        {
            "mmap": lambda: mmap.mmap(-1, LARGE),
            "ctypes": ctypes.c_double * (LARGE // 8),
        },
        note="`SerializationError`",
    ),
]
HEAD = ("type", "item", "result", "writable", "a part takes along", "note")


def _is_missing(row: Row) -> bool:
    return any(importlib.util.find_spec(name) is None for name in row.needs.split(", ") if name)


CASES = [
    pytest.param(
        row,
        make,
        is_part,
        id=f"{row.types.replace('`', '')}-{name}{' of it' if is_part else ''}",
        marks=pytest.mark.skipif(_is_missing(row), reason=f"needs {row.needs}"),
    )
    for row in TABLE
    for is_part, makes in ((False, row.makes), (True, row.parts))
    for name, make in makes.items()
]
TRAVEL = [case for case in CASES if case.values[0].item != "refused"]  # type: ignore[union-attr]
REFUSED = [case for case in CASES if case.values[0].item == "refused"]  # type: ignore[union-attr]


def _sizes(payload: Payload) -> tuple[int, int]:
    """Return the bytes in a pickle and those beside it."""
    _, data, buffers = payload
    return memoryview(data).nbytes, sum(buffer.raw().nbytes for buffer in buffers)


def _received(payload: Payload) -> tuple[list[Any], str]:
    """Return what arrives, and how its content has come."""
    inside, beside = _sizes(payload)
    needs_codec, data, buffers = payload
    memories = [_Memory(buffer.raw()) for buffer in buffers]
    kept = [weakref.ref(memory) for memory in memories]
    values = Codec(out_of_band=True).loads((needs_codec, data, memories))
    del memories
    if inside > beside:
        return values, PICKLED
    return values, IN_PLACE if any(memory() is not None for memory in kept) else BESIDE


class _Memory(bytearray):
    """What a buffer is received in; it can be weakly referenced."""


def _as_result(value: Any) -> Payload:
    """Return how a worker sends a result."""
    pickler = BufferPickler(PlainPickler)
    codec = Codec(worker=True, out_of_band=True)
    kind, content = run_batch._encode_results(codec, pickler, [value])
    if kind == ReplyKind.DONE_EACH:
        ((kind, content),) = content
    assert kind == ReplyKind.DONE
    return content  # type: ignore[no-any-return]


@pytest.mark.parametrize(("row", "make", "is_part"), TRAVEL)
def test_a_value_travels_as_its_row_says(row: Row, make: Callable[[], Any], is_part: bool) -> None:
    """Alone and among others, and back; a part without the rest of what it is a part of."""
    value = make()
    for batch in ([value], [1, value, "text"]):
        payload = Codec(out_of_band=True).dumps(batch)
        values, way = _received(payload)
        assert kinds.is_equal(value, values[len(batch) // 2])
        assert way == row.item
        if is_part:
            assert (OWN if sum(_sizes(payload)) < LARGE // 4 else WHOLE) == row.part
        elif way != PICKLED:
            assert _sizes(payload)[0] < SLACK
    result = _as_result(value)
    assert (PICKLED if _received(result)[1] == PICKLED else BESIDE) == row.result
    if is_part:
        assert (OWN if sum(_sizes(result)) < LARGE // 4 else WHOLE) == row.part


@pytest.mark.parametrize(("row", "make", "is_part"), TRAVEL)
def test_a_standard_pool_gets_the_same(row: Row, make: Callable[[], Any], is_part: bool) -> None:
    """In the pickle, since such a pool has no shared memory; without the rest, too."""
    value = make()
    payload = Codec().dumps([value])
    inside, beside = _sizes(payload)
    assert not beside
    assert not is_part or (OWN if inside < LARGE // 4 else WHOLE) == row.part
    assert kinds.is_equal(value, Codec().loads(payload)[0])


class Wire:
    """Counts the bytes that go to the worker and come back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_socket = self.in_blocks = self.back_in_socket = self.back_in_blocks = 0
        send, buffer_updated = Channel.send, framing.FrameReader.buffer_updated
        write, read = SharedBlock.write, SharedBlock.read

        @functools.wraps(send)
        def counted_send(channel: Any, pieces: Any, descriptors: Any = ()) -> None:
            self.in_socket += sum(map(len, pieces))
            send(channel, pieces, descriptors)

        @functools.wraps(buffer_updated)
        def counted_update(reader: Any, count: int) -> Any:
            self.back_in_socket += count
            return buffer_updated(reader, count)

        @functools.wraps(write)
        def counted_write(block: Any, buffers: Any) -> None:
            self.in_blocks += sum(map(len, buffers))
            write(block, buffers)

        @functools.wraps(read)
        def counted_read(block: Any, sizes: Any, **options: Any) -> Any:
            self.back_in_blocks += sum(sizes)
            return read(block, sizes, **options)

        monkeypatch.setattr(Channel, "send", counted_send)
        monkeypatch.setattr(framing.FrameReader, "buffer_updated", counted_update)
        monkeypatch.setattr(SharedBlock, "write", counted_write)
        monkeypatch.setattr(SharedBlock, "read", counted_read)

    def take(self) -> tuple[list[int], list[int]]:
        """Return the bytes in the socket and in blocks since the last look."""
        found = [self.in_socket, self.back_in_socket], [self.in_blocks, self.back_in_blocks]
        self.in_socket = self.in_blocks = self.back_in_socket = self.back_in_blocks = 0
        return found


def _installed(cases: list[Any]) -> list[tuple[str, Row, Callable[[], Any], bool]]:
    return [(case.id, *case.values) for case in cases if not _is_missing(case.values[0])]


@pytest.mark.skipif(sys.platform == "win32", reason="WorkerPool")
async def test_in_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Type, value and whether it is writable, there and back; large contents never in the socket."""
    wire = Wire(monkeypatch)
    found: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    async with WorkerPool(1) as pool, batched(kinds.described, executor=pool) as batcher:
        await batcher(0)
        for name, row, make, is_part in _installed(TRAVEL):
            value = make()
            wire.take()
            (number, *_), (kind, is_writable, back), _ = await batcher.process_many(
                [1, value, "text"]
            )
            in_socket, in_blocks = wire.take()
            found[name] = (
                kind, kinds.type_name(back), is_writable, kinds.is_writable(back),
                kinds.is_equal(value, back), [count < SLACK for count in in_socket],
                [count > LARGE // 2 for count in in_blocks],
            )  # fmt: skip
            assert number == "int"
            arrives = row.arrives or kinds.type_name(value)
            wanted = {YES: True, NO: False, NEVER: None}[row.writable]
            is_whole = not is_part or row.part == WHOLE
            expected[name] = (
                arrives, arrives, wanted, wanted, True, [True] * 2, [is_whole] * 2,
            )  # fmt: skip
    assert found == expected


@pytest.mark.skipif(sys.platform == "win32", reason="WorkerPool")
async def test_what_cannot_be_pickled_fails_alone() -> None:
    """With an error that says so."""
    async with WorkerPool(1) as pool, batched(kinds.described, executor=pool) as batcher:
        for _, _, make, _ in _installed(REFUSED):
            results: list[Any] = await batcher.process_many(
                [1, make(), "text"], return_exceptions=True
            )
            one, refused, other = results
            assert type(refused) is SerializationError
            assert (one[0], other[0]) == ("int", "str")


async def test_threads_get_the_objects_themselves() -> None:
    """In the batch and as results."""
    values = [next(iter(row.makes.values()))() for row in TABLE if not _is_missing(row)]
    async with batched(work.same, executor="thread", max_batch_size=len(values)) as batcher:
        for value, back in zip(values, await batcher.process_many(values), strict=True):
            assert back is value


def markdown() -> str:
    """Return the table of the README."""
    lines = [HEAD, ("---",) * len(HEAD)]
    lines += [
        (row.types, row.item, row.result, row.writable, row.part or "-", row.note) for row in TABLE
    ]
    return "".join("| " + " | ".join(line).rstrip() + " |\n" for line in lines)


def test_the_table_in_the_readme() -> None:
    """It has these rows."""
    assert markdown() in (ROOT / "README.md").read_text(encoding="utf-8")
