"""Limits and shares that only a controller keeps: in force, and written before anybody asks."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

import msgspec
import pytest
import trio

from sandboxd.cgroup.leaves import swap_is_on
from sandboxd.errors import HostError
from sandboxd.job import Job
from sandboxd.policy import Io, Limits, Mount, Policy, Resources
from sandboxd.probe.host import probe
from sandboxd.supervise.runner import open_runner
from tests.vm.programs import MIB, SLOW, policy, python, run

COUNTS_SWAP = tuple(map(int, re.findall(r"\d+", platform.release())[:2])) >= (6, 5)
"""memory.swap.peak is of Linux 6.5."""


HOLD = 0.5
"""Seconds: a run that lasts is looked at four times in one."""


def leaves(top: Path, name: str) -> set[str]:
    """What this file says in each leaf of the only runner."""
    (runner,) = top.glob("sandboxd-*")
    return {path.read_text().strip() for path in runner.glob(f"*/[0-9]*/{name}")}


async def seen(top: Path, own: Policy, *names: str) -> dict[str, set[str]]:
    """The files of the leaf while a job is in it."""
    async with open_runner() as runner:
        job = Job(argv=python("print('ready', flush=True)\nsys.stdin.read()"), policy=own,
                  stdin=None)  # fmt: skip
        async with runner.start(job) as one:
            async for event in one.events:
                if event.type == "stdout":
                    break
            return {name: leaves(top, name) for name in names}


@pytest.mark.needs("memory", "pids", "cpu")
async def test_what_is_written(cgroup_top: Path) -> None:
    limits = Limits(memory=64 * MIB, processes=9, cpus=0.5)
    resources = Resources(memory_high=48 * MIB, cpu_weight=50)
    expected = {
        "memory.max": str(64 * MIB),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "memory.high": str(48 * MIB),
        "pids.max": "10",
        "cpu.max": "50000 100000",
        "cpu.weight": "50",
    }
    found = await seen(cgroup_top, policy(limits, resources), *expected)
    assert found == {name: {value} for name, value in expected.items()}


@pytest.mark.needs("memory")
@pytest.mark.parametrize(("asked", "status"), [("32M", "ok"), ("200M", "memory_limit")])
async def test_memtester(asked: str, status: str) -> None:
    """The textbook's experiment: 100 MB, what fits and what does not. (`nothing_left` looks.)"""
    if shutil.which("memtester") is None:
        pytest.skip("memtester is not installed")
    limit = 100 * MIB
    own = policy(Limits(memory=limit, wall_time=50.0))
    # One pattern, for what counts is that all of it is touched. It asks for less where it may lock
    # some but not all (mlock(2): ENOMEM), and goes on unlocked where it may lock nothing.
    words = f"ulimit -l 0; MEMTESTER_TEST_MASK=1 exec memtester {asked} 1"
    job = Job(argv=["sh", "-c", words], policy=own, env={"PATH": "/usr/sbin:/usr/bin"})
    async with open_runner() as runner:
        result = await runner.run(job)
    assert result.status == status, (result.message, result.stdout[:900])
    peak = result.usage.memory_peak
    assert peak is not None
    assert result.usage.memory_peak_source == "cgroup2 memory.peak"
    if status == "ok":
        assert 32 * MIB <= peak < 48 * MIB
        assert result.usage.oom_kills == 0
    else:
        assert peak == limit
        assert result.usage.oom_kills
        assert result.limits["memory"].action == "killed"


@pytest.mark.needs("memory")
async def test_swap_and_oom_as_asked(cgroup_top: Path) -> None:
    own = policy(Limits(memory=64 * MIB), Resources(swap=MIB, oom="process"))
    found = await seen(cgroup_top, own, "memory.swap.max", "memory.oom.group")
    assert found == {"memory.swap.max": {str(MIB)}, "memory.oom.group": {"0"}}


@pytest.mark.needs("memory")
async def test_what_does_not_fit_is_swapped_out_where_that_is_allowed() -> None:
    """More than the limit: killed without swap, and with it slower."""
    if not swap_is_on():
        pytest.skip("needs swap: the machine has none")
    limits = Limits(memory=32 * MIB, wall_time=20.0 * SLOW)
    result = await run(python("heap(48 << 20)"), limits, Resources(swap=64 * MIB))
    assert result.status == "ok", result.message
    if COUNTS_SWAP:
        assert (result.usage.swap_peak or 0) >= 16 * MIB
    assert result.usage.memory_peak == limits.memory
    result = await run(python("heap(48 << 20)"), limits)
    assert result.status == "memory_limit"
    assert result.usage.swap_peak == (0 if COUNTS_SWAP else None)


@pytest.mark.needs("memory", "pids")
async def test_leaves_are_ready_before_they_are_asked_for(cgroup_top: Path) -> None:
    """After the first runs of a policy no run waits for a leaf to be made."""
    own = policy(Limits(memory=64 * MIB))
    async with open_runner(slots=1) as runner:
        await runner.run(Job(argv=["true"], policy=own))
        cgroups = runner._cgroups
        assert cgroups is not None
        while not cgroups._free:  # noqa: ASYNC110  the used one is being replaced
            await trio.sleep(0.001)
        (ready,) = cgroups._free
        assert ready.path.joinpath("memory.max").read_text().strip() == str(64 * MIB)
        made = cgroups._made
        async with runner.start(Job(argv=["sleep", "1000"], policy=own)) as one:
            await one.events.receive()
            while runner.statistics().running == 0 or cgroups._free:  # noqa: ASYNC110
                await trio.sleep(0.001)
            assert cgroups._made == made


@pytest.mark.needs("memory")
async def test_leaves_of_killed_runs_go_too(cgroup_top: Path) -> None:
    """Their init could not report, so nobody waits for it as for others."""
    own = policy(Limits(memory=32 * MIB))
    async with open_runner(slots=2) as runner:
        for _ in range(8):
            assert (await runner.run(Job(argv=python("heap(1 << 26)"), policy=own))).signal
        while runner._undertaker.is_busy:  # noqa: ASYNC110
            await trio.sleep(0.005)
        assert len(leaves(cgroup_top, "memory.max")) == 1
        assert len(leaf_directories(cgroup_top)) <= 8


def leaf_directories(top: Path) -> list[Path]:
    return list(top.glob("sandboxd-*/*/[0-9]*"))


@pytest.mark.needs("cpu")
async def test_bandwidth() -> None:
    wall = 1.0 + 0.05 * SLOW
    body = f"until = time.monotonic() + {wall}\nwhile time.monotonic() < until: pass"
    result = await run(python(body), Limits(cpus=0.2))
    assert result.usage.cpu_time is not None
    assert result.usage.wall_time is not None
    assert result.usage.cpu_time < 0.4 * result.usage.wall_time  # a burst at its start
    assert (result.usage.cpu_throttled or 0) > 0.3 * wall
    assert (result.usage.cpu_throttlings or 0) > 0
    assert result.limits["cpus"].action == "refused"
    assert result.quality.grade == "noisy"
    assert any("throttled" in reason for reason in result.quality.reasons)


def pinned(top: Path) -> tuple[set[str], list[Path]]:
    """The directories for sets of CPUs, and the leaves that have a set of their own."""
    (runner,) = top.glob("sandboxd-*")
    sets = {path.name for path in runner.glob("cpus-*")}
    return sets, list(runner.glob("cpus-*/[0-9]*/cpuset.cpus"))


@pytest.mark.needs("cpuset")
async def test_pinning_one_core_a_run(cgroup_top: Path) -> None:
    """Runs at a time are on cores of their own, and cpuset.cpus is not written for each."""
    host = probe()
    if len(host.cores) < 2:
        pytest.skip("needs two cores")
    own = policy(resources=Resources(cores=1, siblings=False))
    body = "print(*os.sched_getaffinity(0), flush=True)\nsys.stdin.read()"
    first_only = {str(core[0]) for core in host.cores}
    cpus: set[str] = set()
    async with open_runner(slots=2) as runner:
        for _ in range(3):
            job = Job(argv=python(body), policy=own, stdin=None)
            async with runner.start(job) as one, runner.start(job) as other:
                cpus.clear()
                for run_ in (one, other):
                    async for event in run_.events:
                        if event.type == "stdout":
                            cpus.add(event.data.decode().strip())
                            break
                assert len(cpus) == 2
                assert cpus <= first_only
        assert pinned(cgroup_top) == ({f"cpus-{cpu}" for cpu in cpus}, [])


@pytest.mark.needs("cpuset")
async def test_a_crowd_on_pinned_cpus_is_told() -> None:
    own = policy(Limits(wall_time=20.0), Resources(cpuset=str(probe().cores[0][0])))
    body = f"until = time.monotonic() + {0.3 + 0.02 * SLOW}\nwhile time.monotonic() < until: pass"
    grades: list[str] = []
    async with open_runner(slots=2) as runner:
        async with trio.open_nursery() as nursery:

            async def one() -> None:
                result = await runner.run(Job(argv=python(body), policy=own))
                assert result.enforcement["pinning"] == "cgroup2"
                grades.extend(result.quality.reasons)

            nursery.start_soon(one)
            nursery.start_soon(one)
    assert any("same CPUs" in reason for reason in grades)
    assert any("waited" in reason for reason in grades)


@pytest.mark.needs("cpuset")
async def test_cpus_that_there_are_not() -> None:
    with pytest.raises(HostError, match="none of these CPUs is ours"):
        await run(["true"], resources=Resources(cpuset="60000"))
    with pytest.raises(HostError, match="cores"):
        await run(["true"], resources=Resources(cores=60000))


def disk_of(path: str) -> str:
    """MAJOR:MINOR of the whole disk it lies on."""
    number = os.stat(path).st_dev
    part = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if (part / "partition").exists():
        part = part.parent
    if not (part / "dev").exists():
        pytest.skip(f"needs a disk below {path}")
    return (part / "dev").read_text().strip()


@pytest.mark.needs("io")
async def test_bandwidth_of_a_disk(cgroup_top: Path) -> None:
    device = disk_of("/var/tmp")
    io = (Io(device=device, read=4 * MIB, writes=100),)
    own = policy(resources=Resources(io=io))
    (line,) = (await seen(cgroup_top, own, "io.max"))["io.max"]
    assert re.search(rf"^{device} rbps={4 * MIB} wbps=max riops=max wiops=100$", line)


READ = """
import mmap, os
file = os.open("/data/file", os.O_RDONLY | os.O_DIRECT)
block = mmap.mmap(-1, 1 << 20)
while os.readv(file, [block]):
    pass
"""


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A directory with a file of 4 MiB that anybody may read."""
    tmp_path.chmod(0o755)
    tmp_path.joinpath("file").write_bytes(os.urandom(4 * MIB))
    return tmp_path


@pytest.mark.needs("io")
async def test_a_disk_is_no_faster_than_allowed(on_disk: Path) -> None:
    """4 MiB at 2 MiB a second, past the page cache: no less than a second and a half."""
    device = disk_of(str(on_disk))
    mount = Mount(target="/data", source=str(on_disk))
    allowed = policy(resources=Resources(io=(Io(device=device, read=2 * MIB),)))
    own = msgspec.structs.replace(allowed, mounts=(*allowed.mounts, mount))
    async with open_runner() as runner:
        result = await runner.run(Job(argv=["python3", "-c", READ], policy=own))
    assert result.ok, (result.message, result.stderr)
    assert (result.usage.io_read or 0) >= 4 * MIB
    assert (result.usage.wall_time or 0.0) > 1.5
    assert (result.usage.pressure or {})["io"] > 1.0


@pytest.mark.needs("memory")
async def test_memory_high_slows_and_does_not_kill() -> None:
    limits = Limits(memory=128 * MIB, wall_time=1.5 + 0.1 * SLOW)
    result = await run(python("heap(64 << 20)"), limits, Resources(memory_high=16 * MIB))
    assert result.status == "wall_time_limit"
    assert (result.usage.memory_events or {})["high"] > 0
    assert result.usage.oom_kills == 0
    assert (result.usage.pressure or {})["memory"] > 0.3
    assert result.quality.grade == "noisy"


@pytest.mark.needs("cgroup")
async def test_what_is_asked_for_and_not_there_is_said() -> None:
    host = probe()
    assert host.cgroup is not None
    bare = msgspec.structs.replace(
        host, cgroup=msgspec.structs.replace(host.cgroup, controllers=frozenset())
    )
    own = policy(Limits(cpus=1.0), Resources(cpu_weight=10, cores=1, io=(Io(device="8:0", read=1),),
                                             memory_high=MIB))  # fmt: skip
    async with open_runner(host=bare) as runner:
        result = await runner.run(Job(argv=["true"], policy=own))
    asked = ("cpu_weight", "pinning", "io", "memory_high", "cpus")
    assert {result.enforcement[name] for name in asked} == {"none"}
    assert set(asked) <= {one.what for one in result.degraded}
    assert result.limits["cpus"].action == "not enforced"


@pytest.mark.needs("memory")
async def test_what_is_not_the_programs_is_told_apart(cgroup_top: Path) -> None:
    """memory_base: measured beside the runs, and never more than a run holds that does nothing."""
    own = policy(Limits(memory=64 * MIB), Resources(cores=1))
    job = Job(argv=python(f"held = heap(32 << 20); time.sleep({HOLD})"), policy=own)
    async with open_runner() as runner:
        first = await runner.run(job)
        assert first.usage.memory_base is None  # whose runner does nothing but this
        with trio.fail_after(30 * SLOW):
            while True:  # each is a run, and it comes beside one
                usage = (await runner.run(job)).usage
                if usage.memory_base is not None:
                    break
        (again,) = {(await runner.run(job)).usage.memory_base for _ in range(2)}
        assert again == usage.memory_base  # once for all
        waiting = Job(argv=["sh", "-c", "echo; read x"], policy=own, stdin=None)
        async with runner.start(waiting) as one:
            async for event in one.events:
                if event.type == "stdout":
                    break
            live = one.usage()
    assert live.memory_base == usage.memory_base
    assert usage.memory_peak is not None
    assert 8 << 12 <= usage.memory_base < MIB
    assert usage.memory_peak - usage.memory_base >= 32 * MIB
    assert usage.memory_program_peak is not None  # it was looked at while it had all
    assert 32 * MIB <= usage.memory_program_peak <= usage.memory_peak - usage.memory_base
