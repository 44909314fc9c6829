"""Signals that a whole process group receives: Ctrl-C, SIGTERM of a service manager, SIGHUP.

The parent decides what they mean, and stops its workers itself. Its workers and its fork server
handle them with a function that does nothing, so that no batch is lost while the parent drains.

Rules:

- They are handled, not ignored. Processes that user code starts in a worker inherit what is
  ignored, and ``Popen.terminate`` would not end them.
- A process that user code forks in a worker gets the defaults back before any signal can reach it.
- What the parent ignores stays ignored (``nohup``, a background job of a shell), in a worker and in
  what user code starts there.
- They are blocked from before a worker exists until it handles them. No other signal changes, but
  for INTERRUPT: a worker has the signal mask of the pool's thread (`inherited.py`), as one of the
  standard pool has that of the thread that started it.

INTERRUPT is from the parent: the batch that a worker runs has no more time. Its handler raises
KeyboardInterrupt, or does nothing:

- It raises only in user code that a running batch has called, never in code of this package that
  sends, pickles or loads. So it looks at the stack, and no batch has to note where it is: going
  outward from where the signal came, the first function of `_worker` must be one that is marked
  `interruptible`. `UserFunction.run` calls all of these in its ``try``, which makes what they raise
  the outcome of the batch.
- It raises only for the batch that the parent has named on the status page, once. A signal that
  comes late does nothing.
- It is SIGURG, which does nothing by default, and which no terminal sends. SIGINT must not make a
  call of a C library fail with EINTR, so Python does not see it while it waits for a socket, a lock
  or a child process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType
    from typing import TypeVar

    F = TypeVar("F", bound=Callable[..., Any])

GROUP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
INTERRUPT: Any = getattr(signal, "SIGURG", None)  # Windows lacks it, as it lacks worker pools

_PACKAGE = __name__.rpartition(".")[0] + "."

_interruptible: set[CodeType] = set()
_hooks = threading.Lock()  # acquired once, to register the hooks; a forked process inherits them
_masks = threading.local()


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Block them in this thread, and so in a process that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def handle() -> None:
    """Handle them in this process with a function that does nothing, and unblock them."""
    for number in GROUP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _do_nothing)
            if sys.platform != "win32":  # no call of a C library fails with EINTR
                signal.siginterrupt(number, False)  # noqa: FBT003 - its only form
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)


def interruptible(function: F) -> F:
    """Mark a function that calls user code, and that may be left at any point; see above."""
    _interruptible.add(function.__code__)
    return function


def handle_interrupt(claim: Callable[[], bool]) -> None:
    """Raise KeyboardInterrupt in user code when the parent sends INTERRUPT.

    Args:
        claim: Tells whether the batch that runs is to be interrupted; only once.
    """

    def interrupt(_number: int, frame: FrameType | None) -> None:
        if _is_in_user_code(frame) and claim():
            msg = "the batch ran for longer than its timeout, or all its callers were cancelled"
            raise KeyboardInterrupt(msg)

    signal.signal(INTERRUPT, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [INTERRUPT])


def _is_in_user_code(frame: FrameType | None) -> bool:
    while frame is not None and not str(frame.f_globals.get("__name__")).startswith(_PACKAGE):
        frame = frame.f_back
    return frame is not None and frame.f_code in _interruptible


def restore_in_children() -> None:
    """Give every process that is forked from this one the default handlers."""
    if hasattr(os, "register_at_fork") and _hooks.acquire(blocking=False):
        os.register_at_fork(before=_before_fork, after_in_parent=_unblock, after_in_child=_restore)


def _do_nothing(number: int, frame: object) -> None:
    pass


def _before_fork() -> None:
    # A signal that reached the child before it has its default handler would do nothing there, and
    # a `terminate` of user code would be without effect.
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _restore() -> None:
    for number in GROUP_SIGNALS:
        if signal.getsignal(number) is _do_nothing:
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
    _unblock()
