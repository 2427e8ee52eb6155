"""network.mode = "user": what is reached, over each program that carries packets."""

from __future__ import annotations

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
