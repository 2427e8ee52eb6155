"""Requests to the kernel for a group's network: a bridge, and pairs of interfaces; nothing is sent.

veth(4) makes two interfaces that are joined: one is a port of the bridge, in a namespace without
any address, and the other a member's. Who owns the user namespace of both network namespaces may
do this in one request (rtnetlink(7), IFLA_NET_NS_FD). And the question who listens there
(sock_diag(7)). pyroute2 is what tests hold these messages against; at run time its import would
take longer than a whole group does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from sandboxd.compile.carrying import RESOLVER
from sandboxd.compile.netlink import (
    AF_INET,
    AF_INET6,
    AF_UNSPEC,
    IFF_UP,
    IFLA_IFNAME,
    IFLA_MTU,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    RTM_NEWLINK,
    Answer,
    attribute,
    message,
    nested,
    text,
)

IFLA_ADDRESS, IFLA_MASTER, IFLA_LINKINFO, IFLA_NET_NS_FD = 1, 10, 18, 28
RTM_NEWNEIGH = 28
NUD_PERMANENT = 0x80
NDA_DST, NDA_LLADDR = 1, 2
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_BR_MCAST_SNOOPING = 23
VETH_INFO_PEER = 1
_LINK = struct.Struct("=BxHiII")

SOCK_DIAG_BY_FAMILY = 20
TCP_LISTEN, TCP_CLOSE = 10, 7
"""States of include/net/tcp_states.h; UDP sockets that are bound and not connected are closed."""
_DIAG = struct.Struct("=BBBxI")
_ADDRESS_PAIR = bytes(48)


def add_bridge(name: str, index: int = 0) -> bytes:
    """A bridge that is up and asks nobody anything: no spanning tree, no multicast queries.

    `index` is the one it gets; 0: the next.
    """
    data = nested(IFLA_INFO_DATA, attribute(IFLA_BR_MCAST_SNOOPING, b"\0"))
    body = _LINK.pack(AF_UNSPEC, 0, index, IFF_UP, IFF_UP) + text(IFLA_IFNAME, name)
    body += nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "bridge"), data)
    return message(RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body, 1)


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a pair: its name, its hardware address, and a descriptor of its network
    namespace, as whoever sends the request has it."""

    name: str
    hardware: bytes
    namespace: int


def hardware(address: IPv4Address) -> bytes:
    """The one of a member: no manufacturer's (IEEE 802, the second bit), and a function of its
    address, so that everybody can be told everybody's."""
    return b"\x02\x00" + address.packed


def add_pair(port: str, bridge: int, peer: Peer, mtu: int) -> bytes:
    """A port of the bridge of this index, whose other end is `peer`."""
    other = _LINK.pack(AF_UNSPEC, 0, 0, 0, 0) + text(IFLA_IFNAME, peer.name)
    other += attribute(IFLA_ADDRESS, peer.hardware)
    other += attribute(IFLA_MTU, struct.pack("=I", mtu))
    other += attribute(IFLA_NET_NS_FD, struct.pack("=I", peer.namespace))
    data = nested(IFLA_INFO_DATA, attribute(VETH_INFO_PEER, other))
    body = _LINK.pack(AF_UNSPEC, 0, 0, IFF_UP, IFF_UP) + text(IFLA_IFNAME, port)
    body += attribute(IFLA_MTU, struct.pack("=I", mtu))
    body += attribute(IFLA_MASTER, struct.pack("=I", bridge))
    body += nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "veth"), data)
    return message(RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body, 1)


def add_neighbour(index: int, address: IPv4Address) -> bytes:
    """Where a member is, for good: nobody asks, and it is not counted (neigh_alloc in
    net/core/neighbour.c)."""
    body = _NEIGHBOUR.pack(AF_INET, index, NUD_PERMANENT, 0, 0)  # struct ndmsg
    body += attribute(NDA_DST, address.packed) + attribute(NDA_LLADDR, hardware(address))
    return message(RTM_NEWNEIGH, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, body, 1)


TRIAL_NAMESPACE, TRIAL_INDEX = 200, 1000


def trial() -> tuple[bytes, ...]:
    """A bridge and a port of it, to see whether they can be had; the other end comes to where the
    descriptor TRIAL_NAMESPACE leads."""
    peer = Peer("eth0", hardware(IPv4Address("192.168.100.2")), TRIAL_NAMESPACE)
    pair = add_pair("port0", TRIAL_INDEX, peer, 1500)
    return add_bridge("br0", TRIAL_INDEX), pair


def get_listeners(family: int, protocol: int) -> bytes:
    """Ask for the sockets of a namespace that wait for somebody (struct inet_diag_req_v2)."""
    state = TCP_LISTEN if protocol == 6 else TCP_CLOSE
    body = _DIAG.pack(family, protocol, 0, 1 << state) + _ADDRESS_PAIR
    return message(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, body, 1)


FAMILIES = (AF_INET, AF_INET6)


def ports(answer: Answer) -> Iterator[int]:
    """The local port of a socket in one answer, unless it is our name server's.

    struct inet_diag_msg: four bytes, the ports, the addresses.
    """
    if answer.kind != SOCK_DIAG_BY_FAMILY or len(answer.body) < 12:
        return
    if answer.body[8:12] != IPv4Address(RESOLVER).packed:
        yield int.from_bytes(answer.body[4:6])
