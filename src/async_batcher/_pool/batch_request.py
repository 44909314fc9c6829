"""A batch that runs in another process or interpreter: what is sent, and what the replies mean.

Imported in the thread that first pickles, since it brings cloudpickle along.
"""

from __future__ import annotations

import os
import threading
from types import FunctionType
from typing import TYPE_CHECKING, Any

from async_batcher._serialization.codec import Codec, Payload
from async_batcher._serialization.diagnostics import pickling_error, unpickling_error
from async_batcher._serialization.pickler import Call, undecorated_path, unwrap
from async_batcher._serialization.remote_exception import PickledException, decode_exception, describe_failure, type_name
from async_batcher._worker.results import Outcome, insert_failures
from async_batcher._worker.run_batch import RemoteCall, SlotSetup
from async_batcher.exceptions import BatchError, SerializationError

if TYPE_CHECKING:
    from async_batcher._serialization.pickler import Trace
    from async_batcher._worker.user_function import UserFunction

# What a worker's unpickler raises for a name that its main module lacks.
_LOOKUP_ERRORS = frozenset({"builtins.AttributeError", "builtins.ImportError", "builtins.ModuleNotFoundError"})


class PickledFunction:
    """The program as it is sent to workers: pickled once.

    Args:
        program: The user's function and its set-up.
        out_of_band: Whether large buffers may travel beside the pickles; see `Codec`.
        runs_main: Whether workers have run the main module; see `Codec`. Then what the module holds is sent as a reference, so
            that the function sees the globals that an initializer has bound there, and by value only if a worker lacks it.
        what: What an error calls the function.
        workers: Where set-ups must not count for a batch although only the time of its trip is known: how many workers there
            are, each of which is set up by a trip of its own. 0: the program travels with a batch.

    Attributes:
        has_setup: Whether there is a set-up.
        workers: See above.
        is_somewhere: Whether a worker has been set up by a trip of its own.
        key: Names the program, once that is sealed.
        payload: Its pickle; None: it has yet to be sealed.
    """

    def __init__(
        self,
        program: UserFunction,
        *,
        out_of_band: bool = False,
        runs_main: bool = False,
        what: str = "process_batch",
        workers: int = 0,
    ) -> None:
        self.has_setup = program.setup is not None
        self.workers = workers if self.has_setup else 0
        self.is_somewhere = False
        self.codec = Codec(out_of_band=out_of_band, runs_main=runs_main)
        self._program = program
        self._what = what
        self._lock = threading.Lock()
        self._error: SerializationError | None = None
        self._trace: Trace | None = None
        self.key = b""
        self.payload: Payload | None = None

    @property
    def name(self) -> str:
        """The function's name, for errors."""
        return str(getattr(self._function, "__qualname__", None) or type(self._function).__qualname__)

    @property
    def _function(self) -> Any:
        """The user's function, without what calls it in a worker."""
        return getattr(self._program.function, "function", self._program.function)

    def is_current(self) -> bool:
        """Tell whether every global that the pickle holds is still bound to the object that was sent."""
        return self._trace is None or self._trace.is_current()

    def send_by_value(self, key: bytes) -> None:
        """Pickle the program by value: a worker lacks what it refers to in the main module.

        Args:
            key: The program that the worker could not load.

        Raises:
            SerializationError: It cannot be pickled by value.
        """
        with self._lock:
            if self.key == key:
                self.codec.runs_main = False
                self.payload = None
        self.pickle()

    def pickle(self) -> tuple[bytes, Payload]:
        """Pickle the program, if that has not been done.

        Returns:
            The key under which workers keep it, and its pickle.

        Raises:
            SerializationError: It cannot be pickled; the same again at every call.
        """
        if self.payload is not None:
            return self.key, self.payload
        with self._lock:
            if self._error is not None:  # afresh: an exception that is raised again and again collects tracebacks
                raise SerializationError(str(self._error)) from self._error.__cause__
            if self.payload is None:
                program = self._program
                codec, runs_main = self.codec, self.codec.runs_main
                try:
                    if runs_main:
                        place = undecorated_path(program.function) if type(program.function) is FunctionType else None
                        function = program.function if place is None else Call(unwrap, *place)
                        blob = codec.dumps(_parts_of(program, function, runs_main=True), define=True)
                    else:
                        content = _parts_of(program, program.function, runs_main=False)
                        blob, self._trace = codec.dumps_checked(content, define=True)
                except BaseException as exc:
                    if _is_interrupt(exc):
                        raise
                    error = pickling_error(self._what, self._function, exc)
                    if program.setup is not None and f"{self._what} (" in str(error):
                        error = pickling_error("setup_worker", program.setup, exc)
                    self._error = error
                    raise error from exc
                # Each batcher has its own copy in a worker, however alike: functions may keep state.
                self.key = os.urandom(16)
                self.payload = blob  # last: who sees it sees the key too
            return self.key, self.payload


class BatchRequest:
    """One batch as it crosses, and what comes back.

    Args:
        cargo: The program as it is sent.
        batch: The items; None to get ready only.

    Attributes:
        function: See above.
        key: Names the program.
        outcome: What came of the batch, if that is known before the trip: when not one item can be sent.
        definitions: The classes of the items, for a worker that lacks one.
        items: What is sent of the batch: as one, or item by item where that fails.
    """

    __slots__ = (
        "_batch", "_failures", "_is_checked", "_preparations", "_with_program", "definitions",
        "function", "items", "key", "outcome",
    )  # fmt: skip

    def __init__(self, cargo: PickledFunction, batch: list[Any] | None) -> None:
        self.function = cargo
        self._batch = batch
        self.items: Payload | list[Payload] | None = None
        self._failures: dict[int, BaseException] | None = None  # items that could not be pickled
        self.outcome: Outcome | None = None
        self._with_program = cargo.workers > 0 and not cargo.is_somewhere
        self._is_checked = False
        self._preparations = cargo.workers  # trips that may yet go to set up a worker
        self.definitions: list[Payload] | None = None
        if cargo.payload is None:
            try:
                cargo.pickle()
            except SerializationError as exc:
                self.outcome = exc
        self.key = cargo.key
        if batch is not None and self.outcome is None:
            try:
                self.items = cargo.codec.dumps(batch)
            except BaseException as exc:
                if _is_interrupt(exc):
                    raise
                self._pickle_items(batch)

    def job(self) -> RemoteCall:
        """What crosses; an empty job where nothing can, since some executors never recover from a pickling that fails."""
        if self.outcome is not None:
            return RemoteCall(b"", None, None, None)
        return RemoteCall(*self.message(with_program=self._with_program))

    def message(self, *, with_program: bool) -> tuple[Any, ...]:
        """What `run_batch.run_batch` is called with.

        Args:
            with_program: Whether the worker has yet to load the program.
        """
        program = self.function.payload if with_program else None
        return (self.key, program, self.definitions, None if with_program and self._preparations else self.items)

    @property
    def carries_items(self) -> bool:
        """Whether the next trip is that of the batch, and not one that sets up a worker for it."""
        return not (self._with_program and self._preparations)

    def decode_results(self, blob: Payload) -> Outcome:
        """What came of the batch: the answers to what could be sent, as a list."""
        try:
            return self._with_failures(self.function.codec.loads(blob))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it came from the reply
            return unpickling_error("results", error)

    def decode_reply(self, reply: Any) -> Outcome | None:
        """What came of the batch.

        Returns:
            None when the worker lacks something, which has now been packed: submit the batch again.
        """
        if self.outcome is not None:
            return self.outcome
        codec = self.function.codec
        match reply:
            case ("done", tuple(blob)):
                return self.decode_results(blob)
            case ("need", True, _) if not self._with_program:  # it may come again from another worker
                self._with_program = True
                return None
            case ("need", _, True) if self.definitions is None:
                self.definitions = codec.definitions()
                return None
            case ("unloadable" | "unreadable", failure) if codec.runs_main and type_name(failure) in _LOOKUP_ERRORS:
                return self._send_by_value()
            case ("unreadable", _) if isinstance(self.items, tuple) and self._batch is not None:
                if not self._check(self._batch):
                    self._pickle_items(self._batch)
                return self.outcome
            case ("unloadable", failure):
                return _unreadable(f"function {self.function.name!r}", failure)
            case ("unreadable", failure):
                return _unreadable("item", failure)
            case ("raised", failure):
                exc = decode_exception(codec, failure)
                if self._failures is None or self._batch is None:
                    return exc
                return self._with_failures([exc] * (len(self._batch) - len(self._failures)))
            case ("ready",) if self._with_program and self._batch is not None:
                self.function.is_somewhere, self._with_program = True, False
                self._preparations -= 1
                return None
            case ("ready",):
                return []
            case ("done", list(answers)):
                return self._with_failures([self._answer(kind, content) for kind, content in answers])
        msg = f"the executor gave back {type(reply).__name__} {reply!r:.80} instead of the reply of its worker"
        return BatchError(msg)

    def _send_by_value(self) -> Outcome | None:
        """Pickle all anew: a worker has run another main module than this one, or none."""
        self.function.codec.runs_main = False
        try:
            self.function.send_by_value(self.key)
            self.key, self._with_program = self.function.key, True
            if self._batch is not None:
                self.items = self.function.codec.dumps(self._batch)
        except BaseException as exc:
            if _is_interrupt(exc):
                raise
            self.outcome = exc if isinstance(exc, SerializationError) else pickling_error("the batch", self._batch, exc)
        return self.outcome

    def _check(self, batch: list[Any]) -> bool:
        """Pickle the items by value as far as no worker can import them; tell whether that makes a difference."""
        if self._is_checked:
            return False
        self._is_checked = True
        try:
            blob, trace = self.function.codec.dumps_checked(batch)
        except Exception:  # noqa: BLE001 - one by one they say why
            return False
        if trace.modules and blob != self.items:
            self.items = blob
            return True
        return False

    def _pickle_items(self, batch: list[Any]) -> None:
        items: list[Payload] = []
        failures: dict[int, BaseException] = {}
        for index, item in enumerate(batch):
            try:
                items.append(self.function.codec.dumps(item))
            except BaseException as exc:
                if _is_interrupt(exc):
                    raise
                failures[index] = pickling_error("the item", item, exc)
        self.items = items
        self._failures = failures or None
        if not items:
            self.outcome = self._with_failures([])

    def _answer(self, kind: str, content: Any) -> Any:
        if kind == "raised":
            return decode_exception(self.function.codec, content)
        if kind == "unreadable":
            return _unreadable("item", content)
        try:
            return self.function.codec.loads(content)
        except BaseException as exc:  # noqa: BLE001 - user code
            return unpickling_error("result", exc)

    def _with_failures(self, answers: list[Any]) -> Outcome:
        batch, failures = self._batch, self._failures
        if batch is None or (failures is None and len(answers) == len(batch)):
            return answers
        failures = failures or {}
        sent = len(batch) - len(failures)
        if len(answers) != sent:
            return BatchError(f"the worker's reply has {len(answers)} answers for {sent} items")
        return insert_failures(answers, failures)


def _parts_of(program: UserFunction, function: Any, *, runs_main: bool) -> dict[str, Any]:
    """What is pickled of a program; the set-up comes first, since it runs before the function's module is imported."""
    parts: dict[str, Any] = {} if program.setup is None else {"setup": SlotSetup(program.setup)}
    return {**parts, "function": function, "by_keyword": program.by_keyword, "runs_main": runs_main}


def _is_interrupt(exc: BaseException) -> bool:
    """Whether it is the program's own Ctrl-C, which comes in the main thread, whatever that does; else it is user code's."""
    return isinstance(exc, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


def _unreadable(what: str, failure: PickledException) -> SerializationError:
    return unpickling_error(what, *describe_failure(failure))
