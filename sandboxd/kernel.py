"""Words of plans with the kernel's values: what a mount lets be done, kinds of namespaces."""

from __future__ import annotations

from enum import IntFlag


class Attributes(IntFlag):
    """What mount_setattr(2) calls MOUNT_ATTR_*, with the kernel's values."""

    NONE = 0
    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4
    NOEXEC = 0x8

    def describe(self) -> str:
        """As mount(8) writes them."""
        words = [str(flag.name).lower() for flag in Attributes if flag and flag in self]
        return ",".join(["ro" if word == "rdonly" else word for word in words]) or "rw"


SAFE = Attributes.NOSUID | Attributes.NODEV
READ_ONLY = SAFE | Attributes.RDONLY


# CLONE_NEW* (include/uapi/linux/sched.h)
NAMESPACES = {
    "mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000,
    "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000, "time": 0x80,
}  # fmt: skip


def namespaces(*names: str) -> int:
    return sum(NAMESPACES[name] for name in names)


def describe_namespaces(flags: int) -> str:
    return " ".join(name for name, flag in NAMESPACES.items() if flags & flag)
