"""PyTorch's tensors: their bytes travel out of band; all else is as in torch's own pickle."""

from __future__ import annotations

import copyreg
import pickle
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher, WorkerPool, batched
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.out_of_band import BufferPickler
from tests.support import worker_functions as work

if TYPE_CHECKING:
    from collections.abc import Callable

torch: Any = pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # a worker takes seconds to import torch

METHODS = ["forkserver", "spawn", "fork"] if sys.platform == "linux" else ["forkserver", "spawn"]
ROWS, COLUMNS = 200, 5_000
MUST_NOT_RESIZE = "not resizable"


@pytest.fixture(scope="module", autouse=True)
def _no_threads_of_torch() -> None:
    """Keep forked processes, in which torch would use its parent's threads, from hanging."""
    torch.set_num_threads(1)


def table(dtype: Any = None) -> Any:
    """Return a tensor whose rows are items."""
    return (
        torch.arange(ROWS * COLUMNS, dtype=torch.float32)
        .reshape(ROWS, COLUMNS)
        .remainder(100)
        .to(dtype or torch.float32)
    )


class Labelled(torch.Tensor):  # type: ignore[misc]
    """A user's subclass."""


def labelled() -> Any:
    """Return a row of a subclass, with an attribute."""
    row = table().as_subclass(Labelled)[3]
    row.label = "cat"
    return row


def with_attribute() -> Any:
    """Return a plain row with an attribute."""
    row = table()[3]
    row.label = "cat"
    return row


def inference() -> Any:
    """Return a row that was created in inference mode."""
    with torch.inference_mode():
        return table()[3]


def quantized() -> Any:
    """Return a row of quantized numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(table(), 0.5, 3, torch.quint8)[3]


def per_channel() -> Any:
    """Return numbers that are quantized with a scale per channel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_channel(
            table()[:4], torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.zeros(4), 0, torch.qint8
        )


TYPES = [
    *(
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    ),
    *(
        name
        for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
        if hasattr(torch, name)
    ),
]
VIEWS: dict[str, Callable[[], Any]] = {
    **{f"row of {name}": lambda name=name: table(getattr(torch, name))[3] for name in TYPES},  # type: ignore[misc]
    **{f"column of {name}": lambda name=name: table(getattr(torch, name))[:, 3] for name in TYPES},  # type: ignore[misc]
    "rows": lambda: table()[3:9],
    "part of each row": lambda: table()[3:9, 10:2_000],
    "every third": lambda: table()[::3, ::3],
    "transposed rows": lambda: table()[3:9].transpose(0, 1),
    "expanded row": lambda: table()[3].expand(20, COLUMNS),
    "overlapping windows": lambda: table()[3].unfold(0, 100, 10),
    "images with the channel last": lambda: torch.rand(50, 3, 16, 16).to(
        memory_format=torch.channels_last
    )[4:9],
    "every second image with the channel last": lambda: torch.rand(50, 3, 16, 16).to(
        memory_format=torch.channels_last
    )[::2],
    "conjugated row": lambda: table(torch.complex64).conj()[3],
    "conjugated column": lambda: table(torch.complex64).conj()[:, 3],
    "negated": lambda: table(torch.complex64).conj().imag[3],
    "one negated number": lambda: table(torch.complex64).conj().imag[3, 3:4],
    "row with a gradient": lambda: table()[3].requires_grad_(True),  # noqa: FBT003 - as torch has it
    "row of a parameter": lambda: torch.nn.Parameter(table())[3],
    "parameter over a row": lambda: torch.nn.Parameter(table()[3]),
    "parameter without a gradient": lambda: torch.nn.Parameter(table()[3], requires_grad=False),
    "buffer over a row": lambda: getattr(torch.nn, "Buffer", torch.nn.Parameter)(table()[3]),
    "row of a subclass": labelled,
    "row with an attribute": with_attribute,
    "row made in inference mode": inference,
    "quantized row": quantized,
    "one number": lambda: table()[3, 3],
    "no row": lambda: table()[3:3],
    "no column": lambda: table()[3, 3:3],
    "row in shared memory": lambda: table().share_memory_()[3],
}
WHOLE: dict[str, Callable[[], Any]] = {
    "all rows": table,
    "of no dimension": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(0),
    "empty in one dimension": lambda: torch.empty(3, 0, dtype=torch.bfloat16),
    "sparse": lambda: table()[:4].to_sparse(2),
    "compressed rows": lambda: torch.eye(40).to_sparse_csr(),
    "on no device": lambda: torch.zeros(3, 5, device="meta"),
    "quantized by channel": per_channel,
    "uninitialized parameter": lambda: torch.nn.UninitializedParameter(dtype=torch.float32),
}


def crossed(value: Any) -> tuple[Any, int, int]:
    """Return what arrives, the size of the pickle, and that of its buffers."""
    data, beside = BufferPickler().dumps(value)
    received = [bytearray(buffer) for buffer in beside]
    return pickle.loads(data, buffers=received), len(data), sum(map(len, received))  # noqa: S301


def traits(tensor: Any) -> dict[str, Any]:
    """Return all that must be as in torch's own pickle."""
    found = {
        name: getattr(tensor, name)
        for name in ("dtype", "layout", "device", "requires_grad", "__dict__", "__class__")
    }
    if not isinstance(tensor, torch.nn.UninitializedParameter):
        found |= {"shape": tensor.shape, "conj": tensor.is_conj(), "neg": tensor.is_neg()}
        if tensor.is_quantized:
            found["scheme"] = tensor.qscheme()
    return found


def equal(one: Any, other: Any) -> bool:
    """Whether two tensors have the same values, and all else that counts."""
    if traits(one) != traits(other):
        return False
    if one.device.type == "meta" or isinstance(one, torch.nn.UninitializedParameter):
        return True
    plain = [
        tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
        for tensor in (one, other)
    ]
    plain = [
        tensor.as_subclass(torch.Tensor) if tensor.layout is torch.strided else tensor.to_dense()
        for tensor in plain
    ]
    if one.dtype.itemsize == 1:  # some of these types cannot be compared
        plain = [tensor.to(torch.float32) for tensor in plain]
    return bool(torch.equal(*plain))


@pytest.mark.filterwarnings("ignore:.*")  # torch warns of what is new or old in it
@pytest.mark.parametrize("kind", [*VIEWS, *WHOLE])
def test_every_kind_arrives_as_from_a_pickle_of_torch(kind: str) -> None:
    """Type, values, gradient, attributes and flags; with each of the picklers."""
    tensor = (VIEWS | WHOLE)[kind]()
    try:
        expected = pickle.loads(pickle.dumps(tensor, 5))  # noqa: S301
    except AttributeError:  # torch cannot unpickle its newest types by itself
        expected = tensor
    assert equal(crossed(tensor)[0], expected)
    for out_of_band in (True, False):
        codec = Codec(out_of_band=out_of_band)
        for value in (tensor, lambda: tensor):
            found = codec.loads(codec.dumps(value))
            assert equal(
                found() if callable(found) and not isinstance(found, torch.Tensor) else found,
                expected,
            )


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_travels_as_its_own_bytes(kind: str) -> None:
    """Without the rest of its storage, out of band if it is large; its memory is writable."""
    tensor = VIEWS[kind]()
    overlaps = kind in ("expanded row", "overlapping windows")
    size = (COLUMNS if overlaps else tensor.numel()) * tensor.element_size()
    arrived, data, beside = crossed(tensor)
    assert data + beside <= size + 1_500
    if size >= 8_192:
        assert data <= 1_500
    if not tensor.is_quantized and not overlaps:
        with torch.no_grad():
            arrived.zero_()
    for value in (tensor, lambda: tensor):
        _, in_band, none = Codec().dumps(value)
        assert not none
        assert len(bytes(in_band)) <= size + 2_500


def test_strides_are_kept() -> None:
    """Those of a dense view stay; gaps are closed, and the order of dimensions stays."""
    images = torch.rand(50, 3, 16, 16).to(memory_format=torch.channels_last)
    for view in (table()[3:9].t(), images[4:9], table()[3].expand(20, COLUMNS)):
        assert crossed(view)[0].stride() == view.stride()
    assert crossed(images[::2])[0].is_contiguous(memory_format=torch.channels_last)


def test_two_tensors_over_one_storage_arrive_as_two() -> None:
    """As with pickle; one tensor in two places stays one."""
    whole = table()
    one, other, again = crossed([whole, whole.view(-1), whole])[0]
    assert one is again
    one.zero_()
    assert torch.equal(other, whole.view(-1))


def test_a_model_keeps_its_tied_weights() -> None:
    """A parameter that two layers share is one parameter again."""
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 100))
    model[1].weight = model[0].weight
    arrived, data, beside = crossed(model)
    assert arrived[0].weight is arrived[1].weight
    assert beside == 100 * 100 * 4
    assert data < 10_000
    assert all(
        torch.equal(a, b) for a, b in zip(arrived.parameters(), model.parameters(), strict=True)
    )
    assert all(type(parameter) is torch.nn.Parameter for parameter in arrived.parameters())


def test_a_result_of_autograd_is_treated_as_torch_treats_it() -> None:
    """It arrives detached from its graph; torch warns about its hooks."""
    tensor = table()[3].requires_grad_() * 2
    assert equal(crossed(tensor)[0], pickle.loads(pickle.dumps(tensor)))  # noqa: S301
    tensor.register_hook(lambda gradient: gradient)
    with pytest.warns(UserWarning, match="hook"):
        assert torch.equal(crossed(tensor)[0], tensor)


def test_exposed_memory_cannot_be_freed() -> None:
    """A tensor cannot be resized while its buffer is in use, however it is pickled."""
    for tensor in (torch.ones(10_000), torch.ones(10_000, dtype=torch.bfloat16)):
        before = tensor.clone()
        data, beside = BufferPickler().dumps(tensor)
        with pytest.raises(RuntimeError, match=MUST_NOT_RESIZE):
            tensor.resize_(10_000_000)
        assert torch.equal(pickle.loads(data, buffers=beside), before)  # noqa: S301


def test_pickles_of_the_user_do_not_change() -> None:
    """Nothing is registered with copyreg; what the user has registered there takes precedence."""
    row = table()[3]
    before = pickle.dumps(row)
    crossed(row)
    assert pickle.dumps(row) == before
    assert torch.Tensor not in copyreg.dispatch_table
    copyreg.pickle(torch.Tensor, _as_text)
    try:
        assert crossed(row)[0] == "a tensor"
        assert Codec().loads(Codec().dumps(lambda: row))() == "a tensor"
    finally:
        del copyreg.dispatch_table[torch.Tensor]
    assert equal(crossed(row)[0], row)


def _as_text(_: Any) -> tuple[Any, ...]:
    return (str, ("a tensor",))


def test_the_default_device_does_not_matter() -> None:
    """It is the device of new tensors, not of those that arrive."""
    row, column = table(torch.bfloat16)[3], table()[:, 3]
    with torch.device("meta"):
        arrived = crossed([row, column])[0]
    assert equal(arrived[0], row)
    assert equal(arrived[1], column)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_another_device_are_left_to_torch() -> None:
    """They arrive on that device."""
    row = table()[3].to("cuda")
    assert equal(crossed(row)[0], row)


# In processes.


def lies_in_shared_memory(tensor: Any) -> bool:
    """Whether its memory is a block that this process shares with its parent."""
    with open("/proc/self/maps", encoding="utf-8") as maps:  # noqa: PTH123 - in a worker
        for line in maps:
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return "async_batcher" in line
    return False


class Classifier(AsyncBatcher[Any, Any]):
    """A batcher whose model is an attribute."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(**options)
        self.model = model

    def process_batch(self, batch: list[Any]) -> Any:
        """Return a row of the model's output for each row."""
        with torch.inference_mode():
            return list(self.model(torch.stack(batch)))

    def where(self) -> list[bool]:
        """Whether each parameter is shared."""
        return [lies_in_shared_memory(parameter) for parameter in self.model.parameters()]


class Where(Classifier):
    """Reports on its model instead of using it."""

    def process_batch(self, batch: list[Any]) -> Any:
        """Return whether the large parameter is in shared memory, for each item."""
        return [self.where()[0]] * len(batch)


@pytest.mark.skipif(sys.platform == "win32", reason="WorkerPool")
@pytest.mark.parametrize("method", METHODS)
async def test_rows_and_a_model_with_every_start_method(method: str) -> None:
    """Tensors as items, results, attributes and closure variables, and one changed in place."""
    rows = table() / 100
    model = torch.nn.Linear(COLUMNS, 10).eval()
    scale = rows[7]

    def scaled(batch: list[Any]) -> list[Any]:
        return [item * scale for item in batch]

    def emptied(tensor: Any) -> tuple[bool, Any]:
        is_shared = sys.platform != "linux" or lies_in_shared_memory(tensor)
        return is_shared, tensor.zero_()

    async with WorkerPool(1, mp_context=method) as pool:
        async with Classifier(model, executor=pool, max_batch_size=64) as batcher:
            found = await batcher.process_many([rows[index] for index in range(64)])
        assert torch.allclose(torch.stack(found), model(rows[:64]), atol=1e-4)
        if sys.platform == "linux":
            async with Where(model, executor=pool) as batcher:
                assert await batcher.process(0)
        async with batched(scaled, executor=pool, max_batch_size=64) as function:
            found = await function.process_many([rows[index] for index in range(64)])
            assert torch.equal(torch.stack(found), rows[:64] * scale)
            assert all(result.add_(1).is_contiguous() for result in found)
        is_shared, tensor = await pool.run(emptied, rows)
        assert is_shared
        assert not tensor.any()
        assert rows.any()


@pytest.mark.skipif(sys.platform == "win32", reason="WorkerPool")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
async def test_a_tensor_that_user_code_keeps_is_not_overwritten(dtype: Any) -> None:
    """Its shared memory is not reused, however it arrived."""

    def keep(tensor: Any) -> None:
        import builtins

        builtins.kept = tensor[:10]  # type: ignore[attr-defined]

    def look() -> list[float]:
        import builtins

        return [float(number) for number in builtins.kept[:3]]  # type: ignore[attr-defined]

    async with WorkerPool(1) as pool:
        await pool.run(keep, torch.full((1 << 20,), 7.0, dtype=dtype))
        for number in range(4):
            await pool.run(len, torch.full((1 << 20,), float(number), dtype=dtype))
        assert await pool.run(look) == [7.0, 7.0, 7.0]


@pytest.mark.skipif(sys.platform == "win32", reason="WorkerPool")
async def test_a_worker_that_imports_torch_after_its_first_results() -> None:
    """Its later results travel out of band."""

    def rows(count: int) -> Any:
        import torch

        return list(torch.ones(count, 5_000))

    async with WorkerPool(1) as pool:
        assert await pool.run(len, "abc") == 3
        assert [row.sum() for row in await pool.run(rows, 3)] == [5_000] * 3


@pytest.mark.parametrize("method", METHODS)
async def test_a_given_executor(method: str) -> None:
    """Tensors as items and results of the standard pool."""
    rows = table()
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as executor:
        async with batched(work.same, executor=executor, max_batch_size=64) as batcher:
            found = await batcher.process_many([rows[index] for index in range(20)])
    assert torch.equal(torch.stack(found), rows[:20])
    assert all(result.untyped_storage().nbytes() == COLUMNS * 4 for result in found)
