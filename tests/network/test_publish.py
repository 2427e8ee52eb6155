"""Ports of the host that lead into a sandbox, for as long as its run lives."""

from __future__ import annotations

import pytest

from tests.escape.attack import python
from tests.network.conftest import TOOLS, World

SERVING = """
server = socket.create_server(("0.0.0.0", 80))
server.settimeout(30)
one, peer = server.accept()
one.sendall(b"from inside: " + one.recv(100))
one.close()
found["peer"] = peer[0]
found["refused"] = reach("203.0.113.10")
"""


def start(world: World, helper: str, *publish: str) -> int:
    network = {"helper": helper, "publish": publish}
    return world.begin("run", network=network, argv=python(TOOLS + SERVING))


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
