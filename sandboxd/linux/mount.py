"""mount(2) and umount2(2)."""

from __future__ import annotations

import ctypes
import os

from sandboxd.linux.syscalls import check

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

_OPEN_TREE = 428  # the same number on every architecture
_OPEN_TREE_CLONE = 1
_AT_FDCWD = -100
# syscalls(2); -1 is a number no kernel has: ENOSYS.
_MOUNT, _UMOUNT2 = {"x86_64": (165, 166), "aarch64": (40, 39)}.get(os.uname().machine, (-1, -1))


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2); an empty `kind` or `data` is a null pointer."""
    words = [
        ctypes.create_string_buffer(os.fsencode(word)) if word else None
        for word in (source or "none", target, kind, data)
    ]
    at = [0 if word is None else ctypes.addressof(word) for word in words]
    check(_MOUNT, at[0], at[1], at[2], flags, at[3])


def open_tree(path: str) -> int:
    """A detached copy of the mount at a path, as a descriptor (open_tree(2), Linux 5.2)."""
    word = ctypes.create_string_buffer(os.fsencode(path))
    return check(_OPEN_TREE, _AT_FDCWD, ctypes.addressof(word), _OPEN_TREE_CLONE | os.O_CLOEXEC)


def umount(target: str, flags: int = 0) -> None:
    word = ctypes.create_string_buffer(os.fsencode(target))
    check(_UMOUNT2, ctypes.addressof(word), flags)
