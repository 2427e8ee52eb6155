"""How much memory a program asks for before its first instruction: the segments of its ELF file.

The kernel refuses, or kills at once, a program whose segments do not fit (execve(2), elf(5)); to
who looks at signals alone that is a crash. So for a run that died at once the file is read, from
where the caller or the policy has it: never from inside of the sandbox.
"""

from __future__ import annotations

import errno
import os
import posixpath
import signal
import stat
import struct
from contextlib import suppress
from pathlib import Path

from sandboxd.compile.build import Compiled
from sandboxd.job import File, Job
from sandboxd.policy import Limits
from sandboxd.supervise.status import Facts

AT_ONCE = 0.1
"""CPU seconds of the program alone; one that used more did not die of its segments."""
HEAD = 1 << 16
"""Bytes of a file that are looked at: the headers come first in what any linker makes."""
PT_LOAD = 1
# e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum: at 32 in a 64-bit file, at 28 in a 32.
TABLES = {1: (28, "IIIHHH"), 2: (32, "QQIHHH")}
MEMORY_SIZE = {1: (20, "I"), 2: (40, "Q")}
"""Where p_memsz is in a program header."""
BYTE_ORDER = {1: "<", 2: ">"}
WORK = "/box"


def are_in_question(facts: Facts, limits: Limits) -> bool:
    """Whether the run ended as one does that was too large to start."""
    if (limits.memory or limits.address_space) is None or facts.stopped_by or facts.output:
        return False
    if facts.start_error is not None:
        return facts.start_error[0] == errno.ENOMEM
    ended = facts.ended
    if ended is None or ended.wait_status is None or not os.WIFSIGNALED(ended.wait_status):
        return False
    if os.WTERMSIG(ended.wait_status) not in (signal.SIGKILL, signal.SIGSEGV):
        return False
    return ended.cpu_user + ended.cpu_system < AT_ONCE


def loaded(head: bytes) -> int | None:
    """The sum of what an ELF file's PT_LOAD segments take in memory; None if it is none."""
    if head[:4] != b"\x7fELF" or len(head) < 64:
        return None
    kind, order = head[4], BYTE_ORDER.get(head[5])
    if kind not in TABLES or order is None:
        return None
    at, form = TABLES[kind]
    start, _, _, _, size, count = struct.unpack_from(order + form, head, at)
    place, word = MEMORY_SIZE[kind]
    total = 0
    for number in range(count):
        header = head[start + number * size : start + (number + 1) * size]
        if len(header) < place + struct.calcsize(order + word):
            return None
        if struct.unpack_from(order + "I", header)[0] == PT_LOAD:
            total += struct.unpack_from(order + word, header, place)[0]
    return total


def of_program(job: Job, compiled: Compiled) -> int | None:
    """The same for what a job started; None where its file is not known outside."""
    name = os.fsdecode(job.argv[0])
    if "/" not in name:
        return None
    cwd = WORK if job.cwd is None else posixpath.join(WORK, os.fsdecode(job.cwd))
    path = posixpath.normpath(posixpath.join(cwd, name))
    if path.startswith(f"{WORK}/"):
        name = path.removeprefix(f"{WORK}/")
        attached = _attached(name, compiled)
        return _copied(job, name) if attached is None else _of_file(attached)
    source = _outside(path, compiled)
    return None if source is None else _of_file(source)


def _attached(name: str, compiled: Compiled) -> Path | None:
    """Where a file that was given by reference lies on the host."""
    inputs = compiled.inputs
    if inputs is None:
        return None
    for one in inputs.attachments:
        if name == one.target or name.startswith(f"{one.target}/"):
            return Path(f"{inputs.store}/{one.source}" + name.removeprefix(one.target))
    return None


def _copied(job: Job, name: str) -> int | None:
    for key, value in job.files.items():
        if posixpath.normpath(os.fsdecode(key)) == name:
            data = value.data if isinstance(value, File) else value
            if isinstance(data, bytes):
                return loaded(data[:HEAD])
            return _of_file(data) if isinstance(data, Path) else None
    return None


def _outside(path: str, compiled: Compiled) -> Path | None:
    """Where a program of the sandbox's lies on the host, if no job can have put it there."""
    policy = compiled.policy
    for mount in policy.mounts:
        if path == mount.target or path.startswith(f"{mount.target}/"):
            if mount.source is None or mount.writable:
                return None
            return Path(mount.source + path.removeprefix(mount.target))
    if policy.root.writable:
        return None
    return Path("/" if policy.root.source == "host" else policy.root.source, path[1:])


def _of_file(path: Path) -> int | None:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return loaded(os.pread(fd, HEAD, 0))
        finally:
            os.close(fd)
    return None
