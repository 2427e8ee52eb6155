"""net_received, net_sent and net_connections: of a run, exactly, over each program that carries."""

from __future__ import annotations

from typing import Any

from tests.network.conftest import Outcome, World
from tests.network.places import OTHER, PUBLIC, PUBLIC6
from tests.network.test_names import NOWHERE

IPV4, IPV6, UDP = 20, 40, 8
"""Bytes of headers (RFC 791, 8200, 768)."""


def counted(outcome: Outcome) -> tuple[int, int, int]:
    usage: dict[str, Any] = outcome.result["usage"]
    return usage["net_received"], usage["net_sent"], usage["net_connections"]


DATAGRAMS = f"""
for address in ({PUBLIC!r}, {PUBLIC6!r}):
    one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    one.settimeout(20)
    for size in (0, 1, 999, 1472, 9000):
        one.sendto(bytes(size), (address, 443))
        assert len(one.recv(65536)) == size + len(f"{{address}} 443 ")
found["done"] = True
"""


def expected() -> tuple[int, int, int]:
    sizes = (0, 1, 999, 1472, 9000)
    sent = sum(2 * size + IPV4 + IPV6 + 2 * UDP for size in sizes)
    prefixes = len(f"{PUBLIC} 443 ") + len(f"{PUBLIC6} 443 ")
    return sent + prefixes * len(sizes), sent, 2


def test_datagrams_to_the_byte(world: World, helper: str) -> None:
    """IPv4 and IPv6; the same in every run, whose networks were made ahead; no ARP, no loopback."""
    for _ in range(3):
        outcome = world.run(DATAGRAMS, helper=helper, allow=["*"])
        assert outcome.found == {"done": True}
        assert counted(outcome) == expected()


STREAM = f"""
one = socket.create_connection(({PUBLIC!r}, 443))
one.recv(99)
one.sendall(b"flood 3000000"); size = 0
while data := one.recv(65536): size += len(data)
one.shutdown(socket.SHUT_WR)
while (info := one.getsockopt(6, 11, 232))[0] != 7: time.sleep(0.01)
found["size"] = size
found["timestamps"] = info[5] & 1
found["acked"], found["got"] = struct.unpack_from("=QQ", info, 120)
found["out"], found["in"] = struct.unpack_from("=II", info, 136)
"""


def test_a_stream_to_the_byte(world: World, helper: str) -> None:
    """As the socket itself counts its segments (TCP_INFO, tcp(7)); a SYN has more options."""
    outcome = world.run("import time\n" + STREAM, helper=helper, allow=["*"])
    found = outcome.found
    assert found["size"] == 3_000_000
    received, sent, connections = counted(outcome)
    header = IPV4 + 20 + (12 if found["timestamps"] else 0)
    least_in = found["got"] + found["in"] * header
    least_out = found["acked"] + found["out"] * header
    assert (least_in <= received <= least_in + 40, received) == (True, received)
    assert (least_out <= sent <= least_out + 40, sent) == (True, sent)
    assert connections == 1


def test_connections_and_not_packets(world: World, helper: str) -> None:
    """One is asked for again and again; one port is used twice; a flow of UDP is one, too."""
    body = (
        f"found['nowhere'] = reach({NOWHERE!r}, wait=3.5)\n"
        "for _ in range(2):\n"
        " one = socket.socket(); one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        " one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n"
        f" one.bind(('', 4321)); one.connect(({PUBLIC!r}, 443)); one.recv(99); one.close()\n"
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.settimeout(20)\n"
        f"for _ in range(5): one.sendto(b'x', ({PUBLIC!r}, 443)); one.recv(99)\n"
        f"one.sendto(b'x', ({OTHER!r}, 443)); one.recv(99)\n"
        f"found['refused'] = reach({PUBLIC!r}, 22)\n"
    )
    outcome = world.run(body, helper=helper, allow=["*:443"])
    assert outcome.found == {"nowhere": "ETIMEDOUT", "refused": "ECONNREFUSED"}
    assert counted(outcome)[2] == 1 + 2 + 1 + 1


def test_what_is_refused_is_not_counted(world: World, helper: str) -> None:
    body = f"for port in range(1, 200): reach({OTHER!r}, port); reach({OTHER!r}, port, 'udp')\n"
    outcome = world.run(body + "found[0] = 0", helper=helper, allow=[f"{PUBLIC}:443"])
    assert counted(outcome) == (0, 0, 0)
    assert sum(outcome.refused.values()) == 2 * 199
