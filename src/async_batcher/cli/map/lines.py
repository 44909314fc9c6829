"""The lines that a run writes for its items.

=================================  ===============================================================
result, without ``--records``      the result
result, with ``--records``         ``{"line": 3, "result": ...}``
failure, with ``--records``        ``{"line": 3, "error": ..., "traceback": ...}``
failure, in the errors file        ``{"line": 3, "item": ..., "error": ..., "traceback": ...}``
=================================  ===============================================================

With ``--format files`` a record has ``"path"`` after ``"line"``. Of a directory, ``"line"`` is the
number of the file.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from async_batcher.cli._worker_function import ItemFailure, decode, encode

if TYPE_CHECKING:
    from async_batcher.cli._items import Format, Item


def result_record(item: Item, result: bytes, form: Format) -> bytes:
    """Return the record of an item that has an encoded result."""
    return b'{%b, "result": %b}\n' % (_keys(item, form), result)


def failure_record(item: Item, failure: ItemFailure, form: Format) -> bytes:
    """Return the record of an item that failed."""
    return b"{%b, %b\n" % (_keys(item, form), _encode_object(failure._asdict())[1:])


def error_line(item: Item, failure: ItemFailure, form: Format) -> bytes:
    """Return the line of an item that failed, for the errors file."""
    line_number, raw = item
    text = os.fsdecode(raw) if form == "files" else raw.decode(errors="replace")
    value = text if form == "files" else decode(raw, form)
    described = encode({"line": line_number, "item": value, **failure._asdict()})
    if isinstance(value, ItemFailure) or isinstance(described, ItemFailure):  # not JSON, or NaN
        described = _encode_object({"line": line_number, "item": text, **failure._asdict()})
    return described + b"\n"


def _keys(item: Item, form: Format) -> bytes:
    """Return the members of a record that name the item."""
    line = b'"line": %d' % item[0]
    if form != "files":
        return line
    return b"%b, %b" % (line, _encode_object({"path": os.fsdecode(item[1])})[1:-1])


def _encode_object(value: dict[str, Any]) -> bytes:
    """Encode text and numbers."""
    encoded = encode(value)
    assert isinstance(encoded, bytes)  # noqa: S101 - text and numbers are JSON
    return encoded
