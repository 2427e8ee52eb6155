"""Bombs and quotas: one job cannot starve the supervisor or another job."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.escape.attack import (
    Compiled,
    Job,
    Policy,
    Result,
    achieved,
    any_uid,
    attack,
    every_policy,
    find,
    finished,
    limited,
    live,
    open_runner,
    plan,
    probe,
    python,
    with_steps,
)

MIB = 1 << 20


async def run(policy: str | Policy, body: str, **job: Any) -> Result:
    with trio.fail_after(55):
        async with open_runner() as runner:
            return await runner.run(Job(argv=python(body), policy=policy, **job))


FORK_BOMBS = {
    "tree": "while True: tried(os.fork)",
    "threads": """
import threading
def more():
    while True:
        try:
            threading.Thread(target=more).start()
        except RuntimeError:
            pass
more()
""",
    # pids that are never there for long enough to be listed
    "hopping": "while True:\n    if os.fork() != 0: os._exit(0)",
}


@pytest.mark.parametrize("bomb", FORK_BOMBS)
@every_policy
async def test_fork_bombs(bomb: str, policy: str) -> None:
    """Processes and threads without end, and one that is always another: fork(2), cgroups(7).

    Countermeasures: pids.max, or RLIMIT_NPROC in a user namespace; killed as a namespace, never
    as a list of pids. The job next to it still starts processes.
    """
    bound = limited(policy, processes=24, wall_time=0.4, memory=1 << 30)
    async with open_runner(slots=2) as runner:
        neighbour = "ready()\nfound['status'] = forked(lambda: os._exit(7))"
        async with live(runner, policy, neighbour) as other:
            result = await runner.run(Job(argv=python(FORK_BOMBS[bomb]), policy=bound))
            assert (await finished(other))["status"] == 7 << 8
    # The hopping one ends its first process at once, and with it itself.
    assert result.status in ("wall_time_limit", "ok", "process_limit", "nonzero_exit")


COUNTING = """
children = 0
try:
    while children < 500:
        if os.fork() == 0:
            signal.pause()
        children += 1
except OSError as error:
    found["error"] = errno.errorcode[error.errno]
found["children"] = children
"""


@every_policy
async def test_number_of_processes(policy: str) -> None:
    """The limit is exact, and it is each job's own: getrlimit(2), RLIMIT_NPROC in namespaces."""
    bound = limited(policy, processes=10, memory=1 << 30)
    async with open_runner(slots=2) as runner:
        async with live(runner, bound, COUNTING + "ready()") as first:
            found = achieved(await runner.run(Job(argv=python(COUNTING), policy=bound)))
            assert found == {"error": "EAGAIN", "children": 9}
            assert await finished(first) == found


MEMORY = {
    "heap": "held = bytearray(256 << 20)\nheld[::4096] = b'x' * len(held[::4096])",
    "shared": "held = mmap.mmap(-1, 256 << 20)\nfor at in range(0, 256 << 20, 4096): held[at] = 1",
    "memory file": "held = call('memfd_create', b'x', 0)\n"
    "for _ in range(32): os.write(held, bytes(8 << 20))",
    "many memory files": "held = [call('memfd_create', b'x', 0) for _ in range(64)]\n"
    "for one in held: os.write(one, bytes(4 << 20))",
    "System V": "libc.shmat.restype = ctypes.c_void_p\nfor _ in range(8):\n"
    "    held = call('shmget', 0, 32 << 20, 0o1600)\n    at = libc.shmat(held, None, 0)\n"
    "    ctypes.memset(at, 1, 32 << 20)\n    libc.shmdt(ctypes.c_void_p(at))",
    "children": "for _ in range(8):\n    if os.fork() == 0:\n        held = bytearray(32 << 20)\n"
    "        held[::4096] = b'x' * len(held[::4096])\n        signal.pause()",
    "sockets": "held = []\nfor _ in range(200):\n    one, other = socket.socketpair()\n"
    "    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)\n"
    "    one.setblocking(False)\n    while tried(one.send, bytes(65536)) == 'ok': pass\n"
    "    held.append((one, other))",
    "pipes": "held = []\nfor _ in range(300):\n    out, into = os.pipe()\n"
    "    tried(fcntl.fcntl, into, 1031, 1 << 20)\n    os.set_blocking(into, False)\n"
    "    while tried(os.write, into, bytes(65536)) == 'ok': pass\n    held.append(into)",
}
UNSEEN = ("sockets", "pipes", "memory file", "many memory files", "System V")
"""In no process' memory: nothing but the memory controller knows whose these pages are."""


@pytest.mark.parametrize("bomb", MEMORY)
async def test_memory_bombs(bomb: str) -> None:
    """Memory that is no process' own: memfd_create(2), shmget(2), shm_open(3), unix(7), pipe(7).

    Countermeasures: memory.max and swap.max for the whole run. Where there is no memory
    controller the memory of processes is sampled, shared pages included, and the result says so.
    """
    policy = limited("base", memory=64 * MIB, wall_time=50.0, open_files=512)
    async with open_runner() as runner:
        stay = 0.5 if bomb in UNSEEN else 40  # the busier the machine, the later it is looked at
        body = MEMORY[bomb] + f"\nprint('there', flush=True)\ntime.sleep({stay})"
        result = await runner.run(Job(argv=python(body), policy=policy))
        if result.enforcement["memory"] != "cgroup2" and bomb in UNSEEN:
            assert "memory" in {one.what for one in result.degraded}
            pytest.skip("needs memory: such pages are counted by nobody else")
    assert result.status == "memory_limit", (result.status, result.usage.memory_peak)
    assert result.limits["memory"].action == "killed", "found out when it was over"


@every_policy
async def test_writing_back_the_machine(policy: str) -> None:
    """sync(2) and syncfs(2) write back other people's data, and stall them: of a whole disk.

    Countermeasure: both succeed and do nothing, also for a descriptor that there is not.
    """
    body = """
found["all"] = tried(call, "sync")
found["one"] = tried(call, "syncfs", 1 << 20)
"""
    assert achieved(await run(policy, body)) == {"all": "ok", "one": "ok"}


DISK = """
import itertools
written = 0
def fill(place):
    global written
    for number in itertools.count():
        with open(f"{place}/file{number}", "wb", buffering=0) as file:
            for _ in range(16):
                written += file.write(bytes(65536))
found["fill"] = {place: tried(fill, place) for place in ("/box", "/tmp", "/dev/shm")}
found["written"] = written
found["grown"] = tried(lambda: os.posix_fallocate(os.open("/tmp/x", os.O_RDWR | os.O_CREAT),
                                                  0, 1 << 26))
"""


@every_policy
async def test_disk_bombs(policy: str) -> None:
    """Bytes without end in all writable places together: tmpfs(5), posix_fallocate(3).

    Countermeasure: they lie on one tmpfs with a size; RLIMIT_FSIZE.
    """
    result = await run(limited(policy, disk=8 * MIB), DISK)
    found = achieved(result)
    assert set(found["fill"].values()) == {"ENOSPC"}
    assert found["written"] <= 8 * MIB
    assert found["grown"] in ("ENOSPC", "EFBIG")


INODES = """
import itertools
made = 0
def fill(place):
    global made
    for number in itertools.count():
        os.mkdir(f"{place}/{number}")
        made += 1
found["fill"] = {place: tried(fill, place) for place in ("/box", "/tmp", "/dev/shm")}
found["made"] = made
"""


@every_policy
async def test_inode_bombs(policy: str) -> None:
    """Empty files without end: no bytes, but memory of the kernel. Countermeasure: nr_inodes."""
    found = achieved(await run(limited(policy, inodes=500), INODES))
    assert set(found["fill"].values()) == {"ENOSPC"}
    assert found["made"] <= 500


@every_policy
async def test_output_floods(policy: str) -> None:
    """Output without end, on both streams, in large and in tiny pieces: pipe(7).

    Countermeasures: a budget for both together; what is kept is bounded, what is over is killed.
    """
    for body in (
        "while True: os.write(1, bytes(65536))",
        "while True: os.write(2, b'x')",
        "if os.fork() == 0:\n    while True: os.write(2, bytes(4096))\n"
        "while True: os.write(1, bytes(4096))",
    ):
        budget = MIB // 4
        result = await run(limited(policy, output=budget, wall_time=50.0), body, keep=4096)
        assert result.status == "output_limit"
        assert sum(stream.bytes for stream in result.streams.values()) <= budget
        assert len(result.stdout) + len(result.stderr) <= 2 * 4096


@any_uid
async def test_cpu_bombs(policy: str) -> None:
    """Many short processes, none of which reaches RLIMIT_CPU: getrlimit(2).

    Countermeasure: the CPU time of the whole tree is what is limited.
    """
    body = """
while True:
    if os.fork() == 0:
        while time.process_time() < 0.02:
            pass
        os._exit(0)
    os.wait()
"""
    result = await run(limited(policy, cpu_time=0.4, wall_time=50.0), body)
    assert result.status == "cpu_time_limit"


# -- quotas that the kernel keeps per user ----------------------------------------------------

INOTIFY_INSTANCES = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
"""All that the caller may have."""
QUOTAS = {
    # pending signals (RLIMIT_SIGPENDING); queued to oneself, and blocked
    "signals": """
signal.pthread_sigmask(signal.SIG_BLOCK, [40])
def take():
    call("rt_sigqueueinfo", os.getpid(), 40, (ctypes.c_int * 32)(40, 0, -1))
""",
    # pages of pipes: fs.pipe-user-pages-soft
    "pipes": """
kept = []
def take():
    kept.append(os.pipe())
    if fcntl.fcntl(kept[-1][0], 1032) < 65536:
        raise OSError(errno.EMFILE, "a small pipe")
""",
    "descriptors": "def take(): os.dup(0)\n",
    # descriptors in flight: RLIMIT_NOFILE of the user together (unix(7), ETOOMANYREFS)
    "in flight": """
pairs = []
def take():
    if not pairs or len(pairs) % 2:
        pairs.append(socket.socketpair())
    one = pairs[-1][0]
    one.setblocking(False)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 100))
    one.sendmsg([b"x"], [rights])
""",
    "inotify": 'def take(): call("inotify_init1", 0)\n',
    # fs.aio-max-nr: one for the whole machine (io_setup(2))
    "asynchronous I/O": """
sizes = [32768, 4096, 512, 64, 8]
def take():
    while True:
        try:
            return call("io_setup", sizes[0], ctypes.byref(ctypes.c_ulong()))
        except OSError as error:
            if error.errno != errno.EAGAIN or len(sizes) == 1:
                raise
            del sizes[0]
""",
    "watches": """
import itertools
names, here = itertools.count(), None
def take():
    global here
    if here is None:
        here = call("inotify_init1", 0)
    path = f"/tmp/{next(names)}"
    os.mkdir(path)
    call("inotify_add_watch", here, path.encode(), 2)
""",
    "timers": """
def take():
    call("timer_create", 1, None, ctypes.byref(ctypes.c_int()))
""",
    "locked memory": """
def take():
    held = mmap.mmap(-1, 1 << 20)
    if libc.mlock(ctypes.byref(ctypes.c_char.from_buffer(held)), 1 << 20):
        raise OSError(ctypes.get_errno(), "mlock")
    kept_locked.append(held)
kept_locked = []
""",
    "epoll": """
poll = select.epoll()
def take():
    poll.register(os.eventfd(0), select.EPOLLIN)
""",
}
TAKING = """
found["first"] = tried(take)
"""
EXHAUSTING = """
count = 0
while count < 3000 and tried(take) == "ok":
    count += 1
found["count"] = count
"""


@pytest.mark.parametrize("policy", ["base", "agent"])
@pytest.mark.parametrize("quota", QUOTAS)
async def test_quotas_of_a_user(quota: str, policy: str) -> None:
    """Quotas per user are shared by all who are that user: getrlimit(2), inotify(7), pipe(7).

    One job takes all it can get; another job, and the supervisor's own user, go on.
    Countermeasures: a uid for each run, and limits in the job's namespace for what is counted up
    to the namespace's creator (inotify: namespaces(7), /proc/sys/user).
    """
    async with open_runner(slots=2) as runner:
        async with live(runner, policy, QUOTAS[quota] + EXHAUSTING + "ready()") as greedy:
            body = QUOTAS[quota] + TAKING
            found = achieved(await runner.run(Job(argv=python(body), policy=policy)))
            assert found["first"] in ("ok", "ENOSYS")
            own = ctypes.CDLL(None, use_errno=True).inotify_init1(os.O_CLOEXEC)
            assert own >= 0, "the supervisor's own user has none left"
            os.close(own)
            taken = (await finished(greedy))["count"]
            assert (taken > 0) == (found["first"] == "ok")


def with_inotify(name: str) -> Policy:
    """A policy of one's own that does not forbid it."""
    policy = find(name)
    kept = tuple(one for one in policy.syscalls.enosys if one != "@inotify")
    return find(policy, syscalls=msgspec.structs.replace(policy.syscalls, enosys=kept))


def without_shares(compiled: Compiled) -> Compiled:
    def step_without(step: plan.Step) -> plan.Step | None:
        if isinstance(step, plan.LeafUserNamespace):
            return msgspec.structs.replace(step, quotas=step.quotas[:1])
        return None if isinstance(step, plan.WriteFile) and "inotify" in step.path else step

    return with_steps(compiled, step_without)


@pytest.mark.parametrize("policy", ["base", "judge-native", "shell"])
async def test_quota_of_inotify_under_a_policy_that_allows_it(policy: str) -> None:
    """inotify instances are counted up to the user who made the namespaces: the caller.

    So a uid of its own is no help: namespaces(7), /proc/sys/user. Countermeasure: a small limit in
    the job's own user namespace; without it one job has all of the caller's (128, mostly).
    """
    body = QUOTAS["inotify"].replace("def take()", "kept = []\ndef take()") + EXHAUSTING
    assert await attack(with_inotify(policy), body) == {"count": 16}
    if min(3000, probe().hard_limits.get("NOFILE", 3000)) > INOTIFY_INSTANCES:
        found = await attack(with_inotify(policy), body, weaken=without_shares)
        assert found["count"] > 16


@pytest.mark.parametrize("policy", ["base", "shell"])
async def test_watches_of_inotify_are_limited(policy: str) -> None:
    """The same for watches, of which a small machine has 8192 for all jobs of a caller."""
    reading = "found['most'] = reads('/proc/sys/user/max_inotify_watches')"
    assert await attack(with_inotify(policy), reading) == {"most": "16384\n"}
