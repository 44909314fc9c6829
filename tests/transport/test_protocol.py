"""What parent and worker say to each other: how batches and replies are encoded."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher._serialization.out_of_band import MIN_BUFFER_SIZE
from async_batcher._transport.protocol import (
    CODEC_PICKLE,
    ENVELOPE,
    PICKLE,
    MessageKind,
    Reply,
    ReplyKind,
    decode_batch,
    dumps,
    encode_batch,
    encode_reply,
    loads,
)

SIZES = st.one_of(
    st.integers(0, 300),
    st.sampled_from([MIN_BUFFER_SIZE - 1, MIN_BUFFER_SIZE, MIN_BUFFER_SIZE + 1, 200_000]),
)
FUNCTION: Any = (True, b"function", [])


def large() -> pickle.PickleBuffer:
    """Return a buffer that travels beside the pickle."""
    return pickle.PickleBuffer(bytearray(MIN_BUFFER_SIZE))


@settings(max_examples=50)
@given(st.lists(st.tuples(SIZES, st.booleans(), st.booleans()), max_size=8))
def test_builtins_come_back_equal(buffers: list[tuple[int, bool, bool]]) -> None:
    """Large buffers travel beside the pickle, small ones in it, and the values are equal."""
    message: tuple[Any, ...] = ("run", 1, [])
    expected: list[bytes] = []
    beside = 0
    for number, (size, is_writable, is_wrapped) in enumerate(buffers):
        data: Any = bytes([number]) * size
        expected.append(data)
        if is_writable:
            data = bytearray(data)
        if is_wrapped:
            beside += size if size >= MIN_BUFFER_SIZE else 0
            data = pickle.PickleBuffer(data)
        message[2].append(data)
    body, views = dumps(message)
    assert sum(len(view) for view in views) == beside
    kind, number, contents = loads(body, [bytearray(view) for view in views])
    assert (kind, number) == ("run", 1)
    assert [bytes(data) for data in contents] == expected


@pytest.mark.parametrize(("own", "form"), [(False, PICKLE), (True, CODEC_PICKLE)])
def test_a_batch_that_is_one_pickle_is_not_pickled_again(own: bool, form: int) -> None:
    """Its pickle is the body itself, and its large buffers follow."""
    content = encode_batch(None, None, (own, b"pickle", [large()]))
    assert content[:2] == (form, b"pickle")
    assert [len(view) for view in content[2]] == [MIN_BUFFER_SIZE]
    assert decode_batch(*content) == (None, None, (own, b"pickle", content[2]))


@pytest.mark.parametrize(
    ("function", "definitions", "items"),
    [
        (FUNCTION, None, (False, b"pickle", [])),
        (FUNCTION, None, None),
        (None, [FUNCTION], (False, b"pickle", [])),
        (None, None, [(False, b"first", []), (True, b"second", [])]),
    ],
    ids=["with the function", "without items", "with definitions", "item by item"],
)
def test_more_than_one_pickle_travels_in_an_envelope(
    function: Any, definitions: Any, items: Any
) -> None:
    """The function, the definitions and the items come out as they were."""
    content = encode_batch(function, definitions, items)
    assert content[0] == ENVELOPE
    assert decode_batch(*content) == (function, definitions, items)


@pytest.mark.parametrize("function", [None, FUNCTION])
@pytest.mark.parametrize("key", [None, (False, b"key", [])])
def test_what_a_batch_knows_travels_in_the_envelope(function: Any, key: Any) -> None:
    """Only if there is anything: other batches are as they were."""
    items: Any = (False, b"pickle", [])
    facts = (key, 2, 1.5, None)
    content = encode_batch(function, None, items, facts)
    assert content[0] == ENVELOPE
    assert decode_batch(*content) == (function, None, items, facts)
    without = encode_batch(function, None, items, None)
    assert without == encode_batch(function, None, items)
    assert len(decode_batch(*without)) == 3


def test_a_pickle_that_is_large_itself_travels_beside_the_envelope() -> None:
    """It is not copied into another pickle."""
    form, body, buffers = encode_batch(None, None, (False, large(), []))
    assert (form, [len(view) for view in buffers]) == (ENVELOPE, [MIN_BUFFER_SIZE])
    assert len(body) < MIN_BUFFER_SIZE
    _, _, (own, data, _) = decode_batch(form, body, buffers)
    assert (own, bytes(data)) == (False, bytes(MIN_BUFFER_SIZE))


@pytest.mark.parametrize("own", [False, True])
def test_results_that_are_one_pickle_are_the_body_of_the_reply(own: bool) -> None:
    """Neither the kind of the reply nor another pickle is around them."""
    content = encode_reply((ReplyKind.DONE, (own, b"pickle", [large()])))
    assert content[:2] == (CODEC_PICKLE if own else PICKLE, b"pickle")
    assert [len(view) for view in content[2]] == [MIN_BUFFER_SIZE]


@pytest.mark.parametrize(
    "reply",
    [
        (ReplyKind.NEED_FUNCTION,),
        (ReplyKind.RAISED, ([], "traceback", 1)),
        (ReplyKind.DONE_EACH, [(int(ReplyKind.DONE), (False, b"pickle", []))]),
    ],
    ids=lambda reply: reply[0].name,
)
def test_other_replies_come_back_equal(reply: Reply) -> None:
    """Their kind is a plain int in the pickle, which names no class of the package."""
    form, body, buffers = encode_reply(reply)
    assert (form, b"async_batcher" in body) == (ENVELOPE, False)
    kind, *content = loads(body, buffers)
    assert (type(kind), kind, content) == (int, reply[0], list(reply[1:]))


def test_every_kind_of_message_fits_its_field() -> None:
    """A frame has one byte for it, and no two kinds share a number."""
    assert sorted(MessageKind) == list(range(1, len(MessageKind) + 1))
    assert max(MessageKind) < 256
