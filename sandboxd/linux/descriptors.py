"""Owning descriptors: closed in reverse, in every ending."""

from __future__ import annotations

import errno
import os
from types import TracebackType
from typing import Self

from sandboxd.errors import HostError

SCARCE = (errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS)
"""The last: more are on their way in sockets than the limit of open files (unix(7))."""


def told(error: OSError, what: str = "") -> Exception:
    """The error to raise for it: what to do about it where descriptors ran out, else itself."""
    if error.errno not in SCARCE:
        return error
    return HostError("open files", f"{what}: {error.strerror}" if what else f"{error.strerror}",
                     hint="fewer jobs at once, or raise the limit: ulimit -n")  # fmt: skip


def no_room(what: str) -> Exception:
    """For a message whose descriptors the kernel dropped for want of room (unix(7))."""
    return told(OSError(errno.EMFILE, os.strerror(errno.EMFILE)), what)


class Descriptors:
    """A group of descriptors with one owner: `with Descriptors() as fds: fd = fds.own(...)`."""

    def __init__(self) -> None:
        self._owned: list[int] = []

    def own(self, fd: int) -> int:
        self._owned.append(fd)
        return fd

    def close(self, fd: int) -> None:
        """Close one early; nothing happens if it is closed already."""
        if fd in self._owned:
            self._owned.remove(fd)
            os.close(fd)

    def close_all(self) -> None:
        while self._owned:
            os.close(self._owned.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close_all()
