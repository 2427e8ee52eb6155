"""The filter of a network namespace, as messages to nf_tables; nothing is sent here.

    table inet sandboxd
      chain out (hook output, policy drop)    to lo, answers, neighbours; then who is allowed;
                                              what is left is written down and refused
      chain let                               tells connections apart and counts them
      chain pass                              counts bytes, accepts
      chain in (hook input)                   counts bytes; slows; notes who asks what is published
      chains full, spent, cut                 no more connections, no more bytes out, or in
      sets closed4, closed6                   what the public Internet is without
      sets names4_N, names6_N                 addresses that allowed names have; they time out
      sets askers4, askers6                   whom a published UDP port may answer; they time out
      set opened                              connections that there were
      sets denied4, denied6, full4, full6     who was refused, how often

Every packet of a TCP connection but its first has ACK or RST: only SYN asks for anything, because
the programs that carry packets open a connection on SYN alone. So there is no connection tracking,
whose table is the whole machine's and which one job could fill. A SYN that is sent again has the
sequence number of the first, which the kernel chooses (RFC 6528), another connection from the same
port has not: so connections are counted, and not packets. A rule in the kernel's form is a
row of expressions that load a register or compare one (include/uapi/linux/netfilter/nf_tables.h).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from ipaddress import ip_network

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
    attribute,
    message,
    nested,
    text,
)

TABLE = "sandboxd"
MOST_DENIED = 256
"""Different destinations that are written down; of what comes after those only the sum is."""

_SUBSYSTEM = 10 << 8
_BEGIN, _END = 0x10, 0x11
_NEWTABLE, _NEWCHAIN, _NEWRULE, _NEWSET, _NEWSETELEM, _DELSETELEM = 0, 3, 6, 9, 12, 14
_NEWOBJ = 18
MOST_OPENED = 65536
"""Connections that are told apart where there is no cap; beyond, what is sent again counts again,
and UDP does not count."""
MOST_ASKERS = 4096
COUNTERS = ("connections", "denied", "full", "spent", "sent", "received")
ASKED = 180.0
"""Seconds for which a published UDP port may answer whoever sent it something."""
BURST = 256 << 10
"""Bytes that may go at once whatever the rate: four of the largest packets."""
_INET, _IPV4, _IPV6 = 1, 2, 10
_INPUT, _OUTPUT = 1, 3
_ACCEPT, _DROP, _GOTO = 1, 0, -4
_ICMPV6 = 58
_META_IIF, _META_OIF, _META_NFPROTO, _META_L4PROTO = 4, 5, 15, 16
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_EQUAL, _OTHER, _MOST, _LEAST = 0, 1, 3, 5
_INTERVAL, _TIMEOUT, _EVAL = 0x4, 0x10, 0x20
_INTERVAL_END = 1
_VERDICT, _REGISTER = 0, 8
_COUNTER, _QUOTA = 1, 2
_OVER = 1
"""NFT_QUOTA_F_INV, NFT_LIMIT_F_INV: what is beyond, instead of what is within."""
_TCP_RESET, _ICMP, _PROHIBITED = 1, 2, 3
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


def _object(kind: int, name: str) -> bytes:
    return _expression("objref", _number(1, kind), text(2, name))


def _count(name: str) -> bytes:
    return _object(_COUNTER, name)


def _refuse(kind: int, code: int) -> bytes:
    return _expression("reject", _number(1, kind), attribute(2, bytes([code])))


def _note(name: str, *more: bytes) -> bytes:
    """Add the key in the registers; go no further if there is no room for it."""
    return _expression("dynset", text(1, name), _number(3, 0), _number(4, _REGISTER), *more)


def _noted(name: str) -> bytes:
    """The same, with a counter of its own."""
    return _note(name, nested(7, text(1, "counter"), nested(2)))


def _constant(register: int, value: bytes) -> bytes:
    return _expression("immediate", _number(1, register), _value(2, value))


def _over(rate: int) -> bytes:
    """What is more than so many bytes a second; the kernel adds a second's worth to the burst."""
    limits = (attribute(1, struct.pack(">Q", rate)), attribute(2, struct.pack(">Q", 1)))
    return _expression("limit", *limits, _number(3, BURST), _number(4, 1), _number(5, _OVER))


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
        text(1, TABLE), text(2, name), _number(3, flags), _number(4, _key_type(name, length)),
        _number(5, length), _number(10, number),
    ]  # fmt: skip
    if size:
        parts.append(nested(9, _number(1, size)))
    return _request(_NEWSET, *parts, flags=NLM_F_CREATE)


def _key_type(name: str, length: int) -> int:
    """So that nft(8) can show the sets: its numbers, one behind the other."""
    address = _IPV4_ADDR if length in (4, 12) else _IPV6_ADDR
    if length in (4, 16):
        return address
    if name.startswith("askers"):
        return address << 12 | _INET_SERVICE << 6 | _INET_SERVICE
    if name == "opened":
        return address << 12 | _INTEGER << 6 | _INTEGER
    return address << 12 | _INET_PROTO << 6 | _INET_SERVICE


_INTEGER, _IPV4_ADDR, _IPV6_ADDR, _INET_PROTO, _INET_SERVICE = 4, 7, 8, 12, 13


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


def ruleset(egress: Egress, own: Iterable[IPAddress] = ()) -> bytes:
    """The batch that makes it all; `own` are the host's addresses, which are not public."""
    return batch(
        [
            _request(_NEWTABLE, text(1, TABLE), flags=NLM_F_CREATE),
            *(_counter(name) for name in COUNTERS),
            *_sets(egress, own),
            *_caps(egress),
            *_chains(egress),
        ]
    )


def _caps(egress: Egress) -> Iterator[bytes]:
    if egress.caps.bytes is not None:
        # A packet that leads to as many as the quota is beyond it (net/netfilter/nft_quota.c).
        most = attribute(1, struct.pack(">Q", min(egress.caps.bytes + 1, (1 << 63) - 1)))
        inner = nested(4, most, _number(2, _OVER))
        parts = (text(1, TABLE), text(2, "bytes"), _number(3, _QUOTA), inner)
        yield _request(_NEWOBJ, *parts, flags=NLM_F_CREATE)


def _chains(egress: Egress) -> Iterator[bytes]:
    """Whoever is gone to comes first."""
    chains = {
        "full": _full(egress), "spent": _spent(), "cut": _cut(), "pass": _pass(egress),
        "let": _let(egress), "in": _in(egress), "out": _out(egress),
    }  # fmt: skip
    hooks = {"in": _INPUT, "out": _OUTPUT}
    for name, rules in chains.items():
        yield _chain(name, hooks.get(name))
        yield from (_rule(name, *expressions) for expressions in rules)


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
        if egress.caps.connections is not None:
            yield _set(f"full{version}", length + 8, _EVAL, next(numbers), MOST_DENIED)
        if _answers(egress):
            flags = _EVAL | _TIMEOUT
            yield _set(f"askers{version}", length + 8, flags, next(numbers), MOST_ASKERS)
    yield _set("opened", 24, _EVAL, next(numbers), egress.caps.connections or MOST_OPENED)


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
            yield nested(1, _value(1, first.to_bytes(size, "big")))
        if after < 1 << 8 * size:
            yield nested(1, _value(1, after.to_bytes(size, "big")), _number(3, _INTERVAL_END))


def _is(key: int, value: int) -> tuple[bytes, bytes]:
    return _meta(key), _compare(_EQUAL, bytes([value]))


def _loopback(interface: int) -> tuple[bytes, ...]:
    return _meta(interface), _compare(_EQUAL, struct.pack("=I", _LOOPBACK)), _verdict(_ACCEPT)


def _neighbours() -> tuple[bytes, ...]:
    """Neighbour discovery, which the kernel itself does (RFC 4861): types 133 to 136."""
    kind = _payload(_TRANSPORT_HEADER, 0, 1)
    first, last = _compare(_LEAST, bytes([133])), _compare(_MOST, bytes([136]))
    return *_is(_META_L4PROTO, _ICMPV6), kind, first, last, _verdict(_ACCEPT)


def _out(egress: Egress) -> Iterator[tuple[bytes, ...]]:
    """The rules of the chain, in order: most packets get no further than the second."""
    yield _loopback(_META_OIF)
    flags = (_payload(_TRANSPORT_HEADER, 13, 1), _masked(b"\x12"), _compare(_OTHER, b"\x02"))
    yield *_is(_META_L4PROTO, TCP), *flags, _verdict(_GOTO, "pass")
    yield _neighbours()
    neither = (_compare(_OTHER, bytes([TCP])), _compare(_OTHER, bytes([UDP])))
    yield _meta(_META_L4PROTO), *neither, _verdict(_DROP)
    if _answers(egress):
        for which in range(len(_FAMILIES)):
            yield *_asker(which, outward=True), _verdict(_GOTO, "pass")
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
    yield from _refused("denied", told=True)


def _refused(name: str, *, told: bool) -> Iterator[tuple[bytes, ...]]:
    """Count under this name, write down who was to be reached, and say no."""
    for version, number, offset, length in _FAMILIES if told else ():
        address = (*_is(_META_NFPROTO, number), _payload(_NETWORK_HEADER, offset, length))
        protocol = _meta(_META_L4PROTO, _REGISTER + length // 4)
        port = _payload(_TRANSPORT_HEADER, 2, 2, _REGISTER + length // 4 + 1)
        yield *address, protocol, port, _noted(f"{name}{version}")
    yield (_count(name),)
    # At once for whoever waits: an ICMPv6 error is kept for a second from a socket in connect(2).
    yield *_is(_META_L4PROTO, TCP), _refuse(_TCP_RESET, 0)
    yield (_refuse(_ICMP, _PROHIBITED),)


def _let(egress: Egress) -> Iterator[tuple[bytes, ...]]:
    """What is allowed, and is a first packet of TCP or any of UDP."""
    keys = (
        # Ports and sequence number.
        (*_is(_META_L4PROTO, TCP), _constant(_REGISTER, bytes(16)),
         _payload(_TRANSPORT_HEADER, 0, 8, _REGISTER + 4)),
        *((*_is(_META_L4PROTO, UDP), *_is(_META_NFPROTO, number), _constant(_REGISTER, bytes(16)),
           _payload(_NETWORK_HEADER, offset, length), _constant(_REGISTER + 5, bytes(4)),
           _payload(_TRANSPORT_HEADER, 0, 4, _REGISTER + 4))
          for _, number, offset, length in _FAMILIES),
    )  # fmt: skip
    for key in keys:
        yield *key, _lookup("opened"), _verdict(_GOTO, "pass")
        yield *key, _note("opened"), _count("connections"), _verdict(_GOTO, "pass")
    if egress.caps.connections is not None:
        yield (_verdict(_GOTO, "full"),)
    yield *_is(_META_L4PROTO, TCP), _count("connections")
    yield (_verdict(_GOTO, "pass"),)


def _full(egress: Egress) -> Iterator[tuple[bytes, ...]]:
    if egress.caps.connections is not None:
        yield from _refused("full", told=True)


def _pass(egress: Egress) -> Iterator[tuple[bytes, ...]]:
    if egress.caps.bytes is not None:
        yield _object(_QUOTA, "bytes"), _verdict(_GOTO, "spent")
    yield _count("sent"), _verdict(_ACCEPT)


def _in(egress: Egress) -> Iterator[tuple[bytes, ...]]:
    """Nobody is kept out: who comes in was asked for, or sent to what is published."""
    yield _loopback(_META_IIF)
    yield _neighbours()
    if egress.caps.rate is not None:
        yield _over(egress.caps.rate), _verdict(_DROP)
    if egress.caps.bytes is not None:
        yield _object(_QUOTA, "bytes"), _verdict(_GOTO, "cut")
    for port in _answers(egress):
        there = (_payload(_TRANSPORT_HEADER, 2, 2), _compare(_EQUAL, struct.pack(">H", port)))
        for which in range(len(_FAMILIES)):
            yield *_is(_META_L4PROTO, UDP), *there, *_asker(which, outward=False)
    yield _count("received"), _verdict(_ACCEPT)


def _asker(which: int, *, outward: bool) -> tuple[bytes, ...]:
    """Note who sends to a published UDP port, and which; or see whether he is answered by it."""
    version, number, offset, length = _FAMILIES[which]
    name, at = f"askers{version}", _REGISTER + length // 4
    theirs, ours = (2, 0) if outward else (0, 2)
    key = (
        *_is(_META_L4PROTO, UDP), *_is(_META_NFPROTO, number),
        _payload(_NETWORK_HEADER, offset if outward else offset - length, length),
        _payload(_TRANSPORT_HEADER, theirs, 2, at), _payload(_TRANSPORT_HEADER, ours, 2, at + 1),
    )  # fmt: skip
    if outward:
        return *key, _lookup(name)
    lasts = attribute(6, struct.pack(">Q", int(ASKED * 1000)))
    update = _expression("dynset", text(1, name), _number(3, 1), _number(4, _REGISTER), lasts)
    return *key, update


def _spent() -> Iterator[tuple[bytes, ...]]:
    yield from _refused("spent", told=False)


def _cut() -> Iterator[tuple[bytes, ...]]:
    """No more bytes may come in: TCP becomes a reset, or whoever reads would wait for ever."""
    offset = 12  # of the flags, with what is before them: a checksum has words
    flags = _payload(_TRANSPORT_HEADER, offset, 2)
    reset = _expression(
        "bitwise", _number(1, _REGISTER), _number(2, _REGISTER), _number(3, 2),
        _value(4, b"\xff\xfb"), _value(5, b"\x00\x04"),
    )  # fmt: skip
    places = (_number(5, _REGISTER), _number(2, _TRANSPORT_HEADER), _number(3, offset))
    write = _expression("payload", *places, _number(4, 2), _number(6, 1), _number(7, 16))
    yield (_count("spent"),)
    yield *_is(_META_L4PROTO, TCP), flags, reset, write, _verdict(_ACCEPT)
    yield (_verdict(_DROP),)


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
