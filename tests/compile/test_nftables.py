"""The filter, as nft(8) reads it back from the kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from ipaddress import ip_address
from typing import Any

import msgspec
import pytest

from sandboxd.compile import nftables
from sandboxd.compile.egress import UDP, Caps, Egress, Published, parse

LOAD = """
import socket, struct, subprocess, sys
link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
link.settimeout(10)
for text in sys.argv[1:]:
    link.send(bytes.fromhex(text))
    error = struct.unpack_from("=i", link.recv(65536), 16)[0]
    if error:
        sys.exit(f"errno {-error}")
sys.stdout.flush()
subprocess.run(["nft", "--json", "list", "ruleset"], check=True)
"""


def listed(*batches: bytes) -> list[dict[str, Any]]:
    """What is in the kernel after these, in a network namespace of its own."""
    done = subprocess.run(
        ["unshare", "--map-root-user", "--net", sys.executable, "-c", LOAD,
         *(one.hex() for one in batches)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["nftables"]
    return found


def rules(found: list[dict[str, Any]], chain: str = "out") -> list[str]:
    """A chain, a line a rule, in the words of nft --json."""
    return [
        json.dumps(one["rule"]["expr"]) for one in found
        if "rule" in one and one["rule"]["chain"] == chain
    ]  # fmt: skip


def sets(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {one["set"]["name"]: one["set"] for one in found if "set" in one}


pytestmark = pytest.mark.needs("userns", "nft")


def test_nothing_is_let_out_that_is_not_named() -> None:
    found = listed(nftables.ruleset(parse(())))
    chain = next(one["chain"] for one in found if one.get("chain", {}).get("name") == "out")
    assert (chain["hook"], chain["policy"]) == ("output", "drop")
    kept = rules(found)
    assert [one for one in kept if '"accept"' in one] == [kept[0], kept[2]]
    assert [one for one in kept if '"goto"' in one] == [kept[1]]  # answers
    assert '"reject"' in kept[-1]
    assert set(sets(found)) == {"denied4", "denied6", "opened"}


def test_each_entry_is_a_rule() -> None:
    entries = ("10.1.0.0/16:22-25", "[2001:db8::/32]:53/udp", "a.example:443", "*:80", "*:1/tcp")
    found = listed(nftables.ruleset(parse(entries)))
    kept = [one for one in rules(found) if '"goto": {"target": "let"}' in one]
    assert '{"prefix": {"addr": "10.1.0.0", "len": 16}}' in kept[0]
    assert '{"range": [22, 25]}' in kept[0] or '"right": 22' in kept[0]
    assert '{"prefix": {"addr": "2001:db8::", "len": 32}}' in kept[1]
    assert '"protocol": "udp"' in kept[1]
    assert [text for text in kept if "@names4_0" in text] == [kept[2]]
    assert ["!=" in text and "@closed4" in text for text in kept[3:5]] == [True, True]
    assert '"protocol": "tcp"' in kept[4]
    assert len(kept) == 2 + 2 * 3


def test_what_is_closed_is_all_of_it() -> None:
    own = (ip_address("203.0.113.200"), ip_address("192.168.5.5"), ip_address("2001:db8::2"))
    found = sets(listed(nftables.ruleset(parse(("*",)), own)))
    four = json.dumps(found["closed4"]["elem"])
    for part in ('"203.0.113.200"', '{"prefix": {"addr": "192.168.0.0", "len": 16}}',
                 '{"prefix": {"addr": "224.0.0.0", "len": 3}}'):  # fmt: skip
        assert part in four
    assert '"2001:db8::2"' in json.dumps(found["closed6"]["elem"])


def test_an_address_is_let_through_for_a_time() -> None:
    egress: Egress = parse(("a.example:443", "a.example:22"))
    address = ip_address("203.0.113.9")
    once = nftables.pin(address, [0, 1], 90)
    found = sets(listed(nftables.ruleset(egress), once))
    for name in ("names4_0", "names4_1"):
        (element,) = found[name]["elem"]
        assert element["elem"]["val"] == "203.0.113.9"
        assert element["elem"]["timeout"] == 90
    longer = nftables.pin(address, [0], 600, again=True)
    found = sets(listed(nftables.ruleset(egress), once, longer))
    assert found["names4_0"]["elem"][0]["elem"]["timeout"] == 600
    assert found["names4_1"]["elem"][0]["elem"]["timeout"] == 90


def test_caps_are_a_set_a_quota_and_a_limit() -> None:
    egress = msgspec.structs.replace(parse(("*",)), caps=Caps(7, 1000, 2048))
    found = listed(nftables.ruleset(egress))
    assert sets(found)["opened"]["size"] == 7
    (quota,) = (one["quota"] for one in found if "quota" in one)
    assert (quota["name"], quota["bytes"]) == ("bytes", 1001)  # a packet that leads to it is over
    assert '"target": "full"' in rules(found, "let")[-3]
    assert '"quota": "bytes"' in rules(found, "pass")[0]
    (limit,) = (one for one in rules(found, "in") if '"limit"' in one)
    assert '"inv": true' in limit
    assert '"drop"' in limit


def test_what_is_not_capped_has_none_of_it() -> None:
    found = listed(nftables.ruleset(parse(("*",))))
    assert sets(found)["opened"]["size"] == nftables.MOST_OPENED
    assert "quota" not in json.dumps(found)
    assert '"limit"' not in json.dumps(found)
    assert rules(found, "full") == []


def test_a_published_udp_port_may_answer_who_asked_it() -> None:
    egress = msgspec.structs.replace(parse(()), published=(Published("127.0.0.1", 8053, 53, UDP),))
    found = listed(nftables.ruleset(egress))
    assert {"askers4", "askers6"} <= set(sets(found))
    assert sets(found)["askers4"]["type"] == ["ipv4_addr", "inet_service", "inet_service"]
    noted = [one for one in rules(found, "in") if "@askers" in one]
    assert ['"right": 53' in one for one in noted] == [True, True]
    assert ['"timeout": 180' in one for one in noted] == [True, True]  # three minutes
    assert len([one for one in rules(found) if "@askers" in one]) == 2
