"""A way out that cannot be had is refused before anything starts, and said why."""

from __future__ import annotations

import msgspec
import pytest

from sandboxd.compile import build, carrying, network
from sandboxd.compile.egress import Caps, Egress, understood
from sandboxd.errors import HostError, PolicyError
from sandboxd.host import Host
from sandboxd.policy import Network, Policy, Require, Syscalls

BARE = Host(arch="x86_64", kernel="6.1.0", uid=1000, gid=1000, cpus=2)
ABLE = msgspec.structs.replace(
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
    host = msgspec.structs.replace(ABLE, **change)
    with pytest.raises(HostError, match=missing) as caught:
        build.compile_policy(policy, host)
    assert caught.value.hint


def test_the_first_that_is_there_is_taken() -> None:
    assert carrying.program(USER, ABLE) == ("slirp4netns", "/x/slirp4netns")
    only = msgspec.structs.replace(ABLE, slirp4netns=None)
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
    return msgspec.structs.replace(found, kind=kind, program=f"/x/{kind}")


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
    (wanted,) = carrying.forwards(egress("slirp4netns", "192.0.2.1:53:54/udp"))
    assert wanted["arguments"]["proto"] == "udp"
    pasta = egress("pasta", "8080:80", "192.0.2.1:53:5353", "53:53/udp", "[::1]:1:2")
    words = carrying.command(pasta, "n1", False)
    given = [words[at + 1] for at, word in enumerate(words) if word == "-t"]
    assert given == ["127.0.0.1/8080:80", "192.0.2.1/53:5353", "::1/1:2"]
    assert words[words.index("-u") + 1] == "127.0.0.1/53:53"
    assert carrying.forwards(pasta) == []


def test_only_pasta_publishes_at_ipv6() -> None:
    """slirp4netns(1): add_hostfwd takes an IPv4 address."""
    network = Network(mode="user", publish=("8080:80", "[::1]:8080:80"))
    assert carrying.program(Policy(network=network), ABLE) == ("pasta", "/x/pasta")
    without = msgspec.structs.replace(ABLE, pasta=None)
    with pytest.raises(HostError, match=r"network.publish\[1\].*IPv6.*needs pasta"):
        carrying.program(Policy(network=network), without)
    slirp = msgspec.structs.replace(network, helper="slirp4netns")
    with pytest.raises(PolicyError, match=r"publish\[1\].*slirp4netns cannot") as caught:
        carrying.program(Policy(network=slirp), ABLE)
    assert 'network.helper = "pasta"' in caught.value.hint
    answered = Network(mode="user", publish=("198.51.100.2:53:53/udp",))
    assert carrying.program(Policy(network=answered), ABLE)[0] == "slirp4netns"
    lost = Network(mode="user", publish=("53:53/udp",))
    assert carrying.program(Policy(network=lost), ABLE)[0] == "pasta"


CAPPED = Network(mode="user", connections=5, bytes=1 << 20, rate=1 << 20)


def test_caps_that_this_kernel_has_not_are_told() -> None:
    """Without nft_quota, nft_limit and sch_tbf; those of connections need nothing of it."""
    compiled = build.compile_policy(Policy(network=CAPPED), ABLE)
    caps = {what: word for what, word in compiled.enforcement.items() if "network_" in what}
    assert caps == {
        "network_connections": "nftables", "network_bytes": "none", "network_rate": "none",
    }  # fmt: skip
    assert {"network_bytes", "network_rate"} <= {what for what, _ in compiled.degraded}
    assert compiled.egress is not None
    assert compiled.egress.caps == Caps(connections=5)
    required = Policy(network=CAPPED, require=Require(network="enforced"))
    with pytest.raises(HostError, match=r"require.network.*network_bytes.*network_rate"):
        build.compile_policy(required, ABLE)
    with_all = msgspec.structs.replace(ABLE, net_bytes=True, net_rate=True)
    compiled = build.compile_policy(required, with_all)
    assert compiled.enforcement["network_rate"] == "nftables and tbf"
    assert compiled.egress is not None
    assert compiled.egress.caps == Caps(5, 1 << 20, 1 << 20)
    without = build.compile_policy(USER, ABLE)
    assert without.enforcement["network_bytes"] == "not asked"
