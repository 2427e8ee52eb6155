"""`sandboxd ps`: the jobs a daemon has of ours."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from sandboxd.cli import exitcodes, remote
from sandboxd.cli.quantities import count

_DESCRIPTION = """\
Lists the jobs that wait or run, the newest first; with -a those that are over as well."""
_HEAD = ("ID", "STATE", "STATUS", "AGE", "POLICY", "COMMAND")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = remote.add(subparsers, "ps", "list the daemon's jobs", _DESCRIPTION, "-a -n 10")
    parser.add_argument("-a", "--all", action="store_true", help="those that are over, too")
    parser.add_argument("-n", "--number", type=count, metavar="N", help="no more than N")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Prints them."""
    rows: list[tuple[str, ...]] = [] if args.json else [_HEAD]
    for view in _jobs(args):
        if args.json:
            print(json.dumps(view))
        else:
            rows.append(_row(view))
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]))
    return exitcodes.OK


def _jobs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    daemon, left = remote.daemon(args), args.number or 1 << 62
    for state in [""] if args.all else ["&state=queued", "&state=running"]:
        before: Any = ""
        while before is not None:
            target = f"/v1/jobs?limit={min(500, left)}{state}"
            page = daemon.ask("GET", f"{target}&before={before}" if before else target)
            for view in page["jobs"][:left]:
                yield view
                left -= 1
            before = page["next"] if left else None


def _row(view: dict[str, Any]) -> tuple[str, ...]:
    age = time.time() - datetime.fromisoformat(view["created_at"]).timestamp()
    command = shlex.join(view["argv"]).encode("unicode_escape").decode()
    return (
        view["id"], view["state"], view["status"] or "", _short(age), view["policy"], command
    )  # fmt: skip


def _short(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"
