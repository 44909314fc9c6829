"""Who runs a batch that waits at a worker: the worker, or the parent, which takes it back.

::

    parent: put(seq) --> RUN_AHEAD ...                     worker, when it comes to the batch:
            take_all() <------------- token ---------------> take(seq), then it begins

Each batch that is sent ahead has a token, its sequence number, in a pipe from which both sides
read. The side that reads it owns the batch. After a crash, a token that is still there is that of a
batch which has not begun.

A token begins with a mark: code of the user's in the worker that closes a wrong descriptor may open
another file under the number of the pipe.

A message could not take a batch back, since the worker may read it too late. A counter (an eventfd)
does not say which batch is meant.
"""

from __future__ import annotations

import os
import struct

_MARK = b"\xabtk\x01"
_TOKEN = struct.Struct("=4sQ")  # the mark, and the sequence number


class TokenPipe:
    """The parent's side.

    Attributes:
        child_fd: The descriptor for the worker; closed here when it has been started.
    """

    def __init__(self) -> None:
        self._read_fd, self._write_fd = os.pipe()
        try:
            os.set_blocking(self._read_fd, False)
            os.set_blocking(self._write_fd, False)
            self.child_fd = os.dup(self._read_fd)
        except BaseException:
            self.close()
            raise

    def put(self, seq: int) -> None:
        """Put a token; before its batch is sent, since the worker asks for it at once."""
        os.write(self._write_fd, _TOKEN.pack(_MARK, seq))

    def take_all(self) -> set[int]:
        """Take the tokens of all batches that the worker has not begun."""
        taken: set[int] = set()
        try:
            while True:
                _, seq = _TOKEN.unpack(os.read(self._read_fd, _TOKEN.size))
                taken.add(seq)
        except BlockingIOError:
            return taken

    def close(self) -> None:
        fds = (self._read_fd, self._write_fd)
        self._read_fd = self._write_fd = -1  # first: they are closed once only
        for fd in fds:
            if fd != -1:
                os.close(fd)


class TokenReader:
    """The worker's side.

    Args:
        fd: The descriptor of the read end.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._seq = 0  # of a token whose batch has not been received yet; 0: none

    def take(self, seq: int) -> bool:
        """Take the token of a batch; False: the parent has taken the batch back.

        Raises:
            EOFError: The parent has exited.
            ValueError: What was read is not a token.
        """
        if not self._seq:
            try:
                token = os.read(self._fd, _TOKEN.size)
            except BlockingIOError:
                return False
            if not token:
                raise EOFError
            if len(token) < _TOKEN.size or not token.startswith(_MARK):
                msg = f"not a token of the pool: {token!r}"
                raise ValueError(msg)
            _, self._seq = _TOKEN.unpack(token)
        if self._seq != seq:  # of a batch that was sent later
            return False
        self._seq = 0
        return True
