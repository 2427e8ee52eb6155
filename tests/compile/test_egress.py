"""[network] allow, publish, resolvers: what is understood, what is refused, and where that is."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from sandboxd.compile.egress import (
    TCP,
    UDP,
    Ports,
    Published,
    entry,
    is_closed,
    parse,
    problems,
    published,
)
from sandboxd.errors import PolicyError
from sandboxd.policy import Network


def test_every_form_of_an_entry() -> None:
    found = parse(
        ("packages.example.org:443", "*.Mirror.example.net.:80/tcp", "10.1.0.0/16:22-25",
         "[2001:db8::/32]:53/udp", "[::ffff:0:1]:1", "192.0.2.1:*", "*", "*:8000-8999")
    )  # fmt: skip
    assert found.names == (
        ("packages.example.org", Ports(443, 443)),
        ("*.mirror.example.net", Ports(80, 80, (TCP,))),
    )
    assert found.networks == (
        (ip_network("10.1.0.0/16"), Ports(22, 25)),
        (ip_network("2001:db8::/32"), Ports(53, 53, (UDP,))),
        (ip_network("::ffff:0:1/128"), Ports(1, 1)),
        (ip_network("192.0.2.1/32"), Ports(1, 65535)),
    )
    assert found.public == (Ports(1, 65535), Ports(8000, 8999))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("example.org", "says no port"),
        ("example.org:", "says no port"),
        (":443", "says no port"),
        ("example.org:0", "ports are 1 to 65535"),
        ("example.org:65536", "ports are 1 to 65535"),
        ("example.org:9-8", "the lower one first"),
        ("example.org:80/sctp", "says no port"),
        ("10.1.0.5/16:22", "has host bits set"),
        ("10.1.0.300:22", "does not appear"),
        ("010.1.0.5:22", "does not appear"),
        ("10.1:22", "does not appear"),
        ("[10.1.0.5]:22", "and no other, stands in brackets"),
        ("2001:db8::1:22", "and no other, stands in brackets"),
        ("[2001:db8::1:22", "no name and no address"),
        ("[::g]:22", "does not appear"),
        ("127.0.0.1:80", "cannot be opened"),
        ("127.0.0.0/9:80", "cannot be opened"),
        ("[::1]:80", "cannot be opened"),
        ("224.0.0.251:5353", "cannot be opened"),
        ("[ff02::fb]:5353", "cannot be opened"),
        ("*.*.org:80", "no name and no address"),
        ("a.*.org:80", "no name and no address"),
        ("*org:80", "no name and no address"),
        ("http://example.org:80", "does not appear"),
        ("-a.org:80", "no name and no address"),
        ("a..org:80", "no name and no address"),
        (f"{'a' * 64}.org:80", "no name and no address"),
        ("bücher.example:80", "no name and no address"),
        ("example.org:443 ", "says no port"),
        ("", "says no port"),
    ],
)
def test_what_is_no_entry_is_named(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message) as caught:
        parse(("*", text))
    assert caught.value.where == "network.allow[1]"


def test_names_match_as_written() -> None:
    found = parse(("example.org:1", "*.example.org:2", "*.deep.example.org:2", "*.net:3"))
    assert found.groups == (Ports(1, 1), Ports(2, 2), Ports(3, 3))
    for name, groups in {
        "example.org": (0,),
        "a.example.org": (1,),
        "x.deep.example.org": (1,),
        "deep.example.org": (1,),
        "example.net": (2,),
        "net": (),
        "badexample.org": (),
        "example.org.evil.com": (),
        ".example.org": (),
        "": (),
        "a\\000.example.org": (1,),
    }.items():
        assert found.pins(name) == groups, name
        assert found.admits(name) == bool(groups)


def test_the_public_internet_is_what_is_left() -> None:
    closed = (
        "10.0.0.1", "172.31.255.255", "192.168.0.0", "100.127.0.1", "169.254.169.254", "127.0.0.1",
        "0.0.0.0", "255.255.255.255", "224.0.0.1", "::1", "fd00:ec2::254", "fe80::1", "ff02::1",
        "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:a00:1::", "2001::1", "::8.8.8.8",
    )  # fmt: skip
    for address in closed:
        assert is_closed(ip_address(address)), address
    for address in ("8.8.8.8", "172.32.0.0", "192.169.0.0", "100.128.0.0", "2606:4700::1111"):
        assert not is_closed(ip_address(address)), address
    assert is_closed(ip_address("8.8.8.8"), (ip_address("8.8.8.8"),))


def test_the_host_itself_may_be_named() -> None:
    found = parse(("192.168.7.0/24:80",))
    assert found.is_named(ip_address("192.168.7.7"))
    assert not found.is_named(ip_address("192.168.8.7"))


def test_ports_of_the_host() -> None:
    entries = ("8080:80", "192.0.2.1:8080:81/tcp", "8080:8080/udp", "[2001:db8:0::1]:8080:80")
    assert published(entries) == (
        Published("127.0.0.1", 8080, 80),
        Published("192.0.2.1", 8080, 81),
        Published("127.0.0.1", 8080, 8080, UDP),
        Published("2001:db8::1", 8080, 80),
    )
    for text in ("80", "a:80", "8080:80/sctp", "0:80", "80:65536", "[192.0.2.1]:80:80", "::1:80:80",
                 "1.2.3.400:1:1", "[fe80::1%eth0]:80:80", "[::g]:80:80"):  # fmt: skip
        with pytest.raises(PolicyError) as caught:
            published((text,))
        assert caught.value.where == "network.publish[0]"
    with pytest.raises(PolicyError, match="one place only"):
        published(("8080:80", "127.0.0.1:8080:81"))
    with pytest.raises(PolicyError, match="both ports of UDP are the same"):
        published(("[::1]:8053:53/udp",))
    with pytest.raises(PolicyError, match="one place only"):
        published(("[::1]:8080:80", "[0::1]:8080:81"))


def test_all_that_is_wrong_is_told() -> None:
    network = Network(mode="user", allow=("x",), resolvers=("1.1.1.1", "dns"), publish=("y",))
    places = ["network.allow[0]", "network.resolvers[1]", "network.publish[0]"]
    assert [error.where for error in problems(network)] == places


def test_an_entry_for_what_was_refused() -> None:
    for text in ("1.2.3.4:80/tcp", "[2001:db8::1]:53/udp"):
        found = parse((text,))
        network, ports = found.networks[0]
        assert entry(network.network_address, ports.first, ports.protocols[0]) == text
