"""`./do vm --accuracy`: what sandboxd and BenchExec's runexec report of programs of known cost.

Runs in the guest. Each row is one program of burners.c, run in turn by both; the error is the worst
of all rounds, by size, against what the program itself knows to be true.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import trio

from sandboxd.job import Job
from sandboxd.policy import Environment, Limits, Mount, Policy, Require
from sandboxd.supervise.runner import open_runner

SECONDS = 2.0
MIB = 128
CPU = {
    "user": "one thread",
    "system": "reads of /dev/zero",
    "threads": "4 threads",
    "children": "4 processes, waited for",
    "orphans": "4 processes, not waited for",
    "ignored": "4 processes, SIGCHLD ignored",
    "chain": "10 times exec",
}
MEMORY = {
    "heap": "malloc",
    "mmap": "private mapping",
    "shared": "shared mapping",
    "tmpfs": "a file in /dev/shm",
    "copied": "half, and its copy after fork",
    "bss": "zeros of the program",
}
SCOPE = ("systemd-run", "--user", "--scope", "--quiet", "--collect", "-p", "Delegate=yes")
RUNEXEC = "from benchexec.runexecutor import main; main()"
CONTAINER = ("--read-only-dir", "/", "--full-access-dir", "/dev/shm", "--dir", "/")
"""runexec has a sandbox, too, unless told otherwise; this one needs no overlayfs."""


@dataclass(frozen=True, slots=True)
class Row:
    """One program: the truth of each round, and what each of the two said about it."""

    kind: str
    what: str
    limit: float  # 3 ms or 1 %; 256 KiB or 1 %: what may be wrong
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)


def worst(errors: list[float]) -> float:
    return max(errors, key=abs)


def policy(program: Path) -> Policy:
    folder = str(program.parent)
    return Policy(
        name="accuracy",
        limits=Limits(wall_time=120.0, memory=512 << 20, disk=256 << 20),
        mounts=(Mount(target=folder, source=folder),),
        environment=Environment(set={"PATH": "/usr/bin:/bin"}),
        require=Require(memory="enforced"),
    )


async def by_us(program: Path, words: list[str]) -> tuple[bytes, float, int]:
    """What the program printed, its CPU time in seconds and its peak of memory in bytes."""
    async with open_runner() as runner:
        result = await runner.run(Job(argv=[str(program), *words], policy=policy(program)))
    usage = result.usage
    assert result.stdout is not None, result
    if not result.ok or usage.cpu_time is None or usage.memory_peak is None:
        raise RuntimeError(f"{words}: {result}")
    assert (usage.cpu_time_source, usage.memory_peak_source) == (
        "cgroup2 cpu.stat",
        "cgroup2 memory.peak",
    )
    return result.stdout, usage.cpu_time, usage.memory_peak


def by_them(program: Path, words: list[str], packages: str) -> tuple[bytes, float, int]:
    with tempfile.NamedTemporaryFile() as log:
        argv = [*SCOPE, sys.executable, "-P", "-c", RUNEXEC]
        argv += [*CONTAINER, "--output", log.name, "--", str(program), *words]
        paths = os.pathsep.join((packages, os.environ["PYTHONPATH"]))
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )
        said = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        if "cputime" not in said or "memory" not in said:
            raise RuntimeError(f"runexec: {done.stdout}{done.stderr}")
        printed = Path(log.name).read_bytes().rpartition(b"\n\n")[2]
    return printed, float(said["cputime"].rstrip("s")), int(said["memory"].rstrip("B"))


async def measure(row: Row, program: Path, packages: str) -> None:
    cpu = row.kind in CPU
    words = [row.kind, str(SECONDS if cpu else MIB)]
    for into, one in (
        (row.ours, await by_us(program, words)),
        (row.theirs, await trio.to_thread.run_sync(by_them, program, words, packages)),
    ):
        printed, seconds, peak = one
        truth = int(printed) / 1e9 if cpu else MIB << 20
        into.append((seconds if cpu else peak) - truth)


def line(row: Row) -> str:
    scale, unit = (1e3, "ms") if row.kind in CPU else (1 / 1024, "KiB")
    ours, theirs = worst(row.ours), worst(row.theirs)
    verdict = "yes" if abs(ours) <= row.limit else "NO"
    closer = "yes" if abs(ours) <= abs(theirs) else "NO"
    cells = (f"{ours * scale:+.1f} {unit}", f"{theirs * scale:+.1f} {unit}")
    return f"| {row.kind}: {row.what} | {cells[0]} | {cells[1]} | {verdict} | {closer} |"


def table(rows: list[Row], version: str, rounds: int) -> str:
    head = (
        f"{SECONDS:g} s of CPU time, {MIB} MiB of memory; worst of {rounds} rounds; "
        f"Linux {platform.release()}; runexec {version}"
    )
    columns = "| program | sandboxd | runexec | within 1 % or 3 ms, 256 KiB | as close |"
    return "\n".join([head, "", columns, "| --- | --- | --- | --- | --- |", *map(line, rows)])


def rows() -> list[Row]:
    times = [Row(kind, what, max(0.003, SECONDS / 100)) for kind, what in CPU.items()]
    size = MIB << 20
    sizes = [Row(kind, what, max(256 << 10, size / 100)) for kind, what in MEMORY.items()]
    return times + sizes


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", help="directory with benchexec")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="every error, in seconds and bytes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # the job is somebody else
        program = Path(folder, "burners")
        source = str(Path(__file__).with_name("burners.c"))
        argv = ["gcc", "-O1", "-static", "-pthread", "-o", str(program), source]
        await trio.run_process(argv)
        all_rows = rows()
        for _ in range(options.rounds):
            for row in all_rows:
                await measure(row, program, options.packages)
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    (found,) = importlib.metadata.distributions(name="benchexec", path=[options.packages])
    if options.json:
        print(json.dumps({row.kind: [row.ours, row.theirs] for row in all_rows}))
    else:
        print(table(all_rows, found.version, options.rounds))
    return 0 if all(abs(worst(row.ours)) <= row.limit for row in all_rows) else 1


if __name__ == "__main__":
    sys.exit(trio.run(main))
