"""Requests to the kernel's network, encoded, and its answers, decoded; nothing is sent here.

netlink(7): a header, a struct of the family, attributes of type and length, all aligned to four
bytes. pyroute2 has this as well; but it wants asyncio and a tenth of a second to be imported, has
no name for half of what a rule of nftables is made of, and these are the only eight messages.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_CREATE, NLM_F_EXCL, NLM_F_APPEND = 0x100, 0x400, 0x200, 0x800
NLMSG_ERROR, NLMSG_DONE = 2, 3
NESTED = 0x8000
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")

# rtnetlink(7)
RTM_NEWLINK, RTM_GETLINK, RTM_NEWADDR, RTM_GETADDR, RTM_NEWROUTE = 16, 18, 20, 22, 24
AF_UNSPEC, AF_INET, AF_INET6 = 0, 2, 10
IFF_UP = 1
RTM_NEWQDISC = 36
IFLA_IFNAME, IFLA_MTU = 3, 4
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_NODAD = 0x02
RTA_OIF, RTA_GATEWAY = 4, 5
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
RT_TABLE_MAIN, RTPROT_STATIC, RTN_UNICAST = 254, 4, 1


def attribute(kind: int, content: bytes) -> bytes:
    """One attribute, padded."""
    size = _ATTRIBUTE.size + len(content)
    return _ATTRIBUTE.pack(size, kind) + content + bytes(-size % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    return attribute(kind | NESTED, b"".join(inner))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def message(kind: int, flags: int, body: bytes, sequence: int = 0) -> bytes:
    size = _HEADER.size + len(body)
    return _HEADER.pack(size, kind, flags | NLM_F_REQUEST, sequence, 0) + body + bytes(-size % 4)


@dataclass(frozen=True, slots=True)
class Answer:
    """One message of the kernel's: `error` is an errno or 0 if it is the end of an answer."""

    kind: int
    sequence: int
    body: bytes
    error: int | None


def answers(data: bytes) -> Iterator[Answer]:
    """The messages of one datagram."""
    at = 0
    while at + _HEADER.size <= len(data):
        size, kind, _, sequence, _ = _HEADER.unpack_from(data, at)
        if not _HEADER.size <= size <= len(data) - at:
            return
        body = data[at + _HEADER.size : at + size]
        # The end of a dump has an error, too: that of a module that is not there, for one.
        told = kind in (NLMSG_ERROR, NLMSG_DONE) and len(body) >= 4
        error = -struct.unpack_from("=i", body)[0] if told else None
        yield Answer(kind, sequence, body, error)
        at += size + -size % 4


def attributes(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Type and content of each attribute; the bits that say how it is written are left out."""
    at = start
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if size < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, data[at + _ATTRIBUTE.size : at + size]
        at += size + -size % 4


# -- interfaces, addresses, routes -----------------------------------------------------------


def get_link(name: str, sequence: int = 1) -> bytes:
    """Ask about an interface by its name."""
    body = _LINK.pack(AF_UNSPEC, 0, 0, 0, 0) + text(IFLA_IFNAME, name)
    return message(RTM_GETLINK, 0, body, sequence)


@dataclass(frozen=True, slots=True)
class Link:
    index: int


def link(answer: Answer) -> Link | None:
    """What RTM_GETLINK was answered with."""
    if answer.kind != RTM_NEWLINK:
        return None
    return Link(_LINK.unpack_from(answer.body)[2])


def set_up(index: int, mtu: int, sequence: int = 1) -> bytes:
    body = _LINK.pack(AF_UNSPEC, 0, index, IFF_UP, IFF_UP)
    body += attribute(IFLA_MTU, struct.pack("=I", mtu))
    return message(RTM_NEWLINK, NLM_F_ACK, body, sequence)


def add_address(
    index: int, address: IPv4Address | IPv6Address, bits: int, sequence: int = 1
) -> bytes:
    """Usable at once: nobody else is there who could have the same one (RFC 4862, 5.4)."""
    family = AF_INET if isinstance(address, IPv4Address) else AF_INET6
    body = _ADDRESS.pack(family, bits, 0, 0, index)
    body += attribute(IFA_LOCAL, address.packed) + attribute(IFA_ADDRESS, address.packed)
    if family == AF_INET6:
        body += attribute(IFA_FLAGS, struct.pack("=I", IFA_F_NODAD))
    return message(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body, sequence)


def add_default_route(index: int, gateway: IPv4Address | IPv6Address, sequence: int = 1) -> bytes:
    family = AF_INET if isinstance(gateway, IPv4Address) else AF_INET6
    body = _ROUTE.pack(family, 0, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST, 0)
    body += attribute(RTA_GATEWAY, gateway.packed) + attribute(RTA_OIF, struct.pack("=I", index))
    return message(RTM_NEWROUTE, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body, sequence)


def add_shaper(index: int, rate: int, burst: int, sequence: int = 1) -> bytes:
    """What leaves by an interface waits for its turn (tc-tbf(8)): bytes a second, bytes at once.

    struct tc_tbf_qopt, with a struct tc_ratespec for the rate and an empty one for its peak; QUEUE
    bytes wait, what is more is lost.
    """
    ratespec = struct.pack("=xBHhHI", 1, 0, 0, 0, min(rate, _MOST))  # TC_LINKLAYER_ETHERNET
    options = attribute(1, ratespec + bytes(12) + struct.pack("=III", QUEUE, 0, 0))
    if rate > _MOST:
        options += attribute(4, struct.pack("=Q", rate))
    options += attribute(6, struct.pack("=I", min(burst, _MOST)))
    body = struct.pack("=B3xiIII", AF_UNSPEC, index, 0, TC_H_ROOT, 0)
    body += text(1, "tbf") + attribute(2, options)
    return message(RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body, sequence)


TC_H_ROOT = 0xFFFFFFFF
QUEUE = 1 << 20
_MOST = (1 << 32) - 1


def get_addresses(sequence: int = 1) -> bytes:
    """Ask for all addresses of all interfaces."""
    return message(RTM_GETADDR, NLM_F_DUMP, _ADDRESS.pack(AF_UNSPEC, 0, 0, 0, 0), sequence)


def address(answer: Answer) -> IPv4Address | IPv6Address | None:
    """One address that RTM_GETADDR was answered with."""
    if answer.kind != RTM_NEWADDR:
        return None
    found = dict(attributes(answer.body, _ADDRESS.size))
    packed = found.get(IFA_LOCAL, found.get(IFA_ADDRESS, b""))
    if len(packed) == 4:
        return IPv4Address(packed)
    return IPv6Address(packed) if len(packed) == 16 else None
