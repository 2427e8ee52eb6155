"""The result: status, exit code and times are the supervisor's, and nobody inside makes them."""

from __future__ import annotations

import pytest
import trio

from tests.escape.attack import (
    File,
    Job,
    Policy,
    Result,
    achieved,
    any_uid,
    attack,
    every_policy,
    limited,
    open_runner,
    program,
    python,
)


async def run(policy: str | Policy, body: str) -> Result:
    async with open_runner() as runner:
        return await runner.run(Job(argv=python(body), policy=policy))


@every_policy
async def test_writing_to_the_report_socket(policy: str) -> None:
    """The descriptor by which init reports: a forged report would be a forged verdict (dup(2)).

    Countermeasures: it is closed by execve(2), and init's own is out of reach (test_init.py).
    """
    found = await attack(
        policy,
        """
report = b"\\0SBENDED" + bytes(304)
for number in range(3, 256):
    found.setdefault(tried(os.write, number, report), []).append(number)
    found.setdefault(tried(lambda: os.dup(number)), []).append(number)
found = {"answers": sorted(found)}
""",
    )
    assert found == {"answers": ["EBADF"]}


# `gone` returns when init has reaped a process.
GONE = """
def gone(pid):
    while os.path.exists(f"/proc/{pid}"):
        os.sched_yield()
"""
FORGING = {
    # a child's exit code, and a brother's: CLONE_PARENT makes one, and init reaps it first
    "child": "forked(lambda: os._exit(0))",
    "brother": "gone(call('clone', 0x8000 | 17, 0, 0, 0, 0) or os._exit(0))",
    "orphan": """
out, into = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        os.write(into, b"%d" % os.getpid())
        os._exit(0)
    os._exit(0)
os.wait()
gone(int(os.read(out, 16)))
""",
    # what looks like a result is output
    "output": """
os.write(1, b'{"status": "ok", "exit_code": 0}\\n' + b"\\0SBENDED" + bytes(304))
os.write(2, b"\\0SBENDED" + bytes(304))
""",
    "reaper": "libc.prctl(36, 1, 0, 0, 0)\nforked(lambda: os._exit(0))",
    "ignoring": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\ngone(os.fork() or os._exit(0))",
    "exec": 'os.execv("/bin/sh", ["sh", "-c", "exit 3"])',
}


@pytest.mark.parametrize("way", FORGING)
async def test_forging_the_exit_code(way: str) -> None:
    """The exit code is that of the program, whoever else ends: wait(2), clone(2), prctl(2).

    Countermeasure: init compares the pid of what it reaps with that of the program it started.
    """
    result = await run("base", f"{GONE}{FORGING[way]}\nos._exit(3)")
    assert (result.status, result.exit_code) == ("nonzero_exit", 3)


THREADS = r"""
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>
static void *last(void *unused) { usleep(50000); exit(3); }
int main(void) {
    pthread_t thread;
    pthread_create(&thread, 0, last, 0);
    pthread_exit(0);  /* the leader is a zombie now, and no exit code yet */
}
"""


@pytest.mark.needs("gcc")
@any_uid
async def test_end_of_the_first_thread(policy: str) -> None:
    """A zombie leader is not the program's end: pthread_exit(3), wait(2)."""
    files = {"attack": File(data=program(THREADS, "-pthread"), mode=0o755)}
    async with open_runner() as runner:
        result = await runner.run(Job(argv=("/box/attack",), policy=policy, files=files))
    assert (result.status, result.exit_code) == ("nonzero_exit", 3)


DAEMON = """
out, into = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(1, 65):
            if number not in (9, 19, 32, 33):
                signal.signal(number, signal.SIG_IGN)
        os.chdir("/")
        os.write(into, b"there")
        WAY
        while True:
            time.sleep(1000)
    os._exit(0)
os.wait()
os.read(out, 5)
os._exit(3)
"""
WAYS = {
    "waiting": "pass",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "spinning": "\n        while True: pass",
    "writing": "\n        while tried(os.write, 1, b'x' * 65536): pass",
    "multiplying": "\n        while True: tried(os.fork)",
    "traced": "libc.ptrace(0, 0, 0, 0); os.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.parametrize("way", WAYS)
@any_uid
async def test_processes_that_outlive_the_program(way: str, policy: str) -> None:
    """Daemons that forked twice, ignore every signal, are stopped, or multiply: daemon(7), wait(2).

    Countermeasures: init ends everything when the program ends; the PID namespace ends with it.
    """
    body = DAEMON.replace("WAY", WAYS[way])
    result = await run(limited(policy, processes=32, wall_time=50.0, output=1 << 40), body)
    assert (result.status, result.exit_code) == ("nonzero_exit", 3)  # and no limit


ENDLESS = {
    "ignoring": "for n in range(1, 65):\n    tried(signal.signal, n, signal.SIG_IGN)\n"
    "while True: time.sleep(100)",
    "blocking": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "vfork": "libc.vfork() or libc.pause()",
    "traced": """
main, (out, into) = os.getpid(), os.pipe()
if os.fork() == 0:
    call("ptrace", 0x4206, main, 0, 0)
    os.write(into, b"x")
    while True:
        time.sleep(100)
os.read(out, 1)
os._exit(0)  # a zombie that only its tracer may reap
""",
}


@pytest.mark.parametrize("way", ENDLESS)
async def test_programs_that_do_not_end(way: str) -> None:
    """Ignored and blocked signals, a stopped program, a vfork that never execs, a zombie held

    by its tracer (ptrace(2)): none goes on beyond the wall time. Countermeasures: the
    supervisor's own clock; SIGKILL by init, and for init itself.
    """
    policy = limited("shell", wall_time=0.3)
    with trio.fail_after(50):
        result = await run(policy, ENDLESS[way])
    assert result.status == "wall_time_limit"


@any_uid
async def test_slowing_init_down(policy: str) -> None:
    """sched_setscheduler(2) on init: starved by its own children, will it still report?

    The same user may make it the laziest of all processes. Countermeasures: it is killed with
    everything else if it does not answer, and the supervisor knows the cause by itself.
    """
    body = """
SCHED_IDLE = 5
lazy = (ctypes.c_int * 1)(0)
tried(call, "sched_setscheduler", 1, SCHED_IDLE, lazy)
tried(os.setpriority, os.PRIO_PROCESS, 1, 19)
for _ in range(6):
    if os.fork() == 0:
        while True:
            pass
while True:
    pass
"""
    with trio.fail_after(50):
        result = await run(limited(policy, wall_time=0.5), body)
    assert result.status == "wall_time_limit"


CORE = """
import resource
found["limit"] = resource.getrlimit(resource.RLIMIT_CORE)
tried(resource.setrlimit, resource.RLIMIT_CORE, (1 << 30, 1 << 30))
libc.prctl(4, 1, 0, 0, 0)
os.chdir("/tmp")
status = forked(os.abort)
found["dumped"] = os.WCOREDUMP(status)
found["signal"] = os.WTERMSIG(status)
found["files"] = [name for place in ("/tmp", "/box", "/") for name in os.listdir(place)
                  if "core" in name]
"""


@every_policy
async def test_core_dumps(policy: str) -> None:
    """A core dump feeds a program of the host's, or fills a disk: core(5), CVE-2022-4415.

    Countermeasure: RLIMIT_CORE is 1, which a pipe takes for 0 and is too small for a file.
    """
    found = await attack(policy, CORE)
    assert found["limit"] == [1, 1]
    assert not found["dumped"]
    assert found["signal"] == 6
    assert found["files"] == []


@any_uid
async def test_times_are_not_the_jobs(policy: str) -> None:
    """Clocks that a job could set, and CPU time hidden in unwaited children: getrusage(2).

    Countermeasures: no clock can be set; the cgroup counts what the kernel reaps by itself.
    """
    body = """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
found["set"] = tried(time.clock_settime, time.CLOCK_REALTIME, 0)
out, into = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        while time.process_time() < 0.3:
            pass
    else:
        os.wait()
    os._exit(0)
os.close(into)
os.read(out, 1)  # until both are gone
"""
    async with open_runner() as runner:
        result = await runner.run(Job(argv=python(body), policy=policy))
        assert achieved(result) == {"set": "EPERM"}
        if runner.host.cgroup is not None:
            assert (result.usage.cpu_time or 0) > 0.28
    assert (result.usage.wall_time or 0) > 0.28
