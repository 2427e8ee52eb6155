"""Files on their way between two of our processes: packets of entries, descriptors beside them.

A packet of a SEQPACKET socket is one byte that says what it is about, and entries: kind, mode,
length of name, length of content, time, name, content. What is too large for a packet travels as a
descriptor of the same packet (unix(7), SCM_RIGHTS). Nothing of it is ever interpreted here.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

TYPE_CHECKING = False  # as typing's, which is not imported for it
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PACKET = 65536
INLINE = 16384
"""The longest content, and the longest name, within a packet."""
DESCRIPTORS = 16
"""As many go with one packet; the kernel allows 253 (SCM_MAX_FD)."""

# What an entry is.
FILE = 1  # a regular file, its content here
SOURCE = 2  # a regular file behind the next descriptor of the packet; here may be its SIZE,
#             or, on the way in, a RANGE: which part of what is behind the descriptor it is
LINK = 3  # a symbolic link, its target here
DIRECTORY = 4
PATTERN = 5  # `name` is to be looked for
REFUSED = 6  # something went wrong with `name`: `mode` is an errno or 0, the content says what
HARDLINK = 7  # one more name for what was made before under the name that is here

SIZE = struct.Struct("<Q")
RANGE = struct.Struct("<QQ")
"""Offset and length."""
NOW = -1 << 63
"""No time: that of the moment in which the thing is made."""
_ENTRY = struct.Struct("<BIIIq")
_SPACE = socket.CMSG_SPACE(DESCRIPTORS * 4)
_FIRST_FLAGS = 0x0001 | 0x0008  # MFD_CLOEXEC | MFD_NOEXEC_SEAL


class Entry:
    """One thing with a name. `mode` means what `kind` makes of it; `time` is in ns, or NOW."""

    __slots__ = ("content", "kind", "mode", "name", "time")

    def __init__(
        self, kind: int, name: bytes, mode: int = 0, content: bytes = b"", time: int = NOW
    ) -> None:
        self.kind = kind
        self.name = name
        self.mode = mode
        self.content = content
        self.time = time


class Packet:
    """A packet being filled: entries, and the descriptors of those that have one."""

    __slots__ = ("_head", "_parts", "_size", "descriptors")

    def __init__(self, head: bytes, descriptors: Iterable[int] = ()) -> None:
        self._head = head
        self._parts: list[bytes] = []
        self._size = len(head)
        self.descriptors = list(descriptors)

    @property
    def empty(self) -> bool:
        return not self._parts

    def has_room(self, entry: Entry, descriptor: int | None = None) -> bool:
        after = self._size + _ENTRY.size + len(entry.name) + len(entry.content)
        return after <= PACKET and len(self.descriptors) + (descriptor is not None) <= DESCRIPTORS

    def add(self, entry: Entry, descriptor: int | None = None) -> None:
        lengths = len(entry.name), len(entry.content)
        head = _ENTRY.pack(entry.kind, entry.mode, *lengths, entry.time)
        self._parts += (head, entry.name, entry.content)
        self._size += len(head) + len(entry.name) + len(entry.content)
        if descriptor is not None:
            self.descriptors.append(descriptor)

    def content(self) -> bytes:
        return b"".join((self._head, *self._parts))


def entries(packet: bytes, start: int) -> Iterator[Entry]:
    """What the packet holds from `start` on."""
    while start < len(packet):
        kind, mode, name, content, time = _ENTRY.unpack_from(packet, start)
        start += _ENTRY.size
        middle, end = start + name, start + name + content
        yield Entry(kind, packet[start:middle], mode, packet[middle:end], time)
        start = end


def send(link: socket.socket, content: bytes, descriptors: list[int]) -> None:
    """One packet; BlockingIOError if the socket is not to wait and would have to."""
    ancillary = []
    if descriptors:
        numbers = struct.pack(f"{len(descriptors)}i", *descriptors)
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers))
    link.sendmsg([content], ancillary, socket.MSG_NOSIGNAL)


def receive(link: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and its descriptors, which are the caller's now; an empty one is the end."""
    content, ancillary, flags, _ = link.recvmsg(PACKET, _SPACE, socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, numbers in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors += struct.unpack(f"{len(numbers) // 4}i", numbers[: len(numbers) // 4 * 4])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close(descriptors)
        # A process at its limit of open files is not told: the kernel just drops the rest.
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "descriptors of a packet")
    return content, descriptors


def close(descriptors: Iterable[int]) -> None:
    for number in descriptors:
        os.close(number)


def memory_file(name: str) -> int:
    """memfd_create(2) of a file nobody will execute, also where vm.memfd_noexec is 2."""
    try:
        return os.memfd_create(name, _FIRST_FLAGS)
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 6.3
            raise
        return os.memfd_create(name, os.MFD_CLOEXEC)
