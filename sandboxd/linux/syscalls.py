"""Raw system calls and raw memory: the kernel as a launch script sees it, one call at a time."""

from __future__ import annotations

import ctypes
import os

_MAP_FIXED_NOREPLACE = 0x100000
_MAP_ANONYMOUS = 0x20
_MAP_PRIVATE = 0x02
_PROT_READ_WRITE = 0x1 | 0x2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)


def call(nr: int, *args: int) -> int:
    """What the kernel returns: a negative errno if it failed. Addresses and flags are just ints.

    libc turns exactly -4095..-1 into errno (syscall(2)), so turning it back loses nothing. All six
    arguments are always passed: the kernel reads none that a call does not have, but a register
    left as it happens to be is a bug that shows up later.
    """
    words = [ctypes.c_long(word) for word in (nr, *args, *(0,) * (6 - len(args)))]
    value: int = _libc.syscall(*words)
    return -ctypes.get_errno() if value == -1 else value


def check(nr: int, *args: int) -> int:
    """The same, but a failure is an OSError."""
    value = call(nr, *args)
    if -4095 <= value < 0:
        raise OSError(-value, os.strerror(-value))
    return value


def map_fixed(address: int, size: int) -> None:
    """Zeroed private memory at exactly this address; OSError(EEXIST) if something is there.

    Kernels before 4.17 take the unknown flag for a hint and may choose another place (mmap(2)).
    """
    mapped: int | None = _libc.mmap(
        address, size, _PROT_READ_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE, -1, 0
    )
    if mapped != address:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), f"{size} bytes at {address:#x}")


def write_memory(address: int, content: bytes) -> None:
    ctypes.memmove(address, content, len(content))


def read_u64(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def write_u64(address: int, value: int) -> None:
    """Store the low 64 bits of a value, negative ones as two's complement."""
    ctypes.c_uint64.from_address(address).value = value
