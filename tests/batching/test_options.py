"""The options: what each may be, what the error says when it is not, and what they do; and how many cores there are."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import math
import os
import re
import sys
from collections.abc import AsyncGenerator, Iterable, Sequence  # noqa: TC003 - annotations of functions are evaluated
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import async_batcher
from async_batcher import AsyncBatcher, BatchedFunction, batched, run
from async_batcher._batching import options as options_module
from async_batcher._pool.cpu_count import cpu_count
from async_batcher.loops import loop_factory

if TYPE_CHECKING:
    from pathlib import Path


def echo(batch: list[Any]) -> list[Any]:
    """Give them back."""
    return list(batch)


async def async_echo(batch: list[Any]) -> list[Any]:
    """Give them back, on the loop."""
    return list(batch)


def make(function: Any = echo, **options: Any) -> AsyncBatcher[Any, Any]:
    """A batcher, of options that a type checker would refuse."""
    batcher: AsyncBatcher[Any, Any] = batched(function, **options)
    return batcher


LIMITS = ("max_batch_size", "max_queue_size", "concurrency")


# ---- what is refused


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [0, -2, -(10**30)])
def test_a_limit_out_of_range(name: str, value: int) -> None:
    """The message names the option, the value, and what is allowed."""
    with pytest.raises(ValueError, match=rf"^{name}={value}: must be .*at least 1, or -1 for no limit"):
        make(**{name: value})


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [1.0, "3", True, False, [1], math.nan, math.inf])
def test_a_limit_that_is_no_whole_number(name: str, value: object) -> None:
    """The message names the type too."""
    with pytest.raises(TypeError, match=rf"^{name}=.*at least 1, or -1 for no limit, not {type(value).__name__}") as raised:
        make(**{name: value})
    assert repr(value) in str(raised.value)


class Number:
    """A whole number that is no int, as numpy's are."""

    def __index__(self) -> int:
        """Three."""
        return 3


def test_numbers_of_others() -> None:
    """Whatever can stand for an index can be a limit, and is an int from then on."""
    limits = ("max_batch_size", "concurrency", "max_queue_size", "max_workers")
    batcher = make(executor="thread", **dict.fromkeys(limits, Number()))
    assert [type(value) for value in (batcher.max_batch_size, batcher.concurrency)] == [int] * 2


@pytest.mark.parametrize("name", ["batch_timeout", "item_timeout"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_time_limit_out_of_range(name: str, value: float) -> None:
    """It is more than 0, and that is what the message says."""
    with pytest.raises(ValueError, match=rf"^{name}={value}: must be a number of seconds, more than 0"):
        make(**{name: value})


@pytest.mark.parametrize("value", [-1, -0.001, -math.inf, math.nan])
def test_a_time_out_of_range(value: float) -> None:
    """max_queue_time is 0 or more."""
    with pytest.raises(ValueError, match=rf"^max_queue_time={value}: must be a number of seconds, 0 or more"):
        make(max_queue_time=value)


@pytest.mark.parametrize("value", ["1", None, True, 1j, [0.1]])
def test_a_time_that_is_no_number(value: object) -> None:
    """max_queue_time is a number."""
    with pytest.raises(TypeError, match=r"^max_queue_time=.*number of seconds, 0 or more, not "):
        make(max_queue_time=value)


def test_a_time_beyond_any_float() -> None:
    """It is out of range, as any other bad value, and not an OverflowError from within."""
    with pytest.raises(ValueError, match="max_queue_time"):
        make(max_queue_time=10**400)


@pytest.mark.parametrize("value", ["threads", "", "Process"])
def test_an_executor_of_an_unknown_name(value: str) -> None:
    """The message says what there is."""
    with pytest.raises(ValueError, match=rf"^executor='{value}': must be None, 'thread', 'process', a WorkerPool or a"):
        make(executor=value)


@pytest.mark.parametrize("value", [3, object(), True, int, b"thread"])
def test_an_executor_that_is_none(value: object) -> None:
    """Anything but an executor is refused."""
    with pytest.raises(TypeError, match=r"^executor=.*must be None, 'thread', 'process', a WorkerPool or a"):
        make(executor=value)


async def _make_later() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (echo, r"without arguments to make an executor \(missing a required argument: 'batch'\).*functools.partial"),
        (_make_later, "is async; the batcher calls it in a thread"),
        (partial(_make_later), "is async; the batcher calls it in a thread"),
    ],
)
def test_a_factory_that_cannot_be_called(factory: Any, message: str) -> None:
    """What is wrong with a factory is said at construction, as far as it can be seen, and when it is set."""
    with pytest.raises(TypeError, match=f"^executor=.*{message}"):
        make(executor=factory)
    batcher = make()
    with pytest.raises(TypeError, match=f"^executor=.*{message}"):
        batcher.executor = factory
    assert batcher.executor is None


@pytest.mark.parametrize("value", [0, -1, -7])
def test_max_workers_out_of_range(value: int) -> None:
    """At least one, or None for all cores."""
    with pytest.raises(ValueError, match=rf"^max_workers={value}: must be .*at least 1, or None"):
        make(executor="thread", max_workers=value)


@pytest.mark.parametrize("value", [1.5, "2", True])
def test_max_workers_that_is_no_whole_number(value: object) -> None:
    """A whole number."""
    with pytest.raises(TypeError, match=r"^max_workers=.*at least 1, or None"):
        make(executor="thread", max_workers=value)


def test_max_workers_without_a_pool_of_ours() -> None:
    """There is nothing that it could size: a TypeError that says so."""
    for function in (echo, async_echo):
        with pytest.raises(TypeError, match=r"^max_workers=2 sizes the pool"):
            make(function, max_workers=2)
    with ThreadPoolExecutor(1) as executor, pytest.raises(TypeError, match=r"^max_workers=2 sizes the pool"):
        make(executor=executor, max_workers=2)
    with pytest.raises(TypeError, match=r"^max_workers=2 sizes the pool"):
        make(executor=ThreadPoolExecutor, max_workers=2)


def test_an_async_process_batch_with_an_executor() -> None:
    """It would run on the loop all the same: refused at construction, and told why."""
    with ThreadPoolExecutor(1) as executor:
        for given in ("thread", "process", executor, ThreadPoolExecutor):
            with pytest.raises(TypeError, match=r"process_batch is async, and runs on the event loop"):
                make(async_echo, executor=given)

    async def generate(batch: list[Any]) -> Any:
        for item in batch:
            yield item

    with pytest.raises(TypeError, match="process_batch is async"):
        make(generate, executor="thread")


class Sub(AsyncBatcher[Any, Any]):
    """A subclass that passes its options on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)

    def process_batch(self, batch: list[Any]) -> list[Any]:
        """Give them back."""
        return batch


def test_an_unknown_option() -> None:
    """It is a TypeError that names the class and the option, as for any function."""
    with pytest.raises(TypeError, match=r"^Sub\(\) got an unexpected keyword argument 'max_batchsize'"):
        Sub(max_batchsize=3)
    with pytest.raises(TypeError, match="'max_batchsize'"):
        make(max_batchsize=3)


def test_options_are_keywords_only() -> None:
    """By position they are refused."""
    with pytest.raises(TypeError, match="positional"):
        Sub(3)


@pytest.mark.parametrize("value", [3, "x"])
def test_a_set_up_that_is_no_function(value: object) -> None:
    """batched(setup_worker=) takes a function."""
    with pytest.raises(TypeError, match=rf"^setup_worker={value!r}: must be a function"):
        make(setup_worker=value)


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError)])
async def test_a_stop_timeout_out_of_range(value: Any, error: type[Exception]) -> None:
    """It is refused before anything is stopped."""
    async with batched(async_echo, max_queue_time=0) as batcher:
        with pytest.raises(error, match=r"^timeout="):
            await batcher.stop(timeout=value)
        assert await batcher.is_running()
        assert await batcher.process(1) == 1


# ---- deprecated options


@pytest.mark.parametrize("name", ["sleep_time", "buffering_time", "batch_size"])
def test_a_deprecated_option_warns(name: str) -> None:
    """With a UserWarning that names it, at the line that passes it."""
    with pytest.warns(UserWarning, match=name) as caught:
        batcher = Sub(**{name: 7})
    assert [warning.category for warning in caught] == [UserWarning]
    assert caught[0].filename == __file__
    assert batcher.max_batch_size == (7 if name == "batch_size" else -1)


def test_batch_size_counts() -> None:
    """It takes effect, over max_batch_size too, and is checked by the same rules."""
    with pytest.warns(UserWarning, match="max_batch_size"):
        assert make(batch_size=3, max_batch_size=9).max_batch_size == 3
    with pytest.warns(UserWarning, match="max_batch_size"), pytest.raises(ValueError, match="at least 1"):
        make(batch_size=0)


# ---- properties


def test_the_options_are_properties() -> None:
    """What was given is had back; the defaults are those of the documentation."""
    with ThreadPoolExecutor(1) as executor:
        batcher = make(max_batch_size=3, max_queue_time=1.5, concurrency=2, max_queue_size=9, executor=executor)
        assert batcher.executor is executor
    assert (batcher.max_batch_size, batcher.max_queue_time, batcher.concurrency) == (3, 1.5, 2)
    batcher = make()
    assert (batcher.max_batch_size, batcher.max_queue_time, batcher.concurrency) == (-1, 0.01, 1)
    assert batcher.executor is None
    assert make(max_batch_size=None, max_queue_size=None).max_batch_size is None


def test_the_default_concurrency() -> None:
    """As many batches at a time as workers that we make; 1 for coroutines, the loop's threads, given threads, and the unknown."""

    class Unknown(Executor):
        pass

    assert make(async_echo).concurrency == 1
    assert make(echo).concurrency == 1
    assert make(executor="thread", max_workers=3).concurrency == 3
    assert make(executor="thread").concurrency == cpu_count()
    assert make(executor="process", max_workers=3).concurrency == 3
    with ThreadPoolExecutor(4) as executor:
        assert make(executor=executor).concurrency == 1
        assert make(executor=executor, concurrency=3).concurrency == 3
        assert make(executor=executor, concurrency=-1).concurrency == -1
    assert make(executor=Unknown()).concurrency == 1


@pytest.mark.virtual_clock
async def test_limits_can_be_set_at_run_time() -> None:
    """They hold for the batches that have not left yet; a bad value is refused and changes nothing."""
    batches: list[list[int]] = []

    @batched(max_queue_time=1000)
    async def process_batch(batch: list[int]) -> list[int]:
        batches.append(list(batch))
        return batch

    futures = [process_batch.submit(item) for item in range(5)]
    for name, value in (("max_batch_size", 0), ("max_queue_time", -1), ("max_batch_size", "2")):
        with pytest.raises((ValueError, TypeError), match=name):
            setattr(process_batch, name, value)
    assert (process_batch.max_batch_size, process_batch.max_queue_time) == (-1, 1000)
    process_batch.max_batch_size = 2
    await asyncio.gather(*futures[:4])
    assert batches == [[0, 1], [2, 3]]
    process_batch.max_queue_time = 1
    await futures[4]
    assert batches == [[0, 1], [2, 3], [4]]
    process_batch.max_batch_size = None
    process_batch.max_queue_time = 0
    assert await asyncio.gather(*map(process_batch.submit, range(9))) == list(range(9))
    assert batches[3:] == [list(range(9))]
    await process_batch.stop()


def test_limits_can_be_set_before_the_start() -> None:
    """Outside of any loop too."""
    batcher = make(async_echo)
    batcher.max_batch_size = 3
    batcher.max_queue_time = 0
    assert asyncio.run(batcher.process(1)) == 1
    batcher.max_batch_size = 4
    assert batcher.max_batch_size == 4


@pytest.mark.virtual_clock
@pytest.mark.parametrize("value", [-1, None, 10**30])
async def test_no_limit(value: int | None) -> None:
    """-1, for the sizes None too, and numbers beyond any count mean no limit."""
    batches: list[int] = []

    async def process_batch(batch: list[int]) -> list[int]:
        batches.append(len(batch))
        return batch

    concurrency = -1 if value is None else value
    async with make(process_batch, max_batch_size=value, max_queue_size=value, concurrency=concurrency) as batcher:
        assert await asyncio.gather(*map(batcher.submit, range(1000))) == list(range(1000))
    assert batches == [1000]


@pytest.mark.virtual_clock
@pytest.mark.parametrize("concurrency", [1, 3, -1])
async def test_concurrency(concurrency: int) -> None:
    """As many batches run at a time as it says; -1: all of them."""
    running: list[int] = []
    most = 0

    async def process_batch(batch: list[int]) -> list[int]:
        nonlocal most
        running.extend(batch)
        most = max(most, len(running))
        await asyncio.sleep(1.0)
        running.remove(batch[0])
        return batch

    async with make(process_batch, max_batch_size=1, concurrency=concurrency) as batcher:
        assert await asyncio.gather(*map(batcher.submit, range(10))) == list(range(10))
    assert most == (10 if concurrency == -1 else concurrency)


# ---- cores


def write(file: Path, text: str) -> None:
    """A file, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which this process may use eight cores."""
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


V2 = {"proc/self/cgroup": "0::/a.slice/b.scope\n"}
V1 = {"proc/self/cgroup": "12:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n2:cpuset:/\n0::/init.scope\n"}
V1_QUOTA = "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us"
V1_PERIOD = "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us"

ROOTS: dict[str, tuple[dict[str, str], int]] = {
    "no control groups": ({}, 8),
    "v2 without a limit": ({**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "max 100000\n"}, 8),
    "v2 without the controller": (V2, 8),
    "v2 two cores": ({**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "200000 100000\n"}, 2),
    "v2 one and a half": ({**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "150000 100000\n"}, 2),
    "v2 a tenth": ({**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "10000 100000\n"}, 1),
    "v2 another period": ({**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "150000 50000\n"}, 3),
    "v2 more than there are": ({**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "9900000 100000\n"}, 8),
    "v2 the limit is above": (
        {**V2, "sys/fs/cgroup/a.slice/b.scope/cpu.max": "max 100000\n", "sys/fs/cgroup/a.slice/cpu.max": "300000 100000\n"},
        3,
    ),
    "v2 the smallest of all counts": (
        {
            **V2,
            "sys/fs/cgroup/a.slice/b.scope/cpu.max": "500000 100000\n",
            "sys/fs/cgroup/a.slice/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/cpu.max": "600000 100000\n",
        },
        4,
    ),
    "v2 in a container that sees only its own": ({**V2, "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    "v2 at the root": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    "v2 outside of its namespace": ({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    "v1 without a limit": ({**V1, V1_QUOTA: "-1\n", V1_PERIOD: "100000\n"}, 8),
    "v1 two cores": ({**V1, V1_QUOTA: "200000\n", V1_PERIOD: "100000\n"}, 2),
    "v1 two and a half": ({**V1, V1_QUOTA: "250000\n", V1_PERIOD: "100000\n"}, 3),
    "v1 mounted as cpu": (
        {
            "proc/self/cgroup": "3:cpuacct,cpu:/docker/x\n",
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "v1 the limit is above": (
        {
            **V1,
            V1_QUOTA: "-1\n",
            V1_PERIOD: "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "v1 cpuset is not cpu": (
        {
            "proc/self/cgroup": "2:cpuset:/x\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
        },
        8,
    ),
    "v1 a period of zero": ({**V1, V1_QUOTA: "200000\n", V1_PERIOD: "0\n"}, 8),
    "nonsense": ({"proc/self/cgroup": "what\n\n::::\n", "sys/fs/cgroup/cpu.max": "a b c\n"}, 8),
}


@pytest.mark.usefixtures("_eight_cores")
@pytest.mark.parametrize("kind", ROOTS)
def test_the_quota_of_control_groups_counts(kind: str, tmp_path: Path) -> None:
    """Of v1 and v2, of the group and of all above it; a fraction of a core counts as one; never less than 1."""
    files, cores = ROOTS[kind]
    for name, text in files.items():
        write(tmp_path / name, text)
    assert cpu_count(tmp_path) == cores


def test_the_affinity_counts() -> None:
    """The cores of this very process."""
    cores = cpu_count()
    assert 1 <= cores <= (os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        assert cores <= len(os.sched_getaffinity(0))


@pytest.mark.skipif(sys.version_info < (3, 13), reason="PYTHON_CPU_COUNT came with Python 3.13")
def test_an_unknown_count_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the system does not tell, there is one core."""
    monkeypatch.setattr(os, "process_cpu_count", lambda: None)
    assert cpu_count(tmp_path) == 1


# ---- loops


async def kind_of_loop() -> str:
    """The module of the running loop's class."""
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_run_on_asyncio() -> None:
    """loop="asyncio" is Python's own; the result comes back; debug is passed on."""

    async def is_debug() -> bool:
        return asyncio.get_running_loop().get_debug()

    assert run(kind_of_loop(), loop="asyncio") == "asyncio"
    assert run(is_debug(), loop="asyncio", debug=True)
    assert not run(is_debug(), loop="asyncio", debug=False)


def test_run_on_uvloop() -> None:
    """The loop is uvloop when asked for, and by default where it is installed."""
    pytest.importorskip("uvloop")
    assert run(kind_of_loop(), loop="uvloop") == "uvloop"
    assert run(kind_of_loop()) == "uvloop"


def test_run_without_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where uvloop is missing, "auto" is asyncio, and "uvloop" an error that says how to install it."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert run(kind_of_loop()) == "asyncio"
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'async-batcher\[uvloop\]'"):
        run(kind_of_loop(), loop="uvloop")


@pytest.mark.parametrize("loop", ["trio", "", None])
def test_run_on_an_unknown_loop(loop: Any) -> None:
    """It is refused, and the coroutine is not left behind unawaited."""
    with pytest.raises(ValueError, match=r"must be 'auto', 'asyncio' or 'uvloop'"):
        run(kind_of_loop(), loop=loop)
    with pytest.raises(ValueError, match="loop="):
        loop_factory(loop)


def test_run_passes_exceptions_on() -> None:
    """What the program raises comes out."""

    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(fail())


async def test_run_inside_a_loop() -> None:
    """It is the same error as asyncio.run's; neither the coroutine nor a new loop is left behind."""
    with pytest.raises(RuntimeError, match="cannot be called from a running event loop"):
        run(kind_of_loop())
    gc.collect()


@pytest.mark.parametrize("name", ["asyncio", "auto"])
def test_a_loop_factory_makes_new_loops(name: str) -> None:
    """Each call gives a loop of its own."""
    loops = [loop_factory(name)() for _ in range(2)]
    for loop in loops:
        loop.close()
    assert loops[0] is not loops[1]


# ---- how the options are declared, and what the batcher shows of itself


def test_options_are_declared_for_type_checkers_as_they_are_checked() -> None:
    """The typed keywords, the checked options and the signatures have the same names and types."""
    checked = {field.name: field.type for field in dataclasses.fields(options_module.CheckedOptions)}
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


def predict(batch: list[tuple[str, int]]) -> list[float]:
    """A function with a name of its own."""
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
def test_an_unknown_option_and_the_one_that_was_meant(name: str, hint: str | None) -> None:
    """The message names the user's function or class, and the option that was likely meant."""
    text = rf"got an unexpected keyword argument '{name}'" + (rf"\. Did you mean '({hint})'\?$" if hint else "$")
    with pytest.raises(TypeError, match=r"^batched\(predict\) " + text):
        make(predict, **{name: 1})
    with pytest.raises(TypeError, match=r"^batched\(\) " + text):
        make(None, **{name: 1})

    class Predictor(AsyncBatcher[Any, Any]):
        process_batch = staticmethod(predict)

    if hint != "setup_worker":
        with pytest.raises(TypeError, match=r"^Predictor\(\) " + text):
            Predictor(**{name: 1})  # type: ignore[arg-type]


def test_the_signature_of_a_batched_function() -> None:
    """It has one parameter, the item; the types are those of the elements, where they can be told."""

    def untold(batch, rest=()):  # type: ignore[no-untyped-def]  # noqa: ARG001
        return batch

    def unknown(batch: list[Missing]) -> Missing:  # type: ignore[name-defined]  # noqa: F821
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
        (untold, empty, empty),
        (unknown, empty, empty),
        (sequence, bytes, str),
        (plain, empty, empty),
        (max, empty, empty),
        (generated, bytes, int),
    ]:
        signature = inspect.signature(batched(function))  # type: ignore[call-overload]
        assert [(p.name, p.annotation) for p in signature.parameters.values()] == [("item", item)]
        assert signature.return_annotation == result
    assert str(inspect.signature(batched(predict))) == "(item: tuple[str, int]) -> float"
    assert list(inspect.signature(BatchedFunction).parameters) == ["function", "setup_worker", "options"]


class Named(AsyncBatcher[int, int]):
    """Has attributes and methods with the names of ours, and with names that ours may come to have."""

    name = start = stop = stats = flush = process = process_many = submit = run = is_running = map = 3  # type: ignore[assignment]
    loop = session = queue = options = pool = state = 3

    def process_batch(self, batch: list[int]) -> list[int]:
        """Return twice each item."""
        return [item * 2 for item in batch]


@pytest.mark.parametrize("executor", [None, "thread", "process"])
async def test_names_of_a_subclass_change_nothing(executor: Any) -> None:
    """The batcher calls none of its public methods by name."""
    batcher = Named(executor=executor)
    async with batcher:
        assert "running" in repr(batcher)
        assert await AsyncBatcher.process(batcher, 1) == 2
        assert await AsyncBatcher.process_many(batcher, [1, 2]) == [2, 4]
        assert [item async for item in AsyncBatcher.map(batcher, [1, 2])] == [2, 4]
        assert AsyncBatcher.stats(batcher).done == 5
    keeper = asyncio.ensure_future(AsyncBatcher.run(batcher))
    await asyncio.sleep(0)
    keeper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeper
    prometheus = pytest.importorskip("async_batcher.integrations.prometheus")
    assert list(prometheus.BatcherCollector(batcher, "named").collect())


async def test_what_a_batcher_shows_of_itself() -> None:
    """Its class or function, its state, and how much there is to do."""

    class Predictor(AsyncBatcher[int, int]):
        def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    class Unfinished(Predictor):
        def __init__(self) -> None:
            self.seen = repr(self)

    assert Unfinished().seen.endswith(".Unfinished not initialised>")
    batcher = make(predict, max_queue_time=60.0)
    assert repr(batcher) == "<batched predict not started>"
    call = asyncio.ensure_future(batcher.process(("a", 1)))
    await asyncio.sleep(0)
    assert repr(batcher) == "<batched predict running, 1 queued, 0 running>"
    await batcher.stop()
    assert await call == 1.0
    assert repr(batcher) == "<batched predict stopped>"
    assert repr(Predictor()).endswith(".Predictor not started>")


def test_the_package_says_its_version_and_names() -> None:
    """It is the version of the distribution, where that is installed; names can be completed."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", async_batcher.__version__)
    assert {"BatchedFunction", "AsyncBatcher", "__version__"} <= set(dir(async_batcher))
