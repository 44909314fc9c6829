"""Shared memory without a name: copies, views, and which blocks are in use."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_batcher._transport import shared_memory
from async_batcher._transport.shared_memory import (
    SharedBlock,
    allocate,
    block_size,
    bytes_needed,
    create_anonymous,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no descriptors to pass")

MB = 1 << 20


def make(need: int) -> SharedBlock:
    """Return a block for that many bytes."""
    size = block_size(need)
    return SharedBlock(create_anonymous(size), size)


def other_side(block: SharedBlock) -> SharedBlock:
    """Return the same memory as another process has it: by its own descriptor and mapping."""
    return SharedBlock(os.dup(block.fd), block.size)


@settings(max_examples=40)
@given(
    st.lists(
        st.sampled_from([0, 1, 63, 64, 65, 4096, 65_535, MB - 1, MB, MB + 1]),
        min_size=1,
        max_size=6,
    )
)
def test_written_buffers_are_read_back(sizes: list[int]) -> None:
    """As copies and as views; every buffer is aligned for any vector instruction."""
    buffers = [memoryview(bytes([i + 1]) * size) for i, size in enumerate(sizes)]
    need = bytes_needed(sizes)
    if not need:
        return
    block = make(need)
    block.write(buffers)
    assert os.fstat(block.fd).st_size == block_size(need), "it fits"
    assert [bytes(copy) for copy in block.read(sizes)] == [bytes(buffer) for buffer in buffers]
    assert block.read(sizes, as_bytes=True) == [bytes(buffer) for buffer in buffers]
    mapping = other_side(block)
    views = mapping.views(sizes)
    assert [bytes(view) for view in views] == [bytes(buffer) for buffer in buffers]
    places = [ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in views if view]
    assert not any(place % 64 for place in places)
    del views
    mapping.close()
    block.close()


@pytest.mark.parametrize("kind", ["bytearray", "bytes", "part of bytes", "read-only"])
def test_a_long_copy_lets_other_threads_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C code copies without the GIL; without an address, the copy sleeps after each megabyte."""
    size = 3 * MB + 5
    content = os.urandom(size)
    source = {
        "bytearray": memoryview(bytearray(content)),
        "bytes": memoryview(content),
        "part of bytes": memoryview(b"more" + content)[4:],
        "read-only": memoryview(bytearray(content)).toreadonly(),
    }[kind]
    without_gil: list[int] = []
    rests: list[float] = []
    memmove = ctypes.memmove

    def copy(target: int, source: int, count: int) -> int:
        without_gil.append(count)
        return memmove(target, source, count)

    monkeypatch.setattr(ctypes, "memmove", copy)
    monkeypatch.setattr("time.sleep", rests.append)
    monkeypatch.setattr(shared_memory, "_has_gil", lambda: True)
    block = make(size)
    block.write([source])
    has_address = kind in ("bytearray", "bytes")
    assert (without_gil, len(rests)) == (([size], 0) if has_address else ([], 4))
    assert bytes(block.read([size])[0]) == content
    assert without_gil[-1] == size
    rests.clear()
    assert block.read([size], as_bytes=True) == [content]
    assert len(rests) == 4
    rests.clear()
    monkeypatch.setattr(shared_memory, "_has_gil", lambda: False)
    assert block.read([size], as_bytes=True) == [content]
    assert rests == []
    block.close()


def test_views_are_the_block_itself() -> None:
    """A read sees what was written through a view; copies are independent."""
    block = make(8192)
    block.write([memoryview(bytearray(b"a" * 8192))])
    mapping = other_side(block)
    (copy,) = block.read([8192])
    (view,) = mapping.views([8192])
    assert not view.readonly
    view[:3] = b"xyz"
    assert bytes(block.read([8192])[0][:4]) == b"xyza"
    assert bytes(copy[:3]) == b"aaa"
    copy[:3] = b"ccc"
    assert bytes(view[:3]) == b"xyz"
    del view
    mapping.close()
    block.close()


def test_a_block_knows_whether_it_has_views() -> None:
    """A view, a view of a view, a read-only view, or an array keeps a block in use."""
    numpy = pytest.importorskip("numpy")
    mapping = make(8192)
    assert mapping.has_no_views()
    holders: list[Any] = [
        lambda views: views,
        lambda views: views[0],
        lambda views: views[1][10:20],
        lambda views: views[1].toreadonly(),
        lambda views: memoryview(views[0]),
        lambda views: numpy.frombuffer(views[1], dtype="u1"),
        lambda views: numpy.frombuffer(views[1], dtype="f8")[5:7].reshape(1, 2),
        lambda views: numpy.frombuffer(views[1].toreadonly(), dtype="u1"),
    ]
    for hold in holders:
        held = hold(mapping.views([100, 4000]))
        assert not mapping.has_no_views()
        del held
        assert mapping.has_no_views()
    mapping.close()


def test_a_view_outlives_its_block() -> None:
    """The views that user code holds stay valid when the block is closed."""
    mapping = make(8192)
    mapping.write([memoryview(b"q" * 8192)])
    (view,) = mapping.views([8192])
    mapping.close()
    del mapping
    assert bytes(view) == b"q" * 8192


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="a file cannot be sealed")
def test_memory_cannot_be_truncated() -> None:
    """No holder can shrink it, which would kill the other holders on their next access."""
    block = make(8192)
    with pytest.raises(PermissionError):
        os.ftruncate(block.fd, 100)
    block.close()


def test_block_sizes() -> None:
    """A block is at least as large as needed, whole pages, and not much larger."""
    for need in (1, 4096, 65_536, 10 * MB + 1):
        size = block_size(need)
        assert need <= size <= need * 1.25 + 4096
        assert size % 4096 == 0


def test_allocated_memory_is_writable_and_zero() -> None:
    """For small and large sizes."""
    for size in (0, 1, 4 * MB - 1, 4 * MB, 4 * MB + 1):
        with memoryview(allocate(size)) as view:
            assert len(view) == size
            assert not view.readonly
            assert not any(view[:100])


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="nothing reserves space here")
def test_memory_that_cannot_be_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making a block reserves it: an OSError then, not a SIGBUS later, and nothing is left."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        create_anonymous(MB)


def test_shared_memory_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even without memfd_create: the file is unlinked at birth, and is in no folder."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    block = make(8192)
    assert os.fstat(block.fd).st_nlink == 0
    block.write([memoryview(b"x" * 5000)])
    assert bytes(block.read([5000])[0]) == b"x" * 5000
    block.close()


def test_closing_a_block_closes_its_descriptor() -> None:
    """Even if it has had views."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("no way to count them")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        mapping = make(MB)
        mapping.views([10])
        mapping.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
