"""The netkeeper: makes a tenant's network namespaces, and starts what serves them.

Theory of operation. A network with a way out has two sides: a namespace that belongs to the tenant,
so that no job has a capability over it, and a program on the host's side (slirp4netns, pasta) that
carries packets between the two. The netkeeper has joined the tenant's user namespace and stayed in
the host's network, so it can have both. It serves requests over a SEQPACKET socket, one JSON object
a packet, descriptors beside it:

    supervisor                                     netkeeper
      | - {"make": id, "group"} --------------------->|
      | <- {"made": id}; namespace, five sockets -----|
      | - {"start": id, "argv", "api"}; namespace --->|
      | <- {"started": id} ---------------------------|
      | - {"publish": id, "requests"} --------------->|
      | <- {"published": id, "why"} ------------------|
      | - {"end": id} ------------------------------->|
      | <- {"ended": id, "status", "said"} -----------|   at any time

The sockets: netlink for routes, for what happens to interfaces, for nf_tables, for who listens;
and UDP, bound where the sandbox looks for its name server. The supervisor configures and filters
through them: whoever owns a user namespace may (capabilities(7)). Programs started here die with
the netkeeper, and that ends with its socket or with its supervisor.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import select
import signal
import socket
import struct

from sandboxd.linux import mount
from sandboxd.linux.namespaces import CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUSER, join, unshare
from sandboxd.linux.packets import receive
from sandboxd.linux.process import become_subreaper, die_with_parent

TYPE_CHECKING = False  # as typing's, which is not imported for it
if TYPE_CHECKING:
    from typing import Any, NoReturn

NETLINK_ROUTE, NETLINK_SOCK_DIAG, NETLINK_NETFILTER = 0, 4, 12
RTMGRP_LINK = 1
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
AREA = "/tmp"  # in a mount namespace of our own
SYSCTLS = (
    ("/proc/sys/net/ipv6/conf/default/accept_ra", "0"),  # only addresses and routes that are given
    # Nobody else could have the same address there; and pasta takes the unspecified one, from
    # which this is asked, for the sandbox's.
    ("/proc/sys/net/ipv6/conf/default/dad_transmits", "0"),
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),  # who is to be reached at 80 is no root
    ("/proc/sys/net/ipv4/ip_forward", "0"),  # a copy of the host's (devconf_inherit_init_net)
    ("/proc/sys/net/ipv4/conf/all/proxy_arp", "0"),
    ("/proc/sys/net/ipv4/conf/default/proxy_arp", "0"),
)
MORE = {
    "": (),
    # On the bridge nobody is asked for the address that he has on the way out.
    "member": (("/proc/sys/net/ipv4/conf/all/arp_ignore", "1"),),
    # It would have an address of its own.
    "bridge": (("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"),),
}
"""By what the namespace has to do with a group."""
PATIENCE = 2.0


class Program:
    """One that we started: its pid, its pidfd, the pipe that is its stderr, and its network."""

    __slots__ = ("namespace", "pid", "pidfd", "said")

    def __init__(self, pid: int, said: int, namespace: str) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.said = said
        self.namespace = namespace

    def close(self) -> str:
        """Its last words."""
        try:
            words = os.read(self.said, 65536)
        except BlockingIOError:
            words = b""
        os.close(self.said)
        os.close(self.pidfd)
        _forget(self.namespace)
        return words.decode(errors="replace").strip()[-500:]


def main(number: int, namespace: int, server: str) -> NoReturn:
    """Serve the socket `number`; `server` is HOST:PORT, where sandboxes have their name server."""
    link = socket.socket(fileno=number)
    try:
        _become(namespace)
    except OSError as error:
        _tell(link, {"failed": f"netkeeper: {error.strerror}"})
        os._exit(1)
    _tell(link, {"ready": True})
    programs: dict[str, Program] = {}
    try:
        _serve(link, server, programs)
    except OSError:  # nobody hears us any more
        pass
    finally:
        for program in programs.values():
            os.kill(program.pid, signal.SIGKILL)
    os._exit(0)


def _become(namespace: int) -> None:
    join(namespace, CLONE_NEWUSER)
    try:  # noqa: SIM105  contextlib would be loaded for this alone
        os.setgroups([])
    except PermissionError:
        pass  # denied for good where an ordinary user wrote the map (user_namespaces(7))
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    os.close(namespace)
    unshare(CLONE_NEWNS)
    mount.mount("", "/", "", mount.MS_REC | mount.MS_PRIVATE)
    mount.mount("tmpfs", AREA, "tmpfs", mount.MS_NOSUID | mount.MS_NODEV, "mode=0700")
    die_with_parent(signal.SIGKILL)
    become_subreaper()
    os.setsid()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _tell(link: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    link.sendmsg([json.dumps(message).encode()], rights)


def _serve(link: socket.socket, server: str, programs: dict[str, Program]) -> None:
    poll = select.poll()
    poll.register(link, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        for name, program in list(programs.items()):
            if program.pidfd in ready:
                poll.unregister(program.pidfd)
                del programs[name]
                _, status = os.waitpid(program.pid, 0)
                said = program.close()
                code = os.waitstatus_to_exitcode(status)
                _tell(link, {"ended": name, "status": code, "said": said})
        _reap_strays(programs)
        if link.fileno() not in ready:
            continue
        data, fds = receive(link)
        if not data:
            return
        request = json.loads(data)
        try:
            _carry_out(link, request, fds, (server, programs, poll))
        finally:
            for fd in fds:
                os.close(fd)


def _reap_strays(programs: dict[str, Program]) -> None:
    """What the programs left us: their own children are ours when they are dead."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or any(one.pid == found.si_pid for one in programs.values()):
            return
        os.waitpid(found.si_pid, 0)


def _carry_out(
    link: socket.socket,
    request: dict[str, Any],
    fds: list[int],
    state: tuple[str, dict[str, Program], select.poll],
) -> None:
    server, programs, poll = state
    if "make" in request:
        _make(link, request["make"], server, request["group"])
    elif "start" in request:
        name = request["start"]
        try:
            program = _started(name, request["argv"], fds[0])
        except OSError as error:
            _tell(link, {"ended": name, "status": 127, "said": str(error)})
            return
        programs[name] = program
        poll.register(program.pidfd, select.POLLIN)
        _tell(link, {"started": name}, (program.pidfd,))
    elif "publish" in request:
        name = request["publish"]
        why = _publish(f"{AREA}/{name}", request["requests"], programs.get(name))
        _tell(link, {"published": name, "why": why})
    elif "end" in request and (ending := programs.get(request["end"])) is not None:
        os.kill(ending.pid, signal.SIGKILL)


def _make(link: socket.socket, name: str, server: str, group: str) -> None:
    """In a process of its own: there is no way back from another's network namespace."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        unshare(CLONE_NEWNET)
        up((*SYSCTLS, *MORE[group]))
        fds = (os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC), *_sockets(server))
        _tell(link, {"made": name}, fds)
    except OSError as error:
        _tell(link, {"made": name, "why": str(error)})
    finally:
        os._exit(0)


def up(sysctls: tuple[tuple[str, str], ...]) -> None:
    """Loopback, and what else a network is by default (ip-sysctl.rst)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        fcntl.ioctl(one, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))
    for path, value in sysctls:
        try:
            with open(path, "w", encoding="ascii") as file:
                file.write(value)
        except OSError:
            pass  # no IPv6, or /proc/sys is read-only: the filter holds with any address


def _sockets(server: str) -> tuple[int, ...]:
    """SOCK_NONBLOCK is for the supervisor, which waits for none of them."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    routes = socket.socket(socket.AF_NETLINK, kind, NETLINK_ROUTE)
    links = socket.socket(socket.AF_NETLINK, kind, NETLINK_ROUTE)
    links.bind((0, RTMGRP_LINK))
    tables = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
    listeners = socket.socket(socket.AF_NETLINK, kind, NETLINK_SOCK_DIAG)
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    names.setblocking(False)
    host, _, port = server.rpartition(":")
    names.bind((host, int(port)))
    return tuple(one.detach() for one in (routes, links, tables, listeners, names))


def _named(name: str, namespace: int) -> str:
    """A path of the namespace, as namespaces(7) has it, that nobody else sees.

    No descriptor is inherited for it: pasta closes what it does not know before it looks.
    """
    path = f"{AREA}/{name}.net"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    mount.mount(f"/proc/self/fd/{namespace}", path, flags=mount.MS_BIND)
    return path


def _forget(path: str) -> None:
    mount.umount(path, mount.MNT_DETACH)
    os.unlink(path)


def _started(name: str, argv: list[str], namespace: int) -> Program:
    path = _named(name, namespace)
    try:
        return start(argv, path)
    except OSError:
        _forget(path)
        raise


def start(argv: list[str], namespace: str) -> Program:
    """Start what carries packets; `{netns}` in argv is the path of the namespace."""
    said, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    words = [word.replace("{netns}", namespace) for word in argv]
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _execute(words, theirs, parent)
        finally:
            os._exit(127)
    os.close(theirs)
    return Program(pid, said, namespace)


def _execute(words: list[str], said: int, parent: int) -> None:
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    nothing = os.open("/dev/null", os.O_RDWR)
    for target, source in ((0, nothing), (1, nothing), (2, said)):
        os.dup2(source, target)
    try:
        os.execv(words[0], words)
    except OSError as error:
        os.write(2, f"{words[0]}: {error.strerror}".encode())


def _publish(path: str, requests: list[dict[str, Any]], program: Program | None) -> str:
    """Tell slirp4netns over its API socket (slirp4netns(1)); why it did not do it, or nothing."""
    for request in requests:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
            one.settimeout(PATIENCE)
            try:
                _connect(one, path, program)
                one.sendall(json.dumps(request).encode())
                one.shutdown(socket.SHUT_WR)
                answer = json.loads(one.makefile("rb").read() or b"{}")
            except (OSError, ValueError) as error:
                return str(error)
        if "return" not in answer:
            return str(answer.get("error", {}).get("desc", "refused"))
    return ""


def _connect(one: socket.socket, path: str, program: Program | None) -> None:
    """It listens a moment after it is ready; inotify would come with more code than this."""
    poll = select.poll()
    if program is not None:
        poll.register(program.pidfd, select.POLLIN)
    for _ in range(int(PATIENCE * 1000)):
        try:
            one.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if poll.poll(1):
                break
        else:
            return
    one.connect(path)
