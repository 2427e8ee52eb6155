"""`sandboxd doctor`: what works on this machine, what does not, and how to change that."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from sandboxd.cli import subtree

if TYPE_CHECKING:
    from sandboxd.supervise.doctor import Report

_DESCRIPTION = """\
Tries everything that sandboxd can make use of, afresh each time, and says what was found, how to
get what is missing, and which guarantees follow. Exit status 1 if programs cannot be run at all
(a FAIL); a warn costs a guarantee or some speed."""
_EXAMPLE = """\
example:
  sandboxd doctor                                # as a table
  sandboxd doctor --json | jq '.checks[] | select(.state != "ok")'"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="what works on this machine, and how to fix what does not",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subtree.add(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(func=doctor)


def doctor(args: argparse.Namespace) -> int:
    from sandboxd.supervise.doctor import diagnose

    report = diagnose(args.cgroup)
    if args.json:
        json.dump(to_json(report), sys.stdout, indent=2)
        print()
    else:
        print(render(report))
    return 0 if report.ok else 1


def to_json(report: Report) -> dict[str, Any]:
    return {
        "schema": "sandboxd.doctor/1",
        "ok": report.ok,
        "checks": [
            {"what": check.what, "state": check.state, "found": check.found, "fix": check.fix}
            for check in report.checks
        ],
        "guarantees": [
            {"what": one.what, "level": one.level, "how": one.how} for one in report.guarantees
        ],
    }


def render(report: Report) -> str:
    """Two tables, plain text; a fix stands on a line of its own, so that it can be copied."""
    names = [check.what for check in report.checks] + [one.what for one in report.guarantees]
    width = max(map(len, names))
    lines = []
    last = ""
    for check in report.checks:
        lines.append(f"{check.state:<6}  {check.what:<{width}}  {check.found}".rstrip())
        if check.fix:
            fix = "the same" if check.fix == last else check.fix
            lines.append(f"{'':<6}  {'':<{width}}  fix: {fix}")
        last = check.fix
    lines += ["", "What follows for every run:"]
    lines += [f"{one.level:<6}  {one.what:<{width}}  {one.how}" for one in report.guarantees]
    return "\n".join(lines)
