"""Much of everything: what a job may do as often as it likes costs others nothing that grows.

Over both helpers, in the world of tests/network/world.py.
"""

from __future__ import annotations

import pytest

from tests.network.conftest import World, helper, nothing_left, world
from tests.network.places import OTHER, PUBLIC
from tests.network.test_names import NOWHERE

__all__ = ["helper", "nothing_left", "world"]

LEAST = 48 << 20
"""Bytes by which a supervisor may grow that has something else to do as well."""

ASKED = """
def ask(name, wait=5):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.settimeout(wait)
    labels = b"".join(bytes([len(part)]) + part for part in name.split(b"."))
    head = struct.pack(">6H", 7, 0x100, 1, 0, 0, 0)
    one.sendto(head + labels + b"\\0\\0\\1\\0\\1", ("127.0.0.53", 53))
    return one.recv(600)[3] & 15
"""


def test_a_hundred_thousand_attempts(world: World, helper: str) -> None:
    """All are counted, the first 256 destinations are told (CWE-779)."""
    body = (
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for _ in range(100):\n"
        " for port in range(1, 1001):\n"
        "  try: one.sendto(b'', ('203.0.113.11', port))\n"
        "  except PermissionError: pass\n"
        "found['done'] = True"
    )
    outcome = world.run(body, helper=helper, allow=[f"{PUBLIC}:443"])
    assert outcome.found == {"done": True}
    refused = outcome.refused
    assert len(refused) == 257
    assert sum(refused.values()) == 100_000
    assert sorted(set(refused.values())) == [100, 100 * (1000 - 256)]
    assert outcome.result["usage"]["net_sent"] == 0


def test_half_open_connections(world: World, helper: str) -> None:
    """Two thousand to where nobody answers, given up at once; who comes after is served."""
    body = (
        "for number in range(2000):\n"
        " one = socket.socket(); one.setblocking(False)\n"
        f" try: one.connect(({NOWHERE!r}, 1 + number))\n"
        " except BlockingIOError: pass\n"
        " one.close()\n"
        f"found['there'] = reach({PUBLIC!r}, wait=20)"
    )
    outcome = world.run(body, helper=helper, allow=["*"])
    assert outcome.result["status"] == "ok"
    assert outcome.result["usage"]["net_connections"] == 2001
    assert outcome.found["there"] in (f"{PUBLIC} 443", "ETIMEDOUT", "ECONNRESET", "EHOSTUNREACH")
    after = world.run(f"found['there'] = reach({PUBLIC!r})", helper=helper, allow=["*"])
    assert after.found == {"there": f"{PUBLIC} 443"}


@pytest.mark.needs("slirp4netns", "subuid", "tun", "ip", "nft")
def test_names_that_are_too_many_are_counted(world: World) -> None:
    body = ASKED + "found['codes'] = [ask(b'x%d.example.com' % number) for number in range(600)]"
    outcome = world.run(body, allow=[f"{PUBLIC}:443"])
    assert outcome.found == {"codes": [3] * 600}
    assert len(outcome.refused) == 257
    assert outcome.refused[None] == 600 - 256


@pytest.mark.needs("slirp4netns", "subuid", "tun", "ip", "nft")
def test_a_flood_that_nobody_answers(world: World) -> None:
    """Questions wait in the sandbox, and only so many outside: no memory of ours is taken."""
    body = (
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "head = struct.pack('>6H', 7, 0x100, 1, 0, 0, 0)\n"
        "for number in range(100000):\n"
        " name = b'x%d' % number\n"
        " question = bytes([len(name)]) + name + b'\\x06silent\\x07example\\x03org'\n"
        " one.sendto(head + question + b'\\0\\0\\1\\0\\1', ('127.0.0.53', 53))\n"
        "found['through'] = True"
    )
    before, _ = world.ask("memory")
    outcome = world.run(body, allow=["*.silent.example.org:443"])
    assert outcome.found == {"through": True}
    _, most = world.ask("memory")
    assert most - before < LEAST


@pytest.mark.needs("slirp4netns", "subuid", "tun", "ip", "nft")
def test_names_of_odd_bytes_are_asked_of_nobody(world: World) -> None:
    """A label may be any bytes (RFC 2181): what it would become elsewhere is not left to chance."""
    body = ASKED + (
        "long = b'\\xff' * 63\n"
        "found['codes'] = [ask(name + b'.mirror.example.net') for name in\n"
        "                  (b'a\\0b', b'a b', b'\\xff', long, b'.'.join([long[:60]] * 3))]"
    )
    outcome = world.run(body, allow=["*.mirror.example.net:80"], resolvers=[NOWHERE])
    assert outcome.found == {"codes": [3] * 5}  # NXDOMAIN; SERVFAIL if somebody had been asked


def test_an_upload_that_nobody_reads(world: World, helper: str) -> None:
    """Datagrams as fast as they go, to somebody who answers each; the run ends as ever."""
    body = (
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"for _ in range(5000): one.sendto(bytes(9000), ({OTHER!r}, 443))\n"
        "found['done'] = True"
    )
    outcome = world.run(body, helper=helper, allow=["*"])
    assert outcome.found == {"done": True}
    usage = outcome.result["usage"]
    assert usage["net_sent"] == 5000 * 9028
    assert usage["net_connections"] == 1
