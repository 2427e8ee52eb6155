"""The sidecar of a root made by fuse-overlayfs: mounts it, hands the mount over, stays with it.

It joins the tenant's user namespace, so that what it mounts belongs to that, and has a mount
namespace of its own, so that nobody else sees it. fuse-overlayfs is its only child. The mount goes
to the supervisor as a descriptor (open_tree(2)), from there to the sandbox. When the supervisor
closes its end, or dies, the sidecar kills fuse-overlayfs and ends: with the last mount gone the
kernel ends the connection, and nothing is left.
"""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import subprocess
import time

from sandboxd.linux import mount
from sandboxd.linux.namespaces import CLONE_NEWNS, CLONE_NEWUSER, join, unshare
from sandboxd.linux.process import die_with_parent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

READY = b"ready"
PATIENCE = 10.0
AREA = "/tmp"  # in a mount namespace of our own


def main(number: int, namespace: int, words: list[str]) -> NoReturn:
    """words: program, size and inodes of the upper ("" is any), lowers, the topmost first."""
    program, size, inodes, *lowers = words
    link = socket.socket(fileno=number)
    server: subprocess.Popen[bytes] | None = None
    try:
        server = _mount(program, lowers, _options(size, inodes), namespace)
        rights = array.array("i", [mount.open_tree(f"{AREA}/root")])
        link.sendmsg([READY], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        link.recv(1)  # only ever the end
    except (OSError, RuntimeError) as error:
        link.send(f"{error}".encode(errors="replace")[:1000] or b"failed")
    finally:
        if server is not None:
            server.kill()
            server.wait()
    os._exit(0)


def _options(size: str, inodes: str) -> str:
    """Of the tmpfs that the upper lies on."""
    said = [("size", size), ("nr_inodes", inodes)]
    return ",".join(["mode=755", *(f"{name}={value}" for name, value in said if value)])


def _mount(
    program: str, lowers: list[str], options: str, namespace: int
) -> subprocess.Popen[bytes]:
    if namespace >= 0:
        join(namespace, CLONE_NEWUSER)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    unshare(CLONE_NEWNS)
    die_with_parent(signal.SIGKILL)
    mount.mount("", "/", "", mount.MS_REC | mount.MS_PRIVATE)
    # In this mount namespace, or it could not be bound; and before anything hides it.
    sources = [os.open(lower, os.O_PATH | os.O_DIRECTORY) for lower in lowers]
    mount.mount("tmpfs", AREA, "tmpfs", mount.MS_NOSUID | mount.MS_NODEV, options)
    for name in ("upper", "work", "root", "lower"):
        os.mkdir(f"{AREA}/{name}")
    places = [f"{AREA}/lower/{number}" for number in range(len(sources))]
    for source, place in zip(sources, places, strict=True):
        os.mkdir(place)
        mount.mount(f"/proc/self/fd/{source}", place, "", mount.MS_BIND | mount.MS_REC)
        os.close(source)
    words = f"lowerdir={':'.join(places)},upperdir={AREA}/upper,workdir={AREA}/work"
    server = subprocess.Popen(
        [program, "-f", "-o", words, f"{AREA}/root"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: die_with_parent(signal.SIGKILL),
    )  # fmt: skip
    _wait_mounted(server)
    return server


def _wait_mounted(server: subprocess.Popen[bytes]) -> None:
    """Until /proc/self/mounts changes to have it: that file polls POLLPRI (proc_pid_mounts(5))."""
    deadline = time.monotonic() + PATIENCE
    with open("/proc/self/mounts", "rb") as mounts:
        poll = select.poll()
        poll.register(mounts, select.POLLPRI)
        while f" {AREA}/root fuse".encode() not in mounts.read():
            if server.poll() is not None:
                reason = server.stderr.read() if server.stderr else b""
                raise RuntimeError(f"fuse-overlayfs: {reason.decode(errors='replace').strip()}")
            if time.monotonic() > deadline:
                server.kill()
                server.wait()
                raise RuntimeError("fuse-overlayfs did not mount")
            poll.poll(50)
            mounts.seek(0)
