"""Ports of the host that lead into a sandbox, for as long as its run lives."""

from __future__ import annotations

import pytest

from tests.escape.attack import python
from tests.network.conftest import TOOLS, Outcome, World

SERVING = """
server = socket.create_server(("0.0.0.0", 80))
server.settimeout(30)
one, peer = server.accept()
one.sendall(b"from inside: " + one.recv(100))
one.close()
found["peer"] = peer[0]
found["refused"] = reach("203.0.113.10")
"""


SERVING_UDP = """
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.bind(("::", 5353)); server.settimeout(30)
data, peer = server.recvfrom(100)
found["elsewhere"] = tried(server.sendto, b"x", ("::ffff:203.0.113.10", 443))
found["another port of his"] = tried(server.sendto, b"x", (peer[0], peer[1] ^ 1))
other = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
found["from another port"] = tried(other.sendto, b"x", peer[:2])
server.sendto(b"from inside: " + data, peer)
"""
TRIED = ("elsewhere", "another port of his", "from another port")


def start(world: World, helper: str, *publish: str, body: str = SERVING) -> int:
    network = {"helper": helper, "publish": publish}
    return world.begin("run", network=network, argv=python(TOOLS + body))


def test_a_port_leads_inside(world: World, helper: str) -> None:
    number = start(world, helper, "8080:80")
    assert world.ask("connect", address="127.0.0.1", port=8080) == "from inside: hello"
    result = world.answer(number)
    assert result["status"] == "ok", result
    assert '"refused": "ECONNREFUSED"' in result["streams"]["stdout"]["data"]  # no way out by it
    gone = world.ask("connect", address="127.0.0.1", port=8080, must_fail=True)
    assert "refused" in gone or "failed" in gone


def test_it_is_at_loopback_alone(world: World, helper: str) -> None:
    number = start(world, helper, "8081:80")
    assert world.ask("connect", address="127.0.0.1", port=8081) == "from inside: hello"
    world.answer(number)
    number = start(world, helper, "198.51.100.2:8082:80")
    assert world.ask("connect", address="198.51.100.2", port=8082) == "from inside: hello"
    world.answer(number)
    number = start(world, helper, "8083:80")
    assert "from inside" not in world.ask("connect", address="127.0.0.1", port=1, must_fail=True)
    away = world.ask("connect", address="198.51.100.2", port=8083, must_fail=True)
    assert "refused" in away or "failed" in away
    assert world.ask("connect", address="127.0.0.1", port=8083) == "from inside: hello"
    world.answer(number)


def test_a_port_that_is_taken(world: World, helper: str) -> None:
    """7777 is the host's own."""
    with pytest.raises(RuntimeError, match=r"LaunchError: network: step [24]"):
        world.ask(
            "run", network={"helper": helper, "publish": ["7777:80"]}, argv=python("found[0] = 0")
        )


def test_datagrams_lead_inside(world: World, helper: str) -> None:
    """Who asks is answered, and nobody else gets anything that way."""
    number = start(world, helper, "198.51.100.2:8053:5353/udp", body=SERVING_UDP)
    said = world.ask("connect", address="198.51.100.2", port=8053, kind="udp")
    assert said == "from inside: hello"
    outcome = Outcome(world.answer(number))
    assert outcome.result["status"] == "ok", outcome.result
    assert {outcome.found[what] for what in TRIED} == {"EPERM"}
    assert "203.0.113.10:443/udp" in outcome.refused


@pytest.mark.needs("pasta", "subuid", "tun", "ip", "nft")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_datagrams_at_loopback_lead_inside(world: World, address: str) -> None:
    """By pasta, from loopback to loopback; slirp4netns would carry no answer."""
    where = f"[{address}]" if ":" in address else address
    number = start(world, "auto", f"{where}:5353:5353/udp", body=SERVING_UDP)
    said = world.ask("connect", address=address, port=5353, kind="udp")
    assert said == "from inside: hello"
    outcome = Outcome(world.answer(number))
    assert outcome.result["enforcement"]["network"] == "user: pasta, nftables"
    assert outcome.found["elsewhere"] == "EPERM"


@pytest.mark.needs("pasta", "subuid", "tun", "ip", "nft")
@pytest.mark.parametrize(("kind", "address"), [
    ("tcp", "::1"), ("tcp", "2001:db8:1::2"), ("udp", "2001:db8:1::2"),
])  # fmt: skip
def test_ipv6_leads_inside(world: World, kind: str, address: str) -> None:
    """By pasta, which "auto" takes for it; slirp4netns cannot: tests/compile/test_carrying.py."""
    body = (
        SERVING_UDP
        if kind == "udp"
        else SERVING.replace('"0.0.0.0", 80)', '"::", 5353), family=10')
    )
    number = start(world, "auto", f"[{address}]:8054:5353/{kind}", body=body)
    said = world.ask("connect", address=address, port=8054, kind=kind)
    assert said == "from inside: hello"
    result = world.answer(number)
    assert result["status"] == "ok", result
    assert result["enforcement"]["network"] == "user: pasta, nftables"


def test_slirp4netns_says_who_can(world: World) -> None:
    with pytest.raises(
        RuntimeError, match=r"PolicyError: .*network.publish\[0\]: .*slirp4netns cannot"
    ):
        world.answer(start(world, "slirp4netns", "[::1]:8055:80"))
