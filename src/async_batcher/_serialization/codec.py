"""How objects travel between processes: the bytes, and what happens to classes on the way.

::

    caller's side                                                    worker's side
    Codec.dumps(object) --> Payload ------------------------------>  Codec.loads(payload)
        plain pickle if possible, else `pickler.py`

    class of __main__ --> reference (its id) --------------------->  known: that class;  not known: UnknownClassError,
    Codec.definitions() --> each class referred to, by value ----->  and the worker asks for the definitions

    that class again  <-- reference (its id) <---------------------  an instance among the results

Rules:

- What an importable module holds travels by reference, as in pickle; a function behind a decorator that keeps it as
  ``__wrapped__`` travels as a reference to that.
- A class that travels by value is made once on the other side, under an id, and never again: cloudpickle by itself redefines
  methods and resets attributes each time that the class arrives, also on its way back.
"""

from __future__ import annotations

import io
import pickle
import weakref
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import cloudpickle

from async_batcher._serialization import tensors
from async_batcher._serialization.by_value import REGISTRY, Registry
from async_batcher._serialization.out_of_band import MIN_BUFFER_SIZE, OutOfBandPickler, buffer_collector
from async_batcher._serialization.pickler import Trace, ValuePickler
from async_batcher._serialization.unpickler import Receiver, ValueUnpickler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from async_batcher._transport.framing import Buffer

P = TypeVar("P", bound=ValuePickler)

# Whether the codec's own unpickler is needed, the pickle, and the large buffers that are not in it.
Payload: TypeAlias = "tuple[bool, Buffer, Sequence[Any]]"

_PROTOCOL = 5
_MAIN = b"_main__"  # in a pickle that refers to one of `MAIN_MODULES`


class Codec:
    """Pickles for one pair of sides.

    Args:
        worker: Whether this is the worker's side. It sends the definition of a class of its own along each time; the caller's
            side sends definitions when asked.
        out_of_band: Whether large buffers (arrays, bytes) may travel beside the pickles, uncopied; the channel must know how.
        runs_main: Whether workers have run the program's main module, as those of a standard pool have, so that what it holds
            can be sent as a reference.
        registry: What has been sent by value and received.

    Attributes:
        out_of_band: See above.
        runs_main: See above.
    """

    def __init__(
        self, *, worker: bool = False, out_of_band: bool = False, runs_main: bool = False, registry: Registry = REGISTRY
    ) -> None:
        self._worker = worker
        self.out_of_band = out_of_band
        self.runs_main = runs_main
        self._registry = registry
        self._receiver = Receiver(registry, keeps=worker)
        self._packer = OutOfBandPickler()
        self._definitions: weakref.WeakKeyDictionary[type, tuple[int, Payload]] = weakref.WeakKeyDictionary()

    def dumps(self, value: Any, *, define: bool = False) -> Payload:
        """Pickle ``value``; a plain pickle where that will do.

        A plain pickle trusts that the modules of what it refers to can be imported; see `dumps_checked`.

        Args:
            value: Any object.
            define: See `dumps_checked`.

        Raises:
            Exception: What pickling raised.
        """
        if not cloudpickle.list_registry_pickle_by_value():
            try:
                data, beside = self._packer.dumps(value) if self.out_of_band else (tensors.dumps(value), [])
            except Exception:  # noqa: BLE001, S110 - cloudpickle may do it, or says better why not
                pass
            else:
                if self._is_plain(data):
                    return (
                        (False, data, beside) if len(data) < MIN_BUFFER_SIZE else self.blob(own=False, data=data, beside=beside)
                    )
        return self.dumps_checked(value, define=define)[0]

    def dumps_checked(self, value: Any, *, define: bool = False, age: int = 0) -> tuple[Payload, Trace]:
        """Pickle ``value``; what no other process can import by value.

        Args:
            value: Any object.
            define: Send classes that travel by value whole, rather than as references.
            age: Of such a definition; see `_refers`.

        Returns:
            The pickle, and what was taken by value.

        Raises:
            Exception: What pickling raised.
        """
        file = io.BytesIO()
        beside, aside = buffer_collector() if self.out_of_band else ([], None)
        pickler = self.pickler(ValuePickler, file, define=define, aside=aside, age=age)
        pickler.dump(value)
        if not self._worker:
            self._registry.note_by_value(pickler.trace.modules)
        return self.blob(own=True, data=file.getvalue(), beside=beside), pickler.trace

    def pickler(
        self,
        kind: type[P],
        file: io.BytesIO,
        *,
        define: bool = False,
        aside: Callable[[pickle.PickleBuffer], bool] | None = None,
        age: int = 0,
    ) -> P:
        """Make a pickler of that type, which knows what the other side has."""
        refers = _never if define else self._refers
        return kind(file, self._registry, refers=refers, replies=self._worker, aside=aside, age=age)

    def blob(self, *, own: bool, data: bytes, beside: list[pickle.PickleBuffer]) -> Payload:
        """A pickle and its buffers, as they travel."""
        return (own, pickle.PickleBuffer(data) if self.out_of_band and len(data) >= MIN_BUFFER_SIZE else data, beside)

    def loads(self, blob: Payload) -> Any:
        """The object again.

        Raises:
            UnknownClassError: It refers to a class whose definition is not here.
            Exception: Whatever unpickling raised.
        """
        own, data, beside = blob
        if not own:
            return pickle.loads(data, buffers=beside)  # noqa: S301 - from this program's own worker or caller
        try:
            return ValueUnpickler(io.BytesIO(data), self._receiver, beside).load()
        finally:
            self._receiver.give_up()

    def definitions(self) -> list[Payload]:
        """Every class that was referred to so far and still lives, by value; each is pickled once."""
        return [blob for _, blob in self._definitions.values()]

    def _is_plain(self, data: bytes) -> bool:
        """Tell whether a pickle refers to nothing that travels by value."""
        if _MAIN in data and not self.runs_main:
            return False
        return not self._registry.by_value_modules or not any(name in data for name in self._registry.by_value_modules)

    def _refers(self, cls: type, name: str) -> int | None:
        """Tell whether the other side knows the class of that id, or may ask for it; see to it that it can.

        Returns:
            The age of its definition, which grows when a global that its methods use has been bound anew.
        """
        if self._worker:
            return None if name.startswith(self._registry.prefix) else 0
        age, trace = self._registry.sent_ages.get(cls, (-1, None))
        definition = self._definitions.get(cls)
        if trace is None or not trace.is_current():
            definition, age = None, age + 1
        if definition is None or definition[0] != age:
            blob, trace = self.dumps_checked(cls, define=True, age=age)
            self._definitions[cls] = age, blob
            self._registry.sent_ages[cls] = age, trace
        return age


def _never(cls: type, name: str) -> None:
    """See `ValuePickler`: no class is known on the other side."""
