"""Shared memory without a name: blocks that the parent owns and lends to one worker.

::

    parent                                                          worker
    Block(size) ---- its descriptor, with the first message that uses it ---->  Mapping
    write(buffers) -> places ------------ places ----------------------------> views(places): arrays over the block itself
    read(places) <------------------------ places ---------------------------- write(buffers) into a block lent for results

Rules:

- Nothing can be left behind: the memory is a descriptor (`memfd_create`, or a file unlinked at birth), and goes with its last
  holder.
- Space is reserved before it is used. Writing to memory that a full system cannot back kills a process with SIGBUS; an `OSError`
  while it is reserved does not.
- The parent never maps a block. `os.pwrite` and `os.preadv` let other threads run while they copy; copying through a mapping
  does not.
"""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Places: TypeAlias = "list[tuple[int, int]]"  # offset and size of each buffer in a block, in bytes

_ALIGNMENT = 64  # bytes; a cache line, and enough for any vector instruction
_PAGE = mmap.PAGESIZE

# Bytes from which memory comes from the system untouched: `bytearray` would fill it with zeros first, and hold the GIL meanwhile
# (70 ms for 100 MB).
_LARGE = 1 << 20


def room(size: int) -> Any:
    """Fresh writable memory of that many bytes."""
    return mmap.mmap(-1, size) if size >= _LARGE else bytearray(size)


def nameless(size: int) -> int:
    """The descriptor of new shared memory of that many bytes.

    Raises:
        OSError: There is not so much.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("async_batcher", os.MFD_CLOEXEC)
    else:
        import tempfile

        fd, path = tempfile.mkstemp(prefix="async_batcher-")
        Path(path).unlink()
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        else:
            os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def size_for(need: int) -> int:
    """The size of a block for ``need`` bytes: with a quarter to spare, so that one that grows a little need not be made anew."""
    return (need + need // 4 + _PAGE - 1) // _PAGE * _PAGE


def need_of(buffers: Sequence[memoryview]) -> int:
    """Bytes that the buffers take in a block."""
    return sum(_aligned(len(buffer)) for buffer in buffers)


def write(fd: int, buffers: Iterable[memoryview]) -> Places:
    """Copy buffers into a block; lets other threads run.

    Raises:
        OSError: The system cannot back it.
    """
    places: Places = []
    offset = 0
    for buffer in buffers:
        size = len(buffer)
        done = 0
        while done < size:
            done += os.pwrite(fd, buffer[done:], offset + done)
        places.append((offset, size))
        offset += _aligned(size)
    return places


def read(fd: int, places: Places) -> list[Any]:
    """Copy buffers out of a block, each into memory of its own; lets other threads run."""
    buffers: list[Any] = []
    for offset, size in places:
        buffer = room(size)
        with memoryview(buffer) as view:
            done = 0
            while done < size:
                done += os.preadv(fd, [view[done:]], offset + done)
        buffers.append(buffer)
    return buffers


def _aligned(size: int) -> int:
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


class Mapping:
    """A block as a worker sees it.

    Args:
        fd: Its descriptor, which this now owns.
        size: Bytes.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._memory: mmap.mmap | None = None
        self._alone = 0  # references to the mapping while there is no view of it

    def views(self, places: Places) -> list[memoryview]:
        """Writable views of the buffers in it, without a copy."""
        if self._memory is None:  # not before: into a block that is lent for results nothing is written by way of a mapping
            # All pages at once: one by one, a page fault for each costs more than the copy did.
            self._memory = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
            self._alone = self._references()
        whole = memoryview(self._memory)
        return [whole[offset : offset + size] for offset, size in places]

    def is_free(self) -> bool:
        """Whether nobody holds a view of it, or an array over one."""
        return self._memory is None or self._references() <= self._alone

    def close(self) -> None:
        """Forget the block; what user code still holds of it stays valid for as long."""
        os.close(self.fd)
        if self._memory is not None and self.is_free():
            self._memory.close()

    def _references(self) -> int:
        # Every view refers to what it shows, and so does a view or an array made of one. Trying to release our own views would
        # not tell: a read-only view that was made of one does not count as its user, and an object may keep the view itself.
        return sys.getrefcount(self._memory)
