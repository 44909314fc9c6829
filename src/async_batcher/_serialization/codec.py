"""How objects travel between processes: as pickles, and as classes that a worker cannot import.

::

    caller's side                                             worker's side
    Codec.dumps(object) --> Payload ------------------------> Codec.loads(payload)
        plain pickle if possible, else `pickler.py`

    class of __main__ --> reference (its id) ---------------> known: that class; else
    Codec.definitions() --> each such class, by value ------> UnknownClassError, and the worker asks
                                                              for the definitions
    that class again  <-- reference (its id) <--------------- an instance among the results

Rules:

- What an importable module holds travels by reference, as in pickle. A function behind a decorator
  that keeps it as ``__wrapped__`` travels as a reference to that.
- The other side creates a class that travels by value once, under an id. cloudpickle by itself
  redefines its methods and resets its attributes each time that the class arrives.
"""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

from async_batcher._serialization.by_value import (
    REGISTRY,
    Namespace,
    Registry,
    SentValue,
    SentVersion,
)
from async_batcher._serialization.object_path import registered_modules
from async_batcher._serialization.out_of_band import (
    MIN_BUFFER_SIZE,
    BufferPickler,
    buffer_collector,
)
from async_batcher._serialization.pickler import Trace, ValuePickler
from async_batcher._serialization.unpickler import Receiver, ValueUnpickler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_batcher._transport.framing import Buffer

# Whether the codec's own unpickler is needed, the pickle, and its out-of-band buffers.
Payload: TypeAlias = "tuple[bool, Buffer, Sequence[Any]]"

_MAIN = b"_main__"  # in a pickle that refers to one of `MAIN_MODULES`


class Codec:
    """Pickles objects for the other side, and unpickles what comes from there.

    Args:
        worker: Whether this is the worker's side. It sends definitions of its own classes each
            time; the caller's side sends definitions when the worker asks for them.
        out_of_band: Whether large buffers (arrays, bytes) travel beside the pickles, uncopied.
        runs_main: Whether workers have run the program's main module, as those of a standard pool
            have, so that a reference to what it holds will do.
        registry: What this process has sent by value and received.
    """

    def __init__(
        self,
        *,
        worker: bool = False,
        out_of_band: bool = False,
        runs_main: bool = False,
        registry: Registry = REGISTRY,
    ) -> None:
        self.out_of_band = out_of_band
        self.runs_main = runs_main
        self.is_worker = worker
        self.registry = registry
        self._receiver = Receiver(registry, keep_classes=worker)
        self._pickler = BufferPickler(out_of_band=out_of_band)
        self._definitions: WeakKeyDictionary[type, tuple[int, Payload]] = WeakKeyDictionary()
        self._first_versions: WeakKeyDictionary[Namespace, dict[str, int]] = WeakKeyDictionary()

    def dumps(self, value: Any, *, define: bool = False) -> Payload:
        """Pickle a value, plainly if that will do; see `dumps_checked` for ``define``.

        A plain pickle trusts that the modules of what it refers to can be imported.
        """
        if not registered_modules:
            try:
                data, buffers = self._pickler.dumps(value)
            except Exception:  # noqa: BLE001, S110 - cloudpickle may do it, or says better why not
                pass
            else:
                modules = self.registry.by_value_modules
                if (self.runs_main or _MAIN not in data) and not (
                    modules and any(name in data for name in modules)
                ):  # it refers to nothing that travels by value
                    is_small = len(data) < MIN_BUFFER_SIZE
                    return (False, data, buffers) if is_small else self.payload(data, buffers)
        return self.dumps_checked(value, define=define)[0]

    def dumps_checked(
        self, value: Any, *, define: bool = False, version: int = 0
    ) -> tuple[Payload, Trace]:
        """Pickle what no other process can import by value; return what was taken by value, too.

        ``define`` sends definitions, of that version, of classes that travel by value, rather than
        references.
        """
        file = io.BytesIO()
        buffers, callback = buffer_collector(out_of_band=self.out_of_band)
        pickler = ValuePickler(file, self, define=define, version=version, buffer_callback=callback)
        pickler.dump(value)
        if not self.is_worker:
            self.registry.note_by_value(pickler.trace.modules)
        return self.payload(file.getvalue(), buffers, needs_codec=True), pickler.trace

    def payload(
        self, data: bytes, buffers: list[pickle.PickleBuffer], *, needs_codec: bool = False
    ) -> Payload:
        is_large = self.out_of_band and len(data) >= MIN_BUFFER_SIZE
        return (needs_codec, pickle.PickleBuffer(data) if is_large else data, buffers)

    def loads(self, payload: Payload) -> Any:
        """Unpickle a value; raise `UnknownClassError` if the definition of a class is not here."""
        needs_codec, data, buffers = payload
        if not needs_codec:
            return pickle.loads(data, buffers=buffers)  # noqa: S301 - of this program
        return ValueUnpickler(io.BytesIO(data), self._receiver, buffers).load()

    def record_sent(
        self, namespace: Namespace, name: str, value: Any
    ) -> tuple[SentValue, SentVersion]:
        """Record that a global is about to be sent."""
        with self.registry.lock:  # two threads must not give one version to two objects
            sent = namespace.record_sent(name, value)
            first = self._first_versions.setdefault(namespace, {}).setdefault(name, sent.version)
        return sent, (sent.version, sent.version > first)

    def definitions(self) -> list[Payload]:
        """Return the classes that were sent as references and still exist, by value."""
        with self.registry.lock:  # another thread may be pickling
            return [payload for _, payload in self._definitions.values()]

    def send_by_reference(self, cls: type, class_id: str) -> int | None:
        """Return the version of a class's definition, and pickle that; None: send no reference.

        The version grows when a global that its methods use is bound to another object.
        """
        if self.is_worker:
            return None if class_id.startswith(self.registry.prefix) else 0
        version, trace = self.registry.sent_versions.get(cls, (-1, None))
        definition = self._definitions.get(cls)
        if trace is None or not trace.is_current():
            definition, version = None, version + 1
        if definition is None or definition[0] != version:
            payload, trace = self.dumps_checked(cls, define=True, version=version)
            with self.registry.lock:
                self._definitions[cls] = version, payload
                self.registry.sent_versions[cls] = version, trace
        return version
