"""Requests for a bridge and its ports: byte for byte, and as pyroute2 reads them."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import Any

import pytest

from sandboxd.compile import bridge, netlink

ASK = netlink.NLM_F_REQUEST | netlink.NLM_F_ACK | netlink.NLM_F_CREATE | netlink.NLM_F_EXCL


PEER = bridge.Peer("eth0", bridge.hardware(IPv4Address("10.9.0.2")), 42)


def read(data: bytes) -> Any:
    """By pyroute2, whose import is slow."""
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    found = ifinfmsg(data)
    found.decode()
    return found


def test_a_bridge_as_bytes() -> None:
    """struct nlmsghdr, struct ifinfomsg, attributes (netlink(7), rtnetlink(7))."""
    link = struct.pack("=BxHiII", 0, 0, 0, 1, 1)
    snooping = struct.pack("=HHB3x", 5, 23, 0)
    data = struct.pack("=HH", 4 + len(snooping), 2 | 0x8000) + snooping
    kind = struct.pack("=HH", 11, 1) + b"bridge\0\0"
    info = struct.pack("=HH", 4 + len(kind + data), 18 | 0x8000) + kind + data
    body = struct.pack("=HH4s", 8, 3, b"br0\0") + info
    header = struct.pack("=IHHII", 16 + len(link + body), 16, ASK, 1, 0)
    assert bridge.add_bridge("br0") == header + link + body


def test_a_bridge_as_pyroute2_reads_it() -> None:
    found = read(bridge.add_bridge("br0"))
    assert found["header"]["type"] == netlink.RTM_NEWLINK
    assert found["header"]["flags"] == ASK
    assert (found["flags"], found["change"]) == (1, 1)
    assert found.get("ifname") == "br0"
    info = found.get("linkinfo")
    assert info.get("kind") == "bridge"
    assert info.get("data").get("br_mcast_snooping") == 0


def test_a_port_as_pyroute2_reads_it() -> None:
    found = read(bridge.add_pair("port7", 3, PEER, 1500))
    assert found["header"]["flags"] == ASK
    assert (found.get("ifname"), found.get("master"), found.get("mtu")) == ("port7", 3, 1500)
    assert found["flags"] == 1
    info = found.get("linkinfo")
    assert info.get("kind") == "veth"
    peer = info.get("data").get("veth_info_peer")
    assert (peer.get("ifname"), peer.get("mtu"), peer.get("net_ns_fd")) == ("eth0", 1500, 42)
    assert peer.get("address") == "02:00:0a:09:00:02"
    assert peer["flags"] == 0  # its owner sets it up


def test_a_neighbour_as_pyroute2_reads_it() -> None:
    from pyroute2.netlink.rtnl.ndmsg import ndmsg

    found: Any = ndmsg(bridge.add_neighbour(5, IPv4Address("10.9.0.2")))
    found.decode()
    flags = ASK & ~netlink.NLM_F_EXCL | netlink.NLM_F_REPLACE
    assert (found["header"]["type"], found["header"]["flags"]) == (28, flags)
    assert (found["family"], found["ifindex"], found["state"]) == (2, 5, 0x80)
    assert (found.get("dst"), found.get("lladdr")) == ("10.9.0.2", "02:00:0a:09:00:02")


def test_what_pyroute2_writes_is_the_same_bridge() -> None:
    """The other way round: the same attributes with the same contents, in whatever order."""
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    theirs = ifinfmsg()
    theirs["flags"] = theirs["change"] = 1
    theirs["attrs"] = [
        ("IFLA_IFNAME", "br0"),
        ("IFLA_LINKINFO", {"attrs": [
            ("IFLA_INFO_KIND", "bridge"),
            ("IFLA_INFO_DATA", {"attrs": [("IFLA_BR_MCAST_SNOOPING", 0)]}),
        ]}),
    ]  # fmt: skip
    theirs.encode()
    size = 16 + 16
    ours = bridge.add_bridge("br0")
    assert flat(ours[size:]) == flat(bytes(theirs.data)[size:])


def flat(data: bytes) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    for kind, content in netlink.attributes(data):
        if kind == bridge.IFLA_LINKINFO:
            for inner, value in netlink.attributes(content):
                if inner == bridge.IFLA_INFO_DATA:
                    found += [(100 + one, what) for one, what in netlink.attributes(value)]
                else:
                    found.append((inner, value.rstrip(b"\0")))
        else:
            found.append((kind, content.rstrip(b"\0")))
    return sorted(found)


@pytest.mark.parametrize(("protocol", "state"), [(6, 10), (17, 7)])
def test_who_listens(protocol: int, state: int) -> None:
    """struct inet_diag_req_v2 (sock_diag(7))."""
    request = bridge.get_listeners(netlink.AF_INET, protocol)
    size, kind, flags = struct.unpack_from("=IHH", request)
    assert (size, kind, flags) == (len(request), 20, netlink.NLM_F_REQUEST | netlink.NLM_F_DUMP)
    assert request[16:24] == struct.pack("=BBBxI", 2, protocol, 0, 1 << state)
    assert len(request) == 16 + 8 + 48


def test_a_port_in_an_answer() -> None:
    body = bytes([2, 10, 0, 0]) + (5432).to_bytes(2) + bytes(66)
    assert list(bridge.ports(netlink.Answer(20, 1, body, None))) == [5432]
    assert list(bridge.ports(netlink.Answer(3, 1, body, None))) == []
    assert list(bridge.ports(netlink.Answer(20, 1, body[:11], None))) == []
    resolver = body[:8] + bytes([127, 0, 0, 53]) + body[12:]
    assert list(bridge.ports(netlink.Answer(20, 1, resolver, None))) == []
