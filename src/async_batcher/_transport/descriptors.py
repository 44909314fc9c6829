"""File descriptors that arrive with the messages of a channel."""

from __future__ import annotations

import os
import socket
from array import array
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

# Bytes for the descriptors of one read.
ANCILLARY_SIZE: Final = socket.CMSG_SPACE(16 * array("i").itemsize)


def received_descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> Iterable[int]:
    """Yield the descriptors that `socket.recvmsg` has received; child programs do not get them."""
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors = array("i")
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)  # noqa: FBT003 - its only argument
                yield descriptor
