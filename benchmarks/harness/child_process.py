"""The process of a library on one event loop: started once, it runs rounds on request.

The other end is `benchmarks.libraries.serve`: one line of JSON each way.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Any, cast

from benchmarks.harness.machine import ROOT
from benchmarks.harness.venvs import has_own_venv, python_for
from benchmarks.libraries.base import NotAvailableError
from benchmarks.libraries.names import ADAPTERS

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_EXIT_TIMEOUT = 10.0  # seconds from the end of its input
_REPLY_TIMEOUT = 120.0  # seconds; after that it counts as hanging


class LibraryProcess:
    """One library on one loop.

    Args:
        library: A key of `ADAPTERS`.
        loop: ``"asyncio"`` or ``"uvloop"``.

    Attributes:
        facts: Versions of the library, of Python and of the loop, as the process reports them.

    Raises:
        NotAvailableError: The library cannot run here.
    """

    def __init__(self, library: str, loop: str) -> None:
        self.library = library
        python = [str(python_for(library, loop))]
        if has_own_venv(library):
            # A PYTHONPATH with this project's source would hide 0.2.2, which has the same name.
            python.append("-E")
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [*python, "-u", "-m", ADAPTERS[library], loop],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._requests = cast("IO[str]", self._process.stdin)
        self._replies = cast("IO[str]", self._process.stdout)
        self.facts: dict[str, str] = {}
        try:
            self.facts = self._read_reply()
        except BaseException:
            self.close()
            raise

    def run_round(self, scenario: str, load: dict[str, Any]) -> dict[str, float]:
        """Run one round.

        Returns:
            The measures by name, in seconds and counts.

        Raises:
            NotAvailableError: The library cannot run the scenario; the message says why.
            RuntimeError: A result is wrong, or the round failed.
        """
        try:
            self._requests.write(json.dumps({"scenario": scenario, **load}) + "\n")
            self._requests.flush()
        except OSError as exc:
            raise RuntimeError(self._exited()) from exc
        return self._read_reply()

    @property
    def has_exited(self) -> bool:
        """Whether the process has exited."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        try:
            self._process.wait(_EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()

    def _read_reply(self) -> dict[str, Any]:
        # The process writes one line per request, so no line is left in the reader's buffer here.
        if sys.platform != "win32":
            ready, _, _ = select.select([self._replies], [], [], _REPLY_TIMEOUT)
            if not ready:
                os.killpg(self._process.pid, signal.SIGKILL)  # with all its children
                self._process.wait()
                msg = f"{self.library} has not replied for {_REPLY_TIMEOUT:.0f} s"
                raise RuntimeError(msg)
        line = self._replies.readline()
        if not line:
            raise RuntimeError(self._exited())
        try:
            reply: dict[str, Any] = json.loads(line)
        except ValueError as exc:
            msg = f"{self.library} has sent a line that is not a reply"
            raise RuntimeError(msg) from exc
        if "unavailable" in reply:
            raise NotAvailableError(reply["unavailable"])
        if "failed" in reply:
            msg = f"{self.library}: {reply['failed']}"
            raise RuntimeError(msg)
        return reply

    def _exited(self) -> str:
        return f"{self.library} has exited with status {self._process.wait()}"


class LibraryProcesses:
    """The processes of all libraries, each started when it is first needed."""

    def __init__(self) -> None:
        self._processes: dict[tuple[str, str], LibraryProcess | NotAvailableError] = {}

    def get(self, library: str, loop: str) -> LibraryProcess:
        """Return the process of a library on a loop; start another one if it has exited.

        Raises:
            NotAvailableError: The library cannot run here.
        """
        process = self._processes.get((library, loop))
        if isinstance(process, LibraryProcess) and process.has_exited:
            process.close()
            process = None
        if process is None:
            try:
                process = LibraryProcess(library, loop)
            except NotAvailableError as exc:
                process = exc
            self._processes[library, loop] = process
        if isinstance(process, NotAvailableError):
            raise process
        return process

    def __enter__(self) -> Self:
        """Start no process yet."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End all processes."""
        for process in self._processes.values():
            if isinstance(process, LibraryProcess):
                process.close()
