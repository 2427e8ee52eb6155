"""Files without a name: what is handed on cannot be changed by whoever gets hold of it."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sandboxd.linux import memfd


def copied(content: bytes) -> int:
    source = os.memfd_create("source")
    try:
        memfd.write_all(source, content)
        os.lseek(source, 0, os.SEEK_SET)
        return memfd.sealed_copy(source)
    finally:
        os.close(source)


CHANGES: dict[str, Callable[[int], object]] = {
    "write": lambda fd: os.pwrite(fd, b"x", 0),
    "longer": lambda fd: os.ftruncate(fd, 100),
    "shorter": lambda fd: os.ftruncate(fd, 1),
    "mapped": lambda fd: mmap.mmap(fd, 4),
}


@pytest.mark.parametrize("make", [memfd.program, memfd.sealed, copied])
@pytest.mark.parametrize("change", CHANGES)
def test_nobody_changes_it(make: Callable[[bytes], int], change: str) -> None:
    """F_ADD_SEALS of fcntl(2), also by a descriptor opened anew: /proc/self/fd."""
    fd = make(b"text")
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        for one in (fd, again):
            with pytest.raises(OSError) as caught:
                CHANGES[change](one)
            assert caught.value.errno == errno.EPERM
        assert Path(f"/proc/self/fd/{fd}").read_bytes() == b"text"
    finally:
        os.close(again)
        os.close(fd)
