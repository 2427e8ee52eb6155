"""`./do bench serve`: jobs a second by the Runner of this process, and through the daemon in turns.

Both run the same program under the same policy with as many slots, for as many callers. The daemon
is a process of its own, and so are its callers (load.py), which do as little as can be done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from sandboxd import Job, Runner, open_runner
from sandboxd.serve.address import Unix
from sandboxd.serve.plain import Plain
from tests.bench import load
from tests.bench.contestants import POLICY
from tests.bench.programs import DYNAMIC, PLACE, STATIC, compile_all

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = "bench"
SETTLING = 1.0
"""Seconds in which what was noted is written, and the last sandboxes are taken apart."""


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="./do bench serve", description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000, metavar="N",
                        help="through the daemon, in all (default: 10000)")  # fmt: skip
    parser.add_argument("--callers", type=int, default=50, metavar="N", help="(default: 50)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns (default: 5)")
    parser.add_argument("--json", action="store_true", help="all samples as JSON on stdout")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="sandboxd-bench-") as folder:
        found = trio.run(measure, Path(folder), args.jobs, args.callers, args.rounds)
    print(json.dumps(found, indent=1) if args.json else text(found))


async def measure(folder: Path, jobs: int, callers: int, rounds: int) -> dict[str, Any]:
    """Samples by their names; memory in bytes before the first round and after the last."""
    why = prepare(folder)
    program = DYNAMIC if why else f"{PLACE}/{STATIC}"
    job = Job(argv=(program,), policy=NAME)
    body = json.dumps({"argv": [program], "policy": NAME}).encode()
    each = max(callers, jobs // rounds)
    found: dict[str, Any] = {"p50": [], "p99": []}
    found |= {"runner": [], "daemon": [], "runner cpu": [], "daemon cpu": []}
    async with open_runner() as runner:
        with daemon(folder) as pid:
            await many(runner, job, each // 4, callers)
            await caller(folder, each // 2, callers, body)
            await trio.sleep(SETTLING)
            found["before"] = memory(pid)
            for _ in range(rounds):
                began, used = time.monotonic(), time.process_time()
                await many(runner, job, each // 4, callers)
                found["runner cpu"].append((time.process_time() - used) / (each // 4))
                found["runner"].append(each // 4 / (time.monotonic() - began))
                used = cpu(pid)
                said = await caller(folder, each, callers, body)
                found["daemon"].append(each / said["seconds"])
                found["daemon cpu"].append((cpu(pid) - used) / each)
                found["p50"].append(said["p50"])
                found["p99"].append(said["p99"])
            await trio.sleep(SETTLING)
            found["after"] = memory(pid)
    return found | {"jobs": each * rounds, "callers": callers, "missing": why}


def prepare(folder: Path) -> str:
    """The programs, and a policy for the Runner here and for the daemon; why there are none."""
    folder.chmod(0o755)
    programs = folder / "programs"
    programs.mkdir()
    (folder / f"{NAME}.toml").write_text(
        f'extends = "{POLICY}"\nlimits.wall_time = "60s"\n'
        f'[[mounts]]\ntarget = "{PLACE}"\nsource = "{programs}"\n'
    )
    os.environ["SANDBOXD_POLICY_PATH"] = str(folder)
    return compile_all(programs)


async def many(runner: Runner, job: Job, count: int, callers: int) -> None:
    left = count

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            result = await runner.run(job)
            if not result.ok:
                raise RuntimeError(f"{result.status} {result.message}")

    async with trio.open_nursery() as nursery:
        for _ in range(callers):
            nursery.start_soon(worker)


async def caller(folder: Path, jobs: int, callers: int, body: bytes) -> Mapping[str, float]:
    """load.py in a process of its own."""
    words = [sys.executable, "-I", load.__file__, f"{folder}/s", str(callers), str(jobs)]
    done = await trio.run_process([*words, body.decode()], capture_stdout=True)
    said: Mapping[str, float] = json.loads(done.stdout)
    return said


@contextmanager
def daemon(folder: Path) -> Iterator[int]:
    """The pid of one that answers at folder/s."""
    words = ["serve", "--state", f"{folder}/state", "--listen", f"unix://{folder}/s"]
    with (folder / "log").open("wb") as log:
        argv = [sys.executable, "-P", "-m", "sandboxd", *words]
        process = subprocess.Popen(argv, cwd=ROOT, stderr=log)
    try:
        plain = Plain(Unix(folder / "s"))
        deadline = time.monotonic() + 30
        while True:
            try:
                plain.ask("GET", "/v1/info")
                break
            except Exception:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "log").read_text()) from None
                time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)


def memory(pid: int) -> int:
    """VmRSS of proc_pid_status(5), in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def cpu(pid: int) -> float:
    """Seconds of CPU time, user and system, of proc_pid_stat(5): in ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def text(found: Mapping[str, Any]) -> str:
    """The best and the middle of each, and the ratios of those."""
    best = {who: max(found[who]) for who in ("runner", "daemon")}
    middle = {who: statistics.median(found[who]) for who in ("runner", "daemon")}
    rows = [found["missing"]] if found["missing"] else []
    rows.append(f"{found['callers']} callers, {found['jobs']} jobs      max   median")
    for who, name in (("runner", "Runner, in process"), ("daemon", "through the daemon")):
        rows.append(f"  {name + ', jobs/s':<30}{best[who]:8.0f} {middle[who]:8.0f}")
    ratios = (best["daemon"] / best["runner"], middle["daemon"] / middle["runner"])
    rows.append(f"  {'ratio':<30}{ratios[0]:8.2f} {ratios[1]:8.2f}")
    least = [min(found[f"{who} cpu"]) * 1e6 for who in ("runner", "daemon")]
    rows.append(f"CPU per job, us at least: {least[0]:.0f} and {least[1]:.0f}")
    p50, p99 = min(found["p50"]) * 1e3, min(found["p99"]) * 1e3
    rows.append(f"latency with all of them, ms: p50 {p50:.1f}, p99 {p99:.1f} at least")
    change = found["after"] / found["before"] - 1
    rows.append(
        f"daemon's memory, MB: {found['before'] / 1e6:.1f} before, {found['after'] / 1e6:.1f}"
        f" after ({change:+.1%})"
    )
    return "\n".join(rows)
