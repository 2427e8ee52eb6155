"""What a process may set for itself: prctl(2) and seccomp(2)."""

from __future__ import annotations

import ctypes
import os

from sandboxd.linux.syscalls import check

# syscalls(2); -1 is a number no kernel has: ENOSYS.
_PRCTL, _SECCOMP = {"x86_64": (157, 317), "aarch64": (167, 277)}.get(os.uname().machine, (-1, -1))
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1


class _Program(ctypes.Structure):
    """struct sock_fprog (include/uapi/linux/filter.h)."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def die_with_parent(signal: int) -> None:
    """PR_SET_PDEATHSIG: this signal when the thread that forked us ends."""
    check(_PRCTL, _PR_SET_PDEATHSIG, signal)


def become_subreaper() -> None:
    """PR_SET_CHILD_SUBREAPER: who loses its parent below us becomes our child, not init's."""
    check(_PRCTL, _PR_SET_CHILD_SUBREAPER, 1)


def no_new_privileges() -> None:
    """PR_SET_NO_NEW_PRIVS: no exec gives more than we have; it cannot be undone."""
    check(_PRCTL, _PR_SET_NO_NEW_PRIVS, 1)


def load_filter(program: bytes) -> None:
    """SECCOMP_SET_MODE_FILTER with an array of struct sock_filter, for the calling thread."""
    content = ctypes.create_string_buffer(program, len(program))
    header = _Program(len(program) // 8, ctypes.addressof(content))
    check(_SECCOMP, _SECCOMP_SET_MODE_FILTER, 0, ctypes.addressof(header))
