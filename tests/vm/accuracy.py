"""`./do vm --accuracy`: what sandboxd and BenchExec's runexec report of programs of known cost.

Runs in the guest. Each row is one program of burners.c, run in turn by both; the error is against
what the program itself knows to be true: the median of all rounds, and the worst, by size. The
kernel counts memory by 64 pages at once: each round wants a few pages more, or all would be rounded
alike. Beside what we report stands what of it is the program's, where that can be told.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import trio

from sandboxd.job import Job
from sandboxd.policy import Environment, Limits, Mount, Policy, Require
from sandboxd.result import Usage
from sandboxd.supervise.runner import Runner, open_runner

SECONDS = 2.0
MIB = 128
STEP = 12 * 4096
"""Bytes that a program of memory wants more in each round."""
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
    own: list[float] = field(default_factory=list)
    """memory_program_peak; of CPU time there is nothing that is not the program's."""
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


async def by_us(runner: Runner, program: Path, words: list[str]) -> tuple[bytes, Usage]:
    """What the program printed, and what it used."""
    result = await runner.run(Job(argv=[str(program), *words], policy=policy(program)))
    usage = result.usage
    assert result.stdout is not None, result
    if not result.ok or usage.cpu_time is None or usage.memory_peak is None:
        raise RuntimeError(f"{words}: {result}")
    assert (usage.cpu_time_source, usage.memory_peak_source) == (
        "cgroup2 cpu.stat",
        "cgroup2 memory.peak",
    )
    return result.stdout, usage


async def until_base_is_known(runner: Runner, program: Path) -> None:
    with trio.fail_after(120):
        while True:
            _, usage = await by_us(runner, program, ["heap", "1"])
            if usage.memory_base is not None:
                return
            await trio.sleep(0.2)


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


async def measure(row: Row, turn: int, runner: Runner, program: Path, packages: str) -> None:
    cpu = row.kind in CPU
    size = (MIB << 20) + turn * STEP
    words = [row.kind, str(SECONDS if cpu else size / (1 << 20))]
    printed, usage = await by_us(runner, program, words)
    assert usage.cpu_time is not None
    assert usage.memory_peak is not None
    seconds, peak = usage.cpu_time, usage.memory_peak
    truth = int(printed) / 1e9 if cpu else size
    row.ours.append((seconds if cpu else peak) - truth)
    assert usage.memory_program_peak is not None
    row.own.append((seconds if cpu else usage.memory_program_peak) - truth)
    printed, seconds, peak = await trio.to_thread.run_sync(by_them, program, words, packages)
    truth = int(printed) / 1e9 if cpu else size
    row.theirs.append((seconds if cpu else peak) - truth)


def line(row: Row) -> str:
    scale, unit = (1e3, "ms") if row.kind in CPU else (1 / 1024, "KiB")
    verdict = "yes" if abs(worst(row.ours)) <= row.limit else "NO"
    closer = "yes" if is_as_close(row) else "NO"
    cells = [
        f"{statistics.median(errors) * scale:+.1f} ({worst(errors) * scale:+.1f}) {unit}"
        for errors in (row.ours, row.own, row.theirs)
    ]
    return f"| {row.kind}: {row.what} | {' | '.join(cells)} | {verdict} | {closer} |"


def is_as_close(row: Row) -> bool:
    """By the median: a worst one is whatever else the machine did."""
    return abs(statistics.median(row.own)) <= abs(statistics.median(row.theirs))


def table(rows: list[Row], version: str, rounds: int) -> str:
    head = (
        f"{SECONDS:g} s of CPU time, {MIB} MiB of memory; median (worst) of {rounds} rounds; "
        f"Linux {platform.release()}; runexec {version}"
    )
    columns = "| program | sandboxd | its own | runexec | within 1 % or 3 ms, 256 KiB | as close |"
    return "\n".join([head, "", columns, "| --- | --- | --- | --- | --- | --- |", *map(line, rows)])


def rows() -> list[Row]:
    times = [Row(kind, what, max(0.003, SECONDS / 100)) for kind, what in CPU.items()]
    size = MIB << 20
    sizes = [Row(kind, what, max(256 << 10, size / 100)) for kind, what in MEMORY.items()]
    return times + sizes


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", help="directory with benchexec")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="every error, in seconds and bytes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # the job is somebody else
        program = Path(folder, "burners")
        source = str(Path(__file__).with_name("burners.c"))
        argv = ["gcc", "-O1", "-static", "-pthread", "-o", str(program), source]
        await trio.run_process(argv)
        all_rows = rows()
        async with open_runner() as runner:
            await until_base_is_known(runner, program)
            for turn in range(options.rounds):
                for row in all_rows:
                    await measure(row, turn, runner, program, options.packages)
                    print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    (found,) = importlib.metadata.distributions(name="benchexec", path=[options.packages])
    if options.json:
        print(json.dumps({row.kind: [row.ours, row.own, row.theirs] for row in all_rows}))
    else:
        print(table(all_rows, found.version, options.rounds))
    return 0 if all(abs(worst(row.ours)) <= row.limit for row in all_rows) else 1


if __name__ == "__main__":
    sys.exit(trio.run(main))
