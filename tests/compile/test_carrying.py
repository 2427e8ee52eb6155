"""A way out that cannot be had is refused before anything starts, and said why."""

from __future__ import annotations

import dataclasses

import pytest

from sandboxd.compile import build, carrying, network
from sandboxd.compile.egress import Egress, understood
from sandboxd.errors import HostError, PolicyError
from sandboxd.host import Host
from sandboxd.policy import Network, Policy, Syscalls

BARE = Host(arch="x86_64", kernel="6.1.0", uid=1000, gid=1000, cpus=2)
ABLE = dataclasses.replace(
    BARE, slirp4netns="/x/slirp4netns", pasta="/x/pasta", tun=True, nftables=True
)
USER = Policy(network=Network(mode="user"))


def with_helper(name: str) -> Policy:
    return Policy(network=Network(mode="user", helper=name))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "policy", "missing"),
    [
        ({"slirp4netns": None, "pasta": None}, USER, "slirp4netns or pasta"),
        ({"pasta": None}, with_helper("pasta"), "needs pasta"),
        ({"slirp4netns": None}, with_helper("slirp4netns"), "needs slirp4netns"),
        ({"tun": False}, USER, "needs tun"),
        ({"nftables": False}, USER, "needs nftables"),
    ],
)
def test_what_lacks_is_named(change: dict[str, object], policy: Policy, missing: str) -> None:
    host = dataclasses.replace(ABLE, **change)  # type: ignore[arg-type]
    with pytest.raises(HostError, match=missing) as caught:
        build.compile_policy(policy, host)
    assert caught.value.hint


def test_the_first_that_is_there_is_taken() -> None:
    assert carrying.program(USER, ABLE) == ("slirp4netns", "/x/slirp4netns")
    only = dataclasses.replace(ABLE, slirp4netns=None)
    assert carrying.program(USER, only) == ("pasta", "/x/pasta")
    assert carrying.program(with_helper("pasta"), ABLE) == ("pasta", "/x/pasta")


def test_no_way_out_without_sockets() -> None:
    """As under the policies for judging, whose programs have unix sockets alone."""
    rules = ("@sockets-unix", "@no-namespaces", "@guards")
    policy = Policy(network=Network(mode="user"), syscalls=Syscalls(rules=rules))
    with pytest.raises(PolicyError, match="no rule admits a socket"):
        build.compile_policy(policy, ABLE)


def test_none_is_none() -> None:
    assert network.egress(Policy(), ABLE) is None
    assert build.compile_policy(Policy(), BARE).enforcement["network"] == "none"


def egress(kind: str, *publish: str) -> Egress:
    found = understood(Network(mode="user", publish=publish))
    return dataclasses.replace(found, kind=kind, program=f"/x/{kind}")


def test_nobody_is_told_to_lead_to_the_host() -> None:
    """slirp4netns(1), pasta(1): each has its own ways to the host's loopback."""
    slirp = carrying.command(egress("slirp4netns"), "n1", True)
    assert {"--disable-host-loopback", "--disable-dns", "--enable-sandbox"} <= set(slirp)
    assert not [word for word in slirp if word.startswith("--api-socket")]
    pasta = carrying.command(egress("pasta"), "n1", True)
    assert "--no-map-gw" in pasta
    for flag in ("-t", "-u", "-T", "-U"):
        assert pasta[pasta.index(flag) + 1] == "none"


def test_published_ports_are_told() -> None:
    slirp = egress("slirp4netns", "8080:80")
    assert "--api-socket=/tmp/n1" in carrying.command(slirp, "n1", False)
    (wanted,) = carrying.forwards(slirp)
    assert wanted["arguments"]["host_addr"] == "127.0.0.1"
    pasta = egress("pasta", "8080:80", "192.0.2.1:53:5353")
    words = carrying.command(pasta, "n1", False)
    given = [words[at + 1] for at, word in enumerate(words) if word == "-t"]
    assert given == ["127.0.0.1/8080:80", "192.0.2.1/53:5353"]
    assert carrying.forwards(pasta) == []
