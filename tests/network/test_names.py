"""Names: who is asked, what is done when nobody answers, and the host's own settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandboxd.supervise.resolver import of_host
from tests.network.conftest import World
from tests.network.places import OTHER, PUBLIC

NOWHERE = "203.0.113.99"
"""Nobody listens there, and nobody says so."""


def test_the_next_name_server_is_asked(world: World, helper: str) -> None:
    body = "found['there'] = resolve('packages.example.org', 2)"
    outcome = world.run(
        body, helper=helper, allow=["packages.example.org:443"],
        resolvers=[NOWHERE, "8.8.8.8"],
    )  # fmt: skip
    assert outcome.found == {"there": [PUBLIC]}


@pytest.mark.needs("slirp4netns", "subuid", "tun", "ip", "nft")
def test_nobody_answers(world: World) -> None:
    """It is no "no such name": whoever is told so would remember it."""
    body = "found['there'] = resolve('silent.example.org', 2)"
    outcome = world.run(body, allow=["silent.example.org:443"])
    assert outcome.found == {"there": "AGAIN"}


@pytest.mark.needs("slirp4netns", "subuid", "tun", "ip", "nft")
def test_a_name_that_nobody_has(world: World) -> None:
    body = "found['there'] = resolve('nobody.example.org', 2)"
    outcome = world.run(body, allow=["nobody.example.org:443"])
    assert outcome.found == {"there": "NONAME"}
    assert outcome.refused == {}


def test_an_answer_that_is_good_for_a_second(world: World, helper: str) -> None:
    """Its address can be used for a minute all the same, and asking again changes nothing."""
    body = (
        "for _ in range(3): resolve('short.example.org', 2)\n"
        f"found['there'] = reach({OTHER!r}, 443)"
    )
    outcome = world.run(body, helper=helper, allow=["short.example.org:443"])
    assert outcome.found == {"there": f"{OTHER} 443"}


@pytest.mark.needs("slirp4netns", "subuid", "tun", "ip", "nft")
@pytest.mark.parametrize("name", ["torn", "broken"])
def test_a_name_server_that_fails(world: World, name: str) -> None:
    """It resets its connection in the middle of an answer, or says that it cannot."""
    body = f"found['there'] = resolve('{name}.example.org', 2)"
    outcome = world.run(body, allow=[f"{name}.example.org:443"])
    assert outcome.found == {"there": "AGAIN"}
    assert outcome.result["status"] == "ok"


@pytest.mark.needs("slirp4netns", "subuid", "tun", "ip", "nft")
def test_what_is_no_answer_is_not_heard(world: World) -> None:
    """RFC 5452: the number, the name and the type must be those of the question."""
    body = "found['there'] = resolve('forged.example.org', 2)"
    outcome = world.run(body, allow=["forged.example.org:443"])
    assert outcome.found == {"there": [PUBLIC]}


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("nameserver 192.0.2.1\nnameserver 2001:db8::1\n", ["192.0.2.1", "2001:db8::1"]),
        ("# nameserver 192.0.2.1\nsearch example.org\n", ["127.0.0.1"]),
        ("nameserver\nnameserver dns.example\n\xff\n nameserver 192.0.2.2 # x", ["192.0.2.2"]),
        (None, ["127.0.0.1"]),
    ],
)
def test_the_name_servers_of_the_host(tmp_path: Path, text: str | None, servers: list[str]) -> None:
    """resolv.conf(5)."""
    file = tmp_path / "resolv.conf"
    if text is not None:
        file.write_text(text)
    assert of_host(str(file)) == servers
