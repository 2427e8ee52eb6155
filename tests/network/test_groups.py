"""Members of a group with a way out: each has its own, and none through another."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.escape.attack import python
from tests.network.conftest import TOOLS, Outcome, World
from tests.network.places import OTHER, PUBLIC, PUBLIC6

SERVE = """
server = socket.create_server(("0.0.0.0", 80)); server.settimeout(30)
def served():
    one, peer = server.accept(); one.sendall(b"from " + peer[0].encode())
    one.shutdown(socket.SHUT_WR)  # what was not read would make the end a reset
    while one.recv(100): pass
    one.close()
served()
"""
RESOLVERS = ["203.0.113.53"]


def member(body: str, *after: str, ready: str = "started", **network: Any) -> dict[str, Any]:
    network = {"resolvers": RESOLVERS, **network} if network else {"mode": "none"}
    return {"argv": python(TOOLS + body), "network": network, "after": after, "ready": ready}


def run(world: World, members: dict[str, Any], **fields: Any) -> dict[str, Outcome]:
    found = world.ask("group", members=members, group=fields)
    return {name: Outcome(result) for name, result in found.items()}


ASKING = (
    f"found['allowed'] = reach({PUBLIC!r})\nfound['other'] = reach({OTHER!r}, wait=1)\n"
    f"found['six'] = reach({PUBLIC6!r}, wait=1)\n"
    "found['name'] = resolve('packages.example.org', 2)\n"
    "found['refused name'] = resolve('evil.example.com', 2)\n"
    "found['member'] = reach('db.shop', 80)\n"
    "found['group'] = [resolve('db.shop', 2), resolve('db', 2), resolve('no.shop', 2)]\n"
)


def test_each_has_its_own_way_out(world: World, helper: str) -> None:
    """The same program with one list, another list, and none."""
    allow = [f"{PUBLIC}:443", f"[{PUBLIC6}]:443", "packages.example.org:443"]
    found = run(
        world,
        {
            "db": member(SERVE + "served(); served()", ready="tcp:80"),
            "web": member(ASKING, "db", helper=helper, allow=allow),
            "other": member(ASKING, "db", helper=helper, allow=[f"{OTHER}:443"]),
            "none": member(ASKING, "db"),
        },
        name="shop",
    )
    addresses = {"web": "192.168.100.3", "other": "192.168.100.4", "none": "192.168.100.5"}
    for name, address in addresses.items():
        assert found[name].found["member"] == f"from {address}"
        assert found[name].found["group"] == [["192.168.100.2"], ["192.168.100.2"], "NONAME"]
        assert found[name].found["refused name"] == "NONAME"
    web, other, none = (found[name].found for name in addresses)
    assert (web["allowed"], web["other"]) == (f"{PUBLIC} 443", "ECONNREFUSED")
    assert web["name"] == [PUBLIC]
    assert (other["allowed"], other["other"]) == ("ECONNREFUSED", f"{OTHER} 443")
    assert (none["allowed"], none["other"], none["name"]) == ("ENETUNREACH",) * 2 + ("NONAME",)
    assert (web["six"], other["six"]) == (f"{PUBLIC6} 443", "ECONNREFUSED")
    assert none["six"] in ("ENETUNREACH", "EADDRNOTAVAIL")
    assert found["web"].refused == {"evil.example.com": 1, f"{OTHER}:443/tcp": 1}
    assert found["other"].refused == {
        "evil.example.com": 1, "packages.example.org": 1, f"{PUBLIC}:443/tcp": 1,
        f"[{PUBLIC6}]:443/tcp": 1,
    }  # fmt: skip
    assert found["none"].refused == {"evil.example.com": 1, "packages.example.org": 1}
    assert found["web"].result["usage"]["net_connections"] == 2  # what stays in the group is none
    assert found["none"].result["usage"]["net_received"] is None
    assert found["web"].result["enforcement"]["network"] == (
        f"group: bridge, nftables; user: {helper}, nftables"
    )


def test_nobody_goes_out_through_another(world: World, helper: str) -> None:
    """Packets to the Internet that are put on the wire, where a member with a way out is: by
    SO_BINDTODEVICE (socket(7)) without a route, and by a source route (ip(7), IP_OPTIONS).
    """
    hostile = (
        "def bound(address):\n"
        " one = socket.socket(); one.settimeout(1)\n"
        " one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth0')\n"
        " one.connect((address, 443)); return one.recv(99)\n"
        f"for who in ({PUBLIC!r}, {OTHER!r}, '169.254.169.254', '10.0.2.2', '10.0.2.100'):\n"
        " try: found[who] = bound(who).decode()\n"
        " except TimeoutError: found[who] = 'ETIMEDOUT'\n"
        " except OSError as error: found[who] = errno.errorcode[error.errno]\n"
        "def routed(first, then):\n"
        " one = socket.socket(); one.settimeout(1)\n"
        " one.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([131, 7, 4])\n"
        "   + socket.inet_aton(first) + bytes(1))\n"
        " one.connect((then, 443)); return one.recv(99)\n"
        "try: found['source route'] = routed('192.168.100.2', " + repr(PUBLIC) + ").decode()\n"
        "except TimeoutError: found['source route'] = 'ETIMEDOUT'\n"
        "except OSError as error: found['source route'] = errno.errorcode[error.errno]\n"
    )
    members = {
        "way": member(SERVE, ready="tcp:80", helper=helper, allow=["*"]),
        "hostile": member(hostile + "found['end'] = reach('way', 80)\n", "way"),
    }
    found = run(world, members)
    answers = found["hostile"].found
    assert answers.pop("end") == "from 192.168.100.3"
    assert set(answers.values()) <= {"ECONNREFUSED", "ENETUNREACH", "EPERM", "EINVAL", "ETIMEDOUT"}
    assert found["way"].result["usage"]["net_connections"] == 0


def test_one_network_has_one_way_out(world: World, helper: str) -> None:
    """And who was refused is told to all of them."""
    network: Any = {"helper": helper, "allow": [f"{PUBLIC}:443"]}
    found = run(
        world,
        {
            "a": member(SERVE + f"found['there'] = reach({PUBLIC!r})", ready="tcp:80", **network),
            "b": member(f"found['away'] = reach({OTHER!r})\nfound['a'] = reach('a', 80)", "a",
                        **network),
        },
        share="network",
    )  # fmt: skip
    assert found["a"].found == {"there": f"{PUBLIC} 443"}
    assert found["b"].found == {"away": "ECONNREFUSED", "a": "from 127.0.0.1"}
    assert found["a"].refused == found["b"].refused == {f"{OTHER}:443/tcp": 1}


def test_a_way_out_that_is_lost_ends_the_group(world: World, helper: str) -> None:
    waiting = (
        f"reach({PUBLIC!r})\nimport subprocess\n"
        "subprocess.run(['/bin/sh', '-c', 'sleep 60; : ready-for-it'])\n"
    )
    members = {
        "web": member(waiting, helper=helper, allow=["*"]),
        "db": member("time.sleep(60)"),
    }
    for victim in (helper, "netkeeper"):
        with pytest.raises(RuntimeError, match=f"{helper} ended while the job ran"):
            world.ask("group", members=members, group={}, kill=victim)
    assert helper not in world.ask("until", names={helper: 0})


def test_a_port_leads_to_a_member(world: World, helper: str) -> None:
    """publish, beside the bridge."""
    members = {"web": member(SERVE, helper=helper, publish=["8089:80"])}
    number = world.begin("group", members=members, group={})
    assert "from" in world.ask("connect", address="127.0.0.1", port=8089)
    assert world.answer(number)["web"]["status"] == "ok"


def test_many_groups_leave_nothing(world: World, helper: str) -> None:
    before = world.ask("processes").count(helper)
    members = {
        "web": member(SERVE, ready="tcp:80", helper=helper, allow=["*"]),
        "db": member("found['x'] = reach('web', 80)", "web"),
    }
    for _ in range(10):
        run(world, members)
    assert world.ask("until", names={helper: before}).count(helper) == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_supervisor(
    world: World, helper: str, how: signal.Signals, tmp_path: Path
) -> None:
    before = {name: world.ask("processes").count(name) for name in (helper, "sleep")}
    file = tmp_path / "group.toml"
    file.write_text(
        '[members.a]\nargv = ["/bin/sleep", "62"]\n'
        f'[members.b]\nargv = ["/bin/sleep", "62"]\nallow = ["{PUBLIC}:443"]\n'
        'policy = "./helped.toml"\n'
    )
    (tmp_path / "helped.toml").write_text(f'extends = "base"\n[network]\nhelper = "{helper}"\n')
    tmp_path.chmod(0o755)
    world.ask("start", command=["group", "run"], argv=[str(file)])
    world.ask("until", names={helper: before[helper] + 1, "sleep": before["sleep"] + 2})
    code, said = world.ask("end", signal=how, tenant=False)
    assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143}[how], said
    left = world.ask("until", names=before)
    assert {name: left.count(name) for name in before} == before
