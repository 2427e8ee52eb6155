"""Raw calls and raw memory, asked of the kernel."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from sandboxd.linux import syscalls

NUMBERS = {"x86_64": (39, 3, 8, 11), "aarch64": (172, 57, 62, 215)}
GETPID, CLOSE, LSEEK, MUNMAP = NUMBERS.get(os.uname().machine, (0, 0, 0, 0))
pytestmark = pytest.mark.skipif(not GETPID, reason=f"no numbers for {os.uname().machine}")


def test_a_call_returns_what_the_kernel_returns() -> None:
    assert syscalls.call(GETPID) == os.getpid()
    assert syscalls.call(CLOSE, -1) == -errno.EBADF


def test_negative_values_below_the_errnos_are_values() -> None:
    with open("/proc/self/mem", "rb") as memory:
        assert syscalls.call(LSEEK, memory.fileno(), -8192, os.SEEK_SET) == -8192
        assert syscalls.check(LSEEK, memory.fileno(), 2**64 - 8192, os.SEEK_SET) == -8192


def test_a_checked_failure_is_an_oserror() -> None:
    assert syscalls.check(GETPID) == os.getpid()
    with pytest.raises(OSError) as caught:
        syscalls.check(CLOSE, -1)
    assert caught.value.errno == errno.EBADF


@pytest.fixture
def page() -> Iterator[int]:
    """A page where nothing else ever is: above the heap, below programs and libraries."""
    address = 0x2000000000
    syscalls.map_fixed(address, mmap.PAGESIZE)
    yield address
    assert syscalls.call(MUNMAP, address, mmap.PAGESIZE) == 0


def test_mapped_memory_is_zero(page: int) -> None:
    assert syscalls.read_u64(page) == syscalls.read_u64(page + mmap.PAGESIZE - 8) == 0


def test_memory_is_read_as_it_was_written(page: int) -> None:
    syscalls.write_memory(page, (0x1122334455667788).to_bytes(8, "little"))
    assert syscalls.read_u64(page) == 0x1122334455667788
    syscalls.write_u64(page, -1)
    assert syscalls.read_u64(page) == 2**64 - 1


def test_what_is_mapped_already_is_left_alone(page: int) -> None:
    syscalls.write_u64(page, 42)
    with pytest.raises(OSError) as caught:
        syscalls.map_fixed(page, mmap.PAGESIZE)
    assert caught.value.errno == errno.EEXIST
    assert syscalls.read_u64(page) == 42
