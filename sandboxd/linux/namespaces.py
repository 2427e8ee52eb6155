"""New namespaces for the calling process, and a fork straight into a cgroup."""

from __future__ import annotations

import ctypes
import os

from sandboxd.linux.syscalls import check

# namespaces(7), include/uapi/linux/sched.h
CLONE_NEWTIME = 0x80
CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_CLONE_INTO_CGROUP = 1 << 33
_SIGCHLD = 17

# syscalls(2); -1 is a number no kernel has: ENOSYS.
_UNSHARE = {"x86_64": 272, "aarch64": 97}.get(os.uname().machine, -1)
_SETNS = {"x86_64": 308, "aarch64": 268}.get(os.uname().machine, -1)
_CLONE3 = 435


def unshare(flags: int) -> None:
    """unshare(2). os.unshare() came with Python 3.12 only."""
    check(_UNSHARE, flags)


def join(namespace: int, kind: int) -> None:
    """setns(2) with a descriptor of the namespace; a user namespace only with one thread."""
    check(_SETNS, namespace, kind)


def fork_into_cgroup(cgroup: int) -> int:
    """clone3(2) as a fork whose child starts in the cgroup with this descriptor (Linux 5.7).

    Python learns nothing of it: for single-threaded callers whose child ends in os._exit().
    """
    # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls,
    # set_tid, set_tid_size, cgroup
    args = (ctypes.c_uint64 * 11)(_CLONE_INTO_CGROUP, 0, 0, 0, _SIGCHLD, 0, 0, 0, 0, 0, cgroup)
    return check(_CLONE3, ctypes.addressof(args), ctypes.sizeof(args))
