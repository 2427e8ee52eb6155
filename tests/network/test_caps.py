"""network.connections, network.bytes, network.rate: held by the kernel, told in the result."""

from __future__ import annotations

from typing import Any

import pytest

from tests.network.conftest import Outcome, World
from tests.network.places import OTHER, PUBLIC, PUBLIC6

ALL = ["*"]


def beyond(outcome: Outcome, key: str) -> dict[str | None, int]:
    """Who was refused for this line of the policy -> how often."""
    told: list[dict[str, Any]] = outcome.result["violations"]
    return {one["name"]: one["count"] for one in told if f"network.{key} = " in one["rule"]}


def test_connections(world: World, helper: str) -> None:
    """In all and not at once; those that there are go on."""
    body = (
        f"first = socket.create_connection(({PUBLIC!r}, 443)); first.recv(99)\n"
        "found['udp'] = reach('203.0.113.10', 443, 'udp')\n"
        f"found['six'] = reach({PUBLIC6!r})\n"
        f"found['more'] = [reach({OTHER!r}, 80), reach({OTHER!r}, 80), reach({PUBLIC6!r}, 443),\n"
        f"                 reach({OTHER!r}, 80, 'udp')]\n"
        "first.sendall(b'still there'); found['first'] = first.recv(99).decode()\n"
    )
    outcome = world.run(body, helper=helper, allow=ALL, connections=3)
    assert outcome.found == {
        "udp": f"{PUBLIC} 443 x", "six": f"{PUBLIC6} 443", "first": "still there",
        "more": ["ECONNREFUSED", "ECONNREFUSED", "ECONNREFUSED", "EPERM"],
    }  # fmt: skip
    assert outcome.result["usage"]["net_connections"] == 3
    assert beyond(outcome, "connections") == {
        f"{OTHER}:80/tcp": 2, f"[{PUBLIC6}]:443/tcp": 1, f"{OTHER}:80/udp": 1,
    }  # fmt: skip
    assert outcome.result["status"] == "ok"
    assert outcome.result["enforcement"]["network_connections"] == "nftables"
    assert outcome.result["limits"]["network_connections"] == {
        "limit": 3, "used": 3, "exceeded": False, "action": "refused",
    }  # fmt: skip


def test_bytes_of_datagrams(world: World, helper: str) -> None:
    """To the byte: ten of 1000 with their headers there, and as many back as are left."""
    body = (
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.settimeout(1)\n"
        "got = sent = 0\n"
        "try:\n"
        " while True:\n"
        f"  one.sendto(bytes(972), ({PUBLIC!r}, 443)); sent += 1\n"
        "  got += len(one.recv(65536)) + 28\n"
        "except PermissionError: found['end'] = 'EPERM'\n"
        "found['sent'] = sent * 1000; found['got'] = got"
    )
    answer = 1000 + len(f"{PUBLIC} 443 ")
    most = 5 * (1000 + answer)
    outcome = world.run(body, helper=helper, allow=ALL, bytes=most)
    assert outcome.found == {"end": "EPERM", "sent": 5000, "got": 5 * answer}
    usage = outcome.result["usage"]
    assert (usage["net_sent"], usage["net_received"]) == (5000, 5 * answer)
    assert beyond(outcome, "bytes") == {None: 1}
    assert outcome.result["limits"]["network_bytes"] == {
        "limit": most, "used": most, "exceeded": False, "action": "refused",
    }  # fmt: skip
    assert outcome.result["status"] == "ok"


@pytest.mark.parametrize("way", ["down", "up"])
def test_bytes_of_a_stream(world: World, helper: str, way: str) -> None:
    """It is reset at once, whoever sends: nobody waits for what does not come."""
    down = (
        "one.sendall(b'flood 9000000')\n"
        "try:\n"
        " while data := one.recv(65536): size += len(data)\n"
        "except OSError as error: found['end'] = errno.errorcode.get(error.errno, str(error))\n"
    )
    up = (
        "try:\n"
        " while True: size += one.send(bytes(65536))\n"
        "except OSError as error: found['end'] = errno.errorcode.get(error.errno, str(error))\n"
    )
    body = (
        f"one = socket.create_connection(({PUBLIC!r}, 443)); one.recv(99); size = 0\n"
        "one.settimeout(20)\n"
        + {"down": down, "up": "one.sendall(b'sink')\n" + up}[way]
        + f"found['size'] = size; found['again'] = reach({PUBLIC!r})"
    )
    outcome = world.run(body, helper=helper, allow=ALL, bytes=1_000_000)
    found = outcome.found
    assert found["end"] in ("ECONNRESET", "EPIPE")
    assert found["again"] == "ECONNREFUSED"
    usage = outcome.result["usage"]
    carried = usage["net_received"] + usage["net_sent"]
    assert 900_000 < carried <= 1_000_000
    assert way == "up" or found["size"] <= 1_000_000
    (times,) = beyond(outcome, "bytes").values()
    assert times >= 2
    assert outcome.result["status"] == "ok"
    assert outcome.result["enforcement"]["network_bytes"] == "nftables"


def test_no_more_than_the_rate(world: World, helper: str) -> None:
    """Each way: nothing is refused, it takes longer. A second's worth and 256 KiB go at once."""
    body = (
        "import time\n"
        f"one = socket.create_connection(({PUBLIC!r}, 443)); one.recv(99)\n"
        "start = time.monotonic(); one.sendall(b'flood 1500000'); size = 0\n"
        "while data := one.recv(65536): size += len(data)\n"
        "found['down'] = time.monotonic() - start\n"
        f"one = socket.create_connection(({PUBLIC!r}, 443)); one.recv(99)\n"
        "start = time.monotonic(); one.sendall(b'sink' + bytes(1500000))\n"
        "one.shutdown(socket.SHUT_WR); found['sunk'] = int(one.recv(99))\n"
        "found['up'] = time.monotonic() - start; found['size'] = size\n"
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"for _ in range(50): one.sendto(bytes(9000), ({PUBLIC!r}, 443))\n"
    )
    rate = 500_000
    outcome = world.run(body, helper=helper, allow=ALL, rate=rate)
    found = outcome.found
    assert (found["size"], found["sunk"]) == (1_500_000, 1_500_004)
    least = (1_500_000 - rate - (256 << 10)) / rate
    assert (found["down"] > least, found["up"] > least) == (True, True), found
    assert found["down"] < 30, found
    assert found["up"] < 30, found
    assert outcome.result["violations"] == []
    assert outcome.result["enforcement"]["network_rate"] == "nftables and tbf"
    told = outcome.result["limits"]["network_rate"]
    assert (told["limit"], told["exceeded"], told["action"]) == (rate, False, "none")
    assert 0 < told["used"] < 2 * rate
