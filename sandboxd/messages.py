"""What supervisor, zygote and init say to one another.

    supervisor                      zygote (PID 1 of the tenant)            init (PID 1 of the job)
        |  <- Failure | MAPS ------------|   while the tenant is built
        |  - GO ------------------------>|   id maps are written, it is in its cgroup
        |  <- Failure | READY -----------|
        |  - CloneRequest, fds --------->|   for each sandbox
        |                                |-- clone3 ------------------------->|
        |  <- CloneReply, pidfd ---------|                                    |
        |  - StartHeader, fds, script (on the job's own socket) ------------->|
        |  <- Failure | FILES, fd --------------------------------------------|  only if asked
        |  - GO ------------------------------------------------------------->|  files are in
        |  <- Failure --------------------------------------------------------|  or, and once:
        |  <- Ended ----------------------------------------------------------|
        |  - SIGNAL_STOP by pidfd ------------------------------------------->|  at any time

After Ended init exits when the supervisor closes the socket, or dies.

Supervisor and zygote share a SEQPACKET socket, one message a packet; supervisor and init a STREAM
socket. The end of either (EOF) is how each learns that the other died. All messages are fixed
structs; nothing that a workload wrote is ever in one.
"""

from __future__ import annotations

import struct

import msgspec

WORD = struct.Struct("<Q")
MAPS = WORD.pack(0x5350414D_58425300)
READY = WORD.pack(0x59444145_58425300)
GO = WORD.pack(0x4F47_58425300)
FILES = WORD.pack(0x53454C4946_425300)
ENDED = WORD.pack(0x4445444E45_425300)

SIGNAL_STOP = 64
"""SIGRTMAX: init waits for it (blocked, so that PID 1 gets it although it has no handler)."""


class CloneRequest(msgspec.Struct, frozen=True):
    """Make a sandbox: clone3 with these flags (and into this cgroup), then run `script`.

    `cgroup` is the number the cgroup's descriptor will have in the zygote; descriptors arrive at
    FIRST_DESCRIPTOR and up in the order in which they were sent.
    """

    flags: int
    cgroup: int
    script: bytes

    HEADER = struct.Struct("<QQ")

    def pack(self) -> list[bytes]:
        return [self.HEADER.pack(self.flags, self.cgroup), self.script]


class CloneReply(msgspec.Struct, frozen=True):
    """A pid as the zygote sees it, or a negative errno; the pidfd comes with it."""

    result: int

    FORM = struct.Struct("<q")

    @classmethod
    def unpack(cls, content: bytes) -> CloneReply:
        return cls(*cls.FORM.unpack(content))


class Failure(msgspec.Struct, frozen=True):
    """A record that failed: its address in its script, and the record as the kernel left it."""

    address: int
    nr: int
    errno: int

    FORM = struct.Struct("<Q12q")

    @classmethod
    def unpack(cls, content: bytes) -> Failure:
        address, nr, *rest = cls.FORM.unpack(content)
        return cls(address, nr, -rest[-1])


class Ended(msgspec.Struct, frozen=True):
    """The program ended: wait status, times of CLOCK_MONOTONIC, rusage of the reaped, tmpfs."""

    wait_status: int | None
    started: float
    ended: float
    cpu_user: float
    cpu_system: float
    max_rss: int
    context_switches_voluntary: int
    context_switches_forced: int
    disk_size: int
    disk_free: int
    disk_block: int
    inodes: int
    inodes_free: int
    own_cpu: float
    """CPU seconds of init itself since it was cloned: setting up, reaping."""

    # magic, status, 2 x timespec, struct rusage (getrusage(2)), struct statfs (statfs(2)), timespec
    FORM = struct.Struct("<8s q 4q 4q 14q 15q 2q")
    OWN_CPU = FORM.size - 16
    NO_STATUS = -1
    STOPPED, KILLED = 0x7F, 9

    @classmethod
    def unpack(cls, content: bytes) -> Ended:
        _, status, *words = cls.FORM.unpack(content)
        if status & 0xFF == cls.STOPPED:  # it had made init its tracer: it was killed then
            status = cls.KILLED
        start, start_ns, end, end_ns, user, user_us, system, system_us = words[:8]
        usage, statfs, (own, own_ns) = words[8:22], words[22:37], words[37:]
        return cls(
            wait_status=None if status == cls.NO_STATUS else status & 0xFFFFFFFF,
            started=start + start_ns / 1e9,
            ended=end + end_ns / 1e9,
            cpu_user=user + user_us / 1e6,
            cpu_system=system + system_us / 1e6,
            max_rss=usage[0] * 1024,
            context_switches_voluntary=usage[12],
            context_switches_forced=usage[13],
            disk_block=statfs[1],
            disk_size=statfs[2],
            disk_free=statfs[3],
            inodes=statfs[5],
            inodes_free=statfs[6],
            own_cpu=own + own_ns / 1e9,
        )


class StartHeader(msgspec.Struct, frozen=True):
    """The length of the exec script that follows; the job's descriptors come with it."""

    length: int

    def pack(self) -> bytes:
        return WORD.pack(self.length)
