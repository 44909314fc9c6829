"""Functions for workers: importable there, without asyncio and pytest.

A function that must act in one place only (crash in the worker, fail to unpickle in the parent)
checks the process id or the thread. One that waits for the test waits for a file, up to `DEADLINE`.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

DEADLINE = 20.0  # seconds; only failing tests wait that long
Where = tuple[int, int]


def where() -> Where:
    """Return the process and the thread; interpreters in one process have threads of their own."""
    return os.getpid(), threading.get_ident()


def wait_for(path: Path) -> None:
    """Wait for a file."""
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        if time.monotonic() > deadline:
            msg = f"{path.name} was not written in time"
            raise TimeoutError(msg)
        time.sleep(0.002)


def note(folder: Path, kind: str, text: str = "") -> None:
    """Write a file with a name of its own, complete from the start."""
    written = folder / f".{os.getpid()}-{threading.get_ident()}"
    written.write_text(text)
    number = 0
    while True:
        try:
            (folder / f"{kind}-{number}").hardlink_to(written)
        except FileExistsError:
            number += 1
        else:
            break
    written.unlink()


def noted(folder: Path, kind: str) -> list[str]:
    """Return the texts of all files of a kind."""
    return [file.read_text() for file in sorted(folder.glob(f"{kind}-*"))]


# --- batch functions


def same(batch: list[Any]) -> list[Any]:
    """Return each item as its own result."""
    return batch


def double(batch: list[int]) -> list[int]:
    """Return twice each item."""
    return [item * 2 for item in batch]


def noted_double(file: Path, batch: list[int]) -> list[int]:
    """Append the items to a file, with one system call; then take a few milliseconds."""
    fd = os.open(file, os.O_WRONLY | os.O_APPEND)
    os.write(fd, f"{' '.join(map(str, batch))}\n".encode())
    os.close(fd)
    time.sleep(0.003)
    return double(batch)


def whereabouts(batch: list[Any]) -> list[Where]:
    """Return where the batch runs."""
    return [where()] * len(batch)


def modules(batch: list[Any]) -> list[list[str]]:
    """Return the names of the modules that this process has imported."""
    return [sorted(sys.modules)] * len(batch)


def results_of_shape(batch: list[str]) -> Any:
    """Return the positions of the items, or another value, as the first item says."""
    results = [*range(len(batch))]
    shapes: dict[str, Any] = {
        "list": results,
        "tuple": tuple(results),
        "generator": (result for result in results),
        "None": None,
        "too few": results[1:],
        "too many": [*results, None],
        "str": "x" * len(batch),
        "bytes": b"x" * len(batch),
        "dict": dict.fromkeys(results),
        "int": len(batch),
    }
    return shapes[batch[0]]


class FalsyError(Exception):
    """An exception that is false and has no length."""

    def __bool__(self) -> bool:
        """Return False."""
        return False

    def __len__(self) -> int:
        """Return 0."""
        return 0


class PickyError(Exception):
    """An exception whose ``__init__`` does not accept its ``args``."""

    def __init__(self, code: int, reason: str) -> None:
        """Keep only the text."""
        super().__init__(f"{code}: {reason}")


class FrankError(Exception):
    """An exception with attributes."""

    def __init__(self, message: str, code: int = 0) -> None:
        """Keep the code."""
        super().__init__(message)
        self.code = code


class OwnSignal(BaseException):
    """A BaseException that is not an Exception."""


def odd_ones_fail(batch: list[int]) -> list[Any]:
    """Return an exception for each odd item."""
    return [FrankError(f"{item} is odd", item) if item % 2 else item for item in batch]


def _raise(name: str) -> None:
    match name:
        case "value":
            msg = "a plain failure"
            raise ValueError(msg)
        case "frank":
            msg = "frankly"
            raise FrankError(msg, code=7)
        case "falsy":
            raise FalsyError
        case "picky":
            raise PickyError(404, "not found")
        case "exit":
            sys.exit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case "stop":
            raise StopIteration
        case "cancelled":
            from asyncio import CancelledError

            raise CancelledError
        case "closed":
            raise GeneratorExit
        case "own":
            raise OwnSignal


def raise_named(batch: list[str]) -> list[str]:
    """Raise the exception that an item names."""
    for name in batch:
        _raise(name)
    return batch


# --- gates and set-ups


def gated(folder: Path, batch: list[Any]) -> list[Any]:
    """Note that the batch has started, wait for ``go``, return how many ran with it."""
    mine = folder / f"inside-{os.getpid()}-{threading.get_ident()}-{batch[0]}"
    mine.touch()
    try:
        count = len(list(folder.glob("inside-*")))
        note(folder, "begun", str(batch))
        wait_for(folder / "go")
    finally:
        mine.unlink()
    return [count] * len(batch)


def note_setup(folder: Path) -> None:
    """Note where the set-up runs."""
    note(folder, "setup", str(where()))


def fail_first(folder: Path) -> None:
    """Fail the first time; a set-up."""
    try:
        (folder / "tried").mkdir()
    except FileExistsError:
        return
    msg = "the model is not there yet"
    raise LookupError(msg)


def with_setup(folder: Path, batch: list[Any]) -> list[tuple[Where, list[str]]]:
    """Return where the batch runs, and the set-ups that have run so far."""
    return [(where(), noted(folder, "setup"))] * len(batch)


def with_setup_here(batch: list[Path]) -> list[tuple[int, bool]]:
    """Return the process, and whether its set-up has run; each item is a folder of notes."""
    return [(os.getpid(), str(where()) in noted(folder, "up")) for folder in batch]


class Recorder:
    """An object with a set-up and a batch function among its methods."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        """Record a text."""
        self.texts.append(text)

    def recorded(self, batch: list[Any]) -> list[Any]:
        """Return the recorded texts."""
        return [list(self.texts) for _ in batch]


# --- crashes

WAYS = ("raise", "exit", "os._exit", "kill", "segfault")
EXIT_CODES = {
    "os._exit": 5,
    "kill": -int(getattr(signal, "SIGKILL", 9)),
    "segfault": -int(signal.SIGSEGV),
}


def fail_by(way: str) -> None:
    """Crash or fail in one of the `WAYS`."""
    match way:
        case "raise":
            msg = "this hurts"
            raise ArithmeticError(msg)
        case "exit":
            sys.exit(3)
        case "os._exit":
            os._exit(5)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            import faulthandler  # fails in a subinterpreter

            faulthandler.disable()  # no report
            with contextlib.suppress(ImportError):
                import resource

                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler._sigsegv()  # type: ignore[attr-defined]
    time.sleep(DEADLINE)  # until the signal arrives


class CrashAtPickle:
    """Crashes when it is pickled."""

    def __init__(self, way: str) -> None:
        """Keep the way."""
        self.way = way

    def __reduce__(self) -> Any:
        """Crash."""
        fail_by(self.way)
        return (same, ([],))


class CrashAtUnpickle:
    """Crashes when it is unpickled."""

    def __init__(self, way: str) -> None:
        """Keep the way."""
        self.way = way

    def __reduce__(self) -> Any:
        """Crash in the process that unpickles."""
        return (fail_by, (self.way,))


def crash_in_batch(batch: list[str]) -> list[str]:
    """Crash as an item says."""
    for way in batch:
        if way in WAYS:
            fail_by(way)
    return batch


def results_that_crash_pickled(batch: list[str]) -> list[Any]:
    """Return results that crash the worker when they are pickled."""
    return [CrashAtPickle(way) if way in WAYS else way for way in batch]


def results_that_crash_unpickled(batch: list[str]) -> list[Any]:
    """Return results that crash the process that unpickles them."""
    return [CrashAtUnpickle(way) if way in WAYS else way for way in batch]


def crash_once(folder: Path, way: str) -> None:
    """Crash the first time."""
    try:
        (folder / "crashed").mkdir()
    except FileExistsError:
        return
    fail_by(way)


def crash_soon(way: str, delay: float) -> int:
    """Return the process id, and crash some seconds later."""
    threading.Timer(delay, fail_by, [way]).start()
    return os.getpid()


def exit_now(code: int) -> None:
    """Exit; with coverage, ``os._exit`` itself cannot be pickled."""
    os._exit(code)


def own_channel() -> Any:
    """Return the socket between this worker and its pool."""
    import gc

    from async_batcher._worker.main import WorkerLoop

    return next(one._channel._socket for one in gc.get_objects() if isinstance(one, WorkerLoop))


def close_channel() -> None:
    """Close the socket between this worker and its pool, and go on."""
    own_channel().close()
    time.sleep(DEADLINE)


def crash_until(folder: Path, mended: str, way: str) -> None:
    """Note the process id and crash, until there is a file of that name."""
    if not (folder / mended).exists():
        note(folder, "pid", str(os.getpid()))
        fail_by(way)


def exit_unless_first(folder: Path) -> None:
    """Exit in every process but the first."""
    try:
        (folder / "first").mkdir()
    except FileExistsError:
        note(folder, "exited")
        os._exit(5)


def batch_sizes(batch: list[Any]) -> list[int]:
    """Return the size of the batch for each item."""
    return [len(batch)] * len(batch)


def pids(batch: list[Any]) -> list[int]:
    """Return the process id."""
    return [os.getpid()] * len(batch)


def note_pid_and_halt(folder: Path, batch: list[Any]) -> list[Any]:
    """Note the process id, then stop by SIGSTOP."""
    note(folder, "pid", str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)
    return batch


def halt_or_crash(folder: Path, batch: list[str]) -> list[str]:
    """Stop by SIGSTOP, or crash as the item says."""
    return note_pid_and_halt(folder, batch) if batch == ["halt"] else crash_in_batch(batch)


def note_pid_and_wait(folder: Path, batch: list[Any]) -> list[Any]:
    """Note the process id and wait for ``go``."""
    note(folder, "pid", str(os.getpid()))
    wait_for(folder / "go")
    return batch


def sleep_each(batch: list[float]) -> list[float]:
    """Sleep for each item, in seconds."""
    for seconds in batch:
        time.sleep(seconds)
    return batch


def note_and_hold(folder: Path, batch: list[str]) -> list[str]:
    """Note the items; wait for the file of each whose name begins with "hold"."""
    for item in batch:
        note(folder, "begun", item)
    for item in batch:
        if item.startswith("hold"):
            wait_for(folder / item)
    return batch


# --- items and callables


class Colour(enum.Enum):
    """An enum."""

    RED = 1


@dataclass(frozen=True)
class Point:
    """A dataclass."""

    x: int
    y: int


class Pair(NamedTuple):
    """A named tuple."""

    left: int
    right: int


class Scale:
    """A callable object."""

    def __init__(self, factor: int) -> None:
        """Keep the factor."""
        self.factor = factor

    def __call__(self, batch: Iterable[int]) -> list[int]:
        """Return each item times the factor."""
        return [item * self.factor for item in batch]


def scaled(factor: int, batch: list[int]) -> list[int]:
    """Return each item times a factor."""
    return [item * factor for item in batch]


def wait_on_request(folder: Path, batch: list[str]) -> list[str]:
    """Wait for ``go`` if an item is "wait"."""
    if "wait" in batch:
        wait_for(folder / "go")
    return batch


class Buffer:
    """Gives pickle an out-of-band buffer."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Return the buffer beside the pickle."""
        import pickle

        return Buffer, (pickle.PickleBuffer(self.content),)


def poisonous(batch: list[Any]) -> list[Any]:
    """Return results, unless an item crashes, hangs or exhausts the memory; see `fail_by`."""
    for item in batch:
        if item in WAYS:
            fail_by(item)
        elif item == "hang":
            time.sleep(10 * DEADLINE)
        elif item == "memory":
            _use_up_the_memory()
    return [f"{item} done" for item in batch]


def _use_up_the_memory() -> None:
    """Allocate up to a limit, then end the process as the kernel's OOM killer does."""
    import resource
    from pathlib import Path

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    hoard = []
    try:
        while True:
            hoard.append(bytearray(16 << 20))
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)
