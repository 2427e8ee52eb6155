"""Files without a name: memfd_create(2) for programs and sealed input."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

_MFD_EXEC = 0x10  # Linux 6.3; with vm.memfd_noexec=1 no memfd is executable without it
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, SHRINK, GROW, WRITE (fcntl(2))


def program(content: bytes) -> int:
    """A descriptor of an executable file with this content, which nobody can change any more.

    It is behind /proc/1/exe of every sandbox: CVE-2019-5736 was such a file, written over.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("sandboxd", flags | _MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create("sandboxd", flags)
    with _filled(fd):
        write_all(fd, content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def sealed(content: bytes) -> int:
    """A descriptor at offset 0 of a file with this content that nobody can change any more."""
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with _filled(fd):
        write_all(fd, content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        os.lseek(fd, 0, os.SEEK_SET)
    return fd


def sealed_copy(source: int) -> int:
    """The same with the content of an open file, copied inside the kernel (sendfile(2))."""
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with _filled(fd):
        while os.sendfile(fd, source, None, 1 << 30):
            pass
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        os.lseek(fd, 0, os.SEEK_SET)
    return fd


@contextmanager
def _filled(fd: int) -> Iterator[None]:
    """It is closed if there is no room, or no more may be written (RLIMIT_FSIZE)."""
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


def write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
