"""How a process becomes a worker, and how it ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import warnings
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.by_value import BOOT_MARK, REGISTRY, START_MARK
from async_batcher._serialization.codec import Codec
from async_batcher._serialization.remote_exception import PickledException, encode_exception
from async_batcher._worker import signals
from async_batcher._worker.inherited import set_inherited

if TYPE_CHECKING:
    from async_batcher._transport.protocol import WorkerSettings

_MALLOC_THRESHOLD = 30 << 20  # bytes; glibc keeps no larger blocks than 32 MB

# What limits the threads of native libraries; each is read when its library loads or first runs.
# Not NUMBA_NUM_THREADS: Numba refuses to compile once it differs from what a forked worker has.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",  # OpenMP, and so PyTorch
    "MKL_NUM_THREADS",  # PyTorch reads it, too
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",  # Accelerate, on macOS
    "NUMEXPR_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",  # TensorFlow, within an operation
    "TF_NUM_INTEROP_THREADS",  # and for operations at a time
    "LOKY_MAX_CPU_COUNT",  # joblib's n_jobs=-1
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",  # such as Hugging Face tokenizers
)


class FrozenStart:
    """Called by `multiprocessing.freeze_support` in a frozen program that serves as an interpreter.

    Args:
        path: ``sys.path`` from now on.
        module: A module of this package.
        name: The function that is called in it.
        args: Its arguments.
    """

    def __init__(self, path: list[str], module: str, name: str, args: tuple[Any, ...]) -> None:
        self._path = path
        self._module = module
        self._name = name
        self._args = args

    def _bootstrap(self, sentinel: int) -> Any:  # as a process object of multiprocessing
        import importlib

        os.close(sentinel)
        # The main module has run as far as freeze_support, and goes no further.
        setattr(sys.modules["__main__"], BOOT_MARK, True)
        os.environ.pop(START_MARK, None)
        sys.path[:] = self._path
        return getattr(importlib.import_module(self._module), self._name)(*self._args)


def reset_signals() -> None:
    """Leave the signals of the process group to the parent, and show where C code crashes."""
    if sys.platform != "win32":
        signal.set_wakeup_fd(-1)  # inherited by fork: this process would wake the parent's loop
    signals.handle()
    signals.restore_in_children()
    show_crashes()


def show_crashes() -> None:
    """Show on standard error where C code crashes."""
    import faulthandler

    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no usable stderr
            faulthandler.enable()


def limit_threads(threads: int) -> None:
    """Set the `THREAD_VARIABLES` that the environment does not set; 0: leave them alone."""
    for name in THREAD_VARIABLES if threads else ():
        os.environ.setdefault(name, str(threads))


def exit_with_parent(life: int) -> None:
    """Have this process end when the other end of the pipe ``life`` is closed."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox refuses it
            _exit_by_kernel(life)
            return
    _watch(lambda: os.read(life, 1))


def _exit_by_kernel(life: int) -> None:
    """Have the kernel send SIGKILL, also while C code holds the GIL."""
    import fcntl

    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    closed = select.poll()  # not select.select, which takes no descriptor above 1023
    closed.register(life, select.POLLIN)
    if closed.poll(0):  # before the kernel could tell
        os._exit(1)


def _watch(wait: Any) -> None:
    """End this process when ``wait`` returns."""
    import threading

    def watch() -> None:
        wait()
        os._exit(1)

    with contextlib.suppress(Exception):  # without a thread, the end of its channel ends it
        threading.Thread(target=watch, name="async_batcher-parent-watch", daemon=True).start()


def initialize(settings: WorkerSettings, life: int) -> PickledException | None:
    """Get ready for batches, and return what the initializer raised.

    Args:
        settings: What the parent has sent.
        life: As of `main.worker_main`.
    """
    with contextlib.suppress(OSError):  # it was removed, as a relative path will show
        os.chdir(settings["folder"])  # first: relative entries of the path refer to it
    set_inherited(settings["inherited"])
    limit_threads(settings["threads"])
    sys.path = settings["path"]
    sys.argv = settings["argv"]
    _set_process(settings, life)
    codec = Codec(worker=True)
    try:
        if settings["initializer"] is not None:
            initializer, arguments = codec.loads(settings["initializer"])
            REGISTRY.note_imported(initializer)
            initializer(*arguments)
    except BaseException as exc:  # noqa: BLE001 - user code
        return encode_exception(codec, exc)
    return None


def _set_process(settings: WorkerSettings, life: int) -> None:
    """Have multiprocessing, and so logging, know that this is not the program's main process."""
    import multiprocessing
    from multiprocessing import process

    number = settings["number"]
    name = "fork server" if number is None else f"worker {number}"
    # As multiprocessing does it in its own processes. A forked one has another's until now.
    current: Any = process.BaseProcess(name=f"async_batcher {name}", daemon=False)
    current._identity = () if number is None else (number + 1,)  # noqa: SLF001
    current._parent_name, current._parent_pid = settings["parent"]  # noqa: SLF001
    current.authkey = settings["authkey"]
    module: Any = process
    module._current_process = current  # noqa: SLF001
    module._parent_process = module._ParentProcess(*settings["parent"], life)  # noqa: SLF001
    if settings["start_method"] is not None:
        multiprocessing.set_start_method(settings["start_method"], force=True)


def init_standard_worker(threads: int) -> None:
    """Set a worker of a standard pool up that the package made; see `limit_threads`."""
    import multiprocessing

    reset_signals()
    limit_threads(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:
        _watch(parent.join)


def close_stdin() -> None:
    """Give user code a standard input that is empty."""
    try:
        sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123 - for as long as the process lives
    except OSError:  # a sandbox without /dev
        sys.stdin = None


def raise_malloc_threshold() -> None:
    """Raise glibc's mmap threshold, so that large freed buffers stay in the heap; see mallopt(3).

    Otherwise each batch of large bytes pays a page fault for every 4 kB, which costs more than a
    copy. glibc's threshold is the largest block that was freed so far; untouched memory is free.
    """
    with contextlib.suppress(MemoryError):
        bytes(_MALLOC_THRESHOLD)


def fork() -> tuple[int, list[warnings.WarningMessage]]:
    """Fork, and catch warnings: one that is an error would be raised when the child exists."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pid = os.fork()
    return pid, warned or []


def peak_rss_reader() -> Any:
    """Return what reads this process's peak memory in bytes; None where the parent can do so."""
    if os.path.exists("/proc/self/statm"):  # noqa: PTH110 - pathlib is not needed here otherwise
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def drop_parent_state() -> None:
    """In a forked process, drop the parent's exit handlers and its state of multiprocessing."""
    import atexit

    atexit._clear()  # noqa: SLF001 - as multiprocessing does, and so is the rest
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None:
        sys.modules["multiprocessing.process"]._children = set()  # type: ignore[attr-defined]  # noqa: SLF001
        util._finalizer_registry.clear()  # noqa: SLF001
        util._run_after_forkers()  # noqa: SLF001
        atexit.register(util._exit_function)  # noqa: SLF001


def reseed_numpy() -> None:
    """Seed the global generator of numpy anew, whose state each forked process has."""
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is not None:
        with contextlib.suppress(Exception):  # a module has set a generator that has no seed
            numpy_random.seed()


def join_tracker(fd: int) -> None:
    """Register named shared memory and semaphores with the parent's resource tracker.

    A tracker of the worker's own would unlink, when the worker ends, what the parent still uses.
    """
    with contextlib.suppress(ImportError):  # a Python without it
        from multiprocessing import resource_tracker

        tracker: Any = resource_tracker._resource_tracker  # noqa: SLF001 - as multiprocessing does
        if tracker._fd is None:  # noqa: SLF001 - else inherited, or started by user code
            tracker._fd, fd = fd, -1  # noqa: SLF001
    if fd != -1:
        os.close(fd)


def exit_process(code: int) -> None:
    """End this process as a program ends, but not as the process that it was forked from."""
    import atexit

    try:
        atexit._run_exitfuncs()  # noqa: SLF001 - as multiprocessing does; inherited ones were cleared
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BaseException:  # noqa: BLE001, S110 - user code; the process ends all the same
        pass
    finally:
        os._exit(code)
