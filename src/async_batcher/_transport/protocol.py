"""What the parent, a worker and the fork server say to each other, and how it is encoded.

::

    parent                                                            worker
    encode_batch --------> body of RUN ------------> decode_batch --> run_batch.run_batch
    WorkItem.decode_reply <-- loads <-- body of REPLY <-- encode_reply <--'
    WorkItem.pass_on <---- loads <-- body of RESULT <-- encode_reply <-- what a generator yields

Rules:

- Most often a batch is one pickle there and one back, which is the body itself (`PICKLE`,
  `CODEC_PICKLE`). Anything more (a function, definitions, a failure) is an `ENVELOPE`: a pickle of
  builtins around the user's pickles.
- The kind of a reply travels as a plain int: a member of an enum takes several times as long to
  pickle.
"""

from __future__ import annotations

import pickle
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypedDict

from async_batcher._serialization.out_of_band import buffer_collector

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from async_batcher._serialization.codec import Payload
    from async_batcher._transport.framing import Buffer

KEY_SIZE = 16  # bytes of a function's key
FAMILY_SIZE = 8  # of them that stay when it is pickled again under another key
# Functions that a worker keeps loaded. Beyond it, the worker drops the one that was called longest
# ago. Only a pool that many batchers share comes near it.
MAX_CACHED_FUNCTIONS = 64

# The exit status of a worker whose own code has raised; EX_SOFTWARE of sysexits.h.
EXIT_INTERNAL_ERROR = 70


class MessageKind(IntEnum):
    """The kinds of messages between the parent and a worker."""

    # From the parent.
    INIT = 1  # a `WorkerSettings`
    RUN = 2  # a batch: seq, key, blocks
    ADD_BLOCK = 3  # a new block, with its descriptor: block_id, its size
    FREE_BLOCK = 4  # block_id; from the worker: it could not receive that
    STOP = 5
    TRACKER = 6  # the descriptor of the parent's resource tracker
    TEAR_DOWN = 7  # drop the function of a key, and run its tear-down: seq, key
    # From both sides: a worker asks for a block of a size; the parent replies with block_id, or 0.
    NEED_BLOCK = 8
    # From the worker.
    READY = 9
    INIT_FAILED = 10  # the initializer raised: a `PickledException`
    BEGUN = 11  # the function of a batch has been loaded and set up, and the batch begins: seq
    REPLY = 12  # to a RUN or TEAR_DOWN: seq, block_id
    BLOCKS_IN_USE = 13  # before a reply: the ids of the blocks that user code still views
    # From the parent.
    RUN_AHEAD = 14  # as RUN, while another batch runs; see `token_pipe`
    # From the worker.
    RESULT = 15  # the next result of a batch that yields them: seq; else as a REPLY with one result


# What a body is. The numbers of the first two are what a `Payload` says: whether it needs the
# codec's unpickler.
PICKLE: Final = 0  # the pickle of a `Payload` that plain pickle reads
CODEC_PICKLE: Final = 1  # the pickle of a `Payload` that the codec's unpickler reads
ENVELOPE: Final = 2  # a pickle of builtins


class ReplyKind(IntEnum):
    """What became of a batch. The content of each reply follows its kind in a tuple."""

    NEED_FUNCTION = 1  # send the batch again, with its function
    NEED_DEFINITIONS = 2  # send the batch again, with the definitions of its classes
    FUNCTION_ERROR = 3  # PickledException: the function could not be unpickled
    ITEMS_ERROR = 4  # PickledException: the items, or this item, could not be unpickled
    # PickledException: the set-up, the batch or this item raised; and if other items of the batch
    # have a result of their own, for each item as after DONE_EACH, or None.
    RAISED = 5
    READY = 6  # a call without items: the function is loaded and set up
    TORN_DOWN = 7  # the function has been dropped
    DONE = 8  # Payload: the list of results, or the result of this item
    DONE_EACH = 9  # for each item a tuple of DONE, RAISED or ITEMS_ERROR with its content
    KEY_ERROR = 10  # PickledException: the key of the batch could not be unpickled
    # The batch before raised `Later`, or the callers were cancelled during the set-up.
    NOT_STARTED = 11


Reply: TypeAlias = tuple[Any, ...]
# A `current.BatchFacts` whose key is a `Payload`, or None.
SentFacts: TypeAlias = "tuple[Payload | None, int, float | None, float | None]"
_DONE: Final = int(ReplyKind.DONE)


class WorkerSettings(TypedDict):
    """What a worker needs to get ready; the body of INIT.

    ``initializer`` is the pickle of the function and its arguments, ``threads`` a number for
    `bootstrap.limit_threads`, ``inherited`` of `inherited.read_inherited`. ``parent`` is the name
    and the id of the program's process, ``start_method`` what the program has set, or None.
    """

    number: int | None
    folder: str
    path: list[str]
    argv: list[str]
    threads: int
    inherited: dict[str, Any]
    parent: tuple[str, int]
    authkey: bytes
    start_method: str | None
    initializer: Payload | None


# The modules that a fork server imports, and what it needs for that.
Preload: TypeAlias = tuple[tuple[str, ...], WorkerSettings]

# The form of a body, the body, and the large buffers beside it.
Content: TypeAlias = "tuple[int, bytes, list[memoryview]]"


def encode_batch(
    function: Payload | None,
    definitions: list[Payload] | None,
    items: Payload | list[Payload] | None,
    facts: SentFacts | None = None,
) -> Content:
    """Encode what `run_batch.run_batch` is called with; ``facts`` travel if there are any."""
    if function is None and definitions is None and facts is None and type(items) is tuple:
        needs_codec, data, buffers = items
        if type(data) is bytes:  # else the pickle itself travels as a buffer
            return int(needs_codec), data, [buffer.raw() for buffer in buffers] if buffers else []
    parts = (function, definitions, items)
    return ENVELOPE, *dumps(parts if facts is None else (*parts, facts))


def decode_batch(form: int, body: Buffer, buffers: Sequence[Any]) -> tuple[Any, ...]:
    """Return the function, the definitions and the items of a batch, and its facts if any."""
    if form != ENVELOPE:
        return None, None, (form == CODEC_PICKLE, body, buffers)
    return loads(body, buffers)  # type: ignore[no-any-return]


def encode_reply(reply: Reply) -> Content:
    """Encode a reply. The parent reads a body of another form than `ENVELOPE` as that of DONE."""
    if reply[0] == _DONE:
        needs_codec, data, buffers = reply[1]
        if type(data) is bytes:
            return int(needs_codec), data, [buffer.raw() for buffer in buffers] if buffers else []
    return ENVELOPE, *dumps((int(reply[0]), *reply[1:]))


def dumps(parts: Any) -> tuple[bytes, list[memoryview]]:
    """Pickle builtins, and return the large buffers in them apart."""
    buffers, callback = buffer_collector()
    return pickle.dumps(parts, 5, buffer_callback=callback), [buffer.raw() for buffer in buffers]


def loads(body: Buffer, buffers: Sequence[Any] = ()) -> Any:
    """Unpickle builtins, whose large buffers are ``buffers``."""
    return pickle.loads(body, buffers=buffers)  # noqa: S301 - from this program's worker or parent


class ForkServerEvent(IntEnum):
    """What the fork server tells its parent: a pickled tuple of the kind and its content."""

    SERVING = 1  # it takes requests
    STARTED = 2  # number of the request, process id
    START_FAILED = 3  # number of the request, arguments of an OSError
    EXITED = 4  # process id, exit code
    PRELOADING = 5  # the name of a module that it begins to import
    PRELOAD_FAILED = 6  # the name of a module, a `PickledException`


FORK_REQUEST = struct.Struct("=Q")  # the number; a worker's descriptors come along
_EVENT_MARK = b"\xabfs\x01"
_EVENT_HEADER = struct.Struct("=4sI")  # the mark, and bytes of the event that follows


def encode_event(kind: ForkServerEvent, *content: Any) -> bytes:
    data = pickle.dumps((int(kind), *content), 5)
    return _EVENT_HEADER.pack(_EVENT_MARK, len(data)) + data


def take_events(data: bytearray) -> Iterator[tuple[Any, ...]]:
    """Take the events off ``data`` that are complete.

    Raises:
        ConnectionError: There is something else.
    """
    while data:
        if not data.startswith(_EVENT_MARK[: len(data)]):
            msg = (
                f"something else than messages came from the fork server ({bytes(data[:40])!r}). "
                "Likely cause: a module of preload writes to a file descriptor that is not its own"
            )
            raise ConnectionError(msg)
        if len(data) < _EVENT_HEADER.size:
            return
        _, length = _EVENT_HEADER.unpack_from(data)
        end = _EVENT_HEADER.size + length
        if len(data) < end:
            return
        event = loads(data[_EVENT_HEADER.size : end])
        del data[:end]
        yield event
