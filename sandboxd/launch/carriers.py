"""Whether slirp4netns or pasta works here: started as the netkeeper starts it, until it is ready.

That it is installed says little: pasta wants a default route, and a profile of AppArmor may keep
either from a network namespace that it did not make itself, as Debian 12's does with pasta.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket

from sandboxd.launch import netkeeper
from sandboxd.launch.trials import Refused, scratch, step
from sandboxd.linux import mount
from sandboxd.linux.namespaces import CLONE_NEWNET, unshare
from sandboxd.linux.process import die_with_parent

TYPE_CHECKING = False  # as typing's, which is not imported for it
if TYPE_CHECKING:
    from typing import NoReturn

PATIENCE = 10.0
READY, UP = b"ready", b"up"


def carry(argv: list[str], interface: str) -> bool:
    """Until it has made the interface in a network namespace of ours; Refused with its words."""
    namespace = f"{scratch()}/trial.net"
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _watch(namespace, interface, theirs)
    os.close(theirs)
    try:
        if (said := os.read(ours, 4096)) != READY:
            raise Refused(said.decode(errors="replace") or "no network namespace")
        with step(argv[0]):
            program = netkeeper.start(argv, namespace)
        _wait_up(program, ours)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ours)
    return True


def _wait_up(program: netkeeper.Program, ours: int) -> None:
    """Refused if it ends before its interface is there; it is gone in any case."""
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    poll.register(program.pidfd, select.POLLIN)
    ready = {fd for fd, _ in poll.poll(PATIENCE * 1000)}
    ended = program.pidfd in ready and ours not in ready
    os.kill(program.pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(program.pid, 0)[1])
    words = program.close()
    if ended:
        raise Refused(words.rpartition("\n")[2] or f"exit status {status}")
    if not ready:
        raise Refused(f"no interface within {PATIENCE:g} s", errno.EAGAIN)


def _watch(path: str, interface: str, tell: int) -> NoReturn:
    """A process in a new network namespace, which gets a name; says when the interface is there."""
    try:
        die_with_parent(signal.SIGKILL)
        unshare(CLONE_NEWNET)
        netkeeper.up(netkeeper.SYSCTLS)
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        with socket.socket(socket.AF_NETLINK, kind, netkeeper.NETLINK_ROUTE) as links:
            links.bind((0, netkeeper.RTMGRP_LINK))
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            mount.mount("/proc/self/ns/net", path, flags=mount.MS_BIND)
            os.write(tell, READY)
            while interface not in (name for _, name in socket.if_nameindex()):
                links.recv(1 << 16)
            os.write(tell, UP)
            signal.pause()
    except OSError as error:
        os.write(tell, f"a network namespace: {error.strerror}".encode())
    finally:
        os._exit(1)
