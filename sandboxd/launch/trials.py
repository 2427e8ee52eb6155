"""What can be tried on a machine: one function a capability, each run in a process of its own.

A trial returns what it found (JSON types) or raises Refused; what it mounts, starts or sets dies
with its process. Namespaces are entered before it runs: see launch/prober.py.

Half the time of a probe is the start of an interpreter, so only modules that are cheap to import
are: no dataclasses, pathlib or typing (each 3 to 7 ms).
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from types import MappingProxyType

from sandboxd.linux import namespaces as ns
from sandboxd.linux.mount import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC, mount
from sandboxd.linux.process import load_filter, no_new_privileges

TYPE_CHECKING = False  # as typing's, which is not imported for it
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Any

    Request = Mapping[str, Any]

_HOUR = 3600
_PATIENCE = 10.0
_ANSWER = 7
_MACHINE = os.uname().machine
_GETPPID = {"x86_64": 110, "aarch64": 173}.get(_MACHINE)


class Refused(Exception):
    """The kernel, or a tool, said no. `errno` is None where a tool did."""

    def __init__(self, why: str, errno: int | None = None) -> None:
        super().__init__(why)
        self.errno = errno


class step:
    """A block in which an OSError becomes a Refused that names what was being done."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: object, where: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            raise Refused(f"{self.what}: {error.strerror}", error.errno) from None


def run_tool(argv: list[str]) -> None:
    """Runs a program to its end; if it fails, the last line it wrote is the reason."""
    output = os.memfd_create("output", os.MFD_CLOEXEC)
    actions = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
    name = os.path.basename(argv[0])
    with step(name):
        pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=actions)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = os.pread(output, 65536, 0).decode(errors="replace").strip()
    os.close(output)
    if status:
        raise Refused(said.rpartition("\n")[2] or f"{name}: exit status {status}")


def write(path: str, text: str) -> None:
    """To a file that is there already."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def scratch() -> str:
    """A tmpfs in our mount namespace, over a directory that every machine has."""
    with step("make mounts private"):
        mount("", "/", flags=MS_REC | MS_PRIVATE)
    where = next(path for path in ("/tmp", "/run", "/mnt", "/") if os.path.isdir(path))
    with step(f"mount a tmpfs on {where}"):
        mount("tmpfs", where, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    return where


def user_namespace(_: Request) -> object:
    """Every kind of namespace that a job gets, and a mount, which AppArmor may refuse later."""
    for name, flag in (
        ("mount", ns.CLONE_NEWNS),
        ("pid", ns.CLONE_NEWPID),
        ("ipc", ns.CLONE_NEWIPC),
        ("uts", ns.CLONE_NEWUTS),
        ("net", ns.CLONE_NEWNET),
        ("cgroup", ns.CLONE_NEWCGROUP),
    ):
        with step(f"unshare the {name} namespace"):
            ns.unshare(flag)
    scratch()
    return True


def id_maps(request: Request) -> object:
    """Become the last id of the range: the maps are there and setgroups(2) is not denied."""
    last_uid = max(first + count - 1 for first, _, count in request["maps"]["uids"])
    last_gid = max(first + count - 1 for first, _, count in request["maps"]["gids"])
    with step("setgroups"):
        os.setgroups([])
    with step(f"become {last_uid}:{last_gid}"):
        os.setresgid(last_gid, last_gid, last_gid)
        os.setresuid(last_uid, last_uid, last_uid)
    return True


def _write_everywhere(merged: str) -> None:
    """Copy a file up, then remove its directory and make it again: that one must be opaque."""
    with step("change a file of the lower layer"):
        write(f"{merged}/d/f", "changed")
    with step("make a removed directory again (user.* xattrs on tmpfs: Linux 6.6)"):
        os.unlink(f"{merged}/d/f")
        os.rmdir(f"{merged}/d")
        os.mkdir(f"{merged}/d")
        os.close(os.open(f"{merged}/d/g", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    if os.listdir(f"{merged}/d") != ["g"]:
        raise Refused("a removed directory shows its old files when it is made again")


def _layers() -> tuple[str, str, str]:
    """Where to mount, the lower layers, and upper and work directory as options."""
    base = scratch()
    for name in ("lower", "lower/d", "upper", "work", "merged"):
        os.mkdir(f"{base}/{name}")
    os.close(os.open(f"{base}/lower/d/f", os.O_CREAT | os.O_WRONLY))
    lowers = f"{base}/lower" + (":/usr" if os.path.isdir("/usr") else "")
    return f"{base}/merged", f"lowerdir={lowers}", f"upperdir={base}/upper,workdir={base}/work"


def overlay(_: Request) -> object:
    """overlayfs with an upper layer on tmpfs, in a user namespace (Linux 5.11, 459c7c565ac3).

    Before 6.6 (2daf18a7884d) tmpfs has no user.* extended attributes: it mounts, and the first
    opaque directory gives EIO.
    """
    merged, lower, upper = _layers()
    with step("mount an overlay with userxattr"):
        mount("overlay", merged, "overlay", 0, f"userxattr,{lower},{upper}")
    _write_everywhere(merged)
    return True


def fuse_overlayfs(request: Request) -> object:
    """Mount it, as the ids that a tenant has: for root they are not the owner of the device."""
    with step("open /dev/fuse"):
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    merged, lower, upper = _layers()
    run_tool([request["fuse_overlayfs"], "-o", f"{lower},{upper}", merged])
    if not os.path.ismount(merged):
        raise Refused("fuse-overlayfs: says it mounted, but nothing is there")
    _write_everywhere(merged)
    return True


def time_namespace(_: Request) -> object:
    """time_namespaces(7), Linux 5.6: a child in it sees another uptime."""
    with step("unshare the time namespace"):
        ns.unshare(ns.CLONE_NEWTIME)
    with step("write /proc/self/timens_offsets"):
        write("/proc/self/timens_offsets", f"boottime {_HOUR} 0\n")
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    with step("enter the time namespace"):
        pid = os.fork()
    if pid == 0:
        os._exit(time.clock_gettime(time.CLOCK_BOOTTIME) < before + _HOUR)
    if os.waitpid(pid, 0)[1]:
        raise Refused("the offset of a time namespace has no effect")
    return True


def seccomp(_: Request) -> object:
    """A filter that answers getppid(2) with ENOSYS, and one call that notices."""
    with step("set no_new_privs"):
        no_new_privileges()
    allow = struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)
    program = allow
    if _GETPPID is not None:
        load = struct.pack("<HBBI", 0x20, 0, 0, 0)
        is_getppid = struct.pack("<HBBI", 0x15, 0, 1, _GETPPID)
        program = load + is_getppid + struct.pack("<HBBI", 0x06, 0, 0, 0x50000 | 38) + allow
    with step("load a seccomp filter"):
        load_filter(program)
    if _GETPPID is not None and os.getppid() >= 0:
        raise Refused("a seccomp filter has no effect")
    return True


def _program() -> bytes:
    """The smallest static ELF that exits with _ANSWER (elf(5))."""
    number, code = {
        "x86_64": (62, b"\xbf\x07\0\0\0\xb8\xe7\0\0\0\x0f\x05"),
        "aarch64": (183, b"\xe0\x00\x80\xd2\xc8\x0b\x80\xd2\x01\x00\x00\xd4"),
    }[_MACHINE]
    at, headers = 0x400000, 64 + 56
    size = headers + len(code)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    ehdr = struct.pack("<HHIQQQIHHHHHH", 2, number, 1, at + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    phdr = struct.pack("<IIQQQQQQ", 1, 5, 0, at, at, size, size, 4096)
    return ident + ehdr + phdr + code


def memfd_exec(_: Request) -> object:
    """Execute a memfd: vm.memfd_noexec=2 refuses it (Linux 6.3, 105ff5339f49), as an LSM may."""
    if _MACHINE not in ("x86_64", "aarch64"):
        raise Refused(f"no program for {_MACHINE}")
    with step("memfd_create"):
        try:
            memfd = os.memfd_create("program", os.MFD_CLOEXEC | 0x10)  # MFD_EXEC
        except OSError:
            memfd = os.memfd_create("program", os.MFD_CLOEXEC)  # before Linux 6.3
    os.write(memfd, _program())
    with step("fork"):
        pid = os.fork()
    if pid == 0:
        try:
            os.execve(memfd, ["program"], {})
        except OSError as error:
            os._exit(error.errno or 1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != _ANSWER:
        why = os.strerror(code) if code > 0 else f"signal {-code}"
        raise Refused(f"execute a memfd: {why}", code if code > 0 else None)
    return True


def proc(_: Request) -> object:
    """A proc for a pid namespace of its own; refused where parts of the visible one are masked.

    mount_too_revealing() in fs/namespace.c: user_namespaces(7) calls it "fully visible".
    """
    base = scratch()
    kinds = []
    reason: Refused | None = None
    for kind, data in (("whole", ""), ("subset", "subset=pid")):
        os.mkdir(f"{base}/{kind}")
        try:
            with step("mount proc"):
                mount("proc", f"{base}/{kind}", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, data)
            kinds.append(kind)
        except Refused as error:
            reason = error
    if not kinds and reason:
        raise reason
    return kinds


def tun(_: Request) -> object:
    """A TAP device of a network namespace, as slirp4netns makes it (tuntap.rst).

    As the ids that a tenant has: for root they are not the owner of the device.
    """
    with step("open /dev/net/tun"):
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    with step("TUNSETIFF"):
        # IFF_TAP | IFF_NO_PI
        fcntl.ioctl(device, 0x400454CA, struct.pack("16sH22x", b"tap0", 0x1002))
    return True


NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12


def nftables(request: Request) -> object:
    """The filter of a network with a way out, as the supervisor loads it (nft(8))."""
    return _told(NETLINK_NETFILTER, request["filter"], "load a filter of nftables")


def net_bytes(request: Request) -> object:
    """The same with a quota (nft_quota)."""
    return _told(NETLINK_NETFILTER, request["filter_bytes"], "load a filter with a quota")


def net_rate(request: Request) -> object:
    """The same with a limit of bytes a second (nft_limit), and a shaper (tc-tbf(8))."""
    _told(NETLINK_NETFILTER, request["filter_rate"], "load a filter with a limit")
    return _told(NETLINK_ROUTE, request["shaper"], "shape an interface")


def _told(family: int, message: str, what: str) -> object:
    """Ask something of the kernel over netlink."""
    import socket

    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with (
        step("open a netlink socket"),
        socket.socket(socket.AF_NETLINK, kind, family) as link,
    ):
        link.settimeout(_PATIENCE)
        with step(what):
            link.send(bytes.fromhex(message))
            error = struct.unpack_from("=i", link.recv(65536), 16)[0]  # struct nlmsgerr
            if error:
                raise OSError(-error, os.strerror(-error))
    return True


def bridge(request: Request) -> object:
    """A bridge and a pair of interfaces, as the supervisor makes them for a group (veth(4))."""
    import socket

    with step("open its own network namespace"):
        own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(own, request["namespace"])
    with (
        step("open a socket of rtnetlink"),
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as link,
    ):
        link.settimeout(_PATIENCE)
        for what, message in zip(("bridge", "veth"), request["bridge"], strict=True):
            with step(f"make an interface of kind {what}"):
                link.send(bytes.fromhex(message))
                error = struct.unpack_from("=i", link.recv(65536), 16)[0]  # struct nlmsgerr
                if error:
                    raise OSError(-error, os.strerror(-error))
    return True


def slirp4netns(request: Request) -> object:
    return _carry(request, "slirp4netns")


def pasta(request: Request) -> object:
    return _carry(request, "pasta")


def _carry(request: Request, kind: str) -> object:
    from sandboxd.launch.carriers import carry  # with sockets, which no other trial needs

    return carry(request["carriers"][kind], request["interface"])


def into_cgroup(request: Request) -> object:
    """CLONE_INTO_CGROUP (Linux 5.7, ef2c41cf38a7) asks for the permission that a move needs."""
    with step(f"open {request['cgroup']}"):
        leaf = os.open(request["cgroup"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with step("clone3 into a cgroup"):
        pid = ns.fork_into_cgroup(leaf)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return True


class Trial:
    """`namespaces` beside a user namespace; None: no namespace at all.

    `ranges`: with the id maps of the request instead of the caller's single id.
    """

    __slots__ = ("namespaces", "ranges", "run")

    def __init__(
        self,
        run: Callable[[Request], object],
        namespaces: int | None = 0,
        *,
        ranges: bool = False,
    ) -> None:
        self.run = run
        self.namespaces = namespaces
        self.ranges = ranges


TRIALS: Mapping[str, Trial] = MappingProxyType(
    {
        "user_namespace": Trial(user_namespace),
        "id_maps": Trial(id_maps, 0, ranges=True),
        "overlay": Trial(overlay, ns.CLONE_NEWNS),
        "fuse_overlayfs": Trial(fuse_overlayfs, ns.CLONE_NEWNS | ns.CLONE_NEWPID, ranges=True),
        "time_namespace": Trial(time_namespace),
        "proc": Trial(proc, ns.CLONE_NEWNS | ns.CLONE_NEWPID),
        "tun": Trial(tun, ns.CLONE_NEWNET, ranges=True),
        "slirp4netns": Trial(slirp4netns, ns.CLONE_NEWNS, ranges=True),
        "pasta": Trial(pasta, ns.CLONE_NEWNS, ranges=True),
        "nftables": Trial(nftables, ns.CLONE_NEWNET),
        "bridge": Trial(bridge, ns.CLONE_NEWNET),
        "net_bytes": Trial(net_bytes, ns.CLONE_NEWNET),
        "net_rate": Trial(net_rate, ns.CLONE_NEWNET),
        "seccomp": Trial(seccomp, None),
        "memfd_exec": Trial(memfd_exec, None),
        "into_cgroup": Trial(into_cgroup, None),
    }
)
