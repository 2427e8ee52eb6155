"""What a run holds before its program does anything: told apart from what the program uses.

init, the kernel's objects for the sandbox and the first process are charged to the run's cgroup,
for init can be in no other: it has no privilege left when it starts the program, and with
`nsdelegate` a process is started only in cgroups below the root of one's cgroup namespace
(cgroup-v2.rst, Delegation Containment). How much that is cannot be read from a run's own counters,
but it is the same for all runs of a policy: so a program that does nothing is run in a sandbox of
the same kind, once, while nobody waits for it, and its leaf is looked at.
"""

from __future__ import annotations

import os

import trio

from sandboxd.cgroup.leaf import Leaf
from sandboxd.job import Job
from sandboxd.linux import memfd
from sandboxd.linux.descriptors import Descriptors
from sandboxd.script import machine
from sandboxd.script.empty import RUNS, empty_program
from sandboxd.supervise.pipes import Pipes
from sandboxd.supervise.prepared import Prepared
from sandboxd.supervise.sandboxes import Sandbox
from sandboxd.supervise.supervise import Dispatch

ITSELF = Job(argv=["/proc/self/fd/0"])
"""Its stdin is its file, so it is there in every root with a /proc."""
PAUSE = 0.05
LOOKS = 60
"""For three seconds: a kernel that sums up by itself does that every two (mm/memcontrol.c)."""
PATIENCE = 10.0


def applies(prepared: Prepared) -> bool:
    """Whether it can be known for a policy: the kernel counts it, and no sidecar is needed."""
    compiled, host = prepared.compiled, prepared.host
    if host.cgroup is None or "memory" not in host.cgroup.controllers:
        return False
    if host.arch not in machine.ARCHITECTURES:
        return False
    return compiled.egress is None and "area" not in compiled.setup.descriptors


async def measure(box: Sandbox, prepared: Prepared) -> int | None:
    """Bytes, exact to a page; None where the program could not be run or nothing is counted."""
    assert box.leaf is not None
    with Descriptors() as fds, trio.move_on_after(PATIENCE):
        program = fds.own(memfd.program(empty_program(prepared.host.arch)))
        ours, theirs = map(fds.own, os.pipe2(os.O_CLOEXEC))
        nowhere = fds.own(os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC))
        dispatch = Dispatch(ITSELF, prepared, Pipes(fds, job_ends=[program, theirs, nowhere]))
        dispatch.prepare()
        await dispatch.finish(box.socket)
        await trio.lowlevel.wait_readable(ours)
        if os.read(ours, 1) == RUNS:
            return await settled(box.leaf)
    return None


async def settled(leaf: Leaf) -> int | None:
    """What is charged to a leaf in which nothing happens any more.

    memory.stat is exact, unlike memory.current and memory.peak, in which each CPU takes up to 64
    pages at once for what it will charge next (MEMCG_CHARGE_BATCH). Page cache is left out: it is
    the first reader's, whoever that is.
    """
    before = None
    for _ in range(LOOKS):
        leaf.read("cpu.stat")  # so that the kernel sums up, of small amounts too (before 6.16)
        now = leaf.memory()
        if now is None or now.kernel is None:
            return None
        held = now.anon + now.shmem + now.kernel
        if now.anon and held == before:
            return held
        before = held
        await trio.sleep(PAUSE)
    return None
