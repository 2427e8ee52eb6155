"""The numbers of the few system calls that scripts use, per architecture.

Only calls that both architectures have, so that a lowering is written once: aarch64 has no open,
mkdir, dup2 or vfork (include/uapi/asm-generic/unistd.h), x86-64 has all of the newer forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# call: (x86_64, aarch64)
_NUMBERS = {
    "capset": (126, 91),
    "chdir": (80, 49),
    "clock_gettime": (228, 113),
    "clone": (56, 220),
    "clone3": (435, 435),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup3": (292, 24),
    "execve": (59, 221),
    "exit_group": (231, 94),
    "fchmodat": (268, 53),
    "fchownat": (260, 54),
    "fcntl": (72, 25),
    "getppid": (110, 173),
    "getrusage": (98, 165),
    "ioctl": (16, 29),
    "kill": (62, 129),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "madvise": (28, 233),
    "mkdirat": (258, 34),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "openat": (257, 56),
    "openat2": (437, 437),
    "pivot_root": (155, 41),
    "ppoll": (271, 73),
    "prctl": (157, 167),
    "pread64": (17, 67),
    "prlimit64": (302, 261),
    "read": (0, 63),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigtimedwait": (128, 137),
    "seccomp": (317, 277),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "setgroups": (116, 159),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setresgid": (119, 149),
    "setresuid": (117, 147),
    "setsid": (112, 157),
    "socket": (41, 198),
    "statfs": (137, 43),
    "symlinkat": (266, 36),
    "umask": (95, 166),
    "umount2": (166, 39),
    "unlinkat": (263, 35),
    "unshare": (272, 97),
    "wait4": (61, 260),
    "waitid": (247, 95),
    "write": (1, 64),
}

ARCHITECTURES = ("x86_64", "aarch64")


def numbers(arch: str) -> Mapping[str, int]:
    """System call name -> number on this architecture."""
    column = ARCHITECTURES.index(arch)
    return MappingProxyType({name: row[column] for name, row in _NUMBERS.items()})
