"""Every status there is, from a program that earns it, where the kernel keeps the limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from sandboxd.job import File, Job
from sandboxd.policy import Limits, Mount, Resources, Syscalls
from sandboxd.supervise.runner import Runner, open_runner
from tests.vm.programs import MIB, SLOW, policy, python, run, static_program

pytestmark = pytest.mark.needs("memory", "pids", "cpu")
SMALL = Limits(memory=64 * MIB)
ONE = Resources(oom="process")

HUNGRY = {
    "heap": "heap(128 << 20)",
    "shared": "shared(128 << 20)",
    "tmpfs": "open('/tmp/x', 'wb').write(bytes(128 << 20))",
    "memfd": "fd = os.memfd_create('x')\nfor _ in range(128): os.write(fd, bytes(1 << 20))",
    "children": "for _ in range(8):\n    if os.fork() == 0: held = heap(16 << 20); signal.pause()\n"
    "signal.pause()",
    "copy on write": "held = heap(40 << 20)\nif os.fork() == 0: touch(held); signal.pause()\n"
    "touch(held); signal.pause()",
    "fork": "held = heap(40 << 20)\n"
    "while True:\n    if os.fork() == 0: held[::4096] = b'x' * (40 << 8); signal.pause()",
}


@pytest.mark.parametrize("how", HUNGRY)
async def test_memory_limit(how: str) -> None:
    """However it is taken; the whole run is gone, init too, and still we know what happened."""
    result = await run(python(HUNGRY[how]), SMALL)
    assert result.status == "memory_limit"
    assert result.causes == ("memory_limit", "signaled")
    assert result.fault == "job"
    assert result.limits["memory"].action == "killed"
    assert result.signal is not None
    assert (result.signal.name, result.signal.sender) == ("SIGKILL", "kernel: out of memory")
    events = result.usage.memory_events
    assert events is not None
    assert events["oom_group_kill"] == 1
    assert result.usage.oom_kills == events["oom_kill"] > 0
    peak = result.usage.memory_peak or 0
    assert 0.95 * SMALL.memory <= peak <= SMALL.memory  # type: ignore[operator]


@pytest.mark.parametrize("code", [0, 1, 137])
async def test_memory_limit_when_a_child_was_the_victim(code: int) -> None:
    body = f"""
pid = os.fork()
if pid == 0: heap(256 << 20)
assert os.waitpid(pid, 0)[1] == signal.SIGKILL
os._exit({code})
"""
    result = await run(python(body), SMALL, ONE)
    assert result.status == "memory_limit"
    assert result.exit_code == code
    assert result.usage.oom_kills == 1
    assert result.limits["memory"].action == "killed"


async def test_memory_limit_comes_before_a_time_limit() -> None:
    body = "if os.fork() == 0: heap(256 << 20)\ntime.sleep(1000)"
    limits = Limits(memory=64 * MIB, wall_time=1.5 + 0.1 * SLOW)
    result = await run(python(body), limits, ONE)
    assert result.status == "memory_limit"
    assert result.causes[:2] == ("memory_limit", "wall_time_limit")


async def test_message_tells_files_in_memory_from_the_rest() -> None:
    body = "held = open('/tmp/x', 'wb')\nfor _ in range(128): held.write(bytes(1 << 20))"
    of_files = await run(python(body), SMALL)
    of_heap = await run(python("heap(128 << 20)"), SMALL)
    assert "files in memory" in of_files.message
    assert "files in memory" not in of_heap.message
    shmem = of_files.usage.memory_shmem_peak
    assert shmem is not None
    assert shmem > (of_files.usage.memory_anon_peak or 0)


@contextmanager
def file_on_disk(size: int) -> Iterator[Path]:
    """A file of which no page is in memory."""
    path = Path("/var/tmp", f"sandboxd-cache.{os.getpid()}")
    try:
        with path.open("wb") as file:
            for _ in range(0, size, MIB):
                file.write(os.urandom(MIB))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield path
    finally:
        path.unlink()


def tighten_all(top: Path, memory: int) -> None:
    """A limit for all runs of a runner together."""
    (runner,) = top.glob("sandboxd-*")
    (runner / "memory.swap.max").write_text("0")
    (runner / "memory.max").write_text(str(memory))


async def test_page_cache_is_no_fault() -> None:
    """A file on a disk, many times the limit: the cache fills the cgroup and is given up."""
    with file_on_disk(160 * MIB) as big:
        own = policy(Limits(memory=32 * MIB))
        own = msgspec.structs.replace(own, mounts=(Mount(source=str(big), target="/data"),))
        body = "data = open('/data', 'rb')\nwhile data.read(1 << 20): pass\nos._exit(3)"
        async with open_runner() as runner:
            result = await runner.run(Job(argv=python(body), policy=own))
    assert result.status == "nonzero_exit", result.message
    assert result.limits["memory"].exceeded is False
    assert result.usage.memory_peak is not None
    assert result.usage.memory_peak > 0.9 * 32 * MIB
    assert (result.usage.memory_events or {})["max"] > 0


async def test_a_kill_from_above_is_the_hosts_fault(cgroup_top: Path) -> None:
    """Another limit than the run's was reached: that of what holds all runs."""
    async with open_runner() as runner:
        job = Job(argv=python("heap(512 << 20)"), policy=policy(Limits(memory=400 * MIB)))
        tighten_all(cgroup_top, 96 * MIB)
        result = await runner.run(job)
    assert (result.status, result.fault) == ("signaled", "host")
    assert result.signal is not None
    assert result.signal.sender == "kernel: out of memory"
    assert result.limits["memory"].action == "none"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="a program for x86-64")
async def test_segments_that_do_not_fit() -> None:
    """The kernel kills it in execve(2): there is no room in its address space."""
    limits = Limits(memory=64 * MIB, address_space=256 * MIB)
    files = {"a": File(data=static_program(1 << 30), mode=0o755)}
    result = await run(["./a"], limits, files=files)
    assert result.status == "memory_limit", result.causes
    assert str(1 << 30) in result.message
    fits = {"a": File(data=static_program(1 << 20), mode=0o755)}
    assert (await run(["./a"], limits, files=fits)).ok
    # Memory that is never touched is none, as long as it fits into the address space.
    assert (await run(["./a"], Limits(memory=64 * MIB), files=files)).ok


async def test_process_limit_only_if_fatal() -> None:
    body = """
pids = []
try:
    while True:
        pid = os.fork()
        if pid == 0: signal.pause()
        pids.append(pid)
except OSError as error:
    assert error.errno == errno.EAGAIN
print(len(pids), flush=True)
os._exit(%d)
"""
    for code, status in ((0, "ok"), (1, "process_limit")):
        result = await run(python(body % code), Limits(processes=8))
        assert result.stdout == b"7\n"
        assert (result.status, result.usage.process_limit_hits) == (status, 1)
        assert result.usage.processes_peak == 8
        assert result.limits["processes"].action == ("refused" if code == 0 else "exceeded")


async def test_cpu_time_limit() -> None:
    body = "for _ in range(3): os.fork()\nwhile True: pass"
    limit = 0.2 + 0.03 * SLOW
    result = await run(python(body), Limits(cpu_time=limit))
    assert result.status == "cpu_time_limit"
    assert result.limits["cpu_time"].action == "killed"
    assert result.usage.cpu_time is not None
    assert limit <= result.usage.cpu_time < 2 * limit + 0.1 * SLOW


async def test_wall_time_limit_and_idle_limit() -> None:
    limits = Limits(wall_time=0.3 + 0.03 * SLOW)
    assert (await run(["sleep", "1000"], limits)).status == "wall_time_limit"
    limits = Limits(idle_time=0.5 + 0.03 * SLOW)
    result = await run(["sleep", "1000"], limits)
    assert result.status == "idle_limit"
    assert (result.usage.idle_longest or 0) >= limits.idle_time  # type: ignore[operator]


async def test_idle_limit_is_no_limit_for_who_works_now_and_then() -> None:
    """Bursts of a few per cent after long pauses: the slope says so, a total would not."""
    pause = 0.3 + 0.03 * SLOW
    body = f"""
until = time.monotonic() + {8 * pause}
while time.monotonic() < until:
    time.sleep({pause / 2})
    burn(time.process_time() + {pause / 8})
"""
    assert (await run(python(body), Limits(idle_time=2 * pause))).ok


async def test_the_others() -> None:
    limits = Limits(output=10_000, disk=MIB, file_size=2 * MIB)
    assert (await run(["true"])).status == "ok"
    assert (await run(["sh", "-c", "exit 7"])).status == "nonzero_exit"
    assert (await run(python("os.abort()"))).status == "signaled"
    assert (await run(["yes"], limits)).status == "output_limit"
    full = await run(["sh", "-c", "head -c 10M /dev/zero > /tmp/x"], limits)
    assert full.status == "disk_limit"
    large = await run(["sh", "-c", "head -c 10M /dev/zero > /tmp/x"], Limits(file_size=MIB))
    assert large.status in ("disk_limit", "nonzero_exit")  # a shell turns SIGXFSZ into 153
    assert (await run(["/no/such"])).status == "start_failed"
    assert (await run(["true"], collect=("missing",))).status == "artifact_error"


async def test_cancelled() -> None:
    async with open_runner() as runner:
        async with runner.start(Job(argv=["sleep", "1000"], policy=policy())) as run_:
            await run_.events.receive()
            run_.kill()
            assert (await run_.wait()).status == "cancelled"


async def test_syscall_denied_is_a_violation() -> None:
    own = msgspec.structs.replace(policy(), syscalls=Syscalls(kill=("getpriority",)))
    async with open_runner() as runner:
        result = await runner.run(Job(argv=python("os.getpriority(0, 0)"), policy=own))
    assert result.status == "syscall_denied"
    (violation,) = result.violations
    assert (violation.kind, violation.name, violation.count) == ("syscall", None, 1)
    assert "syscalls.kill" in violation.rule


async def test_limits_of_neighbours_do_not_mix() -> None:
    """Leaves are made ahead, with their limits: the next of another policy gets its own."""
    async with open_runner(slots=2) as runner:
        for round_ in range(3):
            async with trio.open_nursery() as nursery:
                for size, status in ((64, "memory_limit"), (256, "ok")):
                    own = policy(Limits(memory=size * MIB))
                    job = Job(argv=python("heap(100 << 20)"), policy=own)
                    nursery.start_soon(expect, runner, job, status, round_)


async def expect(runner: Runner, job: Job, status: str, number: int) -> None:
    result = await runner.run(job)
    assert result.status == status, number
