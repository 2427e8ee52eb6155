"""landlock(7): which version of it the kernel speaks."""

from __future__ import annotations

from sandboxd.linux.syscalls import check

_CREATE_RULESET = 444  # the same number on every architecture
_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION


def abi() -> int:
    """The highest ABI; OSError ENOSYS (not built in) or EOPNOTSUPP (not enabled at boot)."""
    return check(_CREATE_RULESET, 0, 0, _VERSION)
