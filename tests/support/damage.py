"""Damaged bytes for tests: cut, repeated, changed, and with others in between."""

from __future__ import annotations

from hypothesis import strategies as st

_MAX_LENGTH = 300  # bytes that one change concerns

_changes = st.lists(
    st.tuples(
        st.sampled_from(["cut", "drop", "repeat", "change", "insert"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=_MAX_LENGTH),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for the same bytes with one to three changes."""
    return _changes.map(lambda changes: _damage(content, changes))


def with_one_byte_changed(content: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for the same bytes, one of which is another one."""
    changes = st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=1))
    return changes.map(lambda change: _damage(content, [("change", *change)]))


def _damage(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, number, other in changes:
        place = number % (len(content) + 1)
        end = place + len(other)
        match kind:
            case "cut":
                content = content[:place]
            case "drop":
                content = content[:place] + content[end:]
            case "repeat":
                content = content[:end] + content[place:]
            case "change":
                used = [index for index, byte in enumerate(content) if byte] or [0]
                place = used[number % len(used)]  # files of databases are mostly zeros
                content = content[:place] + other[:1] + content[place + 1 :]
            case _:
                content = content[:place] + other + content[place:]
    return content


def common_prefix(one: bytes, other: bytes) -> int:
    """Return how many of the first bytes are equal."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
