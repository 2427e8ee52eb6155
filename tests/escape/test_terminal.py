"""Terminals: the job's own, and the one that the supervisor was started from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.escape.attack import (
    PRELUDE,
    Job,
    Policy,
    Terminal,
    achieved,
    attack,
    every_policy,
    numbers,
    open_runner,
    plan,
    python,
    weakened,
    without,
)

# Requests are C ints: the kernel looks at the lower half, so a filter must not look at more.
UPPER_HALVES = (0, 1 << 32, 0x5412 << 32, 0xFFFFFFFF << 32)
INJECTING = f"""
for name, request in (("TIOCSTI", 0x5412), ("TIOCLINUX", 0x541c), ("TIOCSETD", 0x5423)):
    for upper in {UPPER_HALVES}:
        found[f"{{name}} {{upper:#x}}"] = tried(call, "ioctl", 0, request | upper, bytes(8))
"""


async def in_terminal(policy: str | Policy, body: str) -> dict[str, Any]:
    async with open_runner() as runner:
        job = Job(argv=python(body), policy=policy, terminal=Terminal())
        return achieved(await runner.run(job))


@every_policy
async def test_typing_into_the_terminal(policy: str) -> None:
    """TIOCSTI and TIOCLINUX: CVE-2017-5226, CVE-2019-10063 (high bits), CVE-2023-28100.

    Countermeasures: a terminal of the job's own in a session of its own; seccomp, which compares
    the lower 32 bits only. TIOCSETD (line disciplines, CVE-2017-2636's way in) likewise.
    """
    found = await in_terminal(policy, INJECTING)
    assert set(found.values()) == {"EPERM"}, found


async def test_typing_into_the_terminal_without_filter() -> None:
    """The kernel takes all of these, high bits or not (EIO: dev.tty.legacy_tiocsti is 0)."""
    with weakened(without(plan.Filter)):
        found = await in_terminal("base", INJECTING)
    injected = {value for name, value in found.items() if name.startswith("TIOCSTI")}
    assert injected in ({"ok"}, {"EIO"})
    assert "EPERM" not in found.values()


@every_policy
async def test_terminal_without_one(policy: str) -> None:
    """/dev/tty, and getting a terminal by opening one: ioctl_tty(2), TIOCSCTTY.

    Countermeasures: no session that has one, no other terminal in /dev, no /dev/pts.
    """
    found = await attack(
        policy,
        """
found["tty"] = tried(os.open, "/dev/tty", os.O_RDWR)
for name in ("console", "tty0", "tty1", "ttyS0", "ptmx", "pts/0", "pts/ptmx", "vcs", "vcsa"):
    found[name] = tried(os.open, "/dev/" + name, os.O_RDWR)
for fd in range(3):
    found[f"ioctl {fd}"] = tried(call, "ioctl", fd, 0x540E, 1)
""",
    )
    assert found.pop("tty") == "ENXIO"
    assert {found.pop(f"ioctl {fd}") for fd in range(3)} == {"ENOTTY"}
    assert set(found.values()) == {"ENOENT"}


SUPERVISOR = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.close(os.open("/dev/tty", os.O_RDWR))
import sandboxd
result = sandboxd.run_sync(["/usr/bin/python3", "-I", "-S", "-c", sys.argv[1]])
sys.stdout.buffer.write(result.stdout)
"""


def test_terminal_of_the_supervisor() -> None:
    """The terminal sandboxd was started from: CVE-2016-2781 (chroot), CVE-2017-5226 (bwrap).

    Countermeasures: setsid(2) in tenant, sandbox and program; the job's streams are pipes.
    """
    body = """
found["tty"] = tried(os.open, "/dev/tty", os.O_RDWR)
found["session"] = os.getsid(0) == os.getpid()
found["terminals"] = [fd for fd in range(64) if os.isatty(fd)]
"""
    source = f"{numbers()}{PRELUDE}{body}tell()"
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", SUPERVISOR, source],
            stdin=theirs,
            stdout=subprocess.PIPE,
            start_new_session=True,
            check=True,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert json.loads(done.stdout) == {"tty": "ENXIO", "session": True, "terminals": []}
