"""capabilities(7): giving up what is not needed."""

from __future__ import annotations

import ctypes
import os

from sandboxd.linux.syscalls import check

CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_FOWNER = 3

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words of 32
# syscalls(2); -1 is a number no kernel has: ENOSYS.
_CAPGET, _CAPSET = {"x86_64": (125, 126), "aarch64": (90, 91)}.get(os.uname().machine, (-1, -1))


def keep_only(*capabilities: int) -> None:
    """Of what this thread has, keep these; nothing is inherited by a program."""
    wanted = sum(1 << number for number in capabilities)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    words = (ctypes.c_uint32 * 6)()  # twice: effective, permitted, inheritable
    check(_CAPGET, ctypes.addressof(header), ctypes.addressof(words))
    for half in (0, 1):
        kept = words[3 * half + 1] & (wanted >> 32 * half)
        words[3 * half : 3 * half + 3] = [kept, kept, 0]
    check(_CAPSET, ctypes.addressof(header), ctypes.addressof(words))
