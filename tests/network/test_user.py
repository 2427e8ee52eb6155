"""network.mode = "user": what is reached, over each program that carries packets."""

from __future__ import annotations

import pytest

from tests.network.conftest import World
from tests.network.places import OTHER, PUBLIC, PUBLIC6


def test_addresses_that_are_allowed(world: World, helper: str) -> None:
    """TCP and UDP, IPv4 and IPv6."""
    allow = [f"{PUBLIC}:443", f"[{PUBLIC6}]:443"]
    outcome = world.run(
        f"for address in ({PUBLIC!r}, {PUBLIC6!r}):\n"
        " for kind in ('tcp', 'udp'):\n"
        "  found[address + kind] = reach(address, kind=kind)\n",
        helper=helper,
        allow=allow,
    )
    assert set(outcome.found.values()) == {
        f"{PUBLIC} 443", f"{PUBLIC} 443 x", f"{PUBLIC6} 443", f"{PUBLIC6} 443 x",
    }  # fmt: skip
    assert outcome.refused == {}
    assert outcome.result["enforcement"]["network"] == f"user: {helper}, nftables"


def test_nothing_is_allowed_by_default(world: World, helper: str) -> None:
    body = f"found['tcp'] = reach({PUBLIC!r}); found['udp'] = reach({OTHER!r}, kind='udp')"
    outcome = world.run(body, helper=helper)
    assert outcome.found == {"tcp": "ECONNREFUSED", "udp": "EPERM"}
    assert outcome.refused == {f"{PUBLIC}:443/tcp": 1, f"{OTHER}:443/udp": 1}


def test_what_went_through_is_counted(world: World, helper: str) -> None:
    """Bytes at the interface, so with headers; loopback is not in it."""
    body = (
        f"one = socket.create_connection(({PUBLIC!r}, 443)); one.recv(99)\n"
        "one.sendall(b'flood 1000000'); size = 0\n"
        "while data := one.recv(65536): size += len(data)\n"
        "mine = socket.create_server(('127.0.0.1', 0)); other = socket.socket()\n"
        "other.connect(mine.getsockname())\n"
        "found['size'] = size"
    )
    outcome = world.run(body, helper=helper, allow=[f"{PUBLIC}:443"])
    assert outcome.found == {"size": 1000000}
    usage = outcome.result["usage"]
    assert 1_000_000 < usage["net_received"] < 1_200_000
    assert 100 < usage["net_sent"] < 100_000
    assert usage["net_connections"] == 1


def test_without_a_way_out_nothing_is_counted(world: World) -> None:
    usage = world.run("found['none'] = 1", mode="none").result["usage"]
    assert [usage[f"net_{what}"] for what in ("received", "sent", "connections")] == [None] * 3


ETC = """
for name in ("resolv.conf", "hosts", "hostname"):
    found[name] = reads(f"/etc/{name}")
found["written"] = writes("/etc/resolv.conf", b"nameserver 8.8.8.8\\n", os.O_WRONLY | os.O_TRUNC)
found["name"] = resolve("packages.example.org", 2)
found["itself"] = resolve(socket.gethostname(), 2)
"""


@pytest.mark.needs("slirp4netns", "subuid", "tun", "ip", "nft")
@pytest.mark.parametrize("root", ["shared", "kernel", "tmpfs"])
def test_etc_is_as_programs_expect_it(world: World, root: str) -> None:
    """resolv.conf(5), hosts(5)."""
    fields = {} if root == "shared" else {"root": {"writable": True, "driver": root}}
    found = world.run(ETC, allow=["packages.example.org:443"], **fields).found
    assert found["resolv.conf"].startswith("nameserver 127.0.0.53\n")
    assert found["hosts"] == "127.0.0.1 localhost sandbox\n::1 localhost sandbox\n"
    assert found["hostname"] == "sandbox\n"
    assert set(found["itself"]) == {"127.0.0.1"}
    assert found["written"] in ("EROFS", "EACCES")
    assert found["name"] == [PUBLIC]


def test_where_it_is(world: World, helper: str) -> None:
    """Its addresses; and port 53 of UDP is the name server's, except at its own address."""
    body = (
        "def own(family, address):\n"
        " one = socket.socket(family, socket.SOCK_DGRAM); one.connect((address, 443))\n"
        " return one.getsockname()[0]\n"
        f"found['own'] = [own(2, {PUBLIC!r}), own(10, {PUBLIC6!r})]\n"
        "def server(address):\n"
        " socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind((address, 53))\n"
        "found['servers'] = [tried(server, address) for address in ('', '10.0.2.100')]"
    )
    outcome = world.run(body, helper=helper, allow=["*"])
    assert outcome.found == {"own": ["10.0.2.100", "fd00::100"], "servers": ["EADDRINUSE", "ok"]}


def test_large_and_many(world: World, helper: str) -> None:
    """A megabyte each over a dozen connections, and large datagrams there and back."""
    body = (
        "import threading\nsizes = []\n"
        "def load():\n"
        f" one = socket.create_connection(({PUBLIC!r}, 443)); one.recv(99)\n"
        " one.sendall(b'flood 1000000'); size = 0\n"
        " while data := one.recv(65536): size += len(data)\n"
        " sizes.append(size)\n"
        "all = [threading.Thread(target=load) for _ in range(12)]\n"
        "[one.start() for one in all]; [one.join() for one in all]\n"
        "found['sizes'] = sum(sizes)\n"
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.settimeout(5)\n"
        f"one.sendto(bytes(9000), ({PUBLIC!r}, 443)); found['datagram'] = len(one.recv(65536))"
    )
    found = world.run(body, helper=helper, allow=["*"]).found
    assert found == {"sizes": 12_000_000, "datagram": 9000 + len(f"{PUBLIC} 443 ")}


def test_ahead_of_their_jobs(world: World, helper: str) -> None:
    """Spares have their networks already; two at a time do not meet."""
    answers = world.ask("spares", network={"helper": helper, "allow": ["*"]})
    assert answers == [["ok", f"{PUBLIC} 443"]] * 4
