"""Waiting for processes we started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from sandboxd.errors import LaunchError
from sandboxd.linux.descriptors import SCARCE

PATIENCE = 5.0
"""Seconds a process that has been told to end by closing its socket gets for that."""


@contextmanager
def starting(stage: str, what: str) -> Iterator[None]:
    """LaunchError for what the kernel refuses meanwhile, or who was started does not live to see.

    Where there are no descriptors left, that is still what is said.
    """
    try:
        yield
    except OSError as error:
        if error.errno in SCARCE:
            raise
        raise LaunchError(stage, 0, error.errno or 0, what,
                          hint="a limit of ours (ulimit -a)?") from error  # fmt: skip


async def reap(process: subprocess.Popen[bytes], patience: float = PATIENCE) -> None:
    """Wait until a process of ours is gone; kill it if it does not go by itself in time.

    The pidfd comes first: kill() may find it dead and reap it, and its number is free then.
    """
    if process.poll() is None:
        pidfd = os.pidfd_open(process.pid)
        try:
            with trio.move_on_after(patience) as waiting:
                await trio.lowlevel.wait_readable(pidfd)
            if waiting.cancelled_caught:
                process.kill()
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
    process.wait()
