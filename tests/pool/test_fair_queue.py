"""`FairQueue`, against a model and by example."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from async_batcher._pool.state.fair_queue import FairQueue

CLIENTS = st.sampled_from(["a", "b", "c", None])


class FairQueueMachine(RuleBasedStateMachine):
    """Nothing is lost or doubled, each client's order is kept, and clients are served in turn.

    The model is a list of clients, the next one first, each with its queued values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[int] = FairQueue()
        self.model: list[tuple[str | None, list[int]]] = []
        self.out: list[tuple[str | None, int]] = []  # values that were taken out
        self.made = 0

    def _values(self, client: str | None) -> list[int] | None:
        return next((values for name, values in self.model if name == client), None)

    @rule(client=CLIENTS)
    def put(self, client: str | None) -> None:
        """Add a value at the end of its client's queue; a new client comes last."""
        self.made += 1
        self.queue.put(client, self.made)
        values = self._values(client)
        if values is None:
            self.model.append((client, [self.made]))
        else:
            values.append(self.made)

    @precondition(lambda self: self.model)
    @rule()
    def get(self) -> None:
        """Take the first value of the first client, which then comes last."""
        client, values = self.model.pop(0)
        value = values.pop(0)
        assert self.queue.get() == value
        self.out.append((client, value))
        if values:
            self.model.append((client, values))

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def put_front(self, data: st.DataObject) -> None:
        """Put a value back that was taken out: it comes before everything else."""
        client, value = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.queue.put_front(client, value)
        rest = self._values(client) or []
        others = [entry for entry in self.model if entry[0] != client]
        self.model = [(client, [value, *rest]), *others]

    @rule(client=CLIENTS, data=st.data())
    def remove(self, client: str | None, data: st.DataObject) -> None:
        """Remove a value that is queued, or try to remove one that is not."""
        values = self._values(client)
        queued = sorted(values or [])
        value = data.draw(st.sampled_from([*queued, 0]))
        assert self.queue.remove(client, value) == (value in queued)
        if values is not None and value in values:
            values.remove(value)
            self.model = [entry for entry in self.model if entry[1]]

    @rule()
    def clear(self) -> None:
        """Take out everything, client by client."""
        assert self.queue.clear() == [value for _, values in self.model for value in values]
        self.model = []

    @precondition(lambda self: not self.model)
    @rule()
    def get_from_an_empty_queue(self) -> None:
        """Raise LookupError."""
        with pytest.raises(LookupError):
            self.queue.get()

    @invariant()
    def content_and_order_match_the_model(self) -> None:
        """The queue holds the values of the model, in its order."""
        assert list(self.queue) == [value for _, values in self.model for value in values]
        assert len(self.queue) == sum(len(values) for _, values in self.model)
        assert bool(self.queue) == bool(self.model)


TestFairQueue = FairQueueMachine.TestCase
TestFairQueue.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_client_with_many_values_delays_others_by_one() -> None:
    """Clients with a thousand values and with a few are served in turn."""
    queue: FairQueue[str] = FairQueue()
    for i in range(1000):
        queue.put("many", f"m{i}")
    for i in range(3):
        queue.put("few", f"f{i}")
    queue.put("one", "o0")
    assert [queue.get() for _ in range(9)] == ["m0", "f0", "o0", "m1", "f1", "m2", "f2", "m3", "m4"]


def test_a_client_that_puts_again_gets_its_share() -> None:
    """A client that always puts the next value when one is taken gets no more than its share."""
    queue: FairQueue[str] = FairQueue()
    for client in "ab":
        queue.put(client, client)
    served = []
    for _ in range(10):
        served.append(queue.get())
        queue.put(served[-1], served[-1])
    assert served == ["a", "b"] * 5
