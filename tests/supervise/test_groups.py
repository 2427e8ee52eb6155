"""Jobs that run together: who reaches whom, by which name, who waits for whom, who ends whom."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from sandboxd.errors import JobError, LaunchError
from sandboxd.group import Group, Member
from sandboxd.host import Host
from sandboxd.job import File, Job
from sandboxd.policy import Limits, Network, Root
from sandboxd.result import Event, Result
from sandboxd.supervise.groups import GroupRun
from sandboxd.supervise.runner import Runner, open_runner
from tests.escape.attack import python
from tests.network.conftest import TOOLS
from tests.supervise.variants import EVERY, policy, without

SERVE = """
server = socket.create_server(("0.0.0.0", 5432))
server.settimeout(30)
one, peer = server.accept()
one.sendall(b"hello " + peer[0].encode())
one.close()
found["peer"] = peer[0]
"""
ECHO = """
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind(("0.0.0.0", 5300)); one.settimeout(30)
data, peer = one.recvfrom(100)
one.sendto(b"echo " + data, peer)
found["peer"] = peer[0]
"""


def job(body: str, **fields: Any) -> Job:
    fields.setdefault("policy", policy())
    return Job(argv=python(TOOLS + body), **fields)


def said(result: Result) -> dict[str, Any]:
    assert result.status == "ok", (result.status, result.message, result.stderr.decode())
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


async def run(group: Group, host: str = "nothing") -> dict[str, Result]:
    async with open_runner(slots=len(group.members), host=without(host)) as runner:
        return await runner.run_group(group)


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
    assert answers.pop("192.168.100.1") in ("EHOSTUNREACH", "ETIMEDOUT")  # nobody has it
    assert answers.pop("192.168.100.30") in ("EHOSTUNREACH", "ETIMEDOUT")
    assert set(answers.values()) == {"ENETUNREACH"}
    assert {one.enforcement["network"] for one in found.values()} == {"group: bridge"}


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


def namespaces() -> int:
    """Of networks, that somebody of ours is in or holds."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            if (target := os.readlink(f"/proc/self/fd/{fd}")).startswith("net:"):
                found.add(target)
        except OSError:
            continue
    return len(found)


async def test_many_in_a_row_leave_nothing() -> None:
    """No process (the fixture looks), interface, namespace or descriptor."""
    members = {
        "db": Member(job=job(SERVE), ready="tcp:5432"),
        "web": Member(job=job("found['x'] = reach('db', 5432)"), after=["db"]),
    }
    async with open_runner(slots=2, cgroup="none") as runner:
        await runner.run_group(Group(members=members))
        before = len(os.listdir("/proc/self/fd")), namespaces(), os.listdir("/sys/class/net")
        for _ in range(24):
            found = await runner.run_group(Group(members=members))
            assert [one.status for one in found.values()] == ["ok", "ok"]
        with trio.fail_after(10):
            while before != (  # noqa: ASYNC110  nobody tells when the last init is reaped
                len(os.listdir("/proc/self/fd")), namespaces(), os.listdir("/sys/class/net"),
            ):  # fmt: skip
                await trio.sleep(0.01)


async def read(live: GroupRun, until: Callable[[str, Event], bool]) -> None:
    """All events, up to the first that will do."""
    async with trio.open_nursery() as nursery:

        async def one(name: str) -> None:
            async for event in live.runs[name].events:
                if until(name, event):
                    nursery.cancel_scope.cancel()

        for name in live.runs:
            nursery.start_soon(one, name)


WAITS = ("sh", "-c", "echo up; exec sleep 60")


def waiting(*names: str) -> Group:
    return Group(members={name: Job(argv=WAITS, policy=policy()) for name in names})


async def test_leaving_kills_all() -> None:
    async with open_runner(slots=2) as runner:
        async with runner.start_group(waiting("a", "b")) as live:
            await read(live, lambda _, event: event.type == "stdout")
        assert runner.statistics().running == 0
        assert runner._limiter.borrowed_tokens == 0


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.03, 0.1, 0.3])
async def test_cancelled_at_any_time(seconds: float) -> None:
    """Set up half-way or running: the fixture finds what is left."""
    async with open_runner(slots=3) as runner:
        with trio.move_on_after(seconds):
            await runner.run_group(waiting("a", "b", "c"))
        assert runner._limiter.borrowed_tokens == 0
        found = await runner.run_group(Group(members={"x": job("found['y'] = 1")}))
        assert said(found["x"]) == {"y": 1}


def pids(name: str) -> list[int]:
    """Our children that have this in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if name.encode() in words and int(parent) == os.getpid():
            found.append(int(pid))
    return found


async def test_the_netkeeper_is_not_needed_any_more() -> None:
    """A bridge is the kernel's; the next group has a new one."""
    asks = job(
        "print('up', flush=True); sys.stdin.read(); found['x'] = reach('db', 5432)", stdin=None
    )
    members = {"db": Member(job=job(SERVE), ready="tcp:5432"),
               "web": Member(job=asks, after=["db"])}  # fmt: skip
    async with open_runner(slots=2) as runner:
        async with runner.start_group(Group(members=members)) as live:
            await read(live, lambda name, event: name == "web" and event.type == "stdout")
            (keeper,) = pids("sandboxd.launch.netkeeper")
            os.kill(keeper, signal.SIGKILL)
            stdin = live.runs["web"].stdin
            assert stdin is not None
            await stdin.aclose()
            await read(live, lambda name, event: name == "web" and event.result is not None)
            assert said((await live.wait())["web"])["x"].startswith("hello")
        again = {name: job("found['x'] = 1") for name in "ab"}
        assert (await runner.run_group(Group(members=again)))["a"].status == "ok"


async def killed(runner: Runner) -> None:
    async with runner.start_group(waiting("a", "b")) as live:
        await read(live, lambda _, event: event.type == "stdout")
        for pid in pids("sandboxd-tenant"):
            os.kill(pid, signal.SIGKILL)
        await read(live, lambda *_: False)
        await live.wait()


async def test_a_tenant_that_is_killed_is_an_error() -> None:
    async with open_runner(slots=2) as runner:
        with pytest.raises(LaunchError):
            await killed(runner)
        found = await runner.run_group(Group(members={"x": job("found['y'] = 1")}))
        assert said(found["x"]) == {"y": 1}


async def test_what_nobody_could_do_is_refused() -> None:
    live = Group(members={"a": Job(argv=("cat",), stdin=None)})
    stream = Group(members={"a": Job(argv=("true",), collect_to="stream")})
    async with open_runner(slots=2) as runner:
        with pytest.raises(JobError, match="a: stdin=None"):
            await runner.run_group(live)
        with pytest.raises(JobError, match='a: collect_to="stream"'):
            await runner.run_group(stream)


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
    return dataclasses.replace(without("nothing"), tun=True, nftables=True, pasta="/x/pasta")
