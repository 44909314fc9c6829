"""Sets in a worker what a process that the program started at this moment would inherit.

A worker comes from the fork server or from a helper thread, which may have the values of an earlier
moment: on Linux, nice value, CPU affinity and signal mask belong to a thread. So the program reads
its values when it starts a worker, and the worker sets those that differ.

Rules:

- A value that this system does not let a process read or set stays as it is, such as the umask
  without /proc, or a limit that cannot be raised.
- A worker takes the variables of the environment that the program has changed since the fork server
  started. It keeps what modules of ``preload`` have set.
- What Python and C libraries read only when they start (PYTHONHASHSEED, LC_ALL) is as it was when
  the fork server started, except for the time zone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from async_batcher._worker import signals

if TYPE_CHECKING:
    from collections.abc import Callable

_server_environ: dict[bytes, bytes] = {}  # with which this process's fork server started


def note_environ() -> None:
    """Note the environment with which this process, a fork server, has started."""
    _server_environ.update(os.environb)


def read_inherited() -> dict[str, Any]:
    """Return what a process that this thread started now would inherit; builtins."""
    values = {}
    for name, (get, _) in _SETTINGS.items():
        with contextlib.suppress(Exception):  # not on this system, a sandbox, an audit hook
            values[name] = get()
    return values


def set_inherited(values: dict[str, Any]) -> None:
    """Set what differs from ``values``, as far as this process may."""
    for name, value in values.items():
        get, set_value = _SETTINGS[name]
        with contextlib.suppress(Exception):
            if get() != value:
                set_value(value)


def _environ() -> dict[bytes, bytes]:
    environ = os.environb
    found = {name: environ.get(name) for name in list(environ)}  # another thread may remove some
    return {name: value for name, value in found.items() if value is not None}


def _set_environ(environ: dict[bytes, bytes]) -> None:
    zone = os.environb.get(b"TZ")
    for name in _server_environ.keys() - environ.keys():
        os.environb.pop(name, None)
    os.environb.update(environ.items() - _server_environ.items())
    if os.environb.get(b"TZ") != zone:
        time.tzset()


def _status(field: bytes) -> bytes:
    with open("/proc/self/status", "rb") as file:  # noqa: PTH123 - pathlib is not needed here
        return next(line for line in file if line.startswith(field)).split()[1]


def _umask() -> int:
    """Return the umask, which no system call reads without changing it for all threads."""
    return int(_status(b"Umask:"), 8)


def _nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def _set_nice(nice: int) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, nice)


def _cpus() -> set[int]:
    return os.sched_getaffinity(0)


def _set_cpus(cpus: set[int]) -> None:
    os.sched_setaffinity(0, cpus)


def _ids() -> Any:
    return os.getgroups(), os.getresgid(), os.getresuid()


def _set_ids(ids: Any) -> None:
    groups, gids, uids = ids
    if uids[1] == 0:  # only root may change the groups
        os.setresuid(*uids)
    if groups != os.getgroups():
        os.setgroups(groups)
    os.setresgid(*gids)
    os.setresuid(*uids)  # last: it may end the right to change the others


def _limits() -> dict[int, tuple[int, int]]:
    import resource  # missing on Windows

    numbers = {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
    return {number: resource.getrlimit(number) for number in numbers}


def _set_limits(limits: dict[int, tuple[int, int]]) -> None:
    import resource

    for number, limit in limits.items():
        with contextlib.suppress(OSError, ValueError):  # it may not be raised
            if resource.getrlimit(number) != limit:
                resource.setrlimit(number, limit)


def _blocked_signals() -> set[int]:
    """Return the blocked signals except those that a worker handles."""
    handled = {*signals.GROUP_SIGNALS, signals.INTERRUPT}
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, []) - handled}


def _block_signals(numbers: set[int]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, numbers)


def _ignored_signals() -> set[int]:
    bits = int(_status(b"SigIgn:"), 16)  # signal.getsignal takes several times as long for all
    numbers = {number for number in range(1, signal.NSIG) if bits >> (number - 1) & 1}
    return numbers - {int(signals.INTERRUPT)}


def _ignore_signals(numbers: set[int]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "environ": (_environ, _set_environ),
    "umask": (_umask, os.umask),
    "nice": (_nice, _set_nice),
    "cpus": (_cpus, _set_cpus),
    "limits": (_limits, _set_limits),
    "ids": (_ids, _set_ids),
    "blocked": (_blocked_signals, _block_signals),
    "ignored": (_ignored_signals, _ignore_signals),
}
