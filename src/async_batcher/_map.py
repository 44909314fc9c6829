"""The job of ``async-batcher map``: what the user asks for, checked; where items come from and where results go.

::

    Settings --> do they fit together? --> output opened, and locked --> function imported --> input looked at --> `Mapping`

Rules:

- What cannot be done is refused before anything is written.
- Results that are finished are thrown away only with ``--restart``.
- Where results go to standard output, what the user's code prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, NamedTuple

from async_batcher._formats import InputError, Job, Setup, open_input
from async_batcher._interrupts import ignored_signals
from async_batcher._journal import Header
from async_batcher._mapping import MapError, Mapping
from async_batcher._output import Direct, Files, files_of
from async_batcher._partial import OutputError
from async_batcher._progress import is_terminal
from async_batcher._scan import is_regular, scan
from async_batcher._target import TargetError, load_target
from async_batcher.batcher import batched
from async_batcher.loops import loop_factory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from async_batcher._formats import Format
    from async_batcher._scan import Scan

# Items in a batch: enough that the trip to a worker counts for little beside items of 0.1 ms and more, and little enough that
# a run of some thousand items keeps every worker busy to its end.
DEFAULT_BATCH_SIZE = 64
DEFAULT_QUEUE_TIME = 0.01  # seconds, as the library's

STREAM = "-"  # names standard input, or output
_STDIN = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_STDOUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


class Settings(NamedTuple):
    """What the user asks for.

    Attributes:
        target: The function; see `load_target`.
        input: A file or a directory; ``-``: standard input.
        output: A file; ``-``: standard output.
        format: What an item is.
        each: Whether the function takes one item.
        workers: Processes.
        max_batch_size: As for `AsyncBatcher`, and so are the next two.
        max_queue_time: Seconds.
        timeout: Seconds that a batch may run; None: as long as it likes.
        isolate: Whether a bad item fails alone; otherwise the first failure ends the run.
        errors: Where failures are written; None: to standard error.
        unordered: Whether results are written as they come.
        resume: Whether to go on after what an interrupted run has finished.
        restart: Whether to throw that away.
        loop: As for `async_batcher.run`.
    """

    target: str
    input: str
    output: str
    format: Format
    each: bool
    workers: int
    max_batch_size: int
    max_queue_time: float
    timeout: float | None
    isolate: bool
    errors: str | None
    unordered: bool
    resume: bool
    restart: bool
    loop: Literal["auto", "asyncio", "uvloop"]


def map_items(settings: Settings) -> int:
    """Do it.

    Returns:
        The exit status: 1 where items have failed, 128 and its number after a signal.

    Raises:
        MapError: It cannot be done, or has failed.
        BrokenPipeError: Nobody reads standard output any more.
        KeyboardInterrupt: Ctrl-C before anything was begun.
    """
    ignored = ignored_signals()  # before any code of the user's may change that
    if settings.input in _STDIN:
        settings = settings._replace(input=STREAM)
    if settings.output in _STDOUT:
        settings = settings._replace(output=STREAM)
    try:
        _check(settings)
        with contextlib.ExitStack() as stack:
            output = _open_output(settings, stack)
            return _map_to(output, settings, ignored)
    except OutputError as exc:
        raise MapError(str(exc), status=exc.status) from exc
    except (InputError, TargetError) as exc:
        raise MapError(str(exc)) from exc


def _map_to(output: Files | Direct, settings: Settings, ignored: frozenset[int]) -> int:
    target = load_target(settings.target)
    scanned = _scan(settings, output)
    if isinstance(output, Files):
        digest = "" if scanned is None else scanned.digest
        header = Header(digest, target.name, settings.format, settings.each, settings.unordered)
        if settings.resume:
            output.resume(header)
        else:
            output.begin(header, overwrites=settings.restart)
    batcher = batched(
        Job(target, settings.format, each=settings.each),
        executor="process",
        max_workers=settings.workers,
        max_batch_size=settings.max_batch_size,
        max_queue_time=settings.max_queue_time,
        batch_timeout=settings.timeout,
        isolate_failures=settings.isolate,
        setup_worker=None if target.setup is None else Setup(target),
    )
    mapping = Mapping(
        batcher,
        open_input(None if settings.input == STREAM else settings.input, settings.format),
        output,
        settings.format,
        total=None if scanned is None else scanned.items,
        is_ordered=not settings.unordered,
        isolates=settings.isolate,
        errors=settings.errors,
        is_shown=not output.is_terminal,
        has_changed=None if scanned is None else scanned.has_changed,
        ignored=ignored,
    )
    return mapping.run(settings.loop)


def _check(settings: Settings) -> None:
    """Refuse what does not fit together, before anything is touched."""
    try:
        objection = _objection(settings)
    except OSError as exc:
        objection = f"{exc.filename!r}: {exc.strerror or exc}"
    if objection is not None:
        raise MapError(objection)
    try:
        loop_factory(settings.loop)
    except ModuleNotFoundError as exc:
        raise MapError(str(exc)) from exc


def _objection(settings: Settings) -> str | None:
    if settings.errors is not None and not settings.isolate:
        return "--errors needs --isolate: without it the first failure ends the run"
    if settings.errors is not None and _is_stream(settings.errors):
        return f"--errors needs a file, not {settings.errors!r}; left out, it is standard error"
    if settings.resume and settings.restart:
        return "--resume goes on, and --restart begins anew: give only one of them"
    if (settings.resume or settings.restart) and _is_stream(settings.output):
        return f"--{'resume' if settings.resume else 'restart'} needs -o OUTPUT, a file"
    if settings.resume and settings.input == STREAM:
        return "--resume needs INPUT, a file or a directory: standard input cannot be read again"
    if settings.input == STREAM and sys.stdin is None:
        return "standard input is closed; name an INPUT"
    if settings.output == STREAM and sys.stdout is None:
        return "standard output is closed; name an OUTPUT"
    if settings.input != STREAM and not Path(settings.input).exists():
        return f"there is no file {settings.input!r}"
    if settings.resume and not is_regular(settings.input):
        return f"--resume needs an INPUT that can be read again; {settings.input!r} is no regular file"
    places = [name for name in (settings.output, settings.errors) if name is not None and not _is_stream(name)]
    written = [path for name in places for path in files_of(name, has_journal=name is settings.output)]
    for path in written:
        if written.count(path) > 1:
            return f"results and errors would both be written to {str(path)!r}; name other files"
    source = Path(os.path.realpath(settings.input))
    for path in written if settings.input != STREAM else ():
        if path == source:
            return f"{settings.input!r} is the input, and would be written to; name other files"
        if source.is_dir() and source in path.parents:
            return f"{str(path)!r} would be in the input directory; write somewhere else"
    return None


def _is_stream(path: str) -> bool:
    """Whether it is standard output, or what cannot be replaced by a file: /dev/null, a named pipe, an open descriptor."""
    if path == STREAM or re.match(r"/dev/(fd/|std)|/proc/[^/]+/fd/", path):
        return True
    return Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir()


def _open_output(settings: Settings, stack: contextlib.ExitStack) -> Files | Direct:
    """Where results go; it is closed with the stack.

    Raises:
        MapError: There is a run's work there, and the user has not said what is to become of it.
    """
    if _is_stream(settings.output):
        if settings.output == STREAM:
            file = stack.enter_context(_taken_stdout())
        else:
            file = stack.enter_context(_device(settings.output))
        direct = Direct(file, "standard output" if settings.output == STREAM else settings.output, settings.errors)
        stack.callback(direct.close)
        return direct
    files = Files(settings.output, settings.errors)
    stack.callback(files.close)
    if not (settings.resume or settings.restart) and (objection := files.objection) is not None:
        raise MapError(objection)
    return files


@contextlib.contextmanager
def _device(path: str) -> Iterator[IO[bytes]]:
    try:
        file = Path(path).open("ab", buffering=0)  # noqa: SIM115 - an error here is another than one in the block
    except OSError as exc:
        msg = f"{path!r} cannot be written: {exc.strerror or exc}"
        raise MapError(msg) from exc
    with file:
        yield file


@contextlib.contextmanager
def _taken_stdout() -> Iterator[IO[bytes]]:
    """Standard output for the results alone: what else is printed meanwhile, in a worker too, goes to standard error."""
    sys.stdout.flush()
    mine = os.dup(1)
    with os.fdopen(mine, "wb", buffering=0) as file:
        try:
            os.dup2(2, 1)
        except OSError:  # there is no standard error
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
        try:
            yield file
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os.dup2(mine, 1)


def _scan(settings: Settings, output: Files | Direct) -> Scan | None:
    """Look at the whole input first, where it can be read twice and that is of use."""
    if settings.input == STREAM or not is_regular(settings.input):
        return None
    is_of_use = isinstance(output, Files) or (is_terminal() and not output.is_terminal)
    return scan(settings.input, settings.format) if is_of_use else None
