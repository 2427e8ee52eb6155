"""A way out that leads to whom the policy allows: every other way is tried, over both helpers.

The Internet is tests/network/world.py: whoever is reached there says who he is. `reach` and
`resolve` are those of tests/network/conftest.py. One filter stands in the way of most, so what it
lets through is shown as well; where it does not stand, the test says what does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.network.conftest import World, helper, nothing_left, world
from tests.network.host import LOCAL_PORT
from tests.network.places import CLOSED, METADATA, METADATA6, OTHER, PRIVATE, PUBLIC, PUBLIC6

__all__ = ["helper", "nothing_left", "world"]

ALLOW = ("packages.example.org:443", "*.mirror.example.net:80")
REFUSED = {"ECONNREFUSED", "EPERM", "EACCES", "EHOSTUNREACH"}
UNREACHED = REFUSED | {"ENETUNREACH", "EINVAL", "ETIMEDOUT", "EADDRNOTAVAIL"}


@dataclass(frozen=True)
class Attempt:
    """What is tried, under which entries; every value of `found` must be one of `ends`."""

    body: str
    allow: tuple[str, ...] = ALLOW
    ends: frozenset[Any] = frozenset(REFUSED)


def both(*addresses: str, port: int = 443, wait: int = 5) -> str:
    return (
        f"for address in {addresses!r}:\n"
        f" for kind in ('tcp', 'udp'):\n"
        f"  found[address + kind] = reach(address, {port}, kind, wait={wait})\n"
    )


def names(*wanted: str) -> str:
    return (
        f"for name in {wanted!r}:\n for family in (0, 2, 10):\n"
        "  found[f'{name} {family}'] = resolve(name, family)\n"
    )


NOBODY = frozenset({"NONAME", "NODATA"})
EVERYBODY = ("*",)
UNREACHABLE = frozenset(UNREACHED)

ATTEMPTS: dict[str, Attempt] = {
    "an address written down": Attempt(both(OTHER, "1.1.1.1", PUBLIC6)),
    "the address of an allowed name before it was asked for": Attempt(both(PUBLIC)),
    "another port of an allowed name": Attempt(
        "found['80'] = resolve('packages.example.org', 2) and reach('203.0.113.10', 80)\n"
        "found['22'] = reach('203.0.113.10', 22)"
    ),
    "the port of another name": Attempt(
        "resolve('a.mirror.example.net', 2)\nfound['443'] = reach('203.0.113.11', 443)"
    ),
    "a name that is not allowed": Attempt(names("evil.example.com", "example.org"), ends=NOBODY),
    "the name above a wildcard": Attempt(names("mirror.example.net"), ends=NOBODY),
    "names that only look alike": Attempt(
        names("xpackages.example.org", "packages.example.org.evil.com", "evilmirror.example.net",
              "packages-example.org", "a.packages.example.org"),
        ends=NOBODY,
    ),
    "an alias of an allowed name": Attempt(names("alias.example.org"), ends=NOBODY),
    "where an alias of an allowed name leads, by its own name": Attempt(
        "resolve('to-evil.example.org')\n" + names("evil.example.com"),
        ("to-evil.example.org:443",), NOBODY,
    ),
    "where it leads, at another port": Attempt(
        "resolve('to-evil.example.org')\n" + both(OTHER, port=80), ("to-evil.example.org:443",)
    ),
    "rebinding: an allowed name with private addresses": Attempt(
        names("inside.example.org"), ("inside.example.org:*",), NOBODY
    ),
    "rebinding by an alias": Attempt(
        names("to-metadata.example.org"), ("to-metadata.example.org:*",), NOBODY
    ),
    "rebinding to addresses that hold others": Attempt(
        names("mapped.example.org"), ("mapped.example.org:*",), NOBODY
    ),
    "rebinding to the host's own addresses": Attempt(
        names("host.example.org"), ("host.example.org:*",), NOBODY
    ),
    "rebinding while all is allowed": Attempt(
        names("inside.example.org", "host.example.org", "mapped.example.org"), EVERYBODY, NOBODY
    ),
    "private addresses while all is allowed": Attempt(both(*CLOSED), EVERYBODY, UNREACHABLE),
    "metadata services": Attempt(both(METADATA, METADATA6, port=80), EVERYBODY, UNREACHABLE),
    "the host's own addresses while all is allowed": Attempt(
        both("198.51.100.2", "203.0.113.200", "192.168.5.5", "2001:db8:1::2", port=LOCAL_PORT),
        EVERYBODY, UNREACHABLE,
    ),
    "the host's loopback as the gateway": Attempt(
        both("10.0.2.2", "fd00::2", port=LOCAL_PORT), EVERYBODY, UNREACHABLE
    ),
    "the host's loopback, past the filter": Attempt(  # the helper stands in the way
        both("10.0.2.2", "10.0.2.3", "fd00::2", "fd00::3", port=LOCAL_PORT, wait=1),
        ("10.0.2.0/24:*", "[fd00::]:*", "[fd00::2]:*", "[fd00::3]:*"), UNREACHABLE,
    ),
    "the name server of the host, past the filter": Attempt(
        both("10.0.2.3", "10.0.2.2", "fd00::3", port=53, wait=1),
        ("10.0.2.0/24:*", "[fd00::3]:*"), UNREACHABLE,
    ),
    "the host's loopback as loopback": Attempt(
        both("127.0.0.1", "127.0.0.2", "::1", port=LOCAL_PORT), EVERYBODY,
    ),
    "other name servers": Attempt(both("8.8.8.8", "203.0.113.53", "1.1.1.1", port=53)),
    "names over TLS and HTTPS": Attempt(both("8.8.8.8", "1.1.1.1", port=853) + both("1.1.1.1")),
    "IPv4 by an IPv6 socket": Attempt(
        both("::ffff:203.0.113.11", "::ffff:10.1.0.5"), ends=UNREACHABLE
    ),
    "private IPv4 by an IPv6 socket": Attempt(
        both("::ffff:10.1.0.5", "::10.1.0.5"), EVERYBODY, UNREACHABLE
    ),
    "without connecting": Attempt(
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "found['sendto'] = tried(one.sendto, b'x', ('203.0.113.11', 443))\n"
        "found['sendmsg'] = tried(one.sendmsg, [b'x'], [], 0, ('203.0.113.11', 443))\n"
        "resolve('packages.example.org', 2)\none.connect(('203.0.113.10', 443))\n"
        "found['elsewhere'] = tried(one.sendto, b'x', ('203.0.113.11', 443))"
    ),
    "TCP fast open": Attempt(
        "one = socket.socket()\n"
        "found['data in SYN'] = tried(one.sendto, b'x', 0x20000000, ('203.0.113.11', 443))\n"
        "one = socket.socket()\none.setsockopt(6, 30, 1)\n"
        "found['at connect'] = tried(one.connect, ('203.0.113.11', 443))"
    ),
    "a socket connected once more": Attempt(
        "resolve('packages.example.org', 2)\n"
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "one.connect(('203.0.113.10', 443)); one.send(b'x'); one.recv(99)\n"
        "one.connect(('203.0.113.11', 443))\nfound['again'] = tried(one.send, b'x')"
    ),
    "multicast and broadcast": Attempt(
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)\n"
        "for address in ('224.0.0.251', '224.0.0.252', '239.255.255.250', '255.255.255.255',\n"
        "                '10.0.2.255'):\n"
        " found[address] = tried(one.sendto, b'x', (address, 5353))\n"
        "six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)\n"
        "index = socket.if_nametoindex('tap0')\n"
        "for address in ('ff02::fb', 'ff02::1', 'fe80::2', 'fe80::1'):\n"
        " found[address] = tried(six.sendto, b'x', (address, 5353, 0, index))\n",
        EVERYBODY, UNREACHABLE,
    ),
    "echo requests": Attempt(
        "def ping(family, protocol, address):\n"
        " one = socket.socket(family, socket.SOCK_DGRAM, protocol)\n"
        " one.sendto(bytes([8 if protocol == 1 else 128]) + bytes(7) + b'exfiltrated', address)\n"
        "found['4'] = tried(ping, 2, 1, ('203.0.113.10', 0))\n"
        "found['6'] = tried(ping, 10, 58, ('2001:db8:2::10', 0))",
        EVERYBODY,
    ),
    "protocols of their own": Attempt(
        "for kind, protocol in ((3, 255), (3, 1), (3, 6), (2, 136), (1, 132), (6, 33), (1, 262)):\n"
        " for family in (2, 10):\n"
        "  found[f'{family} {kind} {protocol}'] = tried(socket.socket, family, kind, protocol)\n"
        "found['packet'] = tried(socket.socket, 17, 3, 0x300)",
        EVERYBODY, frozenset({"EAFNOSUPPORT"}),
    ),
    "the filter itself": Attempt(
        "for protocol in (6, 9, 10, 12, 13, 15, 16):\n"
        " found[f'netlink {protocol}'] = tried(socket.socket, 16, 3, protocol)",
        ends=frozenset({"EAFNOSUPPORT"}),
    ),
    "source routes": Attempt(
        "resolve('packages.example.org', 2)\n"
        "def routed(option):\n"
        " one = socket.socket()\n one.settimeout(3)\n"
        " hop = socket.inet_aton('203.0.113.11')\n"
        " one.setsockopt(0, 4, bytes([option, 7, 4]) + hop + b'\\0')\n"
        " one.connect(('203.0.113.11', 443))\n"
        "found['loose'] = tried(routed, 131)\nfound['strict'] = tried(routed, 137)",
        ends=UNREACHABLE,
    ),
    "addresses and marks that are not its own": Attempt(
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "found['transparent'] = tried(one.setsockopt, 0, 19, 1)\n"
        "found['mark'] = tried(one.setsockopt, 1, 36, 1)\n"
        "found['name server'] = tried(one.bind, ('127.0.0.53', 53))\n"
        "one.setsockopt(1, 15, 1)\n"
        "found['name server, shared'] = tried(one.bind, ('127.0.0.53', 53))\n"
        "found['of the other side'] = tried(one.bind, ('10.0.2.2', 4000))",
        EVERYBODY, frozenset({"EPERM", "EADDRINUSE", "EADDRNOTAVAIL"}),
    ),
    "large datagrams": Attempt(
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for size in (1, 1400, 9000, 65507):\n"
        " found[str(size)] = tried(one.sendto, bytes(size), ('203.0.113.11', 443))"
    ),
    "fragments": Attempt(
        "for family, address in ((2, '203.0.113.11'), (10, '2001:db8:2::10')):\n"
        " for size in (2000, 65000):\n"
        "  one = socket.socket(family, socket.SOCK_DGRAM)\n"
        "  if family == 10: one.setsockopt(41, 24, 1280)\n"  # IPV6_MTU
        "  found[f'{address} {size}'] = tried(one.sendto, bytes(size), (address, 443))"
    ),
    "headers and sources by ancillary data": Attempt(  # RFC 3542; ip(7)
        "six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)\n"
        "four = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "there = socket.inet_pton(10, '2001:db8:2::10')\n"
        "meta = socket.inet_pton(10, 'fd00:ec2::254')\n"
        "for kind in (0, 2, 3, 4):\n"
        " route = bytes([17, 2, kind, 1]) + bytes(4) + meta\n"
        " found[f'route {kind}'] = tried(six.sendmsg, [b'x'], [(41, 57, route)], 0,\n"
        "                               ('2001:db8:2::10', 443))\n"
        "for name, number in (('hop', 54), ('destination', 59), ('before', 55)):\n"
        " option = bytes([17, 0, 1, 4]) + bytes(4)\n"
        " found[name] = tried(six.sendmsg, [b'x'], [(41, number, option)], 0,\n"
        "                     ('2001:db8:2::10', 443))\n"
        "found['source 6'] = tried(six.sendmsg, [b'x'], [(41, 50, there + bytes(4))], 0,\n"
        "                          ('2001:db8:2::10', 443))\n"
        "spoofed = bytes(4) + socket.inet_aton('10.0.2.2') + bytes(4)\n"
        "found['source 4'] = tried(four.sendmsg, [b'x'], [(0, 8, spoofed)], 0,\n"
        "                          ('203.0.113.10', 443))",
        EVERYBODY, UNREACHABLE,
    ),
    "interfaces and routes": Attempt(
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for name, request in (('flags', 0x8914), ('address', 0x8916), ('route', 0x890b),\n"
        "                      ('delete', 0x890c), ('mtu', 0x8922), ('hardware', 0x8924)):\n"
        " found[name] = tried(fcntl.ioctl, one, request, struct.pack('16s104x', b'tap0'))\n",
        EVERYBODY, frozenset({"EPERM"}),
    ),
    "TUN and other namespaces": Attempt(
        "for path in ('/dev/net/tun', '/proc/1/ns/net'):\n"
        " found[path] = tried(os.open, path, os.O_RDWR)\n"
        "for name, flags in (('net', 0x40000000), ('user', 0x10000000)):\n"
        " found[name] = tried(call, 'unshare', flags)",
        EVERYBODY, frozenset({"ENOENT", "EACCES", "EPERM"}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ATTEMPTS)
def test_attempt(world: World, helper: str, what: str) -> None:
    """CVE-2024-29021 (Judge0), slirp4netns#315, security.md: nobody who was not allowed answers."""
    attempt = ATTEMPTS[what]
    outcome = world.run(attempt.body, helper=helper, allow=attempt.allow)
    assert outcome.found
    assert {key: end for key, end in outcome.found.items() if end not in attempt.ends} == {}


def test_what_is_allowed_is_reached(world: World, helper: str) -> None:
    """The other side of all of the above."""
    body = (
        "found['name'] = resolve('packages.example.org', 0)\n"
        "found['case'] = resolve('PACKAGES.Example.ORG', 2)\n"
        "found['wild'] = resolve('a.mirror.example.net', 2)\n"
        "found['mixed'] = resolve('mixed.example.org', 2)\n"
        "found['alias'] = resolve('to-evil.example.org', 2)\n"
        + both(PUBLIC, PUBLIC6)
        + f"found['wild there'] = reach({OTHER!r}, 80)\n"
        f"found['private'] = reach({PRIVATE!r}, 22)\n"
    )
    allow = (*ALLOW, "mixed.example.org:443", "to-evil.example.org:8443", "10.1.0.0/16:22")
    outcome = world.run(body, helper=helper, allow=allow)
    assert outcome.found == {
        "name": [PUBLIC6, PUBLIC], "case": [PUBLIC], "wild": [OTHER], "alias": [OTHER],
        "mixed": sorted([PUBLIC, PRIVATE]),  # which has an entry of its own, at its own port
        f"{PUBLIC}tcp": f"{PUBLIC} 443", f"{PUBLIC}udp": f"{PUBLIC} 443 x",
        f"{PUBLIC6}tcp": f"{PUBLIC6} 443", f"{PUBLIC6}udp": f"{PUBLIC6} 443 x",
        "wild there": f"{OTHER} 80", "private": f"{PRIVATE} 22",
    }  # fmt: skip
    assert outcome.refused == {}


def test_a_name_does_not_open_a_private_address(world: World, helper: str) -> None:
    """`mixed` has one whose own entry is for another port: the name's port stays closed."""
    body = f"resolve('mixed.example.org')\nfound['there'] = reach({PRIVATE!r}, 443)"
    allow = ("mixed.example.org:443", "10.1.0.0/16:22")
    assert world.run(body, helper=helper, allow=allow).found == {"there": "ECONNREFUSED"}


def test_only_addresses_are_told(world: World, helper: str) -> None:
    """TXT, NULL and the like carry data both ways (DNS tunnels); updates and transfers change."""
    body = """
def asked(name, kind, flags=0x100, family=1):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.settimeout(5)
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    head = struct.pack(">6H", 7, flags, 1, 0, 0, 0)
    one.sendto(head + labels + struct.pack(">BHH", 0, kind, family), ("127.0.0.53", 53))
    answer = one.recv(600)
    return [answer[3] & 15, struct.unpack_from(">H", answer, 6)[0]]
for kind in (2, 5, 10, 12, 15, 16, 33, 64, 65, 252, 255):
    found[f"type {kind}"] = asked("packages.example.org", kind)
found["update"] = asked("packages.example.org", 6, 0x2800)
found["chaos"] = asked("version.bind", 16, family=3)
found["address"] = asked("packages.example.org", 1)
found["many"] = asked("many.example.org", 1)
found["long"] = asked(".".join(["a" * 63] * 3), 1)
"""
    found = world.run(body, helper=helper, allow=(*ALLOW, "many.example.org:1")).found
    assert {key: end for key, end in found.items() if key.startswith("type")} == {
        f"type {kind}": [0, 0] for kind in (2, 5, 10, 12, 15, 16, 33, 64, 65, 252, 255)
    }
    assert (found["update"], found["chaos"], found["long"]) == ([4, 0], [4, 0], [3, 0])
    assert found["address"] == [0, 1]
    assert found["many"][0] == 0
    assert 20 <= found["many"][1] <= 31  # over TCP, and as many as fit into 512 bytes


def test_a_flood_of_questions_is_held_back(world: World, helper: str) -> None:
    """They wait in the sandbox's own socket; the run ends as ever, and tells of all it heard."""
    body = """
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
head = struct.pack(">6H", 7, 0x100, 1, 0, 0, 0)
for number in range(20000):
    name = f"x{number}".encode()
    one.sendto(head + bytes([len(name)]) + name + b"\\0\\0\\1\\0\\1", ("127.0.0.53", 53))
    one.sendto(os.urandom(40), ("127.0.0.53", 53))
found["through"] = True
"""
    outcome = world.run(body, helper=helper, allow=ALLOW)
    assert outcome.found == {"through": True}
    told = outcome.refused
    assert len(told) <= 257
    assert len(told) < 257 or told[None] > 0


def test_who_was_refused_is_told(world: World, helper: str) -> None:
    """Addresses and names, how often, and the entry that would have let them through."""
    body = (
        f"for _ in range(3): reach({OTHER!r}, 80)\nreach({PUBLIC6!r}, 22, 'udp')\n"
        "resolve('evil.example.com', 2); found['done'] = 1"
    )
    outcome = world.run(body, helper=helper, allow=ALLOW)
    told = [one for one in outcome.result["violations"] if one["kind"] == "network"]
    assert {one["name"]: one["count"] for one in told} == {
        "evil.example.com": 1, f"{OTHER}:80/tcp": 3, f"[{PUBLIC6}]:22/udp": 1,
    }  # fmt: skip
    assert told[0]["rule"].endswith('network.allow = ["evil.example.com:PORT"]')
    assert {one["rule"].rpartition(" = ")[2] for one in told[1:]} == {
        f'["{OTHER}:80/tcp"]', f'["[{PUBLIC6}]:22/udp"]',
    }  # fmt: skip
    assert outcome.result["status"] == "ok"


def test_a_scan_is_told_in_sum(world: World, helper: str) -> None:
    body = (
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for port in range(1, 1001): found['end'] = tried(one.sendto, b'', ('203.0.113.11', port))"
    )
    refused = world.run(body, helper=helper, allow=ALLOW).refused
    assert len(refused) == 257
    assert sum(refused.values()) == 1000
    assert refused[None] == 1000 - 256
