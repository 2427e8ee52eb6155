"""fuse-overlayfs as a sidecar: one process pair per sandbox whose root is layered by it."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass

import trio

from sandboxd.compile import pieces
from sandboxd.errors import LaunchError
from sandboxd.script.command import fuse_command
from sandboxd.supervise.descriptors import Descriptors
from sandboxd.supervise.processes import reap
from sandboxd.supervise.tenants import PACKAGE_PARENT, Prepared, Tenant

READY = b"ready"


@dataclass(slots=True)
class FuseRoot:
    """A mounted overlay: `mount` is its descriptor, owned by this."""

    process: subprocess.Popen[bytes]
    link: socket.socket
    mount: int

    async def close(self) -> None:
        """End its processes and wait for that."""
        os.close(self.mount)
        self.link.close()
        with trio.CancelScope(shield=True):
            await reap(self.process)


def start(command: list[str], keep: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """Not through trio: its child has to outlive this task's scope, and starts in microseconds."""
    return subprocess.Popen(
        command, pass_fds=keep, cwd="/", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


async def open_fuse_root(tenant: Tenant, prepared: Prepared) -> FuseRoot:
    """Mount a fresh overlay over the policy's lower directories, in the tenant's user namespace."""
    policy, host = prepared.compiled.policy, prepared.host
    lowers = pieces.lowers(policy, host)
    limits = [policy.limits.disk, policy.limits.inodes]
    words = [host.fuse_overlayfs or "", *("" if n is None else str(n) for n in limits), *lowers]
    with Descriptors() as fds:
        namespace = fds.own(os.open(tenant.user_namespace(), os.O_RDONLY | os.O_CLOEXEC))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            command = fuse_command(PACKAGE_PARENT, theirs.fileno(), namespace, words)
            process = start(command, (theirs.fileno(), namespace))
    try:
        await trio.lowlevel.wait_readable(ours)
        data, received, _, _ = socket.recv_fds(ours, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        if data != READY or len(received) != 1:
            raise LaunchError("fuse_overlayfs", 0, 0, data.decode(errors="replace") or "it ended",
                              hint='root.driver = "kernel" or "tmpfs" does without it')  # fmt: skip
    except BaseException:
        ours.close()
        with trio.CancelScope(shield=True):
            await reap(process)
        raise
    return FuseRoot(process, ours, received[0])
