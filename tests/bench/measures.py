"""What is measured. Everybody takes turns in a round, so that a busy moment hits all of them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from sandboxd import Job, Limits, open_runner
from sandboxd.host import Host
from tests.bench import files as many_files
from tests.bench.contestants import Contestant, policy_for
from tests.bench.programs import BURN, DYNAMIC, HOLD, PLACE, STATIC

FLIGHTS = (1, 2, 4)
LIVE = 50
BURNING = 1.0
MEMORY = Path("/dev/shm")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Row:
    """The samples of one contestant in one measure, in `unit`."""

    measure: str
    who: str
    unit: str
    samples: list[float] = field(default_factory=list)
    better: str = "less"
    """Which figure wins: "less", "more", or "unknown" where no ratio means anything."""

    def at(self, share: float) -> float:
        """A quantile; 0 is the minimum."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


@dataclass(frozen=True)
class Bench:
    """What every measure gets."""

    contestants: Sequence[Contestant]
    host: Host
    folder: Path
    rounds: int
    programs: bool
    """Whether STATIC and HOLD could be compiled."""

    def path(self, name: str) -> str:
        return f"{PLACE}/{name}"


Measure = Callable[[Bench], Awaitable[list[Row]]]


class Table:
    """Rows by contestant, made when the first sample comes."""

    def __init__(self, measure: str, unit: str, better: str = "less") -> None:
        self.rows: dict[str, Row] = {}
        self._row = (measure, unit, better)

    def add(self, who: str, sample: float) -> None:
        measure, unit, better = self._row
        row = self.rows.setdefault(who, Row(measure, who, unit, better=better))
        row.samples.append(sample)

    def all(self) -> list[Row]:
        return list(self.rows.values())


async def in_turn(
    contestants: Sequence[Contestant], rounds: int, once: Callable[[Contestant], Awaitable[None]]
) -> None:
    """A B C A B C ...; each round begins with another one, so nobody always follows the same."""
    everybody = list(contestants)
    for number in range(rounds):
        first = number % len(everybody)
        for contestant in everybody[first:] + everybody[:first]:
            await contestant.settle()
            await once(contestant)


# -- time --------------------------------------------------------------------------------------


async def latency(bench: Bench, program: str, label: str) -> list[Row]:
    """Time to the first byte, to the result, and the supervisor's CPU time for it."""
    return await latency_of(bench, bench.contestants, program, label)


async def latency_of(
    bench: Bench, contestants: Sequence[Contestant], program: str, label: str
) -> list[Row]:
    """The same for these contestants."""
    byte = Table(f"first byte, {label}", "ms")
    whole = Table(f"result, {label}", "ms")
    cpu = Table(f"supervisor CPU per job, {label}", "us")

    async def once(contestant: Contestant) -> None:
        began = trio.current_time()
        byte.add(contestant.name, (await contestant.first_byte(program) - began) * 1e3)
        await contestant.settle()
        began, used = trio.current_time(), time.process_time()
        await contestant.result(program)
        whole.add(contestant.name, (trio.current_time() - began) * 1e3)
        cpu.add(contestant.name, (time.process_time() - used) * 1e6)

    await in_turn(contestants, 1, once)  # tenants start, files come into memory
    for table in (byte, whole, cpu):
        table.rows.clear()
    await in_turn(contestants, bench.rounds, once)
    return [*byte.all(), *whole.all(), *cpu.all()]


async def static(bench: Bench) -> list[Row]:
    """A program without libc that writes one byte."""
    return await latency(bench, bench.path(STATIC), "static program") if bench.programs else []


async def dynamic(bench: Bench) -> list[Row]:
    """/bin/true: libc, its loader, and no output."""
    return await latency(bench, DYNAMIC, DYNAMIC)


async def start(bench: Bench) -> list[Row]:
    """A new runner's first result, so with the start of its tenant; and its end."""
    table = Table("new runner: tenant, first result, end", "ms")
    program = bench.path(STATIC) if bench.programs else DYNAMIC
    job = Job(argv=(program,), policy=policy_for(bench.folder))
    for _ in range(max(2, bench.rounds // 10)):
        began = trio.current_time()
        async with open_runner(host=bench.host, slots=1) as runner:
            await runner.run(job)
        table.add("sandboxd", (trio.current_time() - began) * 1e3)
    return table.all()


async def overshoot(bench: Bench) -> list[Row]:
    """CPU time beyond a limit of a second, for four processes that never rest."""
    if not bench.programs:
        return []
    table = Table(f"CPU time beyond a limit of {BURNING:g} s, four busy processes", "ms")
    limits = Limits(cpu_time=BURNING, wall_time=60.0)
    hosts = {"sandboxd": bench.host, "sandboxd, no cgroup": without_cgroup(bench.host)}
    for _ in range(max(3, bench.rounds // 20)):
        for who, host in hosts.items():
            async with open_runner(host=host, slots=1) as runner:
                own = msgspec.structs.replace(policy_for(bench.folder), limits=limits)
                result = await runner.run(Job(argv=(bench.path(BURN),), policy=own))
            if result.status != "cpu_time_limit" or result.usage.cpu_time is None:
                raise RuntimeError(f"{who}: {result.status} {result.message}")
            table.add(who, (result.usage.cpu_time - BURNING) * 1e3)
    return table.all()


def without_cgroup(host: Host) -> Host:
    return msgspec.structs.replace(host, cgroup=None, cgroup_why_not="left out by the benchmark")


async def files(bench: Bench) -> list[Row]:
    """Many files in and out; in memory, as a sandbox's are, so that no disk is measured."""
    tables: dict[str, Table] = {}
    rounds = max(1, bench.rounds // 10)
    place = MEMORY if os.access(MEMORY, os.W_OK) else bench.folder.parent
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for measure, who, sample in await many_files.times(bench.host, Path(folder), rounds):
            tables.setdefault(measure, Table(measure, "ms")).add(who, sample)
    return [row for table in tables.values() for row in table.all()]


# -- throughput --------------------------------------------------------------------------------


async def rate(bench: Bench) -> list[Row]:
    """Jobs a second with 1, 2 and 4 in flight, and what the supervisor spends on each."""
    program = bench.path(STATIC) if bench.programs else DYNAMIC
    rows: list[Row] = []
    for flight in FLIGHTS:
        jobs = Table(f"rate, {flight} in flight", "jobs/s", "more")
        cpu = Table(f"supervisor CPU per job, {flight} in flight", "us")

        async def once(
            contestant: Contestant, flight: int = flight, jobs: Table = jobs, cpu: Table = cpu
        ) -> None:
            count = min(100, 5 * bench.rounds)
            began, used = trio.current_time(), time.process_time()
            await many(contestant, program, count, flight)
            jobs.add(contestant.name, count / (trio.current_time() - began))
            cpu.add(contestant.name, (time.process_time() - used) / count * 1e6)

        await in_turn(bench.contestants, max(2, bench.rounds // 10), once)
        rows += [*jobs.all(), *cpu.all()]
    return rows


async def many(contestant: Contestant, program: str, count: int, flight: int) -> None:
    left = count

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await contestant.result(program)

    async with trio.open_nursery() as nursery:
        for _ in range(flight):
            nursery.start_soon(worker)


# -- memory ------------------------------------------------------------------------------------


async def memory(bench: Bench) -> list[Row]:
    """What LIVE jobs that wait for stdin add, divided by their number.

    MemAvailable sees the kernel's part too, but also everybody else's, and not what the kernel
    takes from memory it had kept for such objects; so there it is only a hint.
    """
    if not bench.programs:
        return []
    processes = Table(f"memory per live job, its processes ({LIVE} live)", "KB")
    machine = Table(f"memory per live job, MemAvailable ({LIVE} live)", "KB", "unknown")

    async def once(contestant: Contestant) -> None:
        if "spare" in contestant.name:  # a spare in use is a sandbox like any other
            return
        async with kept_low():
            before, free = private_memory(), available()
            async with contestant.live(bench.path(HOLD), LIVE):
                processes.add(contestant.name, (private_memory() - before) / LIVE / 1024)
                machine.add(contestant.name, (free - available()) / LIVE / 1024)

    await in_turn(bench.contestants, min(3, bench.rounds), once)
    return [*processes.all(), *machine.all()]


@asynccontextmanager
async def kept_low() -> AsyncIterator[None]:
    """The kernel takes namespaces apart in the background; let it finish before and after."""
    await trio.sleep(0.3)
    yield
    await trio.sleep(0.1)


def private_memory() -> int:
    """Bytes of all processes below this one: smaps_rollup's Pss, or where that is forbidden
    (init, which is not dumpable) what statm calls resident and not shared."""
    total = 0
    for pid in descendants(os.getpid()):
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(rollup.split("\nPss:")[1].split()[0]) * 1024
            continue
        except (OSError, IndexError):
            pass
        try:
            _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
            total += (int(resident) - int(shared)) * PAGE
        except (OSError, ValueError):
            continue
    return total


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    todo = [pid]
    while todo:
        current = todo.pop()
        for file in Path(f"/proc/{current}/task").glob("*/children"):
            try:
                children = [int(word) for word in file.read_text().split()]
            except OSError:
                continue
            found += children
            todo += children
    return found


def available() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024


MEASURES: dict[str, Measure] = {
    "static": static,
    "dynamic": dynamic,
    "start": start,
    "overshoot": overshoot,
    "files": files,
    "rate": rate,
    "memory": memory,
}
