"""A batch that runs in another process or interpreter: what is sent, and what the replies mean.

Imported in the thread that first pickles, since it brings cloudpickle along.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from async_batcher._outcome import Outcome, merge
from async_batcher._wire import Blob, Codec, Failure, RemoteTraceback, decode_exception, unpicklable, unreadable
from async_batcher._worker import Job
from async_batcher.exceptions import BatchError, SerializationError

if TYPE_CHECKING:
    from async_batcher._program import Program


class Cargo:
    """The program as it is sent to workers: pickled once.

    Args:
        program: The user's function and its set-up.
        out_of_band: Whether large buffers may travel beside the pickles; see `Codec`.
    """

    def __init__(self, program: Program, *, out_of_band: bool = False) -> None:
        self.codec = Codec(out_of_band=out_of_band)
        self._program = program
        self._lock = threading.Lock()
        self._blob: Blob | None = None
        self._error: SerializationError | None = None
        self.key = b""  # once sealed: names the program

    def seal(self) -> tuple[bytes, Blob]:
        """The key under which workers keep the program, and its pickle.

        Raises:
            SerializationError: It cannot be pickled; the same again at every call.
        """
        if self._blob is not None:
            return self.key, self._blob
        with self._lock:
            if self._error is not None:  # afresh: an exception that is raised again and again collects tracebacks
                raise SerializationError(str(self._error)) from self._error.__cause__
            if self._blob is None:
                program = self._program
                try:
                    blob = self.codec.dumps((program.function, program.by_keyword, program.setup), define=True)
                except BaseException as exc:
                    error = unpicklable("process_batch", program.function, exc)
                    if program.setup is not None and "process_batch (" in str(error):
                        error = unpicklable("setup_worker", program.setup, exc)
                    self._error = error
                    raise error from exc
                # Each batcher has its own copy in a worker, however alike: functions may keep state.
                self.key = os.urandom(16)
                self._blob = blob  # last: who sees it sees the key too
            return self.key, self._blob


class Crossing:
    """One batch as it crosses, and what comes back.

    Args:
        cargo: The program as it is sent.
        batch: The items; None to get ready only.

    Attributes:
        key: Names the program.
        outcome: What came of the batch, if that is known before the trip: when not one item can be sent.
    """

    __slots__ = ("_batch", "_cargo", "_definitions", "_failures", "_items", "_program", "_with_program", "key", "outcome")

    def __init__(self, cargo: Cargo, batch: list[Any] | None) -> None:
        self._cargo = cargo
        self._batch = batch
        self._items: Blob | list[Blob] | None = None
        self._failures: dict[int, BaseException] | None = None  # items that could not be pickled
        self.outcome: Outcome | None = None
        self._with_program = False
        self._definitions: list[Blob] | None = None
        self.key = b""
        try:
            self.key, self._program = cargo.seal()
            if batch is not None:
                self._pack(batch)
        except SerializationError as exc:
            self.outcome = exc

    def job(self) -> Job:
        """What crosses; an empty job where nothing can, since some executors never recover from a pickling that fails."""
        if self.outcome is not None:
            return Job(b"", None, None, None)
        return Job(*self.message(with_program=self._with_program))

    def message(self, *, with_program: bool) -> tuple[Any, ...]:
        """What `_worker.perform` is called with.

        Args:
            with_program: Whether the worker has yet to load the program.
        """
        return (self.key, self._program if with_program else None, self._definitions, self._items)

    def read(self, reply: Any) -> Outcome | None:
        """What came of the batch.

        Returns:
            None when the worker lacks something, which has now been packed: submit the batch again.
        """
        if self.outcome is not None:
            return self.outcome
        codec = self._cargo.codec
        match reply:
            case ("done", tuple(blob)):  # as nearly always
                try:
                    return self._merged(codec.loads(blob))
                except BaseException as error:  # noqa: BLE001 - whatever it is, it came from the reply
                    return unreadable("results", error)
            case ("need", True, _) if not self._with_program:
                self._with_program = True
                return None
            case ("need", _, True) if self._definitions is None:
                self._definitions = codec.definitions()
                return None
            case ("unreadable", _) if isinstance(self._items, tuple) and self._batch is not None:
                self._pack_one_by_one(self._batch)
                return self.outcome
            case ("unloadable" | "unreadable" as what, failure):
                return _unreadable("function" if what == "unloadable" else "item", failure)
            case ("raised", failure):
                exc = decode_exception(codec, failure)
                if self._failures is None or self._batch is None:
                    return exc
                return self._merged([exc] * (len(self._batch) - len(self._failures)))
            case ("ready",):
                return []
            case ("done", list(answers)):
                return self._merged([self._answer(kind, content) for kind, content in answers])
        msg = f"the executor gave back {type(reply).__name__} {reply!r:.80} instead of the reply of its worker"
        return BatchError(msg)

    def _pack(self, batch: list[Any]) -> None:
        try:
            self._items = self._cargo.codec.dumps(batch)
        except BaseException:  # noqa: BLE001 - user code
            self._pack_one_by_one(batch)

    def _pack_one_by_one(self, batch: list[Any]) -> None:
        items: list[Blob] = []
        failures: dict[int, BaseException] = {}
        for index, item in enumerate(batch):
            try:
                items.append(self._cargo.codec.dumps(item))
            except BaseException as exc:  # noqa: BLE001 - user code
                failures[index] = unpicklable("the item", item, exc)
        self._items = items
        self._failures = failures or None
        if not items:
            self.outcome = self._merged([])

    def _answer(self, kind: str, content: Any) -> Any:
        if kind == "raised":
            return decode_exception(self._cargo.codec, content)
        if kind == "unreadable":
            return _unreadable("item", content)
        try:
            return self._cargo.codec.loads(content)
        except BaseException as exc:  # noqa: BLE001 - user code
            return unreadable("result", exc)

    def _merged(self, answers: list[Any]) -> Outcome:
        failures = self._failures
        sent = 0 if self._batch is None else len(self._batch) - (0 if failures is None else len(failures))
        if len(answers) != sent and self._batch is not None:
            return BatchError(f"the worker's reply has {len(answers)} answers for {sent} items")
        return answers if failures is None else merge(answers, failures)


def _unreadable(what: str, failure: Failure) -> SerializationError:
    return unreadable(what, RemoteTraceback(failure[3]), f"{failure[1]}: {failure[2]}")
