"""A way out under Debian's own kernels, whose parts are modules, with its slirp4netns and pasta.

In short, because everything is slow there: tests/network has the rest. Nothing of it is told by
clocks, but that what is slowed takes longer than it must.
"""

from __future__ import annotations

import pytest

from sandboxd.probe.host import probe
from tests.escape.attack import python
from tests.network.conftest import TOOLS, Outcome, World, helper, nothing_left, world
from tests.network.places import OTHER, PUBLIC, PUBLIC6
from tests.network.test_publish import SERVING

__all__ = ["helper", "nothing_left", "world"]

pytestmark = [pytest.mark.needs("cgroup"), pytest.mark.time_limit(60)]

EVERYTHING = f"""
found["name"] = resolve("packages.example.org", 0)
found["named"] = [reach({PUBLIC!r}, 443, kind, wait=20) for kind in ("tcp", "udp")]
found["named"] += [reach({PUBLIC6!r}, 443, kind, wait=20) for kind in ("tcp", "udp")]
found["other"] = [reach({OTHER!r}, 80, "tcp"), reach({OTHER!r}, 80, "udp")]
found["not a name"] = resolve("evil.example.com", 2)
"""


def test_what_is_allowed_and_what_is_not(world: World, helper: str) -> None:
    outcome = world.run(EVERYTHING, helper=helper, allow=["packages.example.org:443"])
    assert outcome.found == {
        "name": [PUBLIC6, PUBLIC],
        "named": [f"{PUBLIC} 443", f"{PUBLIC} 443 x", f"{PUBLIC6} 443", f"{PUBLIC6} 443 x"],
        "other": ["ECONNREFUSED", "EPERM"], "not a name": "NONAME",
    }  # fmt: skip
    assert outcome.refused == {
        f"{OTHER}:80/tcp": 1, f"{OTHER}:80/udp": 1, "evil.example.com": 1,
    }  # fmt: skip
    usage = outcome.result["usage"]
    assert usage["net_connections"] == 4
    assert usage["net_sent"] > 0 < usage["net_received"]


CAPPED = f"""
import time
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.settimeout(20)
begin = time.monotonic()
for _ in range(8):
    one.sendto(bytes(60000), ({PUBLIC!r}, 443)); one.recv(65536)
found["seconds"] = time.monotonic() - begin
found["one too many"] = reach({PUBLIC!r}, wait=20)
found["beyond"] = tried(one.sendto, bytes(60000), ({PUBLIC!r}, 443))
"""


def test_caps(world: World, helper: str) -> None:
    """All three are in force under kernels that have their modules, as Debian's do."""
    there = 8 * (60000 + 28)
    back = there + 8 * len(f"{PUBLIC} 443 ")
    rate = 64 << 10
    outcome = world.run(
        CAPPED, helper=helper, allow=["*"], connections=1, bytes=there + back + 28, rate=rate
    )
    found = outcome.found
    assert (found["one too many"], found["beyond"]) == ("ECONNREFUSED", "EPERM")
    assert found["seconds"] >= (there - rate - (256 << 10)) / rate
    usage, says = outcome.result["usage"], outcome.result["enforcement"]
    assert (usage["net_sent"], usage["net_received"]) == (there, back)
    assert [says[f"network_{what}"] for what in ("connections", "bytes", "rate")] == [
        "nftables", "nftables", "nftables and tbf",
    ]  # fmt: skip
    rules = {one["rule"].rpartition(": ")[2] for one in outcome.result["violations"]}
    assert rules == {"network.connections = 1", f"network.bytes = {there + back + 28}"}


def test_a_port_that_leads_inside(world: World, helper: str) -> None:
    network = {"helper": helper, "publish": ["8080:80"]}
    number = world.begin("run", network=network, argv=python(TOOLS + SERVING))
    assert world.ask("connect", address="127.0.0.1", port=8080) == "from inside: hello"
    assert Outcome(world.answer(number)).result["status"] == "ok"


def test_what_the_probe_found() -> None:
    host = probe(cached=False)
    assert (host.nftables, host.net_bytes, host.net_rate) == (True, True, True), host.fault_notes
