"""PID 1 of the sandbox: it holds the report socket and runs the runtime's own program."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from sandboxd.messages import Ended
from sandboxd.script.record import CODE
from tests.escape.attack import (
    POLICIES,
    PYTHON,
    Change,
    Job,
    achieved,
    any_uid,
    attack,
    every_policy,
    finished,
    limited,
    live,
    needs_scopes,
    open_runner,
    plan,
    python,
    weakened,
    without,
)

SECRETS = """
for name in ("environ", "mem", "maps", "smaps", "auxv", "exe", "stack", "syscall", "io"):
    found[name] = reads("/proc/1/" + name, 64)
for name in ("root", "map_files"):
    found[name] = tried(os.listdir, "/proc/1/" + name)
for name in ("cwd", "root", "exe", "fd/3", "ns/user", "ns/mnt"):
    found["link " + name] = tried(os.readlink, "/proc/1/" + name)
found["write mem"] = writes("/proc/1/mem", b"0")
"""
SETTINGS = """
for name in ("fd", "task/1/fd"):
    found[name] = tried(os.listdir, "/proc/1/" + name)
for name in ("oom_score_adj", "clear_refs", "coredump_filter", "comm", "uid_map", "setgroups",
             "autogroup", "loginuid", "timens_offsets", "sched", "timerslack_ns"):
    found["write " + name] = writes("/proc/1/" + name, b"0")
"""
HIDDEN = without(plan.Landlock)
SCOPED = without(plan.Hide)
NEITHER = without(plan.Landlock, plan.Hide)


def refused(found: dict[str, Any]) -> bool:
    return set(found.values()) <= {"EACCES", "EPERM", "ENOENT"}


@every_policy
async def test_reading_init(policy: str) -> None:
    """/proc/1/{mem,environ,maps,fd,root,cwd}: CVE-2016-8867, CVE-2022-24448's kind; proc(5).

    Countermeasures: init is not dumpable (PR_SET_DUMPABLE), and outside of the Landlock domain.
    """
    found = await attack(policy, SECRETS + SETTINGS)
    assert refused(found), found


@pytest.mark.parametrize(("weaken", "holds"), [(HIDDEN, True), (SCOPED, True), (NEITHER, False)])
@pytest.mark.needs("landlock")
async def test_reading_init_takes_two_layers_away(weaken: Change, holds: bool) -> None:
    """Each of the two layers is enough by itself, and without both everything is open."""
    found = await attack("shell", SECRETS, weaken=weaken)
    assert refused(found) == holds
    if not holds:
        assert found["mem"] == "EIO"  # it is open; address 0 is not mapped
        assert {found[f"link {name}"] for name in ("root", "fd/3", "ns/mnt")} == {"ok"}
        assert found["write mem"] == "EIO"


EXECUTABLES = """
for name, path in (("own", "/proc/self/exe"), ("init", "/proc/1/exe")):
    found[name + " write"] = tried(os.open, path, os.O_WRONLY)
    found[name + " truncate"] = tried(os.open, path, os.O_WRONLY | os.O_TRUNC)
    found[name + " mode"] = tried(os.chmod, path, 0o777)
held = os.open("/proc/self/exe", os.O_PATH)
found["reopened"] = tried(os.open, f"/proc/self/fd/{held}", os.O_WRONLY)
"""


def digest(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


@every_policy
async def test_overwriting_the_runtime(policy: str) -> None:
    """/proc/self/exe and /proc/1/exe opened for writing: CVE-2019-5736 (runc).

    Countermeasures: programs of the host are on a read-only mount or below an overlay; init's
    own is a memory file behind /proc/1/exe, which needs ptrace access (no dump, Landlock).
    """
    before = digest(PYTHON)
    found = await attack(policy, EXECUTABLES)
    assert "ok" not in found.values(), found
    assert {value for name, value in found.items() if name.startswith("init")} == {"EACCES"}
    assert digest(PYTHON) == before


@pytest.mark.needs("landlock")
async def test_the_runtime_is_within_reach_without_its_layers() -> None:
    """Without both layers init's program opens; that it is running and sealed keeps it whole."""
    body = EXECUTABLES + "found['read'] = reads('/proc/1/exe', 4)\n"
    body += "found['changed'] = writes('/proc/1/exe')"
    found = await attack("shell", body, weaken=NEITHER)
    assert found["read"] == "\x7fELF"
    assert found["init write"] in ("ETXTBSY", "ok")
    assert found["changed"] in ("ETXTBSY", "EPERM")


async def test_settings_of_init_without_hiding_it() -> None:
    """These are no ptrace access, so Landlock does not matter, and only one layer protects them."""
    found = await attack("shell", SETTINGS, weaken=SCOPED)
    assert {found[f"write {name}"] for name in ("oom_score_adj", "coredump_filter")} == {"ok"}


TRACING = f"""
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
text = ctypes.create_string_buffer(8)
part = (ctypes.c_uint64 * 2)(ctypes.addressof(text), 8)
there = (ctypes.c_uint64 * 2)({CODE}, 8)
pidfd = call("pidfd_open", 1, 0)
found["seize"] = tried(call, "ptrace", PTRACE_SEIZE, 1, 0, 0)
found["attach"] = tried(call, "ptrace", PTRACE_ATTACH, 1, 0, 0)
found["read"] = tried(call, "process_vm_readv", 1, part, 1, there, 1, 0)
found["write"] = tried(call, "process_vm_writev", 1, part, 1, there, 1, 0)
found["descriptor"] = tried(call, "pidfd_getfd", pidfd, 3, 0)
found["compare"] = tried(call, "kcmp", os.getpid(), 1, 0, 0, 0)
child = os.fork()
if child == 0:
    signal.pause()
found["own child"] = tried(call, "ptrace", PTRACE_SEIZE, child, 0, 0)
os.kill(child, 9)
"""


@every_policy
async def test_tracing_init(policy: str) -> None:
    """ptrace(2), process_vm_readv(2), pidfd_getfd(2) of pid 1: its socket, its memory.

    Countermeasures: seccomp where a policy has no use for debuggers; not dumpable; Landlock.
    """
    found = await attack(policy, TRACING)
    assert found.pop("own child") == ("ok" if policy == "shell" else "EPERM")
    assert set(found.values()) == {"EPERM"}, found


@pytest.mark.needs("landlock")
async def test_tracing_init_takes_two_layers_away() -> None:
    """With debuggers allowed, each of the two other layers is enough; without both it works."""
    for weaken in (HIDDEN, SCOPED):
        found = await attack("shell", TRACING, weaken=weaken)
        assert {found["seize"], found["descriptor"], found["read"]} == {"EPERM"}
    found = await attack("shell", TRACING, weaken=NEITHER)
    assert {found["seize"], found["descriptor"], found["read"]} == {"ok"}


SIGNALS = """
pidfd = call("pidfd_open", 1, 0)

def queued(number):
    call("rt_sigqueueinfo", 1, number, (ctypes.c_int * 32)(number, 0, -1))

def by_io(number):
    F_SETSIG = 10
    out, into = os.pipe()
    fcntl.fcntl(out, F_SETSIG, number)
    fcntl.fcntl(out, fcntl.F_SETOWN, 1)
    fcntl.fcntl(out, fcntl.F_SETFL, os.O_ASYNC)
    os.write(into, b"x")

for number in NUMBERS:
    found[f"kill {number}"] = tried(os.kill, 1, number)
    found[f"tkill {number}"] = tried(call, "tkill", 1, number)
    found[f"tgkill {number}"] = tried(call, "tgkill", 1, 1, number)
    found[f"pidfd {number}"] = tried(call, "pidfd_send_signal", pidfd, number, None, 0)
    found[f"queue {number}"] = tried(queued, number)
    by_io(number)

# An orphan that goes away shows that init still works.
out, into = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.write(into, b"%d" % os.getpid())
    os._exit(0)
os.wait()
orphan = int(os.read(out, 16))
while os.path.exists(f"/proc/{orphan}"):
    os.sched_yield()
"""
FATAL = f"NUMBERS = {[int(n) for n in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)]}\n"
SIGNAL_STOP = "NUMBERS = [64]\n"


@every_policy
async def test_killing_and_stopping_init(policy: str) -> None:
    """SIGKILL and SIGSTOP for pid 1: pid_namespaces(7); SIGIO's side door F_SETSIG (fcntl(2)).

    Countermeasures: the kernel ignores them for an init; the Landlock domain does not let them
    out (ABI 6). Either way the job gets the result it earned.
    """
    with trio.fail_after(50):
        found = await attack(policy, FATAL + SIGNALS)
    if "EPERM" in found.values():
        assert set(found.values()) == {"EPERM"}


async def test_killing_init_without_landlock() -> None:
    """The kernel's own rule is enough: the signals are sent, and init goes on."""
    with trio.fail_after(50):
        found = await attack("shell", FATAL + SIGNALS, weaken=without(plan.Landlock))
    assert set(found.values()) == {"ok"}


@every_policy
@pytest.mark.needs("landlock")
async def test_forged_stop_signal(policy: str) -> None:
    """The signal by which a supervisor ends a run, sent by the job itself: signal(7), real-time.

    Countermeasures: the Landlock domain (ABI 6).
    """
    needs_scopes()
    found = await attack(policy, SIGNAL_STOP + SIGNALS)
    assert set(found.values()) == {"EPERM"}


@any_uid
async def test_forged_stop_signal_without_landlock(policy: str) -> None:
    """On older kernels the job can end itself with it, and that is all it can do.

    It is no success and no verdict of ours, and a job next to it does not notice.
    """
    with weakened(without(plan.Landlock)):
        async with open_runner(slots=2) as runner:
            async with live(runner, policy, "ready()\nfound['alive'] = True") as other:
                job = Job(argv=python(SIGNAL_STOP + SIGNALS), policy=policy)
                result = await runner.run(job)
                assert result.status == "signaled"
                assert result.signal is not None
                assert result.signal.name == "SIGKILL"
                assert result.signal.sender is None
                assert result.exit_code is None
                assert await finished(other) == {"alive": True}


@every_policy
async def test_signals_to_everyone(policy: str) -> None:
    """kill(-1, SIGKILL): all the caller may signal, wherever it is, but itself; kill(2).

    Countermeasures: the PID namespace. Children die; init, supervisor and other jobs do not.
    """
    async with open_runner(slots=2) as runner:
        async with live(runner, policy, "ready()\nfound['alive'] = True") as other:
            body = """
child = os.fork()
if child == 0:
    signal.pause()
found["sent"] = tried(os.kill, -1, 9)
found["child"] = os.waitpid(child, 0)[1]
"""
            job = Job(argv=python(body), policy=policy)
            assert achieved(await runner.run(job)) == {"sent": "ok", "child": signal.SIGKILL}
            assert await finished(other) == {"alive": True}


@every_policy
async def test_signals_to_the_process_group(policy: str) -> None:
    """kill(0, SIGKILL): process groups cross PID namespaces; setsid(2), setpgid(2).

    A launcher that leaves the job in its own process group dies with it. Countermeasures: a
    session of their own for tenant, sandbox and program.
    """
    async with open_runner() as runner:
        groups = "found = {'group': os.getpgid(0), 'session': os.getsid(0), 'pid': os.getpid()}"
        found = achieved(await runner.run(Job(argv=python(groups), policy=policy)))
        assert found["group"] == found["session"] == found["pid"]
        join = "found['group'] = tried(os.setpgid, 0, 1)\nfound['of init'] = os.getpgid(1)"
        found = achieved(await runner.run(Job(argv=python(join), policy=policy)))
        assert found == {"group": "EPERM", "of init": 1}
        result = await runner.run(Job(argv=python("os.kill(0, 9)"), policy=policy))
        assert result.status == "signaled"
        assert (await runner.run(Job(argv=("/bin/true",), policy=policy))).status == "ok"


TRACED_BY_INIT = """
PTRACE_TRACEME = 0
found["traced"] = tried(call, "ptrace", PTRACE_TRACEME, 0, 0, 0)
tell()
os.kill(os.getpid(), NUMBER)
signal.pause()
"""


STOPS = pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTRAP, signal.SIGUSR1])


@STOPS
@pytest.mark.parametrize("policy", [*POLICIES, "ci"])
async def test_being_traced_by_init(policy: str, number: signal.Signals) -> None:
    """PTRACE_TRACEME: the tracer is the parent, and the program's is init, which did not ask.

    wait4(2) then tells init of every stop, and a stop is no end and no exit code: ptrace(2),
    NOTES. Countermeasures: seccomp, but for debuggers; Landlock for init as well, so that its
    domain is not above the program's; a status of a stop is never taken for a result.
    """
    body = TRACED_BY_INIT.replace("NUMBER", str(int(number)))
    with trio.fail_after(50):
        async with open_runner() as runner:
            job = Job(argv=python(body), policy=limited(policy, wall_time=0.5))
            result = await runner.run(job)
    assert result.status in ("signaled", "wall_time_limit")
    assert result.exit_code is None


@STOPS
async def test_stops_are_not_believed(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """init tells how the program really ended; messages.py refusing a stop is a second layer."""
    monkeypatch.setattr(Ended, "STOPPED", -1)
    body = TRACED_BY_INIT.replace("NUMBER", str(int(number)))
    async with open_runner() as runner:
        result = await runner.run(Job(argv=python(body), policy="shell"))
    assert (result.status, result.exit_code) == ("signaled", None)
    assert result.signal is not None
    assert result.signal.name == "SIGKILL"


LIMITS_OF_INIT = """
one = (ctypes.c_uint64 * 2)(1, 1)
for number in set(range(16)) - {4}:  # changing RLIMIT_CORE is feigned
    found[str(number)] = tried(call, "prlimit64", 1, number, one, None)
"""


@every_policy
async def test_limits_of_init(policy: str) -> None:
    """Resource limits of another process of the same user: prlimit(2).

    With one second of CPU time (RLIMIT_CPU) left, init can be worked to death: each stop and
    continue of an orphan wakes it. Its end looks like a fault of the machine, so the job has
    forged that. Neither dumpable nor Landlock matter to prlimit. Countermeasure: seccomp.
    """
    found = await attack(policy, LIMITS_OF_INIT)
    assert "ok" not in found.values(), found
