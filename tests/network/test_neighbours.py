"""The kernel's tables of neighbours are the whole machine's: a job with a way out adds its gateway.

arp(7), gc_thresh3 in Documentation/networking/ip-sysctl.rst: 1024 entries, unless somebody raised
it, for all network namespaces together.
"""

from __future__ import annotations

import pytest

from sandboxd.compile import netlink
from tests.network.conftest import World
from tests.network.places import PUBLIC, PUBLIC6

HEADER = netlink.message(30, netlink.NLM_F_DUMP, bytes(12), 1)[:16]  # RTM_GETNEIGH, struct ndmsg
NEIGHBOURS = f"""
def neighbours(family):
    "The addresses that this namespace has entries for; loopback's are not counted."
    one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    one.send({HEADER!r} + bytes([family]) + bytes(11))
    here, over = set(), False
    tap = socket.if_nametoindex("tap0")
    while not over:
        data = one.recv(65536)
        while data:
            size, kind = struct.unpack_from("=IH", data)
            over = over or kind == 3
            if kind == 28 and struct.unpack_from("=i", data, 20)[0] == tap:
                here.add(bytes(data[28:size]))
            data = data[size + -size % 4:]
    return len(here)

def send(family, address, *options):
    one = socket.socket(family, socket.SOCK_DGRAM)
    for level, option, value in options:
        one.setsockopt(level, option, value)
    one.sendto(b"x", (address, 9))

device = (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"tap0")
direct = (socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)
for number in range(200):
    tried(send, socket.AF_INET, f"11.0.0.{{number}}", device)
    tried(send, socket.AF_INET, f"11.0.1.{{number}}", device, direct)
    tried(send, socket.AF_INET, f"10.0.2.{{number}}", direct)
    tried(send, socket.AF_INET, f"224.9.9.{{number}}", device)
    tried(send, socket.AF_INET6, f"2001:db8:9::{{number}}", device, direct)
    tried(send, socket.AF_INET6, f"fd00::1:{{number}}", device)
    tried(send, socket.AF_INET6, f"ff02::1:{{number}}", device)
found["four"] = neighbours(socket.AF_INET)
found["six"] = neighbours(socket.AF_INET6)
found["there"] = [reach({PUBLIC!r}), reach({PUBLIC6!r})]
"""


NETWORKS = ["0.0.0.0/1:*", "200.0.0.0/5:*", "[2000::/3]:*", "[fd00::/16]:*"]


@pytest.mark.parametrize("allow", [["*"], NETWORKS], ids=["public", "networks"])
def test_only_the_gateway_is_a_neighbour(world: World, helper: str, allow: list[str]) -> None:
    found = world.run(NEIGHBOURS, helper=helper, allow=allow).found
    assert found["there"] == [f"{PUBLIC} 443", f"{PUBLIC6} 443"]
    assert found["four"] == 1
    assert found["six"] <= 4  # and what the kernel itself talks to: routers, multicast listeners
