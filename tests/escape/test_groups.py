"""Groups: what is on one bridge stays there, and nobody on it is somebody else."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import Any

import pytest
import trio

from sandboxd.compile import netlink, nftables
from sandboxd.compile.egress import Egress
from sandboxd.group import Group, Member
from sandboxd.host import Place
from sandboxd.supervise.netkeeper import ask
from sandboxd.supervise.seat import Seat
from tests.escape.attack import Job, Runner, achieved, open_runner, python, with_inet
from tests.network.conftest import TOOLS

SERVE = """
server = socket.create_server(("0.0.0.0", 80)); server.settimeout(30)
one, peer = server.accept(); one.sendall(b"from " + peer[0].encode()); one.close()
"""


def member(body: str, *after: str, policy: Any = "base", ready: str = "started") -> Member:
    job = Job(argv=python(TOOLS + body), policy=policy)
    return Member(job=job, after=after, ready=ready)


async def together(members: dict[str, Member], **fields: Any) -> dict[str, dict[str, Any]]:
    async with open_runner(slots=len(members)) as runner:
        found = await runner.run_group(Group(members=members, **fields))
    return {name: achieved(result) for name, result in found.items()}


async def test_two_groups_with_the_same_addresses() -> None:
    """Same subnet, same names, same tenant; the flood of one is not heard in the other."""
    listens = (
        "import threading\n"
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.bind(('0.0.0.0', 9))\n"
        "one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)\n"
        "server = socket.create_server(('0.0.0.0', 80)); server.settimeout(30)\n"
        "got = server.accept()[0]; found['who'] = got.recv(100).decode()\n"
        "one.settimeout(0.2); heard = set()\n"
        "try:\n"
        " while True: heard.add(one.recv(100).decode())\n"
        "except TimeoutError: pass\n"
        "found['heard'] = sorted(heard)\n"
    )
    floods = (
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)\n"
        "for who in ('192.168.100.255', '255.255.255.255', '192.168.100.2', '224.0.0.1'):\n"
        " for _ in range(200): tried(one.sendto, WHO, (who, 9))\n"
        "other = socket.create_connection(('192.168.100.2', 80)); other.sendall(WHO)\n"
        "for _ in range(300): tried(socket.create_connection, ('192.168.100.2', 81), 0.1)\n"
    )
    results: dict[str, dict[str, dict[str, Any]]] = {}

    async def group(runner: Runner, who: str) -> None:
        members = {
            "a": member(listens, ready="tcp:80"),
            "b": member(f"WHO = {who.encode()!r}\n{floods}", "a"),
        }
        found = await runner.run_group(Group(members=members))
        results[who] = {name: achieved(result) for name, result in found.items()}

    async with open_runner(slots=4) as runner, trio.open_nursery() as nursery:
        for who in ("first", "second"):
            nursery.start_soon(group, runner, who)
    for who in ("first", "second"):
        assert results[who]["a"] == {"who": who, "heard": [who]}


SPOOF = """
SIOCSIFADDR, SIOCSIFFLAGS, SIOCADDRT, SIOCSIFHWADDR = 0x8916, 0x8914, 0x890B, 0x8924
SIOCSARP, IP_PKTINFO = 0x8955, 8
ETH_P_ALL, ETH_P_ARP = 0x0003, 0x0806

def sockets(*kind):
    socket.socket(*kind).close()

found["raw ARP"] = tried(sockets, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP))
found["cooked"] = tried(sockets, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
found["raw IP"] = tried(sockets, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
found["raw ICMPv6"] = tried(sockets, socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
found["nf_tables"] = tried(sockets, socket.AF_NETLINK, socket.SOCK_RAW, 12)

def netlink():
    "libc needs this socket to find its addresses: it may ask, and change nothing."
    one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    one.send(ADD_ADDRESS)
    error = -struct.unpack_from("=i", one.recv(4096), 16)[0]
    if error:
        raise OSError(error, "netlink")
found["address by netlink"] = tried(netlink)
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
address = struct.pack("16sHH4s8x", b"eth0", socket.AF_INET, 0, socket.inet_aton("192.168.100.99"))
found["address"] = tried(fcntl.ioctl, one, SIOCSIFADDR, address)
found["down"] = tried(fcntl.ioctl, one, SIOCSIFFLAGS, struct.pack("16sh22x", b"eth0", 0))
hardware = struct.pack("16sH6s", b"eth0", 1, b"\\2abcde")
found["MAC"] = tried(fcntl.ioctl, one, SIOCSIFHWADDR, hardware)
found["ARP entry"] = tried(fcntl.ioctl, one, SIOCSARP, bytes(68))
found["route"] = tried(fcntl.ioctl, one, SIOCADDRT, bytes(120))
for name, option in (("transparent", 19), ("hdrincl", 3)):
    found[name] = tried(one.setsockopt, socket.IPPROTO_IP, option, 1)
found["promiscuous"] = tried(one.setsockopt, 263, 1, struct.pack("iHH8s", 2, 1, 0, bytes(8)))

def freebind():
    "A source that is not here (ip(7), IP_FREEBIND needs no capability)."
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.setsockopt(socket.IPPROTO_IP, 15, 1)
    one.bind(("192.168.100.99", 0))
    one.sendto(b"spoofed", ("192.168.100.2", 9))

def freebind6(to):
    "ipv6(7); here the kernel asks nobody whose the source is."
    one = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    one.setsockopt(socket.IPPROTO_IPV6, 78, 1)
    one.bind(("fe80::99", 0, 0, socket.if_nametoindex("eth0")))
    one.sendto(b"spoofed", (to, 9, 0, socket.if_nametoindex("eth0")))

def pktinfo():
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    info = struct.pack("i4s4s", 0, socket.inet_aton("192.168.100.99"), bytes(4))
    with_info = [(socket.IPPROTO_IP, IP_PKTINFO, info)]
    one.sendmsg([b"spoofed"], with_info, 0, ("192.168.100.2", 9))

found["freebind"] = tried(freebind)
found["freebind6"] = tried(freebind6, "ff02::1")
found["freebind6 unicast"] = tried(freebind6, "fe80::1")
found["pktinfo"] = tried(pktinfo)
one.sendto(b"honest", ("192.168.100.2", 9))
"""
HEARS = """
one = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); one.bind(("::", 9)); one.settimeout(30)
heard = {}
while "honest" not in heard:
    data, peer = one.recvfrom(100)
    heard[data.decode()] = peer[0]
found["heard"] = heard
"""


ADD = netlink.add_address(2, IPv4Address("192.168.100.99"), 24)


@with_inet
async def test_nobody_is_somebody_else(policy: str) -> None:
    """ARP and router advertisements (RFC 826, 4861) want a packet or raw socket: CAP_NET_RAW, and
    the filter. Addresses want CAP_NET_ADMIN. Sources that are not one's own: the kernel looks."""
    members = {
        "hears": member(HEARS, ready="udp:9", policy=policy),
        "spoofs": member(f"ADD_ADDRESS = {ADD!r}\n{SPOOF}", "hears", policy=policy),
    }
    found = await together(members)
    assert found["hears"] == {"heard": {"honest": "::ffff:192.168.100.3"}}
    tried = found["spoofs"]
    assert "ok" not in tried.values(), tried


ROUTER = """
for who in ("192.168.100.1", "192.168.100.254", "127.0.0.53", "10.0.2.2", "10.0.2.3"):
    for port in (22, 53, 80):
        found[f"{who} {port}"] = reach(who, port, wait=0.3)
def asked(name, server=("127.0.0.53", 53)):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.settimeout(1)
    labels = b"".join(bytes([len(x)]) + x for x in name) + b"\\0"
    one.sendto(b"ab\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0" + labels + b"\\0\\1\\0\\1", server)
    data = one.recv(512)
    return [data[3] & 15, data[7]]
found["DNS"] = {
    "other group": asked([b"db", b"other"]),
    "below": asked([b"x", b"db", b"shop"]),
    "dot in a label": asked([b"db.shop"]),
    "NUL": asked([b"db\\0", b"shop"]),
    "case": asked([b"DB", b"sHoP"]),
    "the group": asked([b"shop"]),
    "root": asked([]),
    "twice": asked([b"db", b"shop", b"shop"]),
}
try: found["of the other member"] = asked([b"db", b"shop"], ("192.168.100.2", 53))
except TimeoutError: found["of the other member"] = "ETIMEDOUT"
except OSError as error: found["of the other member"] = errno.errorcode[error.errno]
"""


async def test_there_is_nothing_in_the_middle() -> None:
    """No gateway, no name server of another's; and names mean what hosts(5) says."""
    waits = "server = socket.create_server(('0.0.0.0', 80)); server.settimeout(30)\nserver.accept()"
    members = {
        "db": member(waits, ready="tcp:80"),
        "hostile": member(ROUTER + "found['end'] = reach('db', 80)", "db"),
    }
    found = (await together(members, name="shop"))["hostile"]
    assert found.pop("end") == ""
    nobody, somebody = [3, 0], [0, 1]
    assert found.pop("DNS") == {
        "other group": nobody, "below": nobody, "dot in a label": nobody, "NUL": nobody,
        "case": somebody, "the group": nobody, "root": nobody, "twice": nobody,
    }  # fmt: skip
    assert found.pop("of the other member") in ("ECONNREFUSED", "ETIMEDOUT")
    own = {name: found.pop(name) for name in list(found) if name.startswith("127.0.0.53")}
    assert set(own.values()) == {"ECONNREFUSED"}
    assert set(found.values()) == {"ECONNREFUSED", "ENETUNREACH"}  # by its own filter, or no route


@pytest.mark.parametrize("share", ["bridge", "network"])
async def test_members_see_nothing_else_of_each_other(share: Any) -> None:
    """Processes, abstract sockets, files, System V memory, signals: as between any two jobs."""
    has = (
        "one = socket.socket(socket.AF_UNIX); tried(one.bind, '\\0sandboxd-group'); one.listen()\n"
        "open('/tmp/secret', 'w').write('x')\n" + SERVE
    )
    looks = (
        "one = socket.socket(socket.AF_UNIX)\n"
        "found['abstract'] = tried(one.connect, '\\0sandboxd-group')\n"
        "found['file'] = reads('/tmp/secret')\n"
        "found['processes'] = len([name for name in os.listdir('/proc') if name.isdigit()])\n"
        "found['signal'] = tried(os.kill, -1, 0)\n"
        "found['there'] = reach('has', 80)\n"
    )
    members = {"has": member(has, ready="tcp:80"), "looks": member(looks, "has")}
    found = (await together(members, share=share))["looks"]
    assert found.pop("there").startswith("from ")
    assert found.pop("processes") == 2  # its init and itself
    assert found.pop("signal") == "ESRCH"
    assert found.pop("file") == "ENOENT"
    assert found.pop("abstract") in ("ECONNREFUSED", "EPERM")


RTM_GETNETCONF, FORWARDING, PROXY, ALL = 82, 2, 5, -1


async def test_a_namespace_forwards_nothing_whatever_the_host_does() -> None:
    """A new one has the host's settings (Documentation/admin-guide/sysctl/net.rst,
    devconf_inherit_init_net), and hosts of containers forward."""
    place = Place(name="a", domain="group", hosts=(("a", "192.168.100.2"),))
    async with open_runner(slots=1) as runner:
        seat = Seat(place, None, trio.lowlevel.checkpoint)
        ground = runner._known.ready(Job(argv=("true",)), None, seat).home
        network = await (await ground.netkeeper()).bare(Egress("", ""), place, "member")
        try:
            body = struct.pack("=B3xHHi", 2, 8, 1, ALL)  # struct netconfmsg, NETCONFA_IFINDEX
            request = netlink.message(RTM_GETNETCONF, netlink.NLM_F_ACK, body, 1)
            answer = ask(network.routes, request)[0]
            found = dict(netlink.attributes(answer.body, 4))
            assert found[FORWARDING] == found[PROXY] == bytes(4)
        finally:
            await network.end()


def test_what_comes_from_the_bridge_goes_no_further() -> None:
    """A chain on forwarded packets that drops all, and one rule more, for those to the bridge."""
    beside = nftables.Beside(7, (IPv4Address("192.168.100.2"),))
    alone, together = (nftables.ruleset(Egress("", ""), (), one) for one in (None, beside))
    assert b"through\0" in together
    assert b"through\0" not in alone
    assert struct.pack("=I", 7) in together


FILLS = """
def send(address, *options):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for level, option, value in options:
        one.setsockopt(level, option, value)
    one.sendto(b"x", (address, 9))

device = (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
direct = (socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)
multicast = (socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("192.168.100.2"))
told = set()
for number in range(200):
    told.add(tried(send, f"11.0.0.{number}", device))
    told.add(tried(send, f"11.0.1.{number}", device, direct))
    told.add(tried(send, f"192.168.100.{number + 10}", direct))
    told.add(tried(send, f"224.9.9.{number}", multicast))
found["told"] = sorted(told)
found["mine"] = neighbours()
"""
NEIGHBOURS = f"""
def neighbours():
    "How many entries of the table this namespace has, and how many are not for good."
    one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    one.send({netlink.message(30, netlink.NLM_F_DUMP, bytes([2]) + bytes(11), 1)!r})
    states, over = [], False
    while not over:
        data = one.recv(65536)
        while data:
            size, kind = struct.unpack_from("=IH", data)
            over = over or kind == 3
            if kind == 28:
                states.append(struct.unpack_from("=H", data, 24)[0])
            data = data[size + -size % 4:]
    return [len(states), len([one for one in states if one != 0x80])]
"""


@with_inet
async def test_the_table_of_neighbours_is_not_filled(policy: str) -> None:
    """It is the whole machine's (arp(7), gc_thresh3), and the host's own neighbours are in it.

    RTM_GETNEIGH tells those of one's own namespace.
    """
    others = [f"other{number}" for number in range(3)]
    reaching = "".join(f"reach('{name}', 81, wait=0.2)\n" for name in others)
    members = {"hostile": member(NEIGHBOURS + reaching + FILLS, policy=policy)}
    members |= {name: member("pass", policy=policy) for name in others}
    found = (await together(members))["hostile"]
    assert "ok" not in found["told"]
    every, counted = found["mine"]
    assert every - counted == 3  # the other members, for good
    assert counted <= 2  # loopback's own
