"""The command ``async-batcher map``: check what the user asks for, open its files, and run it.

::

    arguments --> conflicts? --> output opened and locked --> function imported --> fingerprint of
    the input --> `MapRun`

Rules:

- What cannot be done is rejected before anything is written.
- Finished results are thrown away only with ``--restart``.
- If results go to standard output, what user code prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

from async_batcher import batched
from async_batcher.cli._errors import CommandError
from async_batcher.cli._import_string import import_function
from async_batcher.cli._items import STREAM, open_items
from async_batcher.cli._terminal import redirected_stdout, stderr_is_terminal
from async_batcher.cli._worker_function import ItemProcessor, worker_setup
from async_batcher.cli.map.atomic_file import write_error
from async_batcher.cli.map.batch_size import BatchSize
from async_batcher.cli.map.fingerprint import is_rereadable, read_fingerprint
from async_batcher.cli.map.journal import RunHeader
from async_batcher.cli.map.output import ResumableOutput, StreamOutput, files_of
from async_batcher.cli.map.run import MapRun
from async_batcher.failures import isolate

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from async_batcher.cli.map.completed import CompletedRun
    from async_batcher.stats import BatchRecord

Output: TypeAlias = ResumableOutput | StreamOutput

_STDIN = ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_STDOUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def run_command(options: Namespace) -> int:
    """Run ``map``; see `MapRun.run`."""
    options.input = STREAM if options.input in _STDIN else options.input
    options.output = STREAM if options.output in _STDOUT else options.output
    if options.records is None:
        options.records = options.format == "files"
    try:
        conflict = _conflict(options) or _path_conflict(options)
    except OSError as exc:
        conflict = f"{exc.filename!r}: {exc.strerror or exc}"
    if conflict is not None:
        raise CommandError(conflict)
    with contextlib.ExitStack() as stack:
        return _prepare_and_run(_open_output(options, stack), options)


def _prepare_and_run(output: Output, options: Namespace) -> int:
    function = import_function(options.target)
    fingerprint = None
    if options.input != STREAM and is_rereadable(options.input):
        is_shown = stderr_is_terminal() and not output.is_terminal
        if is_shown or isinstance(output, ResumableOutput):
            fingerprint = read_fingerprint(options.input, options.format)
    if isinstance(output, ResumableOutput):
        digest = "" if fingerprint is None else fingerprint.digest
        header = RunHeader(
            digest,
            function.name,
            options.format,
            options.each,
            options.unordered,
            records=options.records,
        )
        if not options.resume:
            output.start(header, overwrites=options.restart)
        elif (completed := output.resume(header)) is not None:
            return _report_completed(completed, options)
    size = BatchSize(options.max_batch_size)

    def follow(record: BatchRecord) -> None:
        size.update(record)
        if batcher.max_batch_size != size.value:
            batcher.max_batch_size = size.value

    batcher = batched(
        ItemProcessor(function, options.format, each=options.each, isolates=options.isolate),
        executor="process",
        max_workers=options.workers,
        max_batch_size=size.value if options.each else options.max_batch_size,
        max_queue_time=options.max_queue_time,
        batch_timeout=options.timeout,
        on_failure=isolate() if options.isolate else None,
        on_batch=follow if options.each else None,
        setup_worker=worker_setup(function),
    )
    items = open_items(options.input, options.format)
    return MapRun(batcher, items, output, options, fingerprint).run()


def _report_completed(run: CompletedRun, options: Namespace) -> int:
    """Say that there is nothing to resume; return the exit status of the run."""
    if sys.stderr is not None:
        text = f"{options.output!r} {run.description}; --restart begins anew"
        print(f"async-batcher: {text}", file=sys.stderr)
    return 1 if run.failed else 0


def _conflict(options: Namespace) -> str | None:
    """Say which arguments do not fit together."""
    if options.errors is not None and not options.isolate:
        return "--errors needs --isolate: without it the first failure ends the run"
    if options.errors is not None and _is_stream(options.errors):
        return f"--errors needs a file, not {options.errors!r}; left out, it is standard error"
    if (options.resume or options.restart) and _is_stream(options.output):
        return f"--{'resume' if options.resume else 'restart'} needs -o OUTPUT, a file"
    if options.resume and options.input == STREAM:
        return "--resume needs INPUT, a file or a directory: standard input cannot be read again"
    if options.input == STREAM and sys.stdin is None:
        return "standard input is closed; name an INPUT"
    if options.output == STREAM and sys.stdout is None:
        return "standard output is closed; name an OUTPUT"
    if options.input != STREAM and not Path(options.input).exists():
        return f"there is no file {options.input!r}"
    if options.resume and not is_rereadable(options.input):
        what = f"{options.input!r} is not a regular file"
        return f"--resume needs an INPUT that can be read again; {what}"
    return None


def _path_conflict(options: Namespace) -> str | None:
    """Say which file would be written to though it is another one."""
    written: list[Path] = []
    for name in (options.output, options.errors):
        if name is not None and not _is_stream(name):
            written += files_of(name, has_journal=name is options.output)
    for path in written:
        if written.count(path) > 1:
            return f"results and errors would both be written to {str(path)!r}; name other files"
    if options.input == STREAM:
        return None
    source = Path(os.path.realpath(options.input))
    for path in written:
        if path == source:
            return f"{options.input!r} is the input, and would be written to; name other files"
        if source.is_dir() and source in path.parents:
            return f"{str(path)!r} would be in the input directory; write somewhere else"
    return None


def _is_stream(path: str) -> bool:
    """Tell what cannot be replaced by a file: standard output, /dev/null, a named pipe."""
    if path == STREAM or re.match(r"/dev/(fd/|std)|/proc/[^/]+/fd/", path):
        return True
    return Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir()


def _open_output(options: Namespace, stack: contextlib.ExitStack) -> Output:
    """Open the output, which is closed with the stack."""
    if _is_stream(options.output):
        is_stdout = options.output == STREAM
        file = stack.enter_context(redirected_stdout() if is_stdout else _device(options.output))
        name = "standard output" if is_stdout else options.output
        stream = StreamOutput(file, name, options.errors)
        stack.callback(stream.close)
        return stream
    output = ResumableOutput(options.output, options.errors)
    stack.callback(output.close)
    if not (options.resume or options.restart) and (conflict := output.conflict) is not None:
        raise CommandError(conflict)
    return output


@contextlib.contextmanager
def _device(path: str) -> Iterator[IO[bytes]]:
    try:
        file = Path(path).open("ab", buffering=0)  # noqa: SIM115 - only this may fail
    except OSError as exc:
        raise write_error(path, exc, status=2) from exc
    with file:
        yield file
