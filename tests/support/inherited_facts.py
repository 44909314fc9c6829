"""What a worker has inherited, and a program that changes it between two workers."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import faulthandler
import locale
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_batcher import WorkerPool
from async_batcher.exceptions import WorkerDiedError
from tests.support import worker_functions as work

if TYPE_CHECKING:
    from collections.abc import Mapping

    Facts = Mapping[str, Any]

OPTIONS = ["-O", "-s", "-P", "-B", "-Xutf8", "-Werror::FutureWarning"]
ENVIRONMENT = {
    "PYTHONWARNINGS": "error::ImportWarning",
    "TZ": "UTC",
    "FACT_CHANGED": "first",
    "FACT_REMOVED": "first",
    "FACT_KEPT": "first",
}


def _umask() -> int:
    mask = os.umask(0o77)
    os.umask(mask)
    return mask


def _limits() -> dict[str, tuple[int, int]]:
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return {name: resource.getrlimit(getattr(resource, name)) for name in names}


def _disposition(number: signal.Signals) -> str:
    kinds: dict[Any, str] = {
        signal.SIG_IGN: "ignored",
        signal.SIG_DFL: "default",
        signal.default_int_handler: "KeyboardInterrupt",
    }
    return kinds.get(signal.getsignal(number), "handled")


def _is_error(category: type[Warning]) -> bool:
    return any(entry[0] == "error" and entry[2] is category for entry in warnings.filters)


def _file(descriptor: int | None) -> tuple[int, int] | None:
    if descriptor is None:
        return None
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _named(pid: int | None, program: int) -> str:
    return "the program" if pid == program else "none" if pid is None else "another"


def facts(program: int, inheritable: int, pipe: object) -> dict[str, Any]:
    """Return what this process has.

    Args:
        program: The program's process id.
        inheritable: A descriptor of the program's that is inheritable.
        pipe: What `_file` returns for it there.
    """
    process = multiprocessing.current_process()
    parent: Any = multiprocessing.parent_process()
    tracker: Any = resource_tracker._resource_tracker
    return {
        "environment": dict(os.environb),
        "time zone": time.strftime("%z", time.localtime(0)),
        "current folder": os.getcwd(),  # noqa: PTH109 - as user code asks for it
        "umask": _umask(),
        "nice value": os.getpriority(os.PRIO_PROCESS, 0),
        "resource limits": _limits(),
        "CPU affinity": os.sched_getaffinity(0),
        "process group and session": (os.getpgrp(), os.getsid(0)),
        "user and groups": (os.getresuid(), os.getresgid(), os.getgroups()),
        "blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "a signal that is ignored": _disposition(signal.SIGUSR1),
        "a signal that is handled": _disposition(signal.SIGALRM),
        "SIGINT": _disposition(signal.SIGINT),
        "SIGTERM": _disposition(signal.SIGTERM),
        "SIGHUP": _disposition(signal.SIGHUP),
        "SIGURG": _disposition(signal.SIGURG),
        "SIGPIPE": _disposition(signal.SIGPIPE),
        "process name": process.name.rstrip("0123456789"),
        "daemon flag": process.daemon,
        "parent_process()": _named(parent and parent.pid, program),
        "parent_process().is_alive()": parent and parent.is_alive(),
        "os.getppid()": _named(os.getppid(), program),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "authkey": bytes(process.authkey),
        "resource tracker": _file(tracker._fd),
        "sys.flags": (tuple(sys.flags), sys._xoptions),
        "-W": _is_error(FutureWarning),
        "PYTHONWARNINGS": _is_error(ImportWarning),
        "PYTHONWARNINGS set at run time": _is_error(UnicodeWarning),
        "warnings.simplefilter": _is_error(BytesWarning),
        "sys.path": sys.path,
        "sys.argv": sys.argv,
        "sys.executable": sys.executable,
        "main module": hasattr(sys.modules["__main__"], "IS_PROGRAM"),
        "faulthandler": faulthandler.is_enabled(),
        "locale.setlocale": locale.setlocale(locale.LC_NUMERIC),
        "recursion limit": sys.getrecursionlimit(),
        "switch interval": sys.getswitchinterval(),
        "socket timeout": socket.getdefaulttimeout(),
        "sys.stdin": _input(sys.stdin.fileno()),
        "descriptor 0": _input(0),
        "standard output and error": (_file(1), _file(2)),
        "an inheritable descriptor": _file(inheritable) == pipe,
    }


def _input(descriptor: int) -> Any:
    status = Path(os.devnull).stat()
    file = _file(descriptor)
    return "/dev/null" if file == (status.st_dev, status.st_ino) else file


def _do_nothing(number: int, frame: object) -> None:
    pass


def _prepare() -> None:
    """Set what a child could inherit, before there is a worker."""
    os.umask(0o027)
    signal.signal(signal.SIGALRM, _do_nothing)
    multiprocessing.current_process().authkey = b"first"
    sys.setrecursionlimit(1234)
    sys.setswitchinterval(0.5)
    socket.setdefaulttimeout(100)
    with contextlib.suppress(locale.Error):  # not every system has it
        locale.setlocale(locale.LC_NUMERIC, "C.UTF-8")


def _change(folder: Path) -> None:
    """Change what a child could inherit."""
    os.environ.update(FACT_ADDED="later", FACT_CHANGED="later", TZ="Etc/GMT-5")
    os.environ["PYTHONWARNINGS"] = "error::UnicodeWarning"
    os.environb[b"FACT_\xff"] = b"\xfe="
    del os.environ["FACT_REMOVED"]
    time.tzset()
    (folder / "later").mkdir()
    os.chdir(folder / "later")
    os.umask(0o077)
    os.nice(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for number in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE):
        _, hard = resource.getrlimit(number)
        limit = 900 if hard == resource.RLIM_INFINITY else min(hard, 900)
        resource.setrlimit(number, (limit - 1, limit))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGRTMAX])
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _do_nothing)
    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.current_process().authkey = b"later"
    sys.path.append(str(folder))
    sys.argv.append("later")
    warnings.simplefilter("error", BytesWarning)


async def _look(method: str, folder: Path) -> dict[str, Facts]:
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)  # noqa: FBT003 - its only argument
    arguments = os.getpid(), reading, _file(reading)
    _prepare()
    seen: dict[str, Facts] = {}
    # Without threads_per_worker workers have the whole environment of the program.
    async with WorkerPool(1, mp_context=method, threads_per_worker=0) as pool:
        seen["first"] = await pool.run(facts, *arguments)
        seen["program, first"] = copy.deepcopy(facts(*arguments))  # sys.path will change
        _change(folder)
        with contextlib.suppress(WorkerDiedError):
            await pool.run(work.fail_by, "kill")
        seen["later"] = await pool.run(facts, *arguments)
        seen["program, later"] = facts(*arguments)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as standard:
        seen["standard"] = standard.submit(facts, *arguments).result()
        seen["program, standard"] = facts(*arguments)
    os.close(reading)
    os.close(writing)
    return seen


def main(method: str, folder: Path) -> None:
    """Write what workers of the start method have, and one of the standard pool, as a pickle."""
    warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)
    seen = asyncio.run(_look(method, folder))
    (folder / "seen").write_bytes(pickle.dumps(seen))
