"""The network of a group, decided: addresses, names, files, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address

import msgspec
import pytest

from sandboxd import plan
from sandboxd.compile import build, grouping
from sandboxd.compile.etc import NETWORK
from sandboxd.errors import HostError, JobError, PolicyError
from sandboxd.group import Group, Member
from sandboxd.host import Host, Place
from sandboxd.job import Job
from sandboxd.policy import Identity, Network, Policy, Root, Syscalls

JOB = Job(argv=("true",))
HOST = Host(
    arch="x86_64",
    kernel="6.1.0",
    uid=1000,
    gid=1000,
    cpus=2,
    overlay=True,
    bridge=True,
    nftables=True,
)
PLACE = Place(name="web", domain="shop", hosts=(("db", "10.9.0.2"), ("web", "10.9.0.3")))
TOGETHER = Place(
    name="web", domain="shop", hosts=(("db", "127.0.0.1"), ("web", "127.0.0.1")), shared=True
)


def group(*names: str, **fields: object) -> Group:
    return Group(members=dict.fromkeys(names, JOB), **fields)  # type: ignore[arg-type]


def test_addresses_follow_each_other() -> None:
    layout = grouping.lay_out(group("a", "b", "c"))
    assert list(map(str, layout.addresses.values())) == [f"192.168.100.{n}" for n in (2, 3, 4)]
    assert layout.bits == 24


def test_an_address_that_is_wanted_is_kept_free() -> None:
    second = Member(job=JOB, address="10.7.0.2")
    group = Group(members={"a": JOB, "b": second, "c": JOB}, subnet="10.7.0.0/29")
    layout = grouping.lay_out(group)
    assert {name: str(one) for name, one in layout.addresses.items()} == {
        "a": "10.7.0.3", "b": "10.7.0.2", "c": "10.7.0.4",
    }  # fmt: skip


def test_whom_members_may_send_to() -> None:
    layout = grouping.lay_out(group("a", "b", subnet="10.7.0.0/29"))
    found = ["10.7.0.2", "10.7.0.3", "10.7.0.7", "255.255.255.255"]
    assert list(map(str, layout.reachable())) == found


def test_one_network_is_localhost() -> None:
    layout = grouping.lay_out(group("a", "b", share="network"))
    assert set(layout.addresses.values()) == {IPv4Address("127.0.0.1")}
    assert layout.place("a").shared


def member(**fields: object) -> Group:
    return Group(members={"a": JOB, "b": Member(job=JOB, **fields)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Group(members={}), "0 members"),
        (lambda: group(*(f"m{n}" for n in range(65))), "65 members"),
        (lambda: group("A"), "'A' is no name"),
        (lambda: group("a.b"), "is no name"),
        (lambda: group("localhost"), "'localhost' is no name"),
        (lambda: group("a", name="x_y"), "'x_y' is no name"),
        (lambda: group("a", name="a"), "'a' is the group and a member"),
        (lambda: group("a", main="b"), "no member 'b'"),
        (lambda: group("a", share="all"), "share: 'all'"),
        (lambda: group("a", stop="soon"), "stop: 'soon'"),
        (lambda: member(after="a"), "b: after is one string"),
        (lambda: member(after=["c"]), "b: after: no member 'c'"),
        (lambda: member(after=["b"]), "b wait for each other"),
        (lambda: member(ready="tcp:0"), "b: ready: 'tcp:0'"),
        (lambda: member(ready="tcp:65536"), "b: ready: 'tcp:65536'"),
        (lambda: member(ready="later"), "b: ready: 'later'"),
        (lambda: grouping.lay_out(group("a", subnet="192.168.100.1/24")), "has host bits set"),
        (lambda: grouping.lay_out(group("a", subnet="fd00::/64")), "IPv4, /16 to /29"),
        (lambda: grouping.lay_out(group("a", subnet="10.0.0.0/8")), "IPv4, /16 to /29"),
        (lambda: grouping.lay_out(group("a", subnet="8.8.8.0/24")), "not private"),
        (lambda: grouping.lay_out(group("a", subnet="127.1.0.0/16")), "not private"),
        (lambda: grouping.lay_out(group("a", subnet="10.0.0.0/16")), "a way out's own"),
        (lambda: grouping.lay_out(group(*"abcdef", subnet="10.7.0.0/29")), "f: no address left"),
        (lambda: grouping.lay_out(member(address="x")), "b: address:"),
        (lambda: grouping.lay_out(member(address="10.1.1.1")), "is not for a member of"),
        (lambda: grouping.lay_out(member(address="192.168.100.1")), "is not for a member of"),
        (lambda: grouping.lay_out(member(address="192.168.100.255")), "is not for a member of"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(JobError, match=message):
        make()


def test_two_cannot_have_one_address() -> None:
    one = Member(job=JOB, address="192.168.100.9")
    with pytest.raises(JobError, match=r"b: address: 192.168.100.9 is a's"):
        grouping.lay_out(Group(members={"a": one, "b": one}))


def test_a_shared_network_has_no_addresses_to_give() -> None:
    one = Member(job=JOB, address="192.168.100.9")
    with pytest.raises(JobError, match="localhost only"):
        grouping.lay_out(Group(members={"a": one}, share="network"))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("db", "10.9.0.2"), ("db.shop", "10.9.0.2"), ("web.shop", "10.9.0.3"),
        ("x.shop", "missing"), ("db.db.shop", "missing"), ("shop", "missing"),
        ("x", None), ("db.example.org", None), ("db.shop.example.org", None), ("dbshop", None),
        ("", None), ("db.", None),
    ],
)  # fmt: skip
def test_whose_a_name_is(name: str, found: str | None) -> None:
    answer = grouping.look_up(PLACE, name)
    if name == "db.":  # the reader of questions leaves the last dot out
        assert answer is not None
    else:
        assert (str(answer) if answer is not None else None) == found


def test_hosts() -> None:
    assert grouping.hosts(PLACE) == (
        "127.0.0.1 localhost\n::1 localhost\n10.9.0.2 db db.shop\n10.9.0.3 web web.shop\n"
    )
    assert grouping.hosts(TOGETHER) == (
        "127.0.0.1 localhost db db.shop web web.shop\n::1 localhost\n"
    )


def compiled(policy: Policy, place: Place | None) -> build.Compiled:
    return build.compile_policy(policy, msgspec.structs.replace(HOST, place=place))


def test_members_of_one_policy_have_one_tenant() -> None:
    """Whatever they are called, and whether they have a way out: the rest is mounted over it."""
    other = msgspec.structs.replace(PLACE, name="db")
    named = Policy(identity=Identity(hostname="other"))
    plans = {compiled(Policy(), PLACE).tenant, compiled(named, other).tenant}
    assert len(plans) == 1


@pytest.mark.parametrize("root", [Root(), Root(writable=True)])
def test_each_has_files_of_its_own(root: Root) -> None:
    found = compiled(Policy(root=root), PLACE)
    written = {
        step.path.rpartition("/")[2]: step.content.decode()
        for step in found.setup.steps
        if isinstance(step, plan.MakeFile) and step.path.rpartition("/")[2] in NETWORK
    }
    assert written == {
        "hosts": grouping.hosts(PLACE),
        "hostname": "web\n",
        "resolv.conf": "nameserver 127.0.0.53\nsearch shop\noptions timeout:5 attempts:2\n",
    }
    names = [step.name for step in found.setup.steps if isinstance(step, plan.Hostname)]
    assert names == ["web"]


def test_what_is_enforced_says_so() -> None:
    assert compiled(Policy(), PLACE).enforcement["network"] == "group: bridge, nftables"
    assert compiled(Policy(), TOGETHER).enforcement["network"] == "group: one namespace"
    able = msgspec.structs.replace(HOST, pasta="/x/pasta", tun=True, nftables=True, place=PLACE)
    found = build.compile_policy(Policy(network=Network(mode="user")), able)
    assert found.enforcement["network"] == "group: bridge, nftables; user: pasta, nftables"


def test_without_a_bridge() -> None:
    """Or without a filter for it. One namespace for all can be had all the same."""
    less = msgspec.structs.replace(HOST, bridge=False, place=PLACE)
    with pytest.raises(HostError, match="no bridge for a group"):
        build.compile_policy(Policy(), msgspec.structs.replace(HOST, nftables=False, place=PLACE))
    with pytest.raises(HostError, match="no bridge for a group") as caught:
        build.compile_policy(Policy(), less)
    assert "share" in caught.value.hint
    build.compile_policy(Policy(), msgspec.structs.replace(less, place=TOGETHER))


def test_who_has_no_sockets_has_no_use_for_a_group() -> None:
    rules = ("@sockets-unix", "@no-namespaces", "@guards")
    with pytest.raises(PolicyError, match="no rule admits a socket that a group is for"):
        compiled(Policy(syscalls=Syscalls(rules=rules)), PLACE)


def test_in_the_user_namespace_of_another() -> None:
    """All other steps are as they were."""
    alone = compiled(Policy(), None)
    other = build.joined(alone)
    first = other.tenant.steps[0]
    assert isinstance(first, plan.UserNamespace)
    assert first.joined
    assert other.tenant.steps[1:] == alone.tenant.steps[1:]
    assert msgspec.structs.asdict(other.policy) == msgspec.structs.asdict(alone.policy)
