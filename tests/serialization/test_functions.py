"""Batch functions of all kinds run in worker processes; one that cannot be pickled is named."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from async_batcher import AsyncBatcher, batched
from async_batcher._serialization.codec import Codec
from async_batcher.exceptions import SerializationError
from tests.support import worker_functions as work
from tests.support.round_trip import results_of, round_trip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import ProcessPoolExecutor
    from pathlib import Path
    from types import ModuleType

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork server")


class Multiplier(AsyncBatcher[int, int]):
    """A batcher whose method uses an attribute."""

    def __init__(self, factor: int, **options: Any) -> None:
        """Store the factor."""
        super().__init__(**options)
        self.factor = factor

    def process_batch(self, batch: list[int]) -> list[int]:
        """Multiply each item."""
        return [item * self.factor for item in batch]


def _closure() -> Callable[[list[int]], list[int]]:
    factor = 3
    return lambda batch: [item * factor for item in batch]


def _nested_closure() -> Callable[[list[int]], list[int]]:
    factor = 3

    def one(item: int) -> int:
        return item * factor

    def process_batch(batch: list[int]) -> list[int]:
        return [one(item) for item in batch]

    return process_batch


def _recursive() -> Callable[[list[int]], list[int]]:
    def process_batch(batch: list[int]) -> list[int]:
        return [batch[0] * 3, *process_batch(batch[1:])] if batch else []

    return process_batch


def _local_object() -> Callable[[list[int]], list[int]]:
    class Local:
        factor = 3

        def __call__(self, batch: list[int]) -> list[int]:
            return [item * self.factor for item in batch]

    return Local()


def _local_method() -> Callable[[list[int]], list[int]]:
    class Local:
        factor = 3

        def run(self, batch: list[int]) -> list[int]:
            return [item * self.factor for item in batch]

    return Local().run


def _class_method() -> Callable[[list[int]], list[int]]:
    class Local:
        factor = 3

        @classmethod
        def run(cls, batch: list[int]) -> list[int]:
            return [item * cls.factor for item in batch]

    return Local.run


def _keyword_only() -> Callable[..., list[int]]:
    def process_batch(*, batch: list[int], factor: int = 3) -> list[int]:
        return [item * factor for item in batch]

    return process_batch


def _positional_only() -> Callable[[list[int]], list[int]]:
    def process_batch(items: list[int], /, factor: int = 3) -> list[int]:
        return [item * factor for item in items]

    return process_batch


@pytest.mark.parametrize(
    "make",
    [
        lambda: lambda batch: [item * 3 for item in batch],
        _closure,
        _nested_closure,
        _recursive,
        lambda: functools.partial(work.scaled, 3),
        lambda: functools.partial(lambda factor, batch: [item * factor for item in batch], 3),
        lambda: work.Scale(3),
        _local_object,
        _local_method,
        _class_method,
        _keyword_only,
        _positional_only,
    ],
)
async def test_functions_of_all_kinds_run_in_a_worker(
    pool: ProcessPoolExecutor, make: Callable[[], Callable[[list[int]], Any]]
) -> None:
    """Lambdas, closures, partials, callable objects and methods of local classes."""
    assert await round_trip(pool, [1, 2, 3], make()) == [3, 6, 9]


@pytest.mark.slow
async def test_a_method_takes_the_attributes_of_its_instance_along(
    pool: ProcessPoolExecutor,
) -> None:
    """A worker has the attributes; the running batcher stays as it is."""
    async with Multiplier(3, executor=pool) as batcher:
        assert await results_of(batcher, [1, 2, 3]) == [3, 6, 9]
        assert await results_of(batcher, [1, 2, 3]) == [3, 6, 9]


async def test_attributes_may_have_any_name(pool: ProcessPoolExecutor) -> None:
    """No name of a user's attribute clashes with the state of the running batcher."""
    names = [
        "_queue",
        "_state",
        "_loop",
        "_running",
        "_session",
        "_executor",
        "_options",
        "_lock",
        "state",
        "options",
        "session",
    ]

    class Local(AsyncBatcher[int, Any]):
        def __init__(self, **options: Any) -> None:
            self._state = "set before"
            super().__init__(**options)
            for name in names:
                setattr(self, name, name.upper())
            self.__state = "mangled"

        def process_batch(self, batch: list[int]) -> list[Any]:
            return [([getattr(self, name) for name in names], self.__state)] * len(batch)

    async with Local(executor=pool) as batcher:
        assert await results_of(batcher, [1]) == [([name.upper() for name in names], "mangled")]


async def test_a_batcher_with_slots_runs_in_a_worker(pool: ProcessPoolExecutor) -> None:
    """A subclass with ``__slots__`` works like any other."""

    class Local(AsyncBatcher[int, int]):
        __slots__ = ("factor",)

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.factor = 3

        def process_batch(self, batch: list[int]) -> list[int]:
            return [item * self.factor for item in batch]

    async with Local(executor=pool) as batcher:
        assert await results_of(batcher, [1, 2]) == [3, 6]


async def test_options_can_be_read_in_the_worker(pool: ProcessPoolExecutor) -> None:
    """``process_batch`` may read the options of its batcher; a given executor is None there."""

    class Local(AsyncBatcher[int, Any]):
        def process_batch(self, batch: list[int]) -> list[Any]:
            return [(self.max_batch_size, self.max_queue_time, self.executor)] * len(batch)

    async with Local(max_batch_size=7, max_queue_time=0.004, executor=pool) as batcher:
        assert await results_of(batcher, [1]) == [(7, 0.004, None)]


async def test_getstate_is_respected(pool: ProcessPoolExecutor) -> None:
    """A worker gets the state that ``__getstate__`` returns, through ``__setstate__``."""

    class Local(AsyncBatcher[int, Any]):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.lock: Any = threading.Lock()
            self.name = "kept"

        def __getstate__(self) -> dict[str, Any]:
            return {**self.__dict__, "lock": None}

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.__dict__.update(state, restored=True)

        def process_batch(self, batch: list[int]) -> list[Any]:
            return [sorted(self.__dict__.items())] * len(batch)

    async with Local(executor=pool) as batcher:
        assert await results_of(batcher, [1]) == [
            [("lock", None), ("name", "kept"), ("restored", True)]
        ]
        assert batcher.lock is not None


async def test_another_batcher_may_be_an_attribute(pool: ProcessPoolExecutor) -> None:
    """A running batcher arrives in a worker as one that has not started."""

    class Local(AsyncBatcher[int, Any]):
        def __init__(self, other: Multiplier, **options: Any) -> None:
            super().__init__(**options)
            self.other = other

        def process_batch(self, batch: list[int]) -> list[int]:
            return self.other.process_batch(batch)

    async with Multiplier(3, executor=pool) as other, Local(other, executor=pool) as batcher:
        assert await results_of(batcher, [1, 2]) == [3, 6]
        assert await results_of(other, [1, 2]) == [3, 6]


@pytest.fixture
def decorated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An importable module with decorated functions."""
    (tmp_path / "decorated_here.py").write_text(
        """\
import functools
from async_batcher import batched

def plain_decorator(function):
    @functools.wraps(function)
    def wrapper(batch):
        return ["wrong"] * len(batch)
    return wrapper

CALLS = []

@batched(executor="process", max_workers=1)
def triple(batch):
    CALLS.append("a text that is found in the code alone")
    return [(item * 3, __name__, len(CALLS)) for item in batch]

class Holder:
    @staticmethod
    @batched(executor="process", max_workers=1)
    def triple(batch):
        return [item * 3 for item in batch]
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("decorated_here")
    del sys.modules["decorated_here"]


def test_a_decorated_function_travels_as_a_reference(decorated: ModuleType) -> None:
    """The pickle has its name and none of its code; so it is for a static method."""
    for batcher in (decorated.triple, decorated.Holder.triple):
        own, data, buffers = Codec().dumps_checked(
            (batcher.process_batch, True, None), define=True
        )[0]
        assert isinstance(data, bytes)
        assert b"decorated_here" in data
        assert b"triple" in data
        assert b"found in the code" not in data
        assert b"__code__" not in data
        assert len(data) < 300
        function, _, _ = Codec(worker=True).loads((own, data, buffers))
        assert function is batcher.process_batch


@pytest.mark.slow
async def test_a_decorated_function_runs_in_its_own_module(decorated: ModuleType) -> None:
    """In the worker it is the function of the imported module, with that module's globals."""
    async with decorated.triple as triple:
        assert await results_of(triple, [1, 2]) == [
            (3, "decorated_here", 1),
            (6, "decorated_here", 1),
        ]
        assert await results_of(triple, [3]) == [(9, "decorated_here", 2)]
    async with decorated.Holder.triple as triple:
        assert await results_of(triple, [1]) == [3]


async def test_a_function_is_loaded_once(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    """A worker unpickles it once for all batches; what it keeps between batches stays."""

    class Loaded:
        def __init__(self, folder: Path) -> None:
            self.folder = folder
            self.calls = 0

        def __setstate__(self, state: dict[str, Any]) -> None:
            work.note(state["folder"], "loaded")
            self.__dict__.update(state)

        def __call__(self, batch: list[int]) -> list[int]:
            self.calls += 1
            return [self.calls] * len(batch)

    async with batched(Loaded(tmp_path), executor=pool, max_queue_time=0) as batcher:
        assert [await results_of(batcher, [i]) for i in range(4)] == [[1], [2], [3], [4]]
    assert len(work.noted(tmp_path, "loaded")) == 1


@pytest.mark.slow
async def test_many_functions_in_one_worker(pool: ProcessPoolExecutor) -> None:
    """A shared worker caches a limited number of functions, and loads a dropped one again."""
    from async_batcher._transport.protocol import MAX_CACHED_FUNCTIONS

    first = batched(functools.partial(work.scaled, 2), executor=pool, max_queue_time=0)
    assert await results_of(first, [1]) == [2]
    for factor in range(MAX_CACHED_FUNCTIONS + 1):
        assert await round_trip(pool, [1], functools.partial(work.scaled, factor)) == [factor]
    assert await results_of(first, [1]) == [2]
    await first.stop()


# Functions that cannot be pickled.


class Locked(AsyncBatcher[int, int]):
    """Holds a lock."""

    def __init__(self, **options: Any) -> None:
        """Create the lock."""
        super().__init__(**options)
        self.name = "fine"
        self.lock = threading.Lock()

    def process_batch(self, batch: list[int]) -> list[int]:
        """Never runs."""
        return batch


class LockedDeep(AsyncBatcher[int, int]):
    """Holds an object that holds a lock."""

    def __init__(self, **options: Any) -> None:
        """Create the lock."""
        super().__init__(**options)
        self.config = {"fine": 1, "parts": [1, {"lock": threading.Lock()}]}

    def process_batch(self, batch: list[int]) -> list[int]:
        """Never runs."""
        return batch


class LockedSlot(AsyncBatcher[int, int]):
    """Holds a lock in a slot."""

    __slots__ = ("guard",)

    def __init__(self, **options: Any) -> None:
        """Create the lock."""
        super().__init__(**options)
        self.guard = threading.Lock()

    def process_batch(self, batch: list[int]) -> list[int]:
        """Never runs."""
        return batch


def _over_lock(**options: Any) -> AsyncBatcher[int, int]:
    lock = threading.Lock()

    def process_batch(batch: list[int]) -> list[int]:
        with lock:
            return batch

    return batched(process_batch, **options)


def _over_nested_lock(**options: Any) -> AsyncBatcher[int, int]:
    lock = threading.Lock()

    def guarded(item: int) -> int:
        with lock:
            return item

    return batched(lambda batch: [guarded(item) for item in batch], **options)


def _with_default(**options: Any) -> AsyncBatcher[int, int]:
    def process_batch(batch: list[int], *, lock: Any = threading.Lock()) -> list[int]:  # noqa: B008
        lock.acquire()
        return batch

    return batched(process_batch, **options)


def _with_global(**options: Any) -> AsyncBatcher[int, int]:
    namespace: dict[str, Any] = {"__name__": "__main__", "LOCK": threading.Lock()}
    exec("def process_batch(batch):\n    with LOCK:\n        return batch", namespace)  # noqa: S102
    batcher: AsyncBatcher[int, int] = batched(namespace["process_batch"], **options)
    return batcher


def _with_setup(**options: Any) -> AsyncBatcher[int, int]:
    lock = threading.Lock()

    def setup() -> None:
        with lock:
            pass

    return batched(work.same, setup_worker=setup, **options)


def _of_a_class_over_lock(**options: Any) -> AsyncBatcher[int, int]:
    lock = threading.Lock()

    class Local(AsyncBatcher[int, int]):
        def guarded(self) -> None:
            with lock:
                pass

        def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    return Local(**options)


def _of_a_class_with_lock(**options: Any) -> AsyncBatcher[int, int]:
    class Local(AsyncBatcher[int, int]):
        lock = threading.Lock()

        def process_batch(self, batch: list[int]) -> list[int]:
            return batch

    return Local(**options)


def _with_a_lock(lock: Any, batch: list[int]) -> list[int]:
    with lock:
        return batch


def _partial_lock(**options: Any) -> AsyncBatcher[int, int]:
    return batched(functools.partial(_with_a_lock, threading.Lock()), **options)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (Locked, "self.lock (a _thread.lock)"),
        (LockedDeep, "self.config['parts'][1]['lock'] (a _thread.lock)"),
        (LockedSlot, "self.guard (a _thread.lock)"),
        (_over_lock, "closure variable 'lock' (a _thread.lock)"),
        (_over_nested_lock, "closure variable 'guarded': closure variable 'lock' (a _thread.lock)"),
        (_with_default, "default of argument 'lock' (a _thread.lock)"),
        (_with_global, "global variable 'LOCK' (a _thread.lock)"),
        (_with_setup, "setup_worker: closure variable 'lock' (a _thread.lock)"),
        (_of_a_class_over_lock, "closure variable 'lock' (a _thread.lock)"),
        (_of_a_class_with_lock, "lock (a _thread.lock)"),
        (_partial_lock, "(a _thread.lock)"),
    ],
)
async def test_what_cannot_be_pickled_is_named(
    pool: ProcessPoolExecutor, make: Callable[..., Any], named: str
) -> None:
    """Each call gets its own error, which names the attribute or variable, and what to do."""
    batcher = make(executor=pool)
    errors = [*await results_of(batcher, [1, 2]), *await results_of(batcher, [3])]
    with pytest.raises(SerializationError):
        await batcher.start()
    await batcher.stop()
    assert [type(error) for error in errors] == [SerializationError] * 3
    assert len({id(error) for error in errors}) == 3
    assert all(named in str(error) and "setup_worker" in str(error) for error in errors), str(
        errors[0]
    )


async def test_a_function_that_cannot_be_unpickled_fails_each_batch(
    pool: ProcessPoolExecutor,
) -> None:
    """The callers get what the worker raised; the worker stays alive."""

    class Unloadable:
        def __reduce__(self) -> Any:
            return (work.fail_by, ("exit",))

        def __call__(self, batch: list[int]) -> list[int]:
            return batch

    batcher = batched(Unloadable(), executor=pool)
    for _ in range(2):
        errors = await results_of(batcher, [1, 2])
        assert [type(error) for error in errors] == [SerializationError] * 2
        assert all("function" in str(error) and "SystemExit" in str(error) for error in errors)
    await batcher.stop()
    assert await round_trip(pool, [1]) == [1]
