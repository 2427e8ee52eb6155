"""The sidecar of a sandbox: mounts what it will write to, and a root by fuse-overlayfs over that.

Theory of operation. It joins the tenant's user namespace, so that what it mounts belongs to that,
and has a mount namespace of its own, so that nobody else sees it. What it mounts goes to the
supervisor as descriptors (open_tree(2)), and from there to the sandbox:

    supervisor                                  sidecar
      | <- READY: area [, root] | what failed ----|
      | - ALIVE --------------------------------->|   any number of times
      | <- ALIVE | what happened to it -----------|   also unasked, when fuse-overlayfs ended

The area is a tmpfs with the limits of the run, or a directory on disk. Everything that the run
writes is in it, the upper layer of fuse-overlayfs too: so one limit holds for the sum. Without
fuse-overlayfs there is nothing to stay for, and the sidecar ends. With it, it stays: when the
supervisor closes its end, or dies, it kills fuse-overlayfs and ends, and if it is killed itself
the kernel kills fuse-overlayfs with it. With the last mount gone the kernel ends the connection,
and nothing is left.
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

READY, ALIVE = b"ready", b"alive"
PATIENCE = 10.0
TOP = "/tmp"  # in a mount namespace of our own
AREA, ROOT = f"{TOP}/area", f"{TOP}/root"


def main(number: int, namespace: int, words: list[str]) -> NoReturn:
    """words: directory ("" is a tmpfs), its size and inodes ("" is any), where in the area the
    upper layer is, fuse-overlayfs ("" is none), lowers, the topmost first.
    """
    link = socket.socket(fileno=number)
    server: subprocess.Popen[bytes] | None = None
    try:
        directory, size, inodes, upper, program, *lowers = words
        _enter(namespace)
        sources = _mount_area(directory, _options(size, inodes), lowers)
        mounts = [mount.open_tree(AREA)]
        if program:
            server = _mount_root(program, sources, upper)
            mounts.append(mount.open_tree(ROOT))
        rights = array.array("i", mounts)
        link.sendmsg([READY], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        for descriptor in mounts:
            os.close(descriptor)
        if server is not None:
            _stay(link, server)
    except (OSError, RuntimeError) as error:
        _tell(link, f"{error}")
    finally:
        if server is not None:
            server.kill()
            server.wait()
    os._exit(0)


def _tell(link: socket.socket, what: str) -> None:
    try:  # noqa: SIM105  contextlib would be loaded for this alone
        link.send(what.encode(errors="replace")[:1000] or b"failed", socket.MSG_NOSIGNAL)
    except OSError:
        pass  # the supervisor is gone


def _options(size: str, inodes: str) -> str:
    """Of the tmpfs that is the area."""
    said = [("size", size), ("nr_inodes", inodes)]
    return ",".join(["mode=755", *(f"{name}={value}" for name, value in said if value)])


def _enter(namespace: int) -> None:
    if namespace >= 0:
        join(namespace, CLONE_NEWUSER)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    os.umask(0)
    unshare(CLONE_NEWNS)
    die_with_parent(signal.SIGKILL)
    mount.mount("", "/", "", mount.MS_REC | mount.MS_PRIVATE)


def _mount_area(directory: str, options: str, lowers: list[str]) -> list[int]:
    """The area, on a scaffold that counts for nobody; descriptors of what it hides."""
    # In this mount namespace, or it could not be bound; and before anything hides it.
    flags = os.O_PATH | os.O_DIRECTORY
    sources = [os.open(lower, flags) for lower in lowers]
    chosen = os.open(directory, flags) if directory else -1
    safe = mount.MS_NOSUID | mount.MS_NODEV
    mount.mount("tmpfs", TOP, "tmpfs", safe, "mode=755,size=1m")
    for path in (AREA, ROOT, f"{TOP}/lower"):
        os.mkdir(path)
    if chosen < 0:
        mount.mount("tmpfs", AREA, "tmpfs", safe, options)
    else:
        mount.mount(f"/proc/self/fd/{chosen}", AREA, "", mount.MS_BIND)
        os.close(chosen)
    return sources


def _mount_root(program: str, sources: list[int], upper: str) -> subprocess.Popen[bytes]:
    places = [f"{TOP}/lower/{number}" for number in range(len(sources))]
    for source, place in zip(sources, places, strict=True):
        os.mkdir(place)
        mount.mount(f"/proc/self/fd/{source}", place, "", mount.MS_BIND | mount.MS_REC)
        os.close(source)
    above = {name: f"{AREA}/{name}/{upper}".rstrip("/") for name in ("upper", "work")}
    for path in above.values():
        os.makedirs(path)
    # A write that does not fit has to say so, and not the close that nobody looks at: no writeback.
    own = f"upperdir={above['upper']},workdir={above['work']}"
    words = f"writeback=0,lowerdir={':'.join(places)},{own}"
    server = subprocess.Popen(
        [program, "-f", "-o", words, ROOT],
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
        while f" {ROOT} fuse".encode() not in mounts.read():
            if server.poll() is not None:
                reason = server.stderr.read() if server.stderr else b""
                raise RuntimeError(f"fuse-overlayfs: {reason.decode(errors='replace').strip()}")
            if time.monotonic() > deadline:
                server.kill()
                server.wait()
                raise RuntimeError("fuse-overlayfs did not mount")
            poll.poll(50)
            mounts.seek(0)


def _stay(link: socket.socket, server: subprocess.Popen[bytes]) -> None:
    """Answer until the supervisor lets go, or fuse-overlayfs ends."""
    ended = os.pidfd_open(server.pid)
    poll = select.poll()
    poll.register(link, select.POLLIN)
    poll.register(ended, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if link.fileno() in ready and link.recv(64) != ALIVE:
            return
        if ended in ready or not _is_connected():
            raise RuntimeError(f"fuse-overlayfs ended while it was needed{_how(server)}")
        link.send(ALIVE, socket.MSG_NOSIGNAL)


def _is_connected() -> bool:
    """The kernel lets go of the connection before its server can be waited for: ENOTCONN."""
    try:
        os.statvfs(ROOT)  # it is asked each time: nothing of this is remembered
    except OSError:
        return False
    return True


def _how(server: subprocess.Popen[bytes]) -> str:
    try:
        code = server.wait(1.0)
    except subprocess.TimeoutExpired:
        return ""
    return f" ({signal.Signals(-code).name})" if code < 0 else f" (exit status {code})"
