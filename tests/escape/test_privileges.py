"""Who a job is: no capability, no way to get one, no other id, no more than its limits."""

from __future__ import annotations

import pytest

from tests.escape.attack import (
    CALLER,
    attack,
    every_policy,
    find,
    plan,
    without,
)

STATUS = """
lines = dict(line.split(":", 1) for line in reads("/proc/self/status").splitlines())
wanted = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Groups",
          "Uid", "Gid", "TracerPid")
found = {name: lines[name].split() for name in wanted}
found["securebits"] = libc.prctl(27, 0, 0, 0, 0)
found["keep"] = libc.prctl(7, 0, 0, 0, 0)
"""
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
NONE = ["0000000000000000"]


@every_policy
async def test_capabilities_and_modes(policy: str) -> None:
    """All five capability sets, no_new_privs, the filter, groups: capabilities(7), CVE-2022-24769.

    Countermeasures: each is set before the program starts, and it cannot be undone from inside.
    """
    for body in (STATUS, f"STATUS = {STATUS!r}\n" + NESTED):
        found = await attack(policy, body)
        for name in CAPABILITIES:
            assert found[name] == NONE, name
        assert found["NoNewPrivs"] == ["1"]
        assert found["Seccomp"] == ["2"]
        assert found["Groups"] == []
        assert found["TracerPid"] == ["0"]
        assert (found["securebits"], found["keep"]) == (0, 0)
        uids = {*found["Uid"], *found["Gid"]}
        assert len(uids) == 1
        assert uids != {"0"}


# The same in a thread's child's child after another execve.
NESTED = """
import subprocess, threading
source = sys.orig_argv[-1].split("STATUS = ", 1)[0] + STATUS + "tell()"
def run():
    out = subprocess.check_output([sys.executable, "-I", "-S", "-c", source])
    found.update(json.loads(out))
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.parametrize(
    ("kinds", "left"),
    [
        ((plan.DropCapabilities,), {}),
        ((plan.DropBounding,), {"CapBnd": "000001ffffffffff"}),
        ((plan.Filter,), {"Seccomp": "0"}),
        ((plan.NoNewPrivileges, plan.Landlock, plan.Filter), {"NoNewPrivs": "0"}),
    ],
)
async def test_capabilities_and_modes_without_a_step(
    kinds: tuple[type[plan.Step], ...], left: dict[str, str]
) -> None:
    """Which step is behind which line; and that a change of uid alone gives up capabilities."""
    found = await attack("judge-native", STATUS, weaken=without(*kinds))
    for name, value in left.items():
        assert found[name] == [value]
    assert found["CapEff"] == NONE


IDS = """
for name, arguments in (("setuid", (0,)), ("setgid", (0,)), ("setreuid", (0, 0)),
                        ("setresuid", (0, 0, 0)), ("setresgid", (0, 0, 0)), ("setuid", (1001,)),
                        ("setresuid", (65534, 65534, 65534)), ("setgid", (65534,)),
                        ("setgroups", (1, (ctypes.c_uint * 1)(0))), ("setgroups", (0, None)),
                        ("chroot", (b"/tmp",))):
    found[f"{name} {arguments[0]}"] = tried(call, name, *arguments)
call("setfsuid", 0)
call("setfsgid", 0)
found["fsuid"] = call("setfsuid", -1) == os.getuid()
found["same"] = os.getresuid() == (os.getuid(),) * 3 and os.getresgid() == (os.getgid(),) * 3
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
every = (ctypes.c_uint32 * 6)(*[0xffffffff] * 6)
found["capset"] = tried(call, "capset", header, every)
def control(*arguments):
    if libc.prctl(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "prctl")
found["ambient"] = tried(control, 47, 2, 21, 0, 0)
found["securebits"] = tried(control, 28, 0x2f, 0, 0, 0)
found["new privileges"] = tried(control, 38, 0, 0, 0, 0)
found["no filter"] = tried(control, 22, 0, 0, 0, 0)
found["strict"] = tried(call, "seccomp", 1, 0, bytes(16))
"""


@every_policy
async def test_becoming_somebody_else(policy: str) -> None:
    """setuid(2), setgroups(2), capset(2), prctl(2): CVE-2018-18955's kind.

    Countermeasures: no CAP_SETUID and CAP_SETGID; ids that are not mapped do not exist.
    """
    found = await attack(policy, IDS)
    assert found.pop("fsuid")
    assert found.pop("same")
    assert set(found.values()) <= {"EPERM", "EINVAL"}, found
    for name in ("capset", "setgroups 1", "setgroups 0", "ambient"):
        assert found[name] == "EPERM"


OTHERS = """
found["owners"] = sorted({os.stat(path).st_uid for path in ("/", "/usr", "/etc", "/dev")})
found["uid"] = os.getuid()
found["given away"] = [tried(os.chown, "/box", uid, -1) for uid in (0, 1, 1001, 65534)]
"""


@every_policy
async def test_files_given_to_others(policy: str) -> None:
    """chown(2): ownership, with it quotas and set-user-id bits, passed to another id.

    Countermeasure: no CAP_CHOWN. What is not the job's belongs to nobody or the tenant.
    """
    found = await attack(policy, OTHERS)
    assert set(found["given away"]) <= {"EPERM", "EINVAL"}
    if policy in ("base", "judge-native"):
        assert found["uid"] not in found["owners"]


LIMITS = """
import resource
names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
for name in names:
    number = getattr(resource, name)
    soft, hard = resource.getrlimit(number)
    if hard == resource.RLIM_INFINITY:
        continue
    for value in (hard + 1, (1 << 64) - 1):
        new = (ctypes.c_uint64 * 2)(value, value)
        answer = tried(call, "prlimit64", 0, number, new, None)
        kept = resource.getrlimit(number) == (soft, hard)
        found[f"{name} {value}"] = "EPERM" if kept and name == "RLIMIT_CORE" else answer
found = {"raising": found, "hard": {name: resource.getrlimit(getattr(resource, name))[1]
                                    for name in names}}
"""


@every_policy
async def test_raising_limits(policy: str) -> None:
    """setrlimit(2): hard limits go down only. Raising RLIMIT_CORE is feigned, and changes nothing.

    Countermeasure: hard limits, and no CAP_SYS_RESOURCE.
    """
    found = await attack(policy, LIMITS)
    assert set(found["raising"].values()) == {"EPERM"}, found
    hard = found["hard"]
    assert hard["RLIMIT_CORE"] == 1
    assert (hard["RLIMIT_NICE"], hard["RLIMIT_RTPRIO"]) == (0, 0)
    limits = find(policy).limits
    assert hard["RLIMIT_NOFILE"] == min(limits.open_files or 0, hard["RLIMIT_NOFILE"])
    assert 0 < hard["RLIMIT_NPROC"] <= (limits.processes or 0) + 1
    assert hard["RLIMIT_SIGPENDING"] <= 256


SCHEDULING = """
one = (ctypes.c_int * 1)(1)
for name, policy in (("fifo", 1), ("round robin", 2), ("deadline", 6), ("extensible", 7)):
    attributes = struct.pack("IIQiIQQQ", 48, policy, 0, 0, 1 if policy < 3 else 0,
                             10 ** 7, 10 ** 8, 10 ** 8)
    found[name] = tried(call, "sched_setattr", 0, attributes, 0)
for name, policy in (("fifo call", 1), ("round robin call", 2)):
    found[name] = tried(call, "sched_setscheduler", 0, policy, one)
found["nice"] = tried(os.nice, -1)
found["priority"] = tried(os.setpriority, os.PRIO_PROCESS, 0, -5)
found["io"] = tried(call, "ioprio_set", 1, 0, 1 << 13)
found["oom"] = writes("/proc/self/oom_score_adj", b"-1")
found["oom of init"] = writes("/proc/1/oom_score_adj", b"1000")
found["old oom"] = writes("/proc/self/oom_adj", b"-17")
found["latency"] = writes("/proc/self/autogroup", b"-10")
"""


@every_policy
async def test_priorities(policy: str) -> None:
    """Real-time scheduling, negative nice, the OOM killer's choice: sched(7), proc_pid_oom(5).

    Countermeasures: RLIMIT_RTPRIO and RLIMIT_NICE are 0; no capability.
    """
    found = await attack(policy, SCHEDULING)
    found.pop("extensible")  # where no such scheduler is loaded it is the normal one
    assert set(found.values()) <= {"EPERM", "EACCES", "ENOENT", "EINVAL"}, found
    assert {found[name] for name in ("fifo", "deadline", "nice", "priority")} <= {"EPERM", "EACCES"}


async def test_user_of_the_caller() -> None:
    """identity.user = "caller" changes who owns files, and gives no right: credentials(7)."""
    found = await attack(find("base", identity=CALLER), STATUS + IDS)
    assert found["CapEff"] == NONE
    assert found["setuid 0"] == "EINVAL"
