"""Jobs that run together: who reaches whom, by which name, who waits for whom, who ends whom."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from sandboxd.errors import JobError, LaunchError, SandboxError
from sandboxd.group import Group, Member
from sandboxd.host import Host
from sandboxd.job import File, Job
from sandboxd.policy import Limits, Mount, Network, Root
from sandboxd.result import Event
from sandboxd.stores.volumes import Shelf
from sandboxd.supervise.runner import Runner, open_runner
from tests.supervise.members import ECHO, SERVE, WAITS, job, read, run, said
from tests.supervise.variants import EVERY, policy, without

TWO = {"address": "192.168.100.10"}, {"address": "192.168.100.20"}


@EVERY
async def test_two_on_a_bridge(host: str) -> None:
    """The experiment of the textbooks: .10 and .20 reach each other, and nothing else."""
    asking = (
        "found['tcp'] = reach('192.168.100.10', 5432)\n"
        "away = '192.168.100.1', '192.168.100.30', '8.8.8.8', '169.254.169.254', '10.0.2.2'\n"
        "for who in away:\n"
        " found[who] = reach(who, wait=0.5)\n"
        "found['loopback'] = reach('127.0.0.1', 5432)\n"
        "found['interfaces'] = sorted(name for _, name in socket.if_nameindex())\n"
    )
    found = await run(
        Group(members={
            "one": Member(job=job(SERVE), ready="tcp:5432", **TWO[0]),
            "two": Member(job=job(asking), after=["one"], **TWO[1]),
        }), host,
    )  # fmt: skip
    assert said(found["one"]) == {"peer": "192.168.100.20"}
    answers = said(found["two"])
    assert answers.pop("tcp") == "hello 192.168.100.20"
    assert answers.pop("interfaces") == ["eth0", "lo"]
    assert answers.pop("loopback") == "ECONNREFUSED"
    for nobody in ("192.168.100.1", "192.168.100.30"):
        assert answers.pop(nobody) == "ECONNREFUSED"
    assert set(answers.values()) == {"ENETUNREACH"}
    assert {one.enforcement["network"] for one in found.values()} == {"group: bridge, nftables"}


async def test_datagrams() -> None:
    found = await run(
        Group(members={
            "one": Member(job=job(ECHO), ready="udp:5300", **TWO[0]),
            "two": Member(job=job("found['udp'] = reach('one', 5300, 'udp', b'x')"), after=["one"]),
        })
    )  # fmt: skip
    assert said(found["two"]) == {"udp": "echo x"}
    assert said(found["one"]) == {"peer": "192.168.100.2"}


@EVERY
async def test_one_network_for_all(host: str) -> None:
    """As in a pod: they meet at localhost."""
    asking = (
        "found['there'] = reach('127.0.0.1', 5432)\nfound['name'] = socket.gethostname()\n"
        "found['db'] = resolve('db.group', 2)\n"
        "found['interfaces'] = [name for _, name in socket.if_nameindex()]"
    )
    found = await run(
        Group(share="network", members={
            "db": Member(job=job(SERVE), ready="tcp:5432"),
            "web": Member(job=job(asking), after=["db"]),
        }), host,
    )  # fmt: skip
    assert said(found["web"]) == {
        "there": "hello 127.0.0.1", "name": "web", "db": ["127.0.0.1"], "interfaces": ["lo"],
    }  # fmt: skip
    assert found["db"].enforcement["network"] == "group: one namespace"


NAMES = """
for name in ("hosts", "hostname", "resolv.conf"):
    found[name] = reads("/etc/" + name)
found["own"] = socket.gethostname()
for name in ("db", "web", "db.shop", "web.shop", "WEB.Shop", "x.shop", "x", "shop", "localhost"):
    found["resolved " + name] = resolve(name, 2)
found["written"] = tried(open, "/etc/hosts", "a")

def asked(name, kind):
    "Of the name server itself: code, and number of answers."
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.settimeout(5)
    kinds = bytes([0, kind, 0, 1])
    labels = b"".join(bytes([len(x)]) + x.encode() for x in name.split(".")) + b"\\0"
    one.sendto(b"ab\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0" + labels + kinds, ("127.0.0.53", 53))
    data = one.recv(512)
    return [data[3] & 15, data[7], list(data[-4:]) if data[7] else None]
found["A"] = asked("db.shop", 1)
found["AAAA"] = asked("db.shop", 28)
found["TXT"] = asked("db.shop", 16)
found["short"] = asked("db", 1)
found["below"] = asked("secret.db.shop", 1)
found["outside"] = asked("example.org", 1)
"""


@pytest.mark.parametrize("root", ["shared", "kernel", "tmpfs"])
async def test_names(root: str) -> None:
    """hosts(5), resolv.conf(5); and who asks the name server itself hears the same."""
    fields = Root() if root == "shared" else Root(writable=True, driver=root)  # type: ignore[arg-type]
    members = {"db": job("found[0] = 0"), "web": job(NAMES, policy=policy(root=fields))}
    result = (await run(Group(name="shop", members=members)))["web"]
    found = said(result)
    assert found["hosts"] == (
        "127.0.0.1 localhost\n::1 localhost\n192.168.100.2 db db.shop\n192.168.100.3 web web.shop\n"
    )
    assert found["hostname"] == "web\n"
    assert found["resolv.conf"].startswith("nameserver 127.0.0.53\nsearch shop\n")
    assert found["own"] == "web"
    for name in ("db", "db.shop"):
        assert found[f"resolved {name}"] == ["192.168.100.2"]
    for name in ("web", "web.shop", "WEB.Shop"):
        assert found[f"resolved {name}"] == ["192.168.100.3"]
    for name in ("x.shop", "x", "shop"):
        assert found[f"resolved {name}"] == "NONAME"
    assert found["resolved localhost"] == ["127.0.0.1"]
    assert found["written"] in ("EROFS", "EACCES")
    assert found["A"] == found["short"] == [0, 1, [192, 168, 100, 2]]
    assert found["AAAA"] == found["TXT"] == [0, 0, None]
    assert found["below"] == found["outside"] == [3, 0, None]
    refused = {one.name for one in result.violations}
    assert refused == {"x", "example.org"}  # what would be the group's is nobody else's


async def test_each_has_its_own_policy_limits_and_result() -> None:
    """Roots differ, so tenants do; one is stopped at its limit, and the other goes on."""
    members = {
        "small": job("while True: pass", policy=policy(Limits(wall_time=0.3))),
        "large": job("found['w'] = writes('/new', b'x', os.O_WRONLY | os.O_CREAT)",
                     policy=policy(root=Root(writable=True)), files={"a/b": b"x"}),
        "third": job("import os\nfound['files'] = os.listdir('/box')", collect=["out*"],
                     files={"out.txt": File(data=b"here")}),
    }  # fmt: skip
    found = await run(Group(members=members, stop="never"))
    assert list(found) == ["small", "large", "third"]
    assert found["small"].status == "wall_time_limit"
    assert said(found["large"]) == {"w": "ok"}
    assert said(found["third"]) == {"files": ["out.txt"]}
    assert [one.path for one in found["third"].artifacts] == ["out.txt"]


OTHER = Mount(target="/other", source="/usr/lib")
"""What makes a tenant's root another one."""


@EVERY
async def test_roots_that_differ(host: str) -> None:
    """Then tenants do, too, and share a user namespace: by name and at localhost they still meet.

    Two of each root, files in and out, so that each tenant has two and a porter.
    """
    asking = "found['db'] = reach('db', 5432)\nfound['other'] = os.path.isdir('/other')\n"
    looking = "found['other'] = os.path.isdir('/other')\nfound['in'] = reads('/box/in')\n"
    other = msgspec.structs.replace(policy(), mounts=(OTHER,))
    files: Any = {"files": {"in": b"there"}, "collect": ["in"]}
    for share in ("bridge", "network"):
        members = {
            "db": Member(job=job(SERVE), ready="tcp:5432"),
            "web": Member(job=job(asking, policy=other), after=["db"]),
            "third": job(looking, **files),
            "fourth": job(looking, policy=other, **files),
        }
        found = await run(Group(members=members, share=share), host)  # type: ignore[arg-type]
        assert said(found["web"])["db"].startswith("hello")
        assert said(found["web"])["other"] is True
        assert said(found["third"]) == {"other": False, "in": "there"}
        assert said(found["fourth"]) == {"other": True, "in": "there"}
        assert found["fourth"].artifacts[0].data == b"there"


@pytest.mark.needs("subuid")
async def test_no_two_in_a_user_namespace_have_one_uid() -> None:
    """As the kernel has them outside (proc(5), Uid), whatever tenant they are of."""
    other = msgspec.structs.replace(policy(), mounts=(OTHER,))
    members = {name: Job(argv=WAITS, policy=policy() if name < "c" else other) for name in "abcd"}
    up: set[str] = set()
    async with open_runner(slots=4) as runner:
        async with runner.start_group(Group(members=members)) as live:

            def all_up(name: str, event: Event) -> bool:
                up.update({name} if event.type == "stdout" else ())
                return len(up) == 4

            await read(live, all_up)
            boxes = [run._control._box for run in live.runs.values() if run._control is not None]
            namespaces = {os.readlink(f"/proc/{box.tenant.pid}/ns/user") for box in boxes}
            assert len({box.tenant.pid for box in boxes}) == 2
            assert len(namespaces) == 1
            uids = [
                Path(f"/proc/{box.pid()}/status").read_text().partition("Uid:")[2].split()[0]  # noqa: ASYNC240
                for box in boxes
            ]
            assert len(set(uids)) == 4, uids


async def test_caches_are_had_before_slots() -> None:
    """Two members with one cache, and again: nobody waits for a lock that its own group has."""
    shared = Mount(target="/cache", type="cache", name="of-a-group", lock="shared-ro")
    alone = Mount(target="/cache", type="cache", name="of-one", lock="exclusive")
    with_shared, with_alone = (
        msgspec.structs.replace(policy(), mounts=(one,)) for one in (shared, alone)
    )
    body = "found['x'] = len(os.listdir('/cache'))"
    members = {
        "a": job(body, policy=with_shared), "b": job(body, policy=with_shared),
        "c": job(body, policy=with_alone),
    }  # fmt: skip
    try:
        for _ in range(2):
            found = await run(Group(members=members))
            assert [said(one)["x"] for one in found.values()] == [0, 0, 0]
    finally:
        for name in ("of-a-group", "of-one"):
            Shelf.own("cache").remove(name)


SLEEPS = ("sleep", "60")


@pytest.mark.parametrize(
    ("stop", "main", "first", "status"),
    [
        ("failure", None, ("false",), "cancelled"),
        ("exit", None, ("true",), "cancelled"),
        ("never", "first", ("true",), "cancelled"),
        ("failure", "first", ("true",), "cancelled"),
    ],
)
async def test_who_ends_whom(stop: Any, main: str | None, first: Any, status: str) -> None:
    members: dict[str, Job | Member] = {
        "other": Job(argv=SLEEPS, policy=policy()),
        "first": Member(job=Job(argv=first, policy=policy()), after=["other"]),
    }
    found = await run(Group(members=members, stop=stop, main=main))
    assert found["other"].status == status
    assert "its group was stopped when first ended" in found["other"].message
    assert found["first"].exit_code == (first == ("false",))


@pytest.mark.parametrize(("stop", "first"), [("failure", "true"), ("never", "false")])
async def test_who_does_not(stop: Any, first: str) -> None:
    members = {
        "other": Member(job=job("found['there'] = 1"), after=["first"], ready="started"),
        "first": Member(job=Job(argv=(first,), policy=policy()), ready="started"),
    }
    found = await run(Group(members=members, stop=stop))
    assert said(found["other"]) == {"there": 1}


async def test_one_after_another() -> None:
    """`ended`: what is to be done before is done."""
    told: list[tuple[str, str]] = []

    async def emit(name: str, event: Event) -> None:
        if event.type == "stdout":
            told.append((name, event.data.decode().strip()))

    def says(*after: str) -> Member:
        one = Job(argv=("sh", "-c", "echo it"), policy=policy())
        return Member(job=one, after=after, ready="ended")

    group = Group(members={"c": says("b"), "b": says("a"), "a": says()})
    async with open_runner(slots=3) as runner:
        found = await runner.run_group(group, emit=emit)
    assert list(found) == ["c", "b", "a"]
    assert told == [("a", "it"), ("b", "it"), ("c", "it")]


@pytest.mark.parametrize("ready", ["tcp:80", "ended"])
async def test_what_waits_for_nothing_is_not_started(ready: str) -> None:
    members = {
        "db": Member(job=Job(argv=("false",), policy=policy()), ready=ready),
        "web": Member(job=Job(argv=("true",), policy=policy()), after=["db"]),
    }
    found = await run(Group(members=members, stop="never"))
    assert found["db"].status == "nonzero_exit"
    assert found["web"].status == "cancelled"
    assert found["web"].usage.wall_time is None
    assert "db ended before it was ready" in found["web"].message


async def test_what_cannot_be_started_ends_the_group() -> None:
    missing = policy(root=Root(source="/nowhere/at/all"))
    members = {"a": Job(argv=SLEEPS, policy=policy()), "b": Job(argv=SLEEPS, policy=missing)}
    with pytest.raises(LaunchError, match="/nowhere/at/all"):
        await run(Group(members=members))


async def test_slots_are_taken_together() -> None:
    """Groups that together want more than there are wait, and none has a part of its own."""
    one = Group(members={"a": job("found[0] = 0"), "b": job("found[0] = 0")})
    async with open_runner(slots=3) as runner:
        with pytest.raises(JobError, match=r"4 members, and 3 jobs .*slots=4"):
            await runner.run_group(Group(members=dict.fromkeys("abcd", job(""))))
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(runner.run_group, one)
            await runner.run(job("found[0] = 0"))
        assert runner.statistics().running == 0
        assert runner.statistics().finished == 13


async def test_what_nobody_could_do_is_refused() -> None:
    live = Group(members={"a": Job(argv=("cat",), stdin=None)})
    stream = Group(members={"a": Job(argv=("true",), collect_to="stream")})
    async with open_runner(slots=2) as runner:
        with pytest.raises(JobError, match="a: stdin=None"):
            await runner.run_group(live)
        with pytest.raises(JobError, match='a: collect_to="stream"'):
            await runner.run_group(stream)


async def test_an_error_of_the_caller_comes_out_as_itself() -> None:
    """In the block, and in what gets the events: all members are killed by it."""

    async def emit(name: str, event: Event) -> None:
        if event.type == "stdout" and name == "a":
            raise KeyError(name)

    group = Group(members={name: Job(argv=WAITS, policy=policy()) for name in "ab"})
    async with open_runner(slots=2) as runner:
        with pytest.raises(ZeroDivisionError):
            async with runner.start_group(group):
                raise ZeroDivisionError
        with pytest.raises(KeyError):
            await runner.run_group(group, emit=emit)
        assert runner.statistics().running == 0
    with pytest.raises(SandboxError, match="closed"):
        await runner.run_group(group)


async def whose(runner: Runner, group: Group) -> str | None:
    async with runner.start_group(group) as live:
        await read(live, lambda *_: False)
        return live.decisive(await live.wait())


async def test_whose_status_counts() -> None:
    async with open_runner(slots=2) as runner:
        bad, good = Job(argv=("false",), policy=policy()), Job(argv=("true",), policy=policy())
        sleeps = Job(argv=SLEEPS, policy=policy())
        assert await whose(runner, Group(members={"a": sleeps, "b": bad})) == "b"
        assert await whose(runner, Group(members={"a": good, "b": good})) is None
        assert await whose(runner, Group(members={"a": sleeps, "b": good}, main="b")) == "b"


async def test_ways_out_of_one_network_have_to_agree() -> None:
    other = msgspec.structs.replace(policy(), network=Network(mode="user"))
    host = able()
    members = {"a": Job(argv=("true",), policy=policy()), "b": Job(argv=("true",), policy=other)}
    async with open_runner(slots=2, host=host) as runner:
        with pytest.raises(JobError, match=r"members differ in \[network\]"):
            await runner.run_group(Group(members=members, share="network"))


def able() -> Host:
    """This one, with whatever a way out needs: it is refused before that is used."""
    return msgspec.structs.replace(without("nothing"), tun=True, nftables=True, pasta="/x/pasta")
