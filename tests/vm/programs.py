"""Programs of known appetite, the policies they run under, and how slow this machine is."""

from __future__ import annotations

import os
import struct

from sandboxd.job import Job
from sandboxd.policy import Environment, Limits, Policy, Require, Resources
from sandboxd.result import Result
from sandboxd.supervise.runner import open_runner
from tests.supervise.variants import PATH

SLOW = float(os.environ.get("SANDBOXD_TEST_SLOW", "1"))
"""How many times longer things take here than on a machine of its own: emulation is slow."""
MIB = 1 << 20
PYTHON = "/usr/bin/python3"

PRELUDE = """
import ctypes, errno, mmap, os, signal, sys, time
def touch(held):
    for at in range(0, len(held), 4096):
        held[at] = 1
def heap(size):
    held = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    touch(held)
    return held
def shared(size):
    held = mmap.mmap(-1, size)
    touch(held)
    return held
def burn(seconds):
    while time.process_time() < seconds:
        pass
"""


def policy(limits: Limits | None = None, resources: Resources | None = None) -> Policy:
    """As little as a test needs, and what it asks for."""
    limits = limits or Limits()
    kept = {name: getattr(limits, name) for name in Limits.__struct_fields__}
    kept = {name: value for name, value in kept.items() if value is not None}
    return Policy(
        name="test",
        limits=Limits(**({"wall_time": 40.0, "disk": 512 * MIB, "inodes": 16384} | kept)),
        resources=resources or Resources(),
        environment=Environment(set={"PATH": PATH, "LANG": "C.UTF-8"}),
        require=Require(memory="enforced") if limits.memory else Require(),
    )


def python(body: str) -> list[str]:
    return [PYTHON, "-c", PRELUDE + body]


async def run(
    argv: list[str],
    limits: Limits | None = None,
    resources: Resources | None = None,
    **job: object,
) -> Result:
    """One job in a runner of its own."""
    async with open_runner() as runner:
        return await runner.run(
            Job(argv=argv, policy=policy(limits, resources), **job)  # type: ignore[arg-type]
        )


def static_program(memory: int) -> bytes:
    """A program for x86-64 that exits with 0; its only segment takes `memory` bytes (elf(5))."""
    code = bytes.fromhex("31ff b83c000000 0f05")  # xor edi, edi; mov eax, 60; syscall
    at, base, head = 0x78, 0x400000, 0x40
    file = at + len(code)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + at, head, 0, 0, head, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0, base, base, file, memory, 0x1000)
    return ident + header + segment + code
