"""`./do bench`: sandboxd beside bwrap, crun and no sandbox at all, in one run.

Everybody takes turns, so the ratios hold on a busy machine; absolute times are this machine's.
docs/explanation/performance.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from sandboxd.probe.host import probe
from tests.bench import network, report, serve
from tests.bench.command import MEASURES as OF_COMMANDS
from tests.bench.contestants import Contestant, bwrap, nobody, open_ours
from tests.bench.crun import open_crun
from tests.bench.images import MEASURES as OF_IMAGES
from tests.bench.measures import LIVE, Bench, Measure, Row
from tests.bench.measures import MEASURES as OF_JOBS
from tests.bench.programs import DYNAMIC, compile_all

MEASURES: dict[str, Measure] = OF_JOBS | OF_COMMANDS | OF_IMAGES


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./do bench", description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", choices=MEASURES,
                        help=f"one of {', '.join(MEASURES)}; may be repeated")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=100, metavar="N",
                        help="how often each is run for the times (default: 100)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="everything as JSON on stdout")
    return parser.parse_args()


async def run(only: list[str], rounds: int, folder: Path) -> dict[str, object]:
    """Measure, and say what was found; see report.facts for the form."""
    programs, bundle = folder / "programs", folder / "bundle"
    programs.mkdir()
    bundle.mkdir()
    missing: dict[str, str] = {}
    if why := compile_all(programs):
        missing["static program"] = why
    host = probe()
    if shutil.which("umoci") is None:
        missing["umoci"] = "not installed"
    if host.cgroup is None:
        missing["cgroup"] = host.cgroup_why_not
    rows: list[Row] = []
    before = machine()
    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(open_ours(host, programs, LIVE + 4))
        others = {
            "bwrap": bwrap(programs, host.arch),
            "crun": await stack.enter_async_context(open_crun(programs, bundle)),
        }
        peers = [peer for name in others for peer in await working(name, others[name], missing)]
        bench = Bench([*ours, *peers, *nobody(programs)], host, programs, rounds, not why)
        for name in only:
            tell(f"{name} ...")
            rows += await MEASURES[name](bench)
    return report.facts(rows, missing, {"before": before, "after": machine(), "rounds": rounds})


async def working(name: str, peers: list[Contestant], missing: dict[str, str]) -> list[Contestant]:
    """Those that run here; why not the others."""
    if not peers:
        missing[name] = "not installed"
    found = []
    for peer in peers:
        try:
            await peer.result(DYNAMIC)
        except (OSError, subprocess.CalledProcessError) as error:
            missing[peer.name] = f"does not run here: {reason(error)}"
        else:
            found.append(peer)
    return found


def reason(error: BaseException) -> str:
    stderr: bytes = getattr(error, "stderr", None) or b""
    return stderr.decode(errors="replace").strip().split("\n")[-1] or str(error)


def machine() -> dict[str, object]:
    return {
        "kernel": platform.release(),
        "arch": platform.machine(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    if sys.argv[1:2] == ["network"]:
        network.main(sys.argv[2:])
        return
    if sys.argv[1:2] == ["serve"]:
        serve.main(sys.argv[2:])
        return
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="sandboxd-bench-") as folder:
        os.chmod(folder, 0o755)
        found = trio.run(run, args.only or list(MEASURES), max(2, args.rounds), Path(folder))
    print(json.dumps(found, indent=1) if args.json else report.text(found))


if __name__ == "__main__":
    main()
