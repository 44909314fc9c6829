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

    Attributes:
        key: Names the program, once that is sealed.
        blob: Its pickle; None: it has yet to be sealed.
    """

    def __init__(self, program: Program, *, out_of_band: bool = False) -> None:
        self.codec = Codec(out_of_band=out_of_band)
        self._program = program
        self._lock = threading.Lock()
        self._error: SerializationError | None = None
        self.key = b""
        self.blob: Blob | None = None

    def seal(self) -> tuple[bytes, Blob]:
        """Pickle the program, if that has not been done.

        Returns:
            The key under which workers keep it, and its pickle.

        Raises:
            SerializationError: It cannot be pickled; the same again at every call.
        """
        if self.blob is not None:
            return self.key, self.blob
        with self._lock:
            if self._error is not None:  # afresh: an exception that is raised again and again collects tracebacks
                raise SerializationError(str(self._error)) from self._error.__cause__
            if self.blob is None:
                program = self._program
                try:
                    blob = self.codec.dumps((program.function, program.by_keyword, program.setup), define=True)
                except BaseException as exc:
                    if _is_interrupt(exc):
                        raise
                    error = unpicklable("process_batch", program.function, exc)
                    if program.setup is not None and "process_batch (" in str(error):
                        error = unpicklable("setup_worker", program.setup, exc)
                    self._error = error
                    raise error from exc
                # Each batcher has its own copy in a worker, however alike: functions may keep state.
                self.key = os.urandom(16)
                self.blob = blob  # last: who sees it sees the key too
            return self.key, self.blob


class Crossing:
    """One batch as it crosses, and what comes back.

    Args:
        cargo: The program as it is sent.
        batch: The items; None to get ready only.

    Attributes:
        key: Names the program.
        outcome: What came of the batch, if that is known before the trip: when not one item can be sent.
        definitions: The classes of the items, for a worker that lacks one.
        items: What is sent of the batch: as one, or item by item where that fails.
    """

    __slots__ = ("_batch", "_cargo", "_failures", "_with_program", "definitions", "items", "key", "outcome")

    def __init__(self, cargo: Cargo, batch: list[Any] | None) -> None:
        self._cargo = cargo
        self._batch = batch
        self.items: Blob | list[Blob] | None = None
        self._failures: dict[int, BaseException] | None = None  # items that could not be pickled
        self.outcome: Outcome | None = None
        self._with_program = False
        self.definitions: list[Blob] | None = None
        if cargo.blob is None:
            try:
                cargo.seal()
            except SerializationError as exc:
                self.outcome = exc
        self.key = cargo.key
        if batch is not None and self.outcome is None:
            try:
                self.items = cargo.codec.dumps(batch)
            except BaseException as exc:
                if _is_interrupt(exc):
                    raise
                self._pack_one_by_one(batch)

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
        return (self.key, self._cargo.blob if with_program else None, self.definitions, self.items)

    def answers(self, blob: Blob) -> Outcome:
        """What came of the batch: the answers to what could be sent, as a list."""
        try:
            return self._merged(self._cargo.codec.loads(blob))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it came from the reply
            return unreadable("results", error)

    def read(self, reply: Any) -> Outcome | None:
        """What came of the batch.

        Returns:
            None when the worker lacks something, which has now been packed: submit the batch again.
        """
        if self.outcome is not None:
            return self.outcome
        codec = self._cargo.codec
        match reply:
            case ("done", tuple(blob)):
                return self.answers(blob)
            case ("need", True, _) if not self._with_program:
                self._with_program = True
                return None
            case ("need", _, True) if self.definitions is None:
                self.definitions = codec.definitions()
                return None
            case ("unreadable", _) if isinstance(self.items, tuple) and self._batch is not None:
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

    def _pack_one_by_one(self, batch: list[Any]) -> None:
        items: list[Blob] = []
        failures: dict[int, BaseException] = {}
        for index, item in enumerate(batch):
            try:
                items.append(self._cargo.codec.dumps(item))
            except BaseException as exc:
                if _is_interrupt(exc):
                    raise
                failures[index] = unpicklable("the item", item, exc)
        self.items = items
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
        batch, failures = self._batch, self._failures
        if batch is None or (failures is None and len(answers) == len(batch)):
            return answers
        failures = failures or {}
        sent = len(batch) - len(failures)
        if len(answers) != sent:
            return BatchError(f"the worker's reply has {len(answers)} answers for {sent} items")
        return merge(answers, failures)


def _is_interrupt(exc: BaseException) -> bool:
    """Whether it is the program's own Ctrl-C, which comes in the main thread, whatever that does; else it is user code's."""
    return isinstance(exc, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


def _unreadable(what: str, failure: Failure) -> SerializationError:
    return unreadable(what, RemoteTraceback(failure[3]), f"{failure[1]}: {failure[2]}")
