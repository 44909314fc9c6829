"""Shared memory without a name: blocks that the parent owns and leases to one worker.

::

    parent                                                          worker
    SharedBlock(fd, size) --- descriptor, in a message ----------> SharedBlock(fd, size)
    write(buffers) ---------- their sizes -----------------------> views(sizes), without a copy
    read(sizes) <------------ their sizes ------------------------ write(buffers)

Rules:

- Nothing can be left behind: the memory is a descriptor (`memfd_create`, or a file unlinked at
  birth), and is freed with its last holder.
- Space is reserved before it is used, and cannot be taken back. Writing to memory that a full
  system cannot back kills a process with SIGBUS; an `OSError` while reserving it does not.
- A long copy is made without the GIL or, where that is impossible, in pieces between which other
  threads run.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Bytes of large buffers from which they go through shared memory. With 2 workers on 2 cores the
# socket was the faster way up to about here; benchmarks/suites/test_trips.py.
SHM_THRESHOLD = 65_536

_ALIGNMENT = 64  # bytes; a cache line, and enough for any vector instruction
_PAGE = mmap.PAGESIZE
_SHM_DIR = "/dev/shm"  # noqa: S108 - for files that are unlinked at birth, if the system has it

# Bytes from which fresh memory is mapped, untouched. `bytearray` fills it with zeros first, and
# holds the GIL meanwhile (70 ms for 100 MB).
_MIN_MAPPED = 4 << 20

_PIECE = 1 << 20  # bytes copied before other threads may run; about a tenth of a millisecond

# Seconds without the GIL after a piece: as long as a thread that waits for it takes to wake. After
# less, as with a mere yield of the processor, that thread finds the GIL taken again and again, and
# is blocked for as long as all the pieces take; 25 ms for 100 MB.
_GIL_YIELD = 50e-6

_has_gil = getattr(sys, "_is_gil_enabled", lambda: True)  # from Python 3.13

# How systems and sandboxes refuse a call.
_REFUSED = (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP)


def allocate(size: int) -> Any:
    """Return fresh writable memory of this process."""
    if size < _MIN_MAPPED:
        return bytearray(size)
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            # With a page fault for every 4 kB a copy takes three times as long.
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def create_anonymous(size: int) -> int:
    """Return the descriptor of new shared memory.

    Raises:
        OSError: There is not enough memory.
    """
    fd = _memfd() if hasattr(os, "memfd_create") else -1
    if fd != -1:
        return _reserved(fd, size)
    try:
        return _reserved(_unlinked_file(_SHM_DIR), size)
    except OSError as exc:  # the system has no such folder, refuses, or it is full
        if exc.errno == errno.ENOSPC and size >= SHM_THRESHOLD:
            raise  # rather a socket than a disk
        return _reserved(_unlinked_file(None), size)


def _reserved(fd: int, size: int) -> int:
    try:
        _reserve(fd, size)
        if sys.platform == "linux":
            import fcntl

            with contextlib.suppress(OSError):  # a file, or a sandbox
                # User code in a worker cannot truncate it while its parent reads.
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _memfd() -> int:
    try:
        return os.memfd_create("async_batcher", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as exc:
        if exc.errno in _REFUSED:
            return -1
        raise


def _unlinked_file(folder: str | None) -> int:
    import tempfile

    with tempfile.TemporaryFile(dir=folder) as file:
        return os.dup(file.fileno())


def _reserve(fd: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as exc:
            if exc.errno not in _REFUSED:
                raise
        else:
            return
    for offset in range(0, size, _PIECE):
        os.pwrite(fd, bytes(min(_PIECE, size - offset)), offset)


def block_size(need: int) -> int:
    """Return the size of a block for ``need`` bytes, with a quarter to spare for growth."""
    return (need + need // 4 + _PAGE - 1) // _PAGE * _PAGE


def bytes_needed(sizes: Iterable[int]) -> int:
    """Return the bytes that buffers of these sizes take in a block."""
    return sum(map(_aligned, sizes))


class SharedBlock:
    """A block, on either side; owns its descriptor."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        # A finalizer, since a helper thread may be the last that holds the block. Without a GIL it
        # may come late: an object is freed by the thread that made it, when that runs again.
        self._close_fd = weakref.finalize(self, os.close, fd)
        self._close_fd.atexit = False
        self._memory: mmap.mmap | None = None
        self._own_references = 0  # to the memory, while there is no view of it

    def views(self, sizes: Iterable[int]) -> list[memoryview]:
        """Return writable views of buffers of these sizes, one after the other."""
        whole = memoryview(self._mapped())
        views: list[memoryview] = []
        offset = 0
        for size in sizes:
            views.append(whole[offset : offset + size])
            offset += _aligned(size)
        return views

    def write(self, buffers: Sequence[memoryview]) -> None:
        """Copy buffers in."""
        for view, buffer in zip(self.views(map(len, buffers)), buffers, strict=True):
            _copy(view, buffer)

    def read(self, sizes: Iterable[int], *, as_bytes: bool = False) -> list[Any]:
        """Copy buffers out, each into writable memory of its own or as ``bytes``."""
        return [_bytes(view) if as_bytes else _writable(view) for view in self.views(sizes)]

    def contains(self, buffers: Sequence[memoryview], sizes: Sequence[int]) -> bool:
        """Tell whether these buffers are the very memory of the `views` of these sizes."""
        if [len(buffer) for buffer in buffers] != list(sizes):
            return False
        pairs = zip(buffers, self.views(sizes), strict=True)
        return all(_address(buffer) == _address(view) != 0 for buffer, view in pairs)

    def has_no_views(self) -> bool:
        return self._memory is None or self._references() <= self._own_references

    def close(self) -> None:
        """Release it; what user code still holds of it stays valid."""
        self._close_fd()
        if self._memory is not None and self.has_no_views():
            self._memory.close()

    def _mapped(self) -> mmap.mmap:
        if self._memory is None:
            # All pages at once: one by one, page faults cost more than a copy does.
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            self._memory = mmap.mmap(self.fd, self.size, flags)
            self._own_references = self._references()
        return self._memory

    def _references(self) -> int:
        # Every view refers to what it shows, and so does a view or an array made of one. Trying to
        # release our own views would not tell: a read-only view made of one does not count as its
        # user, and an object may keep the view itself.
        # It holds without a GIL, too: only this thread makes views of the memory itself, so the
        # count cannot grow meanwhile; one that another thread has dropped may count for longer.
        return sys.getrefcount(self._memory)


def _copy(target: memoryview, source: memoryview) -> None:
    size = len(source)
    if size <= _PIECE:
        target[:] = source
        return
    to_address, from_address = _address(target), _address(source)
    if to_address and from_address:
        from ctypes import memmove

        memmove(to_address, from_address, size)  # releases the GIL
        return
    for start in range(0, size, _PIECE):
        target[start : start + _PIECE] = source[start : start + _PIECE]
        _let_others_run()


def _writable(source: memoryview) -> Any:
    if len(source) <= _PIECE:
        return bytearray(source)  # not filled with zeros first
    memory = allocate(len(source))
    with memoryview(memory) as target:
        _copy(target, source)
    return memory


def _bytes(source: memoryview) -> bytes:
    if len(source) <= _PIECE:
        return bytes(source)
    with io.BytesIO() as file:
        for start in range(0, len(source), _PIECE):
            file.write(source[start : start + _PIECE])
            _let_others_run()
        return file.getvalue()  # what it holds, not a copy


def _let_others_run() -> None:
    if _has_gil():
        time.sleep(_GIL_YIELD)


def _address(buffer: memoryview) -> int:
    """Return the address of writable memory or of a ``bytes`` object; 0 for other memory."""
    try:
        from ctypes import addressof, c_char, c_char_p, c_void_p, cast

        if buffer.readonly and type(buffer.obj) is bytes and len(buffer) == len(buffer.obj):
            return cast(c_char_p(buffer.obj), c_void_p).value or 0
        return addressof(c_char.from_buffer(buffer))
    except (ImportError, TypeError, ValueError):  # a Python without it; read-only, or empty
        return 0


def _aligned(size: int) -> int:
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
