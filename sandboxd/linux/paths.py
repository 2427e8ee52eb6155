"""openat2(2): a path that is looked up below a directory and nowhere else."""

from __future__ import annotations

import ctypes
import os

from sandboxd.linux.syscalls import check

_OPENAT2 = 437  # the same number on every architecture
# include/uapi/linux/openat2.h
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_STRICT = _RESOLVE_NO_XDEV | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH


def open_beneath(folder: int, path: bytes, flags: int) -> int:
    """A descriptor of what `path` is below `folder`, close-on-exec (openat2(2), Linux 5.6).

    ELOOP if any part of it is a symbolic link, EXDEV if it leads out or into another mount.
    """
    name = ctypes.create_string_buffer(path or b".")
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, 0, _STRICT)
    return check(
        _OPENAT2, folder, ctypes.addressof(name), ctypes.addressof(how), ctypes.sizeof(how)
    )
