"""A tenant for tests: a user namespace with a tmpfs in it, and a job that does things there."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

JOB_UID = 1005

# Runs as root of a new user and mount namespace. Whatever code it is sent, a process with the
# job's uid carries out in the working directory; the answer is what went wrong.
PROGRAM = """
import array, os, socket, stat, subprocess, sys
link, options, uid = socket.socket(fileno=int(sys.argv[1])), sys.argv[2], int(sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", options, "box", "/mnt"], check=True)
os.chown("/mnt", uid, uid)
box = os.open("/mnt", os.O_RDONLY | os.O_DIRECTORY)
link.sendmsg([b"box"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [box]))])
os.umask(0o022)
while code := link.recv(1 << 16):
    pid = os.fork()
    if pid == 0:
        os.chdir("/mnt")
        if uid:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        error = "done"
        try:
            exec(code)
        except BaseException as caught:
            error = repr(caught)
        link.send(error.encode())
        os._exit(0)
    os.waitpid(pid, 0)
"""


@dataclass(frozen=True)
class Tenant:
    """`namespace` and `box` are descriptors; files of the job belong to `uid` of the namespace."""

    process: subprocess.Popen[bytes]
    link: socket.socket
    namespace: int
    box: int
    uid: int

    @property
    def owner(self) -> tuple[int, int]:
        return self.uid, self.uid

    def run(self, code: str) -> None:
        """Let the job do this, in its working directory."""
        self.link.send(code.encode())
        assert self.link.recv(1 << 16).decode() == "done"

    def die(self) -> None:
        """Nothing is left of it but the descriptors."""
        self.process.kill()
        self.process.wait()


@contextmanager
def open_tenant(*, ids: bool = True, options: str = "mode=0700") -> Iterator[Tenant]:
    """With subordinate ids the job has a uid of its own, else it is root of its namespace."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    uid = JOB_UID if ids else 0
    unshare = ["unshare", "--map-root-user", *(["--map-auto"] if ids else []), "--mount"]
    with ours:
        with theirs:
            arguments = (str(theirs.fileno()), options, str(uid))
            process = subprocess.Popen(
                [*unshare, sys.executable, "-I", "-c", PROGRAM, *arguments],
                pass_fds=(theirs.fileno(),),
                cwd="/",
            )
        with process:
            try:
                _, ancillary, _, _ = ours.recvmsg(16, 64, socket.MSG_CMSG_CLOEXEC)
                (box,) = array.array("i", ancillary[0][2])
                namespace = os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    yield Tenant(process, ours, namespace, box, uid)
                finally:
                    os.close(namespace)
                    os.close(box)
            finally:
                process.kill()
