"""Carries out a launch script through ctypes, where the machine cannot run: a fallback.

Theory of operation
-------------------
This is `script/machine.py` once more, in Python: the contract is in `script/record.py`, and one
suite of tests holds both to it. It starts in 25 ms and holds 13 MB where the machine takes
0.25 ms and 16 KB, so it is only for hosts on which the kernel will not execute a file of ours.

It is started as a process of its own (`script/command.py`) and is that process until the script
executes something or exits; it never returns to Python code of anybody else. The script may pivot
the root away, so all modules are imported before the first record, and no later one is needed.

What differs from the machine, because it cannot be otherwise:

- vfork, and clone with CLONE_VM or CLONE_VFORK, become a plain fork. The child gets a copy of the
  memory, not the memory: what it stores, the parent does not see; and the parent does not wait
  for it. Scripts must depend on neither; wait4 and descriptors serve both kinds.
- The interpreter's own memory counts against the limits that the script sets, and its own system
  calls (mmap, munmap, brk) go through the filter that the script loads.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import NoReturn

from sandboxd.linux.syscalls import call, map_fixed, read_u64, write_memory, write_u64
from sandboxd.script.record import (
    BASE,
    CONDITION_SHIFT,
    IGNORE,
    LOWEST_ERROR,
    NO_CALL,
    OFFSETS,
    RECORD_SIZE,
    Condition,
)

# From <linux/sched.h>; see clone(2).
_CLONE_VM = 0x100
_CLONE_VFORK = 0x4000

# uname(2)'s machine: (clone, vfork). aarch64 has no vfork call (syscalls(2)).
_FORKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"x86_64": (56, 58), "aarch64": (220, NO_CALL)}
)
_CLONE, _VFORK = _FORKS.get(os.uname().machine, (NO_CALL, NO_CALL))

_NR, _A0, _STORE, _FLAGS, _COMPARE, _TARGET, _RESULT = (
    OFFSETS[name] for name in ("nr", "a0", "store", "flags", "compare", "target", "result")
)

# An interpreter that is no PIE (Debian's) has its heap anywhere in the GB behind it, chosen at exec
# (proc_sys_kernel(5), randomize_va_space), and now and then that is where the image belongs. One
# more exec finds it elsewhere; each adds an argument, so that there is an end to it.
_ATTEMPTS = 30

_HANDLER, _ERROR_CELL, _START = BASE, BASE + 8, BASE + 16


def main(image: int, memory: int) -> NoReturn:
    """Load the image from a descriptor, become what the machine is after exec, and run."""
    try:
        map_fixed(BASE, memory)
    except FileExistsError:
        if len(sys.argv) > _ATTEMPTS:
            raise
        os.execv(sys.executable, [*sys.orig_argv, "again"])
    write_memory(BASE, os.pread(image, os.fstat(image).st_size, 0))
    os.close(image)
    # Python ignores these two, catches SIGINT, and would pass the first two on through execve.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    here = read_u64(_START)
    while True:
        here = step(here)


def step(here: int) -> int:
    """Carry out one record; the address of the next."""
    nr = _signed(read_u64(here + _NR))
    value = _signed(read_u64(here + _A0)) if nr < 0 else _call(nr, here)
    write_u64(here + _RESULT, value)
    if store := read_u64(here + _STORE):
        write_u64(store, value)
    flags = read_u64(here + _FLAGS)
    if nr >= 0 and LOWEST_ERROR <= value < 0 and not flags & IGNORE:
        write_u64(read_u64(_ERROR_CELL), here)
        return read_u64(_HANDLER)
    if _holds(flags >> CONDITION_SHIFT & 0xFF, value, here):
        return read_u64(here + _TARGET)
    return here + RECORD_SIZE


def _call(nr: int, here: int) -> int:
    args = [read_u64(here + _A0 + 8 * position) for position in range(6)]
    if nr == _VFORK:
        nr, args = _CLONE, [signal.SIGCHLD, 0, 0, 0, 0, 0]
    elif nr == _CLONE and args[0] & (_CLONE_VM | _CLONE_VFORK):
        # The child goes on in this very stack frame, so it has to be given none of its own.
        args[:2] = args[0] & ~(_CLONE_VM | _CLONE_VFORK), 0
    return call(nr, *args)


def _holds(condition: int, value: int, here: int) -> bool:
    match condition:
        case Condition.ZERO:
            return value == 0
        case Condition.NONZERO:
            return value != 0
        case Condition.EQUAL:
            return value == _signed(read_u64(read_u64(here + _COMPARE)))
        case Condition.ALWAYS:
            return True
        case Condition.NEGATIVE:
            return value < 0
    return False


def _signed(word: int) -> int:
    return word - 2**64 if word & 2**63 else word
