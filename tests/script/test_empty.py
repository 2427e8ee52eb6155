"""The program that does nothing: it says that it runs, and is there until it is killed."""

from __future__ import annotations

import os
import platform
import select
import signal
import subprocess

import pytest

from sandboxd.linux import memfd
from sandboxd.script import machine
from sandboxd.script.empty import RUNS, empty_program


@pytest.mark.parametrize("arch", machine.ARCHITECTURES)
def test_it_is_small(arch: str) -> None:
    """What it has must not be more than what every program has."""
    assert len(empty_program(arch)) < (8 << 10 if arch == "x86_64" else 128 << 10)


@pytest.mark.skipif(platform.machine() not in machine.ARCHITECTURES, reason="no machine code")
def test_it_says_that_it_runs_and_sleeps() -> None:
    fd = memfd.program(empty_program(platform.machine()))
    with os.fdopen(fd), subprocess.Popen(
        ["empty"], executable=f"/proc/self/fd/{fd}", pass_fds=(fd,), stdout=subprocess.PIPE
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 16) == RUNS
        os.kill(process.pid, signal.SIGSTOP)  # what interrupts its sleep
        os.kill(process.pid, signal.SIGCONT)
        assert not select.select([process.stdout], [], [], 0.05)[0]
        assert process.poll() is None
        process.kill()
    assert process.returncode == -signal.SIGKILL
