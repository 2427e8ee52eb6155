"""The network: loopback of its own and nothing else; kinds of sockets."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.escape.attack import attack, every_policy, plan, with_inet, without


@dataclass(frozen=True)
class Services:
    """What listens on the host: a TCP and a UDP port, an abstract socket and one with a path."""

    tcp: int
    udp: int
    abstract: str
    path: str
    heard: socket.socket


@pytest.fixture
def services() -> Iterator[Services]:
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory())  # short, unlike tmp_path
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        udp.setblocking(False)
        port = tcp.getsockname()[1]
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0sandboxd-service-{port}")
        abstract.listen()
        path = stack.enter_context(socket.socket(socket.AF_UNIX))
        path.bind(f"{place}/service")
        path.listen()
        name = f"\0sandboxd-service-{port}"
        yield Services(port, udp.getsockname()[1], name, f"{place}/service", udp)


def reaching(services: Services) -> str:
    return f"""
def connected(kind, address):
    one = socket.socket(*kind)
    one.settimeout(1)
    one.connect(address)

tcp, udp = (socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM)
found["tcp"] = tried(connected, tcp, ("127.0.0.1", {services.tcp}))
found["abstract"] = tried(connected, (socket.AF_UNIX,), {services.abstract!r})
found["path"] = tried(connected, (socket.AF_UNIX,), {services.path!r})
found["through proc"] = tried(connected, (socket.AF_UNIX,), "/proc/1/root" + {services.path!r})
socket.socket(*udp).sendto(b"packet", ("127.0.0.1", {services.udp}))
"""


@with_inet
async def test_services_of_the_host(policy: str, services: Services) -> None:
    """The host's loopback, abstract sockets and socket files: CVE-2024-29021 (Judge0, SSRF).

    Countermeasures: a network namespace of its own; a mount namespace; Landlock.
    """
    with socket.create_connection(("127.0.0.1", services.tcp)):  # it is there to be reached
        found = await attack(policy, reaching(services))
    assert found["tcp"] == found["abstract"] == "ECONNREFUSED"
    assert found["path"] in ("ENOENT", "EACCES")
    assert found["through proc"] in ("ENOENT", "EACCES")
    with pytest.raises(BlockingIOError):
        services.heard.recv(64)


OUTSIDE = """
addresses = ("169.254.169.254", "10.0.2.2", "10.0.2.3", "192.168.0.1", "172.17.0.1", "1.1.1.1",
             "255.255.255.255", "224.0.0.1")
for address in addresses:
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    found[address] = tried(one.sendto, b"packet", (address, 53))
    found["tcp " + address] = tried(socket.create_connection, (address, 80), 1)
for address in ("2606:4700:4700::1111", "fe80::1%lo", "ff02::1%lo", "fd00:ec2::254"):
    one = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    found[address] = tried(one.sendto, b"packet", socket.getaddrinfo(address, 53)[0][4])
found = {"answers": found, "interfaces": [name for _, name in socket.if_nameindex()]}
found["routes"] = [line for line in reads("/proc/self/net/route").splitlines()[1:] if line]
found["device"] = tried(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).setsockopt,
                        socket.SOL_SOCKET, 25, b"eth0")
"""


@with_inet
async def test_packets_out(policy: str) -> None:
    """Metadata services, gateways of slirp4netns and Docker, broadcast, link-local: exfiltration.

    Countermeasure: no interface but lo, no route.
    """
    found = await attack(policy, OUTSIDE)
    assert found["interfaces"] == ["lo"]
    assert found["routes"] == []
    answers = found["answers"]
    own = {answers.pop("fe80::1%lo", "ENETUNREACH"), answers.pop("ff02::1%lo", "ENETUNREACH")}
    assert own <= {"ok", "ENETUNREACH", "EADDRNOTAVAIL"}  # link-local on lo is one's own
    assert set(answers.values()) <= {"ENETUNREACH", "EACCES", "ETIMEDOUT", "EHOSTUNREACH"}, answers


CONFIGURING = """
def changed(message_type, flags, body):
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    header = struct.pack("IHHII", 16 + len(body), message_type, flags | 5, 1, 0)
    link.send(header + body)
    error = struct.unpack_from("i", link.recv(4096), 16)[0]
    if error:
        raise OSError(-error, "netlink")

RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE, NLM_F_CREATE = 16, 20, 24, 0x400
kind = struct.pack("HH", 9, 1) + b"dummy" + bytes(3)
dummy = struct.pack("BxHiII", 0, 0, 0, 0, 0) + struct.pack("HH", 4 + len(kind), 18) + kind
down = struct.pack("BxHiII", 0, 0, 1, 0, 1)
address = struct.pack("BBBBI", 2, 8, 0, 0, 1) + struct.pack("HH4s", 8, 2, bytes((10, 0, 0, 1)))
found["link"] = tried(changed, RTM_NEWLINK, NLM_F_CREATE, dummy)
found["down"] = tried(changed, RTM_NEWLINK, 0, down)
found["address"] = tried(changed, RTM_NEWADDR, NLM_F_CREATE, address)
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for name, request in (("flags", 0x8914), ("mtu", 0x8922), ("name", 0x8923), ("address io", 0x8916),
                      ("bridge", 0x89a0), ("tun", 0x400454ca)):
    found[name] = tried(fcntl.ioctl, one, request, struct.pack("16s24x", b"lo"))
found["mark"] = tried(one.setsockopt, socket.SOL_SOCKET, 36, 1)
found["forced"] = tried(one.setsockopt, socket.SOL_SOCKET, 33, 1 << 30)
found["low port"] = tried(one.bind, ("127.0.0.1", 80))
found["transparent"] = tried(one.setsockopt, socket.IPPROTO_IP, 19, 1)
"""


@with_inet
async def test_changing_its_network(policy: str) -> None:
    """Interfaces, addresses, marks: netdevice(7), rtnetlink(7). CAP_NET_ADMIN is how most of the

    bugs of nftables are reached (CVE-2022-34918, CVE-2023-32233, CVE-2024-1086). Countermeasure:
    the namespace belongs to the tenant, in which no job has a capability.
    """
    found = await attack(policy, CONFIGURING)
    assert set(found.values()) <= {"EPERM", "EACCES", "EINVAL", "EOPNOTSUPP", "ENOTTY"}, found
    assert {found[name] for name in ("link", "down", "address", "flags", "mark")} == {"EPERM"}
    assert found["low port"] == "EACCES"


KINDS = """
AF_PACKET, AF_ALG, AF_VSOCK, AF_NETLINK = 17, 38, 40, 16
SOCK_RAW, upper = 3, 1 << 32
for name, family in (("key", 15), ("packet", 17), ("rds", 21), ("can", 29), ("tipc", 30),
                     ("bluetooth", 31), ("alg", 38), ("nfc", 39), ("vsock", 40), ("kcm", 41),
                     ("qipcrtr", 42), ("smc", 43), ("xdp", 44), ("mctp", 45), ("ax25", 3),
                     ("ipx", 4), ("appletalk", 5), ("x25", 9), ("decnet", 12), ("llc", 26)):
    for kind in (1, 2, 3, 5):
        found[f"{name} {kind}"] = tried(call, "socket", family, kind, 0)
        found[f"{name} {kind} upper"] = tried(call, "socket", family | upper, kind | upper, upper)
        found[f"{name} {kind} pair"] = tried(call, "socketpair", family, kind, 0, bytes(8))
for family in (2, 10):
    for protocol in (0, 1, 2, 47, 58, 89, 255):
        found[f"raw {family} {protocol}"] = tried(call, "socket", family, SOCK_RAW, protocol)
        cloexec = SOCK_RAW | 0o2004000
        found[f"raw {family} {protocol} cloexec"] = tried(call, "socket", family, cloexec, protocol)
    for kind, protocol in ((1, 132), (5, 132), (6, 33), (2, 136), (1, 262), (2, 115), (10, 0)):
        found[f"inet {family} {kind} {protocol}"] = tried(call, "socket", family, kind, protocol)
for protocol in NETLINK:
    found[f"netlink {protocol}"] = tried(call, "socket", AF_NETLINK, SOCK_RAW, protocol)
    found[f"netlink {protocol} upper"] = tried(call, "socket", AF_NETLINK | upper, 2, protocol)
"""
# sock_diag and generic netlink are for the policies that have use for ss and the like.
NETLINK = {"shell": sorted(set(range(1, 32)) - {4, 16})}


@every_policy
async def test_kinds_of_sockets(policy: str) -> None:
    """AF_ALG (CVE-2026-31431), AF_VSOCK (the hypervisor), AF_PACKET (CVE-2017-7308), raw sockets,

    netlink of nftables, audit and crypto (CVE-2022-34918), SCTP, DCCP (CVE-2017-6074), MPTCP:
    socket(2). Countermeasure: seccomp admits families, types and protocols by name, each by the
    lower half that the kernel looks at.
    """
    netlink = NETLINK.get(policy, list(range(1, 32)))
    body = KINDS.replace("for protocol in NETLINK:", f"for protocol in {netlink}:")
    found = await attack(policy, body)
    assert set(found.values()) == {"EAFNOSUPPORT"}, found


async def test_kinds_of_sockets_without_filter() -> None:
    """Without it there are all that the kernel was built with and wants no capability for."""
    body = KINDS.replace("for protocol in NETLINK:", "for protocol in range(1, 32):")
    found = await attack("base", body, weaken=without(plan.Filter))
    assert {found["netlink 12"], found["netlink 15"], found["netlink 16"]} & {"ok"}
    assert found["raw 2 255"] == found["packet 3"] == "EPERM"
