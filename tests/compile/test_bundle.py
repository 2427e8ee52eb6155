"""What becomes of each thing that a bundle asks for: granted, made tighter, told of, or refused."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from sandboxd.compile import bpf, numbers, seccomp
from sandboxd.compile.assemble import AUDIT_ARCH
from sandboxd.compile.bundle import bundle
from sandboxd.compile.granted import Around
from sandboxd.errors import PolicyError
from sandboxd.job import Job, Terminal
from sandboxd.policy import Limits, Mount, Policy, Resources, Root
from tests.compile.profiles import ALLOW, DIALECT, rule

ROOT = Path(__file__).resolve().parent.parent.parent
Json = dict[str, Any]
BASE = Policy(
    name="p",
    limits=Limits(memory=1 << 30, processes=100, open_files=1024, disk=1 << 20),
    root=Root(proc="masked", writable=True),
)


def config(**more: Any) -> Json:
    found: Json = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", "readonly": True},
        "process": {"args": ["sh"], "cwd": "/", "env": ["A=1"], "user": {"uid": 0, "gid": 5}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": one} for one in NAMESPACES]},
    }
    for key, value in more.items():
        part, _, inner = key.partition("__")
        if inner:
            found[part] = found.get(part, {}) | {inner: value}
        else:
            found[part] = value
    return found


NAMESPACES = ("pid", "network", "mount", "ipc", "uts")


def resolve(path: str) -> str | None:
    """As if all that is relative and goes nowhere up were there."""
    return None if path.startswith("/") or ".." in path else f"/bundle/{path}"


def made(text: Json | str, policy: Policy = BASE, **around: Any) -> Job:
    text = text if isinstance(text, str) else json.dumps(text)
    return bundle(text, policy, Around(resolve=resolve, **around))


def policy_of(job: Job) -> Policy:
    assert isinstance(job.policy, Policy)
    return job.policy


def ignored(text: Json, policy: Policy = BASE, **around: Any) -> dict[str, str]:
    found = dict(made(text, policy, **around).ignored)
    assert all(what.startswith("config.json: ") for what in found)
    return {what.removeprefix("config.json: "): why for what, why in found.items()}


def test_what_concerns_the_program_is_taken() -> None:
    job = made(config(hostname="there", process__terminal=True, annotations={"a.b": "c"}))
    assert job.argv == ("sh",)
    assert (job.env, job.cwd, job.terminal) == ({"A": "1"}, "/", Terminal())
    policy = policy_of(job)
    assert (policy.root.source, policy.root.writable) == ("/bundle/rootfs", False)
    assert (policy.identity.uid, policy.identity.gid) == (0, 5)
    assert policy.identity.hostname == "there"
    assert policy.environment.set == {}
    assert policy.name == "p+config.json"
    assert policy.origin("root.source") == "config.json: root.path"
    assert job.ignored == ()


def test_words_of_the_operator_take_the_place_of_those_of_the_bundle() -> None:
    text = config()
    del text["process"]["args"]
    job = bundle(json.dumps(text), BASE, Around(resolve=resolve), (b"ls", b"\xff"))
    assert job.argv == (b"ls", b"\xff")


def test_a_terminal_is_for_somebody() -> None:
    text = config(process__terminal=True)
    assert made(text, terminal=False).terminal is None
    assert list(ignored(text, terminal=False)) == ["process.terminal"]


def test_a_console_has_a_size() -> None:
    text = config(process__terminal=True, process__consoleSize={"height": 50, "width": 132})
    assert made(text).terminal == Terminal(rows=50, columns=132)


@pytest.mark.parametrize(
    ("part", "value", "field", "wanted", "told"),
    [
        ("linux__resources", {"memory": {"limit": 1 << 20}}, "memory", 1 << 20, ""),
        ("linux__resources", {"memory": {"limit": -1}}, "memory", 1 << 30, ""),
        ("linux__resources", {"memory": {"limit": 1 << 40}}, "memory", 1 << 30, "memory.limit"),
        ("linux__resources", {"pids": {"limit": 7}}, "processes", 7, ""),
        ("linux__resources", {"pids": {"limit": 0}}, "processes", 100, ""),
        ("linux__resources", {"pids": {"limit": 101}}, "processes", 100, "pids.limit"),
        ("linux__resources", {"cpu": {"quota": 50000}}, "cpus", 0.5, ""),
        ("linux__resources", {"cpu": {"quota": 30, "period": 10}}, "cpus", 3, ""),
        ("linux__resources", {"cpu": {"quota": -1}}, "cpus", None, ""),
        ("process__rlimits", [("RLIMIT_NOFILE", 64, 64)], "open_files", 64, ""),
        ("process__rlimits", [("RLIMIT_NOFILE", 2048, 2048)], "open_files", 1024, "rlimits[0]"),
        ("process__rlimits", [("RLIMIT_FSIZE", 1 << 64 - 1, 1 << 64 - 1)], "file_size", None, ""),
        ("process__rlimits", [("RLIMIT_STACK", 10, 20)], "stack", 10, "rlimits[0].hard"),
        ("process__rlimits", [("RLIMIT_AS", 0, 0)], "address_space", None, "rlimits[0]"),
        ("process__rlimits", [("RLIMIT_CORE", 0, 0)], "stack", None, ""),
        ("process__rlimits", [("RLIMIT_NICE", 1, 1)], "stack", None, "rlimits[0]"),
    ],
)
def test_limits_are_lowered_and_never_raised(
    part: str, value: Any, field: str, wanted: float | None, told: str
) -> None:
    if isinstance(value, list):
        value = [{"type": kind, "soft": soft, "hard": hard} for kind, soft, hard in value]
    text = config(**{part: value})
    assert getattr(policy_of(made(text)).limits, field) == wanted
    where = "linux.resources." if part.startswith("linux") else "process."
    assert set(ignored(text)) == ({where + told} if told else set())


def test_swap_and_cpus() -> None:
    memory = {"limit": 1 << 20, "swap": 1 << 20}
    text = config(linux__resources={"memory": memory, "cpu": {"cpus": "0-1"}})
    assert policy_of(made(text)).resources == Resources(swap=0, cpuset="0-1")
    text["linux"]["resources"]["memory"]["swap"] = 1 << 21
    assert "linux.resources.memory.swap" in ignored(text)
    fixed = Policy(resources=Resources(cpuset="3"), root=BASE.root)
    assert policy_of(made(text, fixed)).resources.cpuset == "3"
    assert "linux.resources.cpu.cpus" in ignored(text, fixed)


def mount(target: str, kind: str = "tmpfs", source: str = "x", *options: str) -> Json:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def test_memory_is_mounted_within_the_limits() -> None:
    proc = mount("/proc", "proc")
    text = config(
        mounts=[
            proc,
            mount("/dev", "tmpfs", "tmpfs", "mode=755", "size=1g"),
            mount("/a", "tmpfs", "tmpfs", "noexec", "size=64k", "nr_inodes=10"),
            mount("/b", "tmpfs", "tmpfs", "size=1g", "mode=1777"),
            mount("c/d/", "tmpfs", "tmpfs", "ro", "mode=700", "huge=always", "size=50%"),
        ]
    )
    assert policy_of(made(text)).mounts == (
        Mount(target="/a", type="tmpfs", writable=True, exec=False, size=65536, inodes=10),
        Mount(target="/b", type="tmpfs", writable=True, size=1 << 20),
        Mount(target="/c/d", type="tmpfs", writable=True),
    )
    assert ignored(text) == {
        "mounts[4]": "a tmpfs can be written to",
        "mounts[4].options[1]": "mode=700 is not kept to",
        "mounts[4].options[2]": "huge=always is not kept to",
        "mounts[4].options[3]": "no number above 0",
    }


def test_nothing_of_the_host_is_shown() -> None:
    text = config(
        mounts=[
            mount("/proc", "proc"),
            mount("/etc/passwd", "bind", "/etc/shadow", "rbind", "ro"),
            mount("/up", "none", "../other", "bind"),
            mount("/own", "none", "data", "bind", "ro", "noexec"),
            mount("/change", "bind", "data", "rw"),
        ]
    )
    own = Mount(target="/own", source="/bundle/data", exec=False)
    assert policy_of(made(text)).mounts == (own, Mount(target="/change", source="/bundle/data"))
    nothing = "a bundle shows nothing of the host; -v"
    assert ignored(text) == {
        "mounts[1]": f"{nothing} /etc/shadow:/etc/passwd:ro on the command line does",
        "mounts[2]": f"{nothing} ../other:/up on the command line does",
        "mounts[4]": "it is shown read-only; -v data:/change on the command line lets it be"
        " written to",
    }
    granted = made(text, shown={"/etc/passwd", "/up", "/change"})
    assert policy_of(granted).mounts == (own,)
    assert granted.ignored == ()


def test_the_policys_own_mounts_stay() -> None:
    policy = Policy(mounts=(Mount(target="/a", source="/srv/a"),), root=BASE.root)
    text = config(mounts=[mount("/a"), mount("/b"), mount("/b", "tmpfs", "x", "size=1m")])
    found = policy_of(made(text, policy))
    assert found.mounts == (
        *policy.mounts, Mount(target="/b", type="tmpfs", writable=True, size=1 << 20)
    )  # fmt: skip
    assert ignored(text, policy)["mounts[0]"] == "custom mounts something there"


def test_without_a_proc_there_is_none() -> None:
    assert policy_of(made(config(mounts=[]))).root.proc == "none"
    assert policy_of(made(config())).root.proc == "masked"


def test_a_root_outside_is_for_the_operator_to_name() -> None:
    for path in ("/", "../other", "/bundle/rootfs"):
        with pytest.raises(PolicyError, match=r"^config.json: root.path: .*--root DIR"):
            made(config(root__path=path))
    job = made(config(root__path="/"), own_root=False)
    assert policy_of(job).root.source == "host"


def test_a_root_is_writable_only_where_the_policy_has_it() -> None:
    text = config(root__readonly=False)
    assert policy_of(made(text)).root.writable
    assert ignored(text, Policy()) == {"root.readonly": "custom has a read-only root"}
    assert not policy_of(made(config(), BASE)).root.writable


def test_a_filter_is_held_on_top() -> None:
    text = config(
        linux__seccomp={
            "defaultAction": ALLOW,
            "syscalls": [rule("getppid", "SCMP_ACT_KILL_PROCESS")],
        }
    )
    programs = seccomp.programs(policy_of(made(text)).syscalls, "x86_64")

    def ask(name: str) -> str:
        number = numbers.table("x86_64")[name]
        return bpf.action_name(bpf.decide(programs, number, AUDIT_ARCH["x86_64"]))

    assert (ask("getppid"), ask("mount"), ask("read")) == ("kill process", "errno 1", "allow")


def test_a_filter_that_makes_no_sense_is_refused() -> None:
    text = config(linux__seccomp={"defaultAction": "SCMP_ACT_NOTIFY"})
    with pytest.raises(PolicyError, match=r"^config.json: linux.seccomp.defaultAction: there is n"):
        made(text)
    text = config(linux__seccomp={"defaultAction": "SCMP_ACT_KILL"})
    with pytest.raises(PolicyError, match=r"^config.json: linux.seccomp: sandboxd's own first"):
        made(text)
    assert made(config(linux__seccomp=DIALECT)).ignored == ()


TOLD: list[tuple[Json, dict[str, str]]] = [
    ({"process__capabilities": {"bounding": ["CAP_KILL"]}}, {"process.capabilities": "has none"}),
    ({"process__capabilities": {"bounding": []}}, {}),
    ({"process__noNewPrivileges": True}, {}),
    ({"process__noNewPrivileges": False}, {"process.noNewPrivileges": "it is always true"}),
    ({"process__oomScoreAdj": 100}, {"process.oomScoreAdj": "the caller's"}),
    ({"process__apparmorProfile": ""}, {}),
    ({"process__apparmorProfile": "x"}, {"process.apparmorProfile": "not supported"}),
    ({"process__user": {"uid": 70000, "umask": 18, "additionalGids": [4]}}, {
        "process.user.uid": "below 65536", "process.user.umask": "the caller's",
        "process.user.additionalGids": "no further groups"}),
    ({"process__env": ["A=1", "B", "=C", "D="]}, {
        "process.env[1]": "NAME=VALUE", "process.env[2]": "NAME=VALUE"}),
    ({"hooks": {"prestart": [{"path": "/bin/sh"}]}}, {"hooks": "never run"}),
    ({"hooks": {}, "domainname": ""}, {}),
    ({"windows": {"a": 1}, "colour": "red"}, {"windows": "another system", "colour": "not known"}),
    ({"mounts": [mount("/proc", "proc", "proc", "hidepid=2")]}, {
        "mounts[0].options[0]": "hidepid=2 is not kept to"}),
    ({"mounts": [mount("/proc", "proc"), mount("/sys", "sysfs"), mount("/sys/fs/cgroup", "cgroup"),
                 mount("/dev/pts", "devpts"), mount("/dev/mqueue", "mqueue"),
                 mount("/m", "overlay"), mount("/proc/x"), mount("/")]}, {
        "mounts[1]": "no /sys", "mounts[2]": "no cgroups", "mounts[3]": "no /dev/pts",
        "mounts[4]": "message queues", "mounts[5]": "no overlay", "mounts[6]": "nothing is mounted",
        "mounts[7]": "nothing is mounted on /"}),
    ({"linux__namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "user"}]}, {
        "linux.namespaces[0].path": "always new",
        "linux.namespaces": "new as well: network, mount, ipc, uts"}),
    ({"linux__uidMappings": [{"containerID": 0, "hostID": 0, "size": 1}]}, {
        "linux.uidMappings": "the policy's"}),
    ({"linux__devices": [{"path": "/dev/null", "type": "c"}, {"path": "/dev/fuse", "type": "c"}]}, {
        "linux.devices[1]": "/dev/fuse is none of [devices]"}),
    ({"linux__sysctl": {"net.core.somaxconn": "1"}}, {"linux.sysctl": "not set"}),
    ({"linux__maskedPaths": ["/proc/kcore", "/proc/self/maps", "/sys/firmware", "/etc/x"]}, {
        "linux.maskedPaths[1]": "/proc/self/maps is not hidden",
        "linux.maskedPaths[3]": "/etc/x is not hidden"}),
    ({"linux__readonlyPaths": ["/proc/sys", "/proc/bus", "/usr"]}, {
        "linux.readonlyPaths[2]": "/usr is not made read-only"}),
    ({"linux__rootfsPropagation": "private"}, {}),
    ({"linux__rootfsPropagation": "shared"}, {"linux.rootfsPropagation": "never spread"}),
    ({"linux__resources": {"devices": [{"allow": False, "access": "rwm"}]}}, {}),
    ({"linux__resources": {"devices": [{"allow": True}], "unified": {"memory.high": "1"},
                           "blockIO": {"weight": 1}, "cpu": {"shares": 5},
                           "memory": {"swappiness": 1, "disableOOMKiller": False}}}, {
        "linux.resources.devices[0]": "no others", "linux.resources.unified": "by name",
        "linux.resources.blockIO": "[[resources.io]]", "linux.resources.cpu.shares": "cpu_weight",
        "linux.resources.memory.swappiness": "the machine's own"}),
    ({"linux__timeOffsets": {"boottime": {"secs": 5, "nanosecs": 7}}}, {
        "linux.timeOffsets.boottime.nanosecs": "whole seconds"}),
]  # fmt: skip


@pytest.mark.parametrize(("more", "told"), TOLD)
def test_what_is_not_done_is_told_with_place_and_reason(more: Json, told: dict[str, str]) -> None:
    found = ignored(config(**more))
    assert set(found) == set(told)
    for where, why in told.items():
        assert why in found[where]


def test_clocks() -> None:
    text = config(linux__timeOffsets={"monotonic": {"secs": -5}, "boottime": {"secs": 7}})
    assert policy_of(made(text)).clock.monotonic == -5
    assert policy_of(made(text)).clock.boottime == 7


WRONG: list[tuple[Json | str, str]] = [
    ("", r"config.json:1:1: not JSON"),
    ("[]", r"config.json: a list where an object belongs"),
    ("{}", r"config.json: ociVersion is missing"),
    (config(ociVersion="2.0"), r"ociVersion: '2.0' is not known"),
    (config(root=None), r"config.json: root is missing"),
    (config(root={}), r"root: path is missing"),
    (config(root__path="\u0007/.."), r"root.path: .* leads out of the bundle"),
    (config(process=None), r"config.json: process is missing"),
    (config(process__args=[]), r"process.args: no program to run"),
    (config(process__args="sh"), r"process.args: a string where a list belongs"),
    (config(process__args=["a", "b\0"]), r"process.args\[1\]: contains a NUL"),
    (config(process__env=["A=\0"]), r"process.env\[0\]: contains a NUL"),
    (config(process__cwd=None), r"process: cwd is missing"),
    (config(process__cwd="tmp"), r"process.cwd: 'tmp' is not absolute"),
    (config(process__terminal=1), r"process.terminal: a number where true or false belongs"),
    (config(process__terminal=True, process__consoleSize={"height": 0}), r"consoleSize.height: 0 "),
    (config(process__user={"uid": -1}), r"process.user.uid: -1 is not from"),
    (config(process__rlimits=[{"type": "RLIMIT_AS"}]), r"process.rlimits\[0\]: soft is missing"),
    (config(process__rlimits=[{"type": "RLIMIT_AS", "soft": 2, "hard": 1}]), r"\[0\].soft: 2 is a"),
    (config(process__rlimits=[{"type": "RLIMIT_AS", "soft": 1, "hard": 1}] * 2), r"\[1\].type: RL"),
    (config(hostname="a b"), r"hostname: 'a b' is no host name"),
    (config(mounts=[{}]), r"mounts\[0\]: destination is missing"),
    (config(mounts=[mount("/a/../b")]), r"mounts\[0\].destination: '/a/../b' contains \.\."),
    (config(mounts=[mount("/a\n")]), r"mounts\[0\].destination: .* contains a control character"),
    (config(mounts=[mount("/a", "bind", "x\n", "ro")]), r"mounts\[0\].source: .* control char"),
    (config(mounts=[{"destination": "/a"}]), r"mounts\[0\]: source is missing"),
    (config(linux__namespaces=[{}]), r"linux.namespaces\[0\]: type is missing"),
    (config(linux__resources={"cpu": {"cpus": "a"}}), r"resources.cpu.cpus: 'a' is no list of CP"),
    (config(linux__resources={"cpu": {"quota": 1, "period": 0}}), r"cpu.period: 0 is not from 1"),
    (config(linux__timeOffsets={"boottime": {"secs": 1 << 40}}), r"boottime.secs: \d+ is not from"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_makes_no_sense_is_refused_with_its_place(text: Json | str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        made(text)


def test_whatever_a_bundle_is_it_only_makes_a_policy_tighter() -> None:
    runpy.run_path(str(ROOT / "fuzz" / "bundle.py"))["fuzz"](200)
