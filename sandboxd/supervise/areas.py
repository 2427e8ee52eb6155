"""What a sandbox writes to, made by a sidecar: its area, and a root by fuse-overlayfs over it.

launch/area.py says what the sidecar does. Only sandboxes that need one have one: most mount their
own tmpfs, which nobody outside can see.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from sandboxd.compile import pieces, rootfs
from sandboxd.errors import LaunchError
from sandboxd.linux.descriptors import Descriptors, no_room
from sandboxd.script.command import area_command
from sandboxd.supervise.prepared import Prepared
from sandboxd.supervise.processes import reap, starting
from sandboxd.supervise.tenants import PACKAGE_PARENT, Tenant

if TYPE_CHECKING:
    from sandboxd.supervise.uppers import Uppers

READY, ALIVE = b"ready", b"alive"  # as in launch/area.py
MESSAGE = 4096
PATIENCE = 5.0
"""Seconds in which fuse-overlayfs must have answered that it is alive."""


class Area(msgspec.Struct):
    """A sandbox's area; `mounts` are descriptors, owned by this: "area", and "fuse" for a root."""

    tenant: Tenant
    process: subprocess.Popen[bytes]
    link: socket.socket
    mounts: dict[str, int]
    directory: Path | None = None
    uppers: Uppers | None = None
    lost: str = ""
    """What happened to the sidecar, if something did."""

    @property
    def is_served(self) -> bool:
        """Whether a process must live for it to work."""
        return "fuse" in self.mounts

    def is_lost(self) -> bool:
        """Whether its sidecar has said that it is over, or is gone."""
        if self.is_served and not self.lost:
            with suppress(BlockingIOError):
                self._heard(self.link)
        return bool(self.lost)

    async def check(self) -> None:
        """LaunchError unless all that the run did was done with the sidecar alive."""
        if not self.is_served:
            return
        with suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
            self.link.send(ALIVE, socket.MSG_NOSIGNAL)
        with trio.move_on_after(PATIENCE):
            while not self.lost:
                await trio.lowlevel.wait_readable(self.link)
                if self._heard(self.link):
                    return
        self.lost = self.lost or "fuse-overlayfs does not answer"
        raise self.failure()

    def failure(self) -> LaunchError:
        return LaunchError("fuse_overlayfs", 0, 0, self.lost,
                           hint='root.driver = "kernel" or "tmpfs" does without it')  # fmt: skip

    def _heard(self, link: socket.socket) -> bool:
        """Whether it says that it is alive."""
        try:
            said = link.recv(MESSAGE)
        except ConnectionResetError:
            said = b""
        if said != ALIVE:
            self.lost = said.decode(errors="replace") or "its sidecar ended while it was needed"
        return said == ALIVE

    def kill(self) -> None:
        """What waits for fuse-overlayfs gets an error instead: it cannot be killed before."""
        if self.process.poll() is None:
            self.process.kill()

    def hand_over(self) -> Callable[[], Awaitable[None]] | None:
        """What removes its directory, which outlives it from now on; None if it has none."""
        directory, uppers = self.directory, self.uppers
        if directory is None or uppers is None:
            return None
        self.directory = None
        return lambda: uppers.remove(directory)

    async def close(self) -> None:
        """End its processes and wait for that."""
        for descriptor in self.mounts.values():
            os.close(descriptor)
        self.mounts.clear()
        self.link.close()
        with trio.CancelScope(shield=True):
            await reap(self.process)
            if self.directory is not None and self.uppers is not None:
                await self.uppers.remove(self.directory)


def start(command: list[str], keep: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """Not through trio: its child has to outlive this task's scope, and starts in microseconds."""
    return subprocess.Popen(
        command, pass_fds=keep, cwd="/", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


async def open_area(tenant: Tenant, prepared: Prepared, uppers: Uppers | None) -> Area:
    """Make what a policy's sandbox writes to, in the tenant's user namespace.

    It lies in a directory that `uppers` makes, or on a tmpfs.
    """
    if uppers is None:
        return await _open_area(tenant, prepared, None)
    directory = uppers.make(prepared.compiled.tenant.ids, prepared.compiled.policy.limits)
    try:
        area = await _open_area(tenant, prepared, directory)
    except BaseException:
        with trio.CancelScope(shield=True):
            await uppers.remove(directory)
        raise
    area.directory, area.uppers = directory, uppers
    return area


async def _open_area(tenant: Tenant, prepared: Prepared, directory: Path | None) -> Area:
    policy, host = prepared.compiled.policy, prepared.host
    wanted = [one for one in ("area", "fuse") if one in prepared.compiled.setup.descriptors]
    limits = [policy.limits.disk, policy.limits.inodes]
    words = [
        str(directory or ""),
        *("" if n is None else str(n) for n in limits),
        rootfs.layered(policy),
    ]
    if "fuse" in wanted:
        words += [host.fuse_overlayfs or "", *pieces.lowers(policy, host)]
    else:
        words.append("")
    with Descriptors() as fds:
        namespace = fds.own(os.open(tenant.user_namespace(), os.O_RDONLY | os.O_CLOEXEC))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            command = area_command(PACKAGE_PARENT, theirs.fileno(), namespace, words)
            with starting("area", "start its sidecar"):
                process = start(command, (theirs.fileno(), namespace))
    received: list[int] = []
    try:
        await trio.lowlevel.wait_readable(ours)
        data, received, _, _ = socket.recv_fds(ours, MESSAGE, 2, socket.MSG_CMSG_CLOEXEC)
        if data == READY and len(received) < len(wanted):
            raise no_room("the root of a job")
        if data != READY or len(received) != len(wanted):
            stage = "fuse_overlayfs" if "fuse" in wanted else "area"
            hint = 'root.driver = "kernel" or "tmpfs" does without it' if "fuse" in wanted else ""
            said = data.decode(errors="replace") or "it ended"
            raise LaunchError(stage, 0, 0, said, hint=hint)
    except BaseException:
        for descriptor in received:
            os.close(descriptor)
        ours.close()
        with trio.CancelScope(shield=True):
            await reap(process)
        raise
    return Area(tenant, process, ours, dict(zip(wanted, received, strict=True)))
