"""The exit status of `sandboxd run`: the workload's own, or what a shell's reader would expect.

As docker run and timeout(1) have it. They are ambiguous by nature (a program may exit with 124 of
its own accord); the exact status is in --json and --result-fd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandboxd.result import Result, Status

OK = 0
FAILED = 1
USAGE = 2
TIME_LIMIT = 124
SANDBOXD_FAILED = 125
CANNOT_EXECUTE = 126
NOT_FOUND = 127
SIGNAL = 128
MEMORY_LIMIT = 137
KILLED = 137
BROKEN_PIPE = 141
OUTPUT_LIMIT = 153
SYSCALL_DENIED = 159


def exit_code(result: Result) -> int:
    """What the process `sandboxd run` exits with."""
    return _OF_STATUS[result.status](result)


def _own(result: Result) -> int:
    """What the program itself ended with; killed where it did not come to that."""
    if result.exit_code is not None:
        return result.exit_code
    return KILLED if result.signal is None else SIGNAL + result.signal.number


def _not_zero(result: Result) -> int:
    return _own(result) or FAILED


def _start_failed(result: Result) -> int:
    return NOT_FOUND if result.error in ("ENOENT", "ENOTDIR") else CANNOT_EXECUTE


def _always(code: int) -> Callable[[Result], int]:
    return lambda _: code


_OF_STATUS: Mapping[Status, Callable[[Result], int]] = MappingProxyType(
    {
        "ok": _always(OK),
        "nonzero_exit": _own,
        "signaled": _own,
        "cpu_time_limit": _always(TIME_LIMIT),
        "wall_time_limit": _always(TIME_LIMIT),
        "idle_limit": _always(TIME_LIMIT),
        "memory_limit": _always(MEMORY_LIMIT),
        "output_limit": _always(OUTPUT_LIMIT),
        "disk_limit": _not_zero,
        "process_limit": _not_zero,
        "syscall_denied": _always(SYSCALL_DENIED),
        "start_failed": _start_failed,
        "artifact_error": _not_zero,
        "cancelled": _always(KILLED),
    }
)
