"""The filter of a network namespace, as messages to nf_tables; nothing is sent here.

    table inet sandboxd
      chain out (hook output, policy drop)    to lo, members of the group, answers, neighbours; by
                                              the gateway to who is allowed; what is left is
                                              written down and refused
      chain let                               tells connections apart and counts them
      chain pass                              counts bytes, accepts
      chain in (hook input)                   counts bytes; slows; notes who asks what is published
      chains full, spent, cut                 no more connections, no more bytes out, or in
      sets closed4, closed6                   what the public Internet is without
      sets names4_N, names6_N                 addresses that allowed names have; they time out
      sets askers4, askers6                   whom a published UDP port may answer; they time out
      set opened                              connections that there were
      sets denied4, denied6, full4, full6     who was refused, how often
      chain through (hook forward, drop)      only beside other members of a group, as is
      set members                             who is there

Every packet of a TCP connection but its first has ACK or RST: only SYN asks for anything, because
the programs that carry packets open a connection on SYN alone. So there is no connection tracking,
whose table is the whole machine's and which one job could fill. A SYN that is sent again has the
sequence number of the first, which the kernel chooses (RFC 6528), another connection from the same
port has not: so connections are counted, and not packets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_network

from sandboxd.compile import nfmessages as nf
from sandboxd.compile.carrying import GATEWAY, GATEWAY6
from sandboxd.compile.egress import (
    CLOSED,
    TCP,
    UDP,
    Egress,
    IPAddress,
    IPNetwork,
    Ports,
)
from sandboxd.compile.netlink import NLM_F_CREATE, attribute, nested, text

MOST_DENIED = 256
"""Different destinations that are written down; of what comes after those only the sum is."""

MOST_OPENED = 65536
"""Connections that are told apart where there is no cap; beyond, what is sent again counts again,
and UDP does not count."""
MOST_ASKERS = 4096
COUNTERS = ("connections", "denied", "full", "spent", "sent", "received")
ASKED = 180.0
"""Seconds for which a published UDP port may answer whoever sent it something."""
_INPUT, _FORWARD, _OUTPUT = 1, 2, 3
_ICMPV6 = 58
_META_IIF, _META_OIF, _META_NFPROTO, _META_L4PROTO = 4, 5, 15, 16
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_EQUAL, _OTHER, _MOST, _LEAST = 0, 1, 3, 5
_INTERVAL, _TIMEOUT, _EVAL = 0x4, 0x10, 0x20
_INTERVAL_END = 1
_TCP_RESET, _ICMP, _NO_HOST, _PROHIBITED = 1, 2, 2, 3
_NEXT_HOP = {4: 1, 6: 2}
_MEMBERS, _MEMBERS_NUMBER = "members", 1000
_LOOPBACK = 1
"""The index of lo, in every network namespace (LOOPBACK_IFINDEX)."""
_FAMILIES: tuple[tuple[int, int, int, int], ...] = ((4, nf.IPV4, 16, 4), (6, nf.IPV6, 24, 16))
"""Version, number, offset of the destination in the header, length."""


def pin(address: IPAddress, groups: Iterable[int], seconds: float, *, again: bool = False) -> bytes:
    """A nf.batch that lets an address of an allowed name through for a time, in each group.

    `again`: it is there already; ENOENT if it is not.
    """
    key = nf.load(1, address.packed)
    element = nested(1, key, attribute(4, struct.pack(">Q", int(seconds * 1000))))
    requests: list[bytes] = []
    for group in groups:
        name = f"names{address.version}_{group}"
        if again:
            parts = (text(1, nf.TABLE), text(2, name), nested(3, nested(1, key)))
            requests.append(nf.request(nf.DELSETELEM, *parts))
        requests.append(nf.elements(name, [element]))
    return nf.batch(requests)


# -- the filter ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Beside:
    """The interface to the bridge of a group, by its index, and what may be reached over it.

    Nobody else: for each address that anybody in a namespace sends to, with SO_BINDTODEVICE also
    without a route, the kernel has an entry in a table of neighbours that all of the machine share
    (gc_thresh3 in Documentation/networking/ip-sysctl.rst; 1024 unless somebody raised it).
    """

    index: int
    members: tuple[IPv4Address, ...]


def ruleset(egress: Egress, own: Iterable[IPAddress] = (), beside: Beside | None = None) -> bytes:
    """The nf.batch that makes it all; `own` are the host's addresses, which are not public.

    What comes from `beside` goes no further.
    """
    return nf.batch(
        [
            nf.request(nf.NEWTABLE, text(1, nf.TABLE), flags=NLM_F_CREATE),
            *(_counter(name) for name in COUNTERS),
            *_sets(egress, own),
            *_members(beside),
            *_caps(egress),
            *_chains(egress, beside),
            *([] if beside is None else [nf.chain("through", _FORWARD)]),
        ]
    )


def _caps(egress: Egress) -> Iterator[bytes]:
    if egress.caps.bytes is not None:
        # A packet that leads to as many as the quota is beyond it (net/netfilter/nft_quota.c).
        most = attribute(1, struct.pack(">Q", min(egress.caps.bytes + 1, (1 << 63) - 1)))
        inner = nested(4, most, nf.integer(2, nf.OVER))
        parts = (text(1, nf.TABLE), text(2, "bytes"), nf.integer(3, nf.QUOTA), inner)
        yield nf.request(nf.NEWOBJ, *parts, flags=NLM_F_CREATE)


def _chains(egress: Egress, beside: Beside | None) -> Iterator[bytes]:
    """Whoever is gone to comes first."""
    chains = {
        "full": _full(egress), "spent": _spent(), "cut": _cut(), "pass": _pass(egress),
        "let": _let(egress), "in": _in(egress, beside), "out": _out(egress, beside),
    }  # fmt: skip
    hooks = {"in": _INPUT, "out": _OUTPUT}
    for name, rules in chains.items():
        yield nf.chain(name, hooks.get(name))
        yield from (nf.rule(name, *expressions) for expressions in rules)


def _counter(name: str) -> bytes:
    parts = (text(1, nf.TABLE), text(2, name), nf.integer(3, nf.COUNTER), nested(4))
    return nf.request(nf.NEWOBJ, *parts, flags=NLM_F_CREATE)


def _sets(egress: Egress, own: Iterable[IPAddress]) -> Iterator[bytes]:
    numbers = iter(range(1, 1000))
    closed = [*CLOSED, *(ip_network(address) for address in own)]
    for version, _, _, length in _FAMILIES:
        if egress.public:
            yield nf.make_set(f"closed{version}", length, _INTERVAL, next(numbers))
            yield nf.elements(f"closed{version}", _intervals(closed, version))
        for group in range(len(egress.groups)):
            yield nf.make_set(f"names{version}_{group}", length, _TIMEOUT, next(numbers), 65535)
        yield nf.make_set(f"denied{version}", length + 8, _EVAL, next(numbers), MOST_DENIED)
        if egress.caps.connections is not None:
            yield nf.make_set(f"full{version}", length + 8, _EVAL, next(numbers), MOST_DENIED)
        if _answers(egress):
            flags = _EVAL | _TIMEOUT
            yield nf.make_set(f"askers{version}", length + 8, flags, next(numbers), MOST_ASKERS)
    yield nf.make_set("opened", 24, _EVAL, next(numbers), egress.caps.connections or MOST_OPENED)


def _answers(egress: Egress) -> tuple[int, ...]:
    """The UDP ports inside that others may ask something."""
    return tuple({one.inside: None for one in egress.published if one.protocol == UDP})


def _intervals(networks: Iterable[IPNetwork], version: int) -> Iterator[bytes]:
    """Where each begins, and the address after its last, in order; what touches is one."""
    size = 4 if version == 4 else 16
    spans: list[list[int]] = [[0, 0]]  # all that lies before the first one
    own = [one for one in networks if one.version == version]
    for one in sorted(own, key=lambda one: int(one.network_address)):
        first, after = int(one.network_address), int(one.broadcast_address) + 1
        if first > spans[-1][1]:
            spans.append([first, after])
        else:
            spans[-1][1] = max(spans[-1][1], after)
    for first, after in spans:
        if first or after:
            yield nested(1, nf.load(1, first.to_bytes(size, "big")))
        if after < 1 << 8 * size:
            yield nested(1, nf.load(1, after.to_bytes(size, "big")), nf.integer(3, _INTERVAL_END))


def _is(key: int, value: int) -> tuple[bytes, bytes]:
    return nf.meta(key), nf.compare(_EQUAL, bytes([value]))


def _by(interface: int, index: int) -> tuple[bytes, ...]:
    return nf.meta(interface), nf.compare(_EQUAL, struct.pack("=I", index))


def _loopback(interface: int) -> tuple[bytes, ...]:
    return *_by(interface, _LOOPBACK), nf.verdict(nf.ACCEPT)


def _neighbours() -> tuple[bytes, ...]:
    """Neighbour discovery, which the kernel itself does (RFC 4861): types 133 to 136."""
    kind = nf.payload(_TRANSPORT_HEADER, 0, 1)
    first, last = nf.compare(_LEAST, bytes([133])), nf.compare(_MOST, bytes([136]))
    return *_is(_META_L4PROTO, _ICMPV6), kind, first, last, nf.verdict(nf.ACCEPT)


def _out(egress: Egress, beside: Beside | None) -> Iterator[tuple[bytes, ...]]:
    """The rules of the chain, in order: most packets get no further than the second."""
    yield _loopback(_META_OIF)
    if beside is not None:
        yield from _beside(beside)
    flags = (nf.payload(_TRANSPORT_HEADER, 13, 1), nf.masked(b"\x12"), nf.compare(_OTHER, b"\x02"))
    yield *_is(_META_L4PROTO, TCP), *flags, nf.verdict(nf.GOTO, "pass")
    yield _neighbours()
    neither = (nf.compare(_OTHER, bytes([TCP])), nf.compare(_OTHER, bytes([UDP])))
    yield nf.meta(_META_L4PROTO), *neither, nf.verdict(nf.DROP)
    if _answers(egress):
        for which in range(len(_FAMILIES)):
            yield *_asker(which, outward=True), nf.verdict(nf.GOTO, "pass")
    yield from _past_the_gateway()
    for network, ports in egress.networks:
        yield *_destination(network), *_ports(ports), nf.verdict(nf.GOTO, "let")
    for version, number, offset, length in _FAMILIES:
        address = (*_is(_META_NFPROTO, number), nf.payload(_NETWORK_HEADER, offset, length))
        for group, ports in enumerate(egress.groups):
            pinned = nf.lookup(f"names{version}_{group}")
            yield *address, pinned, *_ports(ports), nf.verdict(nf.GOTO, "let")
        for ports in egress.public:
            outside = nf.lookup(f"closed{version}", inverted=True)
            yield *address, outside, *_ports(ports), nf.verdict(nf.GOTO, "let")
    yield from _refused("denied", told=True)


def _refused(name: str, *, told: bool) -> Iterator[tuple[bytes, ...]]:
    """Count under this name, write down who was to be reached, and say no."""
    for version, number, offset, length in _FAMILIES if told else ():
        address = (*_is(_META_NFPROTO, number), nf.payload(_NETWORK_HEADER, offset, length))
        protocol = nf.meta(_META_L4PROTO, nf.REGISTER + length // 4)
        port = nf.payload(_TRANSPORT_HEADER, 2, 2, nf.REGISTER + length // 4 + 1)
        yield *address, protocol, port, nf.noted(f"{name}{version}")
    yield (nf.count(name),)
    # At once for whoever waits: an ICMPv6 error is kept for a second from a socket in connect(2).
    yield *_is(_META_L4PROTO, TCP), nf.refuse(_TCP_RESET, 0)
    yield (nf.refuse(_ICMP, _PROHIBITED),)


def _past_the_gateway() -> Iterator[tuple[bytes, ...]]:
    """By SO_DONTROUTE or SO_BINDTODEVICE everybody can be a neighbour; why that matters: Beside."""
    gateways: tuple[IPAddress, ...] = (GATEWAY, GATEWAY6)
    for (version, number, offset, length), gateway in zip(_FAMILIES, gateways, strict=True):
        hop = nf.expression("rt", nf.integer(1, nf.REGISTER), nf.integer(2, _NEXT_HOP[version]))
        other = (*_is(_META_NFPROTO, number), hop, nf.compare(_OTHER, gateway.packed))
        address = nf.payload(_NETWORK_HEADER, offset, length)
        protocol = nf.meta(_META_L4PROTO, nf.REGISTER + length // 4)
        port = nf.payload(_TRANSPORT_HEADER, 2, 2, nf.REGISTER + length // 4 + 1)
        yield *other, address, protocol, port, nf.note(f"denied{version}")
        yield *other, nf.count("denied")
        yield *other, *_is(_META_L4PROTO, TCP), nf.refuse(_TCP_RESET, 0)
        yield *other, nf.refuse(_ICMP, _PROHIBITED)


def _beside(beside: Beside) -> Iterator[tuple[bytes, ...]]:
    """Whatever goes to a member, and nothing else."""
    leaves = _by(_META_OIF, beside.index)
    _, number, offset, length = _FAMILIES[0]
    address = (*_is(_META_NFPROTO, number), nf.payload(_NETWORK_HEADER, offset, length))
    yield *leaves, *address, nf.lookup(_MEMBERS), nf.verdict(nf.ACCEPT)
    yield *leaves, *_is(_META_L4PROTO, TCP), nf.refuse(_TCP_RESET, 0)
    yield *leaves, nf.refuse(_ICMP, _NO_HOST)


def _members(beside: Beside | None) -> Iterator[bytes]:
    if beside is not None:
        yield nf.make_set(_MEMBERS, 4, 0, _MEMBERS_NUMBER)
        found = (nested(1, nf.load(1, address.packed)) for address in beside.members)
        yield nf.elements(_MEMBERS, found)


def _let(egress: Egress) -> Iterator[tuple[bytes, ...]]:
    """What is allowed, and is a first packet of TCP or any of UDP."""
    keys = (
        # Ports and sequence number.
        (*_is(_META_L4PROTO, TCP), nf.constant(nf.REGISTER, bytes(16)),
         nf.payload(_TRANSPORT_HEADER, 0, 8, nf.REGISTER + 4)),
        *((*_is(_META_L4PROTO, UDP), *_is(_META_NFPROTO, number),
           nf.constant(nf.REGISTER, bytes(16)),
           nf.payload(_NETWORK_HEADER, offset, length), nf.constant(nf.REGISTER + 5, bytes(4)),
           nf.payload(_TRANSPORT_HEADER, 0, 4, nf.REGISTER + 4))
          for _, number, offset, length in _FAMILIES),
    )  # fmt: skip
    for key in keys:
        yield *key, nf.lookup("opened"), nf.verdict(nf.GOTO, "pass")
        yield *key, nf.note("opened"), nf.count("connections"), nf.verdict(nf.GOTO, "pass")
    if egress.caps.connections is not None:
        yield (nf.verdict(nf.GOTO, "full"),)
    yield *_is(_META_L4PROTO, TCP), nf.count("connections")
    yield (nf.verdict(nf.GOTO, "pass"),)


def _full(egress: Egress) -> Iterator[tuple[bytes, ...]]:
    if egress.caps.connections is not None:
        yield from _refused("full", told=True)


def _pass(egress: Egress) -> Iterator[tuple[bytes, ...]]:
    if egress.caps.bytes is not None:
        yield nf.refer(nf.QUOTA, "bytes"), nf.verdict(nf.GOTO, "spent")
    yield nf.count("sent"), nf.verdict(nf.ACCEPT)


def _in(egress: Egress, beside: Beside | None) -> Iterator[tuple[bytes, ...]]:
    """Nobody is kept out: who comes in was asked for, or sent to what is published."""
    yield _loopback(_META_IIF)
    if beside is not None:
        yield *_by(_META_IIF, beside.index), nf.verdict(nf.ACCEPT)
    yield _neighbours()
    if egress.caps.rate is not None:
        yield nf.over(egress.caps.rate), nf.verdict(nf.DROP)
    if egress.caps.bytes is not None:
        yield nf.refer(nf.QUOTA, "bytes"), nf.verdict(nf.GOTO, "cut")
    for port in _answers(egress):
        there = (nf.payload(_TRANSPORT_HEADER, 2, 2), nf.compare(_EQUAL, struct.pack(">H", port)))
        for which in range(len(_FAMILIES)):
            yield *_is(_META_L4PROTO, UDP), *there, *_asker(which, outward=False)
    yield nf.count("received"), nf.verdict(nf.ACCEPT)


def _asker(which: int, *, outward: bool) -> tuple[bytes, ...]:
    """Note who sends to a published UDP port, and which; or see whether he is answered by it."""
    version, number, offset, length = _FAMILIES[which]
    name, at = f"askers{version}", nf.REGISTER + length // 4
    theirs, ours = (2, 0) if outward else (0, 2)
    key = (
        *_is(_META_L4PROTO, UDP), *_is(_META_NFPROTO, number),
        nf.payload(_NETWORK_HEADER, offset if outward else offset - length, length),
        nf.payload(_TRANSPORT_HEADER, theirs, 2, at),
        nf.payload(_TRANSPORT_HEADER, ours, 2, at + 1),
    )  # fmt: skip
    if outward:
        return *key, nf.lookup(name)
    lasts = attribute(6, struct.pack(">Q", int(ASKED * 1000)))
    update = nf.expression(
        "dynset", text(1, name), nf.integer(3, 1), nf.integer(4, nf.REGISTER), lasts
    )
    return *key, update


def _spent() -> Iterator[tuple[bytes, ...]]:
    yield from _refused("spent", told=False)


def _cut() -> Iterator[tuple[bytes, ...]]:
    """No more bytes may come in: TCP becomes a reset, or whoever reads would wait for ever."""
    offset = 12  # of the flags, with what is before them: a checksum has words
    flags = nf.payload(_TRANSPORT_HEADER, offset, 2)
    reset = nf.expression(
        "bitwise", nf.integer(1, nf.REGISTER), nf.integer(2, nf.REGISTER), nf.integer(3, 2),
        nf.load(4, b"\xff\xfb"), nf.load(5, b"\x00\x04"),
    )  # fmt: skip
    places = (nf.integer(5, nf.REGISTER), nf.integer(2, _TRANSPORT_HEADER), nf.integer(3, offset))
    write = nf.expression("payload", *places, nf.integer(4, 2), nf.integer(6, 1), nf.integer(7, 16))
    yield (nf.count("spent"),)
    yield *_is(_META_L4PROTO, TCP), flags, reset, write, nf.verdict(nf.ACCEPT)
    yield (nf.verdict(nf.DROP),)


def _destination(network: IPNetwork) -> tuple[bytes, ...]:
    _, number, offset, length = _FAMILIES[0 if network.version == 4 else 1]
    address = (*_is(_META_NFPROTO, number), nf.payload(_NETWORK_HEADER, offset, length))
    mask = network.netmask.packed
    return *address, nf.masked(mask), nf.compare(_EQUAL, network.network_address.packed)


def _ports(ports: Ports) -> tuple[bytes, ...]:
    protocol = _is(_META_L4PROTO, ports.protocols[0]) if len(ports.protocols) == 1 else ()
    first, last = (struct.pack(">H", port) for port in (ports.first, ports.last))
    port = nf.payload(_TRANSPORT_HEADER, 2, 2)
    return *protocol, port, nf.compare(_LEAST, first), nf.compare(_MOST, last)
