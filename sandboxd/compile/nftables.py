"""The filter of a network namespace, as messages to nf_tables; nothing is sent here.

    table inet sandboxd
      chain out (hook output, policy drop)    to lo, answers, neighbours; by the gateway to
                                              who is allowed;
                                              what is left is written down and refused
      chain let                               counts connections, accepts
      sets closed4, closed6                   what the public Internet is without
      sets names4_N, names6_N                 addresses that allowed names have; they time out
      sets denied4, denied6                   who was refused, how often
      chain through (hook forward, drop)      only beside other members of a group, as is
      set members                             who is there

Every packet of a TCP connection but its first has ACK or RST: only SYN asks for anything, because
the programs that carry packets open a connection on SYN alone. So there is no connection tracking,
whose table is the whole machine's and which one job could fill. A rule in the kernel's form is a
row of expressions that load a register or compare one (include/uapi/linux/netfilter/nf_tables.h).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_network

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
from sandboxd.compile.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_DUMP,
    Answer,
    attribute,
    attributes,
    message,
    nested,
    text,
)

TABLE = "sandboxd"
MOST_DENIED = 256
"""Different destinations that are written down; of what comes after those only the sum is."""

_SUBSYSTEM = 10 << 8
_BEGIN, _END = 0x10, 0x11
_NEWTABLE, _NEWCHAIN, _NEWRULE, _NEWSET, _NEWSETELEM, _GETSETELEM, _DELSETELEM = (
    0,
    3,
    6,
    9,
    12,
    13,
    14,
)
_NEWOBJ, _GETOBJ = 18, 19
_INET, _IPV4, _IPV6 = 1, 2, 10
_FORWARD, _OUTPUT = 2, 3
_ACCEPT, _DROP, _GOTO = 1, 0, -4
_ICMPV6 = 58
_META_OIF, _META_NFPROTO, _META_L4PROTO = 5, 15, 16
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_EQUAL, _OTHER, _MOST, _LEAST = 0, 1, 3, 5
_INTERVAL, _TIMEOUT, _EVAL = 0x4, 0x10, 0x20
_INTERVAL_END = 1
_VERDICT, _REGISTER = 0, 8
_COUNTER = 1
_TCP_RESET, _ICMP, _NO_HOST, _PROHIBITED = 1, 2, 2, 3
_NEXT_HOP = {4: 1, 6: 2}
_MEMBERS, _MEMBERS_NUMBER = "members", 1000
_LOOPBACK = 1
"""The index of lo, in every network namespace (LOOPBACK_IFINDEX)."""
_FAMILIES: tuple[tuple[int, int, int, int], ...] = ((4, _IPV4, 16, 4), (6, _IPV6, 24, 16))
"""Version, number, offset of the destination in the header, length."""


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">i" if value < 0 else ">I", value))


def _value(kind: int, content: bytes) -> bytes:
    return nested(kind, attribute(1, content))


def _expression(name: str, *data: bytes) -> bytes:
    return nested(1, text(1, name), nested(2, *data))


def _meta(key: int, register: int = _REGISTER) -> bytes:
    return _expression("meta", _number(1, register), _number(2, key))


def _payload(base: int, offset: int, length: int, register: int = _REGISTER) -> bytes:
    places = (register, base, offset, length)
    return _expression("payload", *(_number(n, value) for n, value in enumerate(places, 1)))


def _compare(operation: int, value: bytes) -> bytes:
    return _expression("cmp", _number(1, _REGISTER), _number(2, operation), _value(3, value))


def _masked(mask: bytes) -> bytes:
    return _expression(
        "bitwise", _number(1, _REGISTER), _number(2, _REGISTER), _number(3, len(mask)),
        _value(4, mask), _value(5, bytes(len(mask))),
    )  # fmt: skip


def _lookup(name: str, *, inverted: bool = False) -> bytes:
    flags = (_number(5, 1),) if inverted else ()
    return _expression("lookup", text(1, name), _number(2, _REGISTER), *flags)


def _verdict(code: int, chain: str = "") -> bytes:
    inner = _number(1, code) + (text(2, chain) if chain else b"")
    return _expression("immediate", _number(1, _VERDICT), nested(2, nested(2, inner)))


def _count(name: str) -> bytes:
    return _expression("objref", _number(1, _COUNTER), text(2, name))


def _refuse(kind: int, code: int) -> bytes:
    return _expression("reject", _number(1, kind), attribute(2, bytes([code])))


def _note(name: str) -> bytes:
    """Add the key in the registers, with a counter of its own."""
    counter = nested(7, text(1, "counter"), nested(2))
    return _expression(
        "dynset", text(1, name), _number(3, 0), _number(4, _REGISTER), counter
    )  # fmt: skip


# -- messages --------------------------------------------------------------------------------


def _generic(family: int, resource: int = 0) -> bytes:
    return struct.pack(">BBH", family, 0, resource)


def _request(kind: int, *parts: bytes, flags: int = 0) -> bytes:
    return message(_SUBSYSTEM | kind, flags, _generic(_INET) + b"".join(parts))


def batch(requests: Iterable[bytes]) -> bytes:
    """Messages that happen together or not at all; one acknowledgement, or the errors."""
    inner = list(requests)
    last = bytearray(inner[-1])
    last[6] |= NLM_F_ACK  # nlmsg_flags
    body = _generic(0, 10)
    return b"".join((message(_BEGIN, 0, body), *inner[:-1], bytes(last), message(_END, 0, body)))


def _chain(name: str, hook: int | None = None) -> bytes:
    parts = [text(1, TABLE), text(3, name)]
    if hook is not None:
        parts += [nested(4, _number(1, hook), _number(2, 0)), _number(5, _DROP), text(7, "filter")]
    return _request(_NEWCHAIN, *parts, flags=NLM_F_CREATE)


def _rule(chain: str, *expressions: bytes) -> bytes:
    parts = (text(1, TABLE), text(2, chain), nested(4, *expressions))
    return _request(_NEWRULE, *parts, flags=NLM_F_CREATE | NLM_F_APPEND)


def _set(name: str, length: int, flags: int, number: int, size: int = 0) -> bytes:
    parts = [
        text(1, TABLE), text(2, name), _number(3, flags), _number(4, _KEY_TYPES.get(length, 0)),
        _number(5, length), _number(10, number),
    ]  # fmt: skip
    if size:
        parts.append(nested(9, _number(1, size)))
    return _request(_NEWSET, *parts, flags=NLM_F_CREATE)


_KEY_TYPES = {4: 7, 16: 8, 12: 7 << 12 | 12 << 6 | 13, 24: 8 << 12 | 12 << 6 | 13}
"""What nft(8) calls ipv4_addr, ipv6_addr, and those with inet_proto and inet_service behind them:
so that it can show the sets."""


def _elements(name: str, elements: Iterable[bytes]) -> bytes:
    parts = (text(1, TABLE), text(2, name), nested(3, *elements))
    return _request(_NEWSETELEM, *parts, flags=NLM_F_CREATE)


def pin(address: IPAddress, groups: Iterable[int], seconds: float, *, again: bool = False) -> bytes:
    """A batch that lets an address of an allowed name through for a time, in each group.

    `again`: it is there already; ENOENT if it is not.
    """
    key = _value(1, address.packed)
    element = nested(1, key, attribute(4, struct.pack(">Q", int(seconds * 1000))))
    requests: list[bytes] = []
    for group in groups:
        name = f"names{address.version}_{group}"
        if again:
            parts = (text(1, TABLE), text(2, name), nested(3, nested(1, key)))
            requests.append(_request(_DELSETELEM, *parts))
        requests.append(_elements(name, [element]))
    return batch(requests)


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
    """The batch that makes it all; `own` are the host's addresses, which are not public.

    What comes from `beside` goes no further.
    """
    return batch(
        [
            _request(_NEWTABLE, text(1, TABLE), flags=NLM_F_CREATE),
            *(_counter(name) for name in ("connections", "denied")),
            *_sets(egress, own),
            *_members(beside),
            _chain("let"),
            _rule("let", *_is(_META_L4PROTO, TCP), _count("connections")),
            _rule("let", _verdict(_ACCEPT)),
            _chain("out", _OUTPUT),
            *(_rule("out", *expressions) for expressions in _out(egress, beside)),
            *([] if beside is None else [_chain("through", _FORWARD)]),
        ]
    )


def _counter(name: str) -> bytes:
    parts = (text(1, TABLE), text(2, name), _number(3, _COUNTER), nested(4))
    return _request(_NEWOBJ, *parts, flags=NLM_F_CREATE)


def _sets(egress: Egress, own: Iterable[IPAddress]) -> Iterator[bytes]:
    numbers = iter(range(1, 1000))
    closed = [*CLOSED, *(ip_network(address) for address in own)]
    for version, _, _, length in _FAMILIES:
        if egress.public:
            yield _set(f"closed{version}", length, _INTERVAL, next(numbers))
            yield _elements(f"closed{version}", _intervals(closed, version))
        for group in range(len(egress.groups)):
            yield _set(f"names{version}_{group}", length, _TIMEOUT, next(numbers), 65535)
        yield _set(f"denied{version}", length + 8, _EVAL, next(numbers), MOST_DENIED)


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
            yield nested(1, _value(1, first.to_bytes(size, "big")))
        if after < 1 << 8 * size:
            yield nested(1, _value(1, after.to_bytes(size, "big")), _number(3, _INTERVAL_END))


def _is(key: int, value: int) -> tuple[bytes, bytes]:
    return _meta(key), _compare(_EQUAL, bytes([value]))


def _out(egress: Egress, beside: Beside | None) -> Iterator[tuple[bytes, ...]]:
    """The rules of the chain, in order."""
    yield *_leaves_by(_LOOPBACK), _verdict(_ACCEPT)
    if beside is not None:
        yield from _beside(beside)
    # Neighbour discovery, which the kernel itself does (RFC 4861): types 133 to 136.
    kind = _payload(_TRANSPORT_HEADER, 0, 1)
    first, last = _compare(_LEAST, bytes([133])), _compare(_MOST, bytes([136]))
    yield *_is(_META_L4PROTO, _ICMPV6), kind, first, last, _verdict(_ACCEPT)
    neither = (_compare(_OTHER, bytes([TCP])), _compare(_OTHER, bytes([UDP])))
    yield _meta(_META_L4PROTO), *neither, _verdict(_DROP)
    flags = (_payload(_TRANSPORT_HEADER, 13, 1), _masked(b"\x12"), _compare(_OTHER, b"\x02"))
    yield *_is(_META_L4PROTO, TCP), *flags, _verdict(_ACCEPT)
    yield from _past_the_gateway()
    for network, ports in egress.networks:
        yield *_destination(network), *_ports(ports), _verdict(_GOTO, "let")
    for version, number, offset, length in _FAMILIES:
        address = (*_is(_META_NFPROTO, number), _payload(_NETWORK_HEADER, offset, length))
        for group, ports in enumerate(egress.groups):
            pinned = _lookup(f"names{version}_{group}")
            yield *address, pinned, *_ports(ports), _verdict(_GOTO, "let")
        for ports in egress.public:
            outside = _lookup(f"closed{version}", inverted=True)
            yield *address, outside, *_ports(ports), _verdict(_GOTO, "let")
        protocol = _meta(_META_L4PROTO, _REGISTER + length // 4)
        port = _payload(_TRANSPORT_HEADER, 2, 2, _REGISTER + length // 4 + 1)
        yield *address, protocol, port, _note(f"denied{version}")
    yield (_count("denied"),)
    # At once for whoever waits: an ICMPv6 error is kept for a second from a socket in connect(2).
    yield *_is(_META_L4PROTO, TCP), _refuse(_TCP_RESET, 0)
    yield (_refuse(_ICMP, _PROHIBITED),)


def _past_the_gateway() -> Iterator[tuple[bytes, ...]]:
    """By SO_DONTROUTE or SO_BINDTODEVICE everybody can be a neighbour; why that matters: Beside."""
    gateways: tuple[IPAddress, ...] = (GATEWAY, GATEWAY6)
    for (version, number, offset, length), gateway in zip(_FAMILIES, gateways, strict=True):
        hop = _expression("rt", _number(1, _REGISTER), _number(2, _NEXT_HOP[version]))
        other = (*_is(_META_NFPROTO, number), hop, _compare(_OTHER, gateway.packed))
        address = _payload(_NETWORK_HEADER, offset, length)
        protocol = _meta(_META_L4PROTO, _REGISTER + length // 4)
        port = _payload(_TRANSPORT_HEADER, 2, 2, _REGISTER + length // 4 + 1)
        yield *other, address, protocol, port, _note(f"denied{version}")
        yield *other, _count("denied")
        yield *other, *_is(_META_L4PROTO, TCP), _refuse(_TCP_RESET, 0)
        yield *other, _refuse(_ICMP, _PROHIBITED)


def _leaves_by(index: int) -> tuple[bytes, ...]:
    return _meta(_META_OIF), _compare(_EQUAL, struct.pack("=I", index))


def _beside(beside: Beside) -> Iterator[tuple[bytes, ...]]:
    """Whatever goes to a member, and nothing else."""
    leaves = _leaves_by(beside.index)
    _, number, offset, length = _FAMILIES[0]
    address = (*_is(_META_NFPROTO, number), _payload(_NETWORK_HEADER, offset, length))
    yield *leaves, *address, _lookup(_MEMBERS), _verdict(_ACCEPT)
    yield *leaves, *_is(_META_L4PROTO, TCP), _refuse(_TCP_RESET, 0)
    yield *leaves, _refuse(_ICMP, _NO_HOST)


def _members(beside: Beside | None) -> Iterator[bytes]:
    if beside is not None:
        yield _set(_MEMBERS, 4, 0, _MEMBERS_NUMBER)
        found = (nested(1, _value(1, address.packed)) for address in beside.members)
        yield _elements(_MEMBERS, found)


def _destination(network: IPNetwork) -> tuple[bytes, ...]:
    _, number, offset, length = _FAMILIES[0 if network.version == 4 else 1]
    address = (*_is(_META_NFPROTO, number), _payload(_NETWORK_HEADER, offset, length))
    mask = network.netmask.packed
    return *address, _masked(mask), _compare(_EQUAL, network.network_address.packed)


def _ports(ports: Ports) -> tuple[bytes, ...]:
    protocol = _is(_META_L4PROTO, ports.protocols[0]) if len(ports.protocols) == 1 else ()
    first, last = (struct.pack(">H", port) for port in (ports.first, ports.last))
    port = _payload(_TRANSPORT_HEADER, 2, 2)
    return *protocol, port, _compare(_LEAST, first), _compare(_MOST, last)


# -- what it counted -------------------------------------------------------------------------


def get_denied(version: int, sequence: int = 1) -> bytes:
    """Ask for what a set of refused destinations holds."""
    body = _generic(_INET) + text(1, TABLE) + text(2, f"denied{version}")
    return message(_SUBSYSTEM | _GETSETELEM, NLM_F_DUMP, body, sequence)


def get_counters(sequence: int = 1) -> bytes:
    body = _generic(_INET) + text(1, TABLE) + _number(3, _COUNTER)
    return message(_SUBSYSTEM | _GETOBJ, NLM_F_DUMP, body, sequence)


@dataclass(frozen=True, slots=True)
class Denied:
    """A destination that was refused, and how many packets to it were."""

    address: IPAddress
    protocol: int
    port: int
    packets: int


def denied(answer: Answer) -> Iterator[Denied]:
    """The elements in one answer to `get_denied`."""
    if answer.kind != _SUBSYSTEM | _NEWSETELEM:
        return
    elements = dict(attributes(answer.body, 4)).get(3, b"")
    for _, element in attributes(elements):
        found = dict(attributes(element))
        key = dict(attributes(found.get(1, b""))).get(1, b"")
        if len(key) not in (12, 24):
            continue
        packed, protocol, port = key[:-8], key[-8], struct.unpack_from(">H", key, len(key) - 4)[0]
        address = IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
        yield Denied(address, protocol, port, _packets(found.get(7, found.get(11, b""))))


def _packets(expression: bytes) -> int:
    data = dict(attributes(expression)).get(2, b"")
    counted = dict(attributes(data)).get(2, bytes(8))
    return int(struct.unpack(">Q", counted)[0])


def counters(answer: Answer) -> dict[str, int]:
    """Name -> packets, in one answer to `get_counters`."""
    if answer.kind != _SUBSYSTEM | _NEWOBJ:
        return {}
    found = dict(attributes(answer.body, 4))
    name = found.get(2, b"").rstrip(b"\0").decode(errors="replace")
    counted = dict(attributes(found.get(4, b""))).get(2, bytes(8))
    return {name: int(struct.unpack(">Q", counted)[0])}
