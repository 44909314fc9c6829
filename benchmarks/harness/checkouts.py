"""The source of a commit in a temporary folder, and programs that run against it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.machine import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import NoReturn

WORKING_TREE = "."
RUN_TIMEOUT = 120.0  # seconds for one program


class CheckoutError(Exception):
    """A revision does not exist, or has no source."""


@contextlib.contextmanager
def checked_out(revisions: Sequence[str]) -> Iterator[list[Path]]:
    """Copy the source of each revision into a temporary folder, and delete it at the end.

    SIGTERM raises `SystemExit` meanwhile, so that the folder is deleted then too.

    Args:
        revisions: What git understands, or ``"."`` for the working tree.

    Yields:
        The ``src`` folder of each revision.

    Raises:
        CheckoutError: A revision does not exist, or has no source.
    """

    def exit_on_signal(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
            sources = []
            for number, revision in enumerate(revisions):
                folder = Path(temporary, str(number))
                folder.mkdir()
                _copy_source(revision, folder)
                sources.append(folder / "src")
            yield sources
    finally:
        signal.signal(signal.SIGTERM, previous)


def _copy_source(revision: str, folder: Path) -> None:
    if revision == WORKING_TREE:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "src", folder / "src", ignore=ignored)
        return
    if revision.startswith("-"):
        msg = f"not a revision: {revision!r}"
        raise CheckoutError(msg)
    command = ["git", "archive", "--format=tar", revision, "src"]
    finished = subprocess.run(  # noqa: S603 - our own command
        command, cwd=ROOT, capture_output=True, check=False
    )
    if finished.returncode:
        msg = f"git archive {revision}: {finished.stderr.decode().strip()}"
        raise CheckoutError(msg)
    with tarfile.open(fileobj=io.BytesIO(finished.stdout)) as archive:
        archive.extractall(folder, filter="data")


def run_against(source: Path, *program: str) -> str:
    """Run a program in a new process that imports the package from ``source``.

    Args:
        source: The ``src`` folder. `check_source` finds it as the first of ``PYTHONPATH``.
        *program: The arguments of Python. The program can import `benchmarks`.

    Returns:
        What the program prints.

    Raises:
        RuntimeError: The program has failed, with the end of its standard error, or hangs.
    """
    try:
        with tempfile.TemporaryDirectory() as current_folder:
            finished = subprocess.run(  # noqa: S603 - our own program
                [sys.executable, *program],
                cwd=current_folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(ROOT)])},
                capture_output=True,
                text=True,
                timeout=RUN_TIMEOUT,
                check=False,
            )
    except subprocess.TimeoutExpired as exc:
        msg = f"{' '.join(program)} has not ended after {RUN_TIMEOUT:.0f} s with {source}"
        raise RuntimeError(msg) from exc
    if finished.returncode:
        last = "\n".join(finished.stderr.strip().splitlines()[-10:])
        msg = f"{' '.join(program)} failed with {source}:\n{last}"
        raise RuntimeError(msg)
    return finished.stdout


def check_source() -> None:
    """Check in such a program that the package is the one in question.

    Raises:
        RuntimeError: Another copy of the package is in its way.
    """
    import async_batcher

    source = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
    found = Path(async_batcher.__file__).resolve()
    if not found.is_relative_to(source.resolve()):
        msg = f"async_batcher is imported from {found.parent}, not from {source}"
        raise RuntimeError(msg)
