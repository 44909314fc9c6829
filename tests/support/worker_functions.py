"""What the tests run in workers: importable there, and importing neither asyncio nor pytest.

What must happen only in one place (die in the worker, fail to unpickle in the caller's process) asks for the process id or the
thread. What must wait for the test does so for a file, up to a deadline that a test which fails lets pass.
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
    from collections.abc import Iterable, Iterator
    from pathlib import Path

DEADLINE = 20.0  # seconds that anything here waits at most
Where = tuple[int, int]


def where() -> Where:
    """The process and the thread; where interpreters share a process, each has threads of its own."""
    return os.getpid(), threading.get_ident()


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        if time.monotonic() > deadline:
            msg = f"{path.name} did not come"
            raise TimeoutError(msg)
        time.sleep(0.002)


def note(folder: Path, kind: str, text: str = "") -> None:
    """Leave a file with a name of its own, which has its text from the start."""
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
    """What the files of that kind say."""
    return [file.read_text() for file in sorted(folder.glob(f"{kind}-*"))]


# Batches of all kinds.


def same(batch: list[Any]) -> list[Any]:
    """Each item as its own result."""
    return batch


def double(batch: list[int]) -> list[int]:
    """Twice each."""
    return [item * 2 for item in batch]


def whereabouts(batch: list[Any]) -> list[Where]:
    """Where it runs."""
    return [where()] * len(batch)


def modules(batch: list[Any]) -> list[list[str]]:
    """What this process has imported."""
    return [sorted(sys.modules)] * len(batch)


def one_too_few(batch: list[Any]) -> list[Any]:
    """One result is missing."""
    return batch[1:]


def one_too_many(batch: list[Any]) -> list[Any]:
    """One result too many."""
    return [*batch, None]


def a_string(batch: list[Any]) -> str:
    """As many characters as items."""
    return "x" * len(batch)


def some_bytes(batch: list[Any]) -> bytes:
    """As many bytes as items."""
    return b"x" * len(batch)


def a_dict(batch: list[Any]) -> dict[int, int]:
    """As many keys as items."""
    return {i: i for i in range(len(batch))}


def a_number(batch: list[Any]) -> int:
    """No sequence at all."""
    return len(batch)


def nothing(batch: list[Any]) -> None:
    """None for all."""


def a_tuple(batch: list[int]) -> tuple[int, ...]:
    """Twice each."""
    return tuple(item * 2 for item in batch)


def a_generator(batch: list[int]) -> Iterator[int]:
    """Twice each."""
    yield from (item * 2 for item in batch)


class FalsyError(Exception):
    """An exception that is false and has no length."""

    def __bool__(self) -> bool:
        """Never true."""
        return False

    def __len__(self) -> int:
        """Empty."""
        return 0


class PickyError(Exception):
    """An exception whose ``__init__`` does not take its ``args``."""

    def __init__(self, code: int, reason: str) -> None:
        """Keep one text only."""
        super().__init__(f"{code}: {reason}")


class FrankError(Exception):
    """An exception with attributes."""

    def __init__(self, message: str, code: int = 0) -> None:
        """Keep the code."""
        super().__init__(message)
        self.code = code


class OwnSignal(BaseException):
    """Not an Exception."""


def odd_ones_fail(batch: list[int]) -> list[Any]:
    """An exception for each odd item."""
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


def raise_what_is_named(batch: list[str]) -> list[str]:
    """Raise what the items name, if they name anything."""
    for name in batch:
        _raise(name)
    return batch


# Gates, set-up.


def gated(folder: Path, batch: list[Any]) -> list[Any]:
    """Say that the batch has begun, and how many run with it; wait for ``go``."""
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
    """A set-up that fails the first time."""
    try:
        (folder / "tried").mkdir()
    except FileExistsError:
        return
    msg = "the model is not there yet"
    raise LookupError(msg)


def with_setup(folder: Path, batch: list[Any]) -> list[tuple[Where, list[str]]]:
    """Where the batch runs, and which set-ups have run so far."""
    return [(where(), noted(folder, "setup"))] * len(batch)


def with_setup_here(batch: list[Path]) -> list[tuple[int, bool]]:
    """The process, and whether its set-up has run in it; each item is the folder of the notes."""
    return [(os.getpid(), str(where()) in noted(folder, "up")) for folder in batch]


class Recorder:
    """Its set-up is one of its methods, and its function another."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        """Note it."""
        self.said.append(text)

    def tell(self, batch: list[Any]) -> list[Any]:
        """What was noted."""
        return [list(self.said) for _ in batch]


# Ways to die.

WAYS = ("raise", "exit", "os._exit", "kill", "segfault")
DEADLY = {"os._exit": 5, "kill": -int(getattr(signal, "SIGKILL", 9)), "segfault": -int(signal.SIGSEGV)}


def end(way: str) -> None:
    """Die, or at least try to."""
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
            import faulthandler  # not in an interpreter of its own

            faulthandler.disable()  # its report would be noise
            with contextlib.suppress(ImportError):
                import resource

                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler._sigsegv()  # type: ignore[attr-defined]
    time.sleep(DEADLINE)  # a signal to oneself may take a moment


class CrashAtPickle:
    """Dies when it is pickled."""

    def __init__(self, way: str) -> None:
        """Keep how."""
        self.way = way

    def __reduce__(self) -> Any:
        """Die."""
        end(self.way)
        return (same, ([],))


class CrashAtUnpickle:
    """Dies when it is unpickled."""

    def __init__(self, way: str) -> None:
        """Keep how."""
        self.way = way

    def __reduce__(self) -> Any:
        """Die on the other side."""
        return (end, (self.way,))


class DiesUnpickledElsewhere:
    """Dies when it is unpickled in a process other than the given one; there it is an int."""

    def __init__(self, pid: int, way: str) -> None:
        """Keep where not, and how."""
        self.pid = pid
        self.way = way

    def __reduce__(self) -> Any:
        """Die on the other side."""
        return (end_elsewhere, (self.pid, self.way))


def end_elsewhere(pid: int, way: str) -> int:
    """Die, but not in the process of that id."""
    if os.getpid() != pid:
        end(way)
    return 0


def die_in_batch(batch: list[str]) -> list[str]:
    """Die as an item says."""
    for way in batch:
        if way in WAYS:
            end(way)
    return batch


def results_that_die_pickled(batch: list[str]) -> list[Any]:
    """A result that dies when it leaves the worker."""
    return [CrashAtPickle(way) if way in WAYS else way for way in batch]


def results_that_die_unpickled(batch: list[str]) -> list[Any]:
    """A result that dies when it arrives."""
    return [CrashAtUnpickle(way) if way in WAYS else way for way in batch]


def crash_once(folder: Path, way: str) -> None:
    """Die the first time."""
    try:
        (folder / "died").mkdir()
    except FileExistsError:
        return
    end(way)


def end_soon(way: str) -> int:
    """Answer, and die a moment later."""
    threading.Timer(0.02, end, [way]).start()
    return os.getpid()


def end_now(code: int) -> None:
    """End this process; what measures coverage replaces ``os._exit`` by a function that cannot be pickled."""
    os._exit(code)


def die_until(folder: Path, mended: str, way: str) -> None:
    """Note the process id and die, until there is a file of that name."""
    if not (folder / mended).exists():
        note(folder, "pid", str(os.getpid()))
        end(way)


def only_one_lives(folder: Path) -> None:
    """Die everywhere but where it is called first."""
    try:
        (folder / "alive").mkdir()
    except FileExistsError:
        note(folder, "died")
        os._exit(5)


def pids(batch: list[Any]) -> list[int]:
    """The process of the batch."""
    return [os.getpid()] * len(batch)


def stopped_first(folder: Path, batch: list[Any]) -> list[Any]:
    """Note the process id, then stop as SIGSTOP does."""
    note(folder, "pid", str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)
    return batch


def halt_or_die(folder: Path, batch: list[str]) -> list[str]:
    """Stop as SIGSTOP does, or die as the item says."""
    return stopped_first(folder, batch) if batch == ["halt"] else die_in_batch(batch)


def note_pid_and_wait(folder: Path, batch: list[Any]) -> list[Any]:
    """Note the process id and wait for ``go``."""
    note(folder, "pid", str(os.getpid()))
    wait_for(folder / "go")
    return batch


# Things that cross.


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
        """That much of each."""
        return [item * self.factor for item in batch]


def scaled(factor: int, batch: list[int]) -> list[int]:
    """That much of each."""
    return [item * factor for item in batch]


def wait_if_told(folder: Path, batch: list[str]) -> list[str]:
    """A batch of "wait" ends when the test says so."""
    if "wait" in batch:
        wait_for(folder / "go")
    return batch


class Buffer:
    """Offers a buffer to pickle, of whatever kind."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Its buffer, beside the pickle."""
        import pickle

        return Buffer, (pickle.PickleBuffer(self.content),)


def poisonous(batch: list[Any]) -> list[Any]:
    """Some items do something to their worker; see `end`."""
    for item in batch:
        if item in WAYS:
            end(item)
        elif item == "hang":
            time.sleep(10 * DEADLINE)
        elif item == "memory":
            _use_up_the_memory()
    return [f"{item} done" for item in batch]


def _use_up_the_memory() -> None:
    """Allocate without end, under a limit, in a way that ends the process as the system would."""
    import resource
    from pathlib import Path

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    hoard = []
    try:
        while True:
            hoard.append(bytearray(64 << 20))
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)
