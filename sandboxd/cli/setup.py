"""`sandboxd setup`: what an administrator does once, shown or done."""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sandboxd.cli import exitcodes
from sandboxd.cli.main import say

if TYPE_CHECKING:
    from sandboxd.probe.setup import Step

SCHEMA = "sandboxd.setup/1"

_DESCRIPTION = """\
Shows what an administrator does once so that a user gets all that sandboxd can give: subordinate
ids, user namespaces, a delegated cgroup. What is in order is left alone. With --apply, as root, the
commands that are shown are run; it may be repeated."""
_EXAMPLE = """\
example:
  sandboxd setup                          # what is there, and the commands for the rest
  sudo sandboxd setup --user judge --apply

exit status: 0 all is in order, 1 something is missing or could not be done, 2 wrong usage"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "setup",
        help="what an administrator does once, shown or done",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--user", metavar="NAME", help="for whom (default: who types it)")
    parser.add_argument("--apply", action="store_true", help="run the commands (as root)")
    parser.add_argument(
        "--program",
        metavar="PATH",
        help="the program that may have user namespaces where AppArmor restricts them "
        "(default: sandboxd itself)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(func=setup)


def setup(args: argparse.Namespace) -> int:
    """Shows or does it; returns the exit status."""
    from sandboxd.probe.setup import look, steps

    user = args.user or _caller()
    if args.apply and os.geteuid() != 0:
        say("setup: --apply changes the machine: type it as root")
        say(f"sudo sandboxd setup --user {user} --apply")
        return exitcodes.USAGE
    program = args.program or _program()
    try:
        found = steps(look(user, program))
    except KeyError:
        say(f"setup: there is no user {user}")
        return exitcodes.USAGE
    failures = {}
    if args.apply:
        failures = _apply(found)
        before, found = found, steps(look(user, program))
    else:
        before = found
    if args.json:
        print(json.dumps(to_json(user, found, failures), indent=2))
    else:
        for line in render(found, before, failures):
            print(line)
    return exitcodes.OK if all(step.state == "ok" for step in found) else exitcodes.FAILED


def _caller() -> str:
    """Who typed it, also behind sudo."""
    name = os.environ.get("SUDO_USER", "") if os.geteuid() == 0 else ""
    try:
        return name or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _program() -> str:
    """The script that was started, as the kernel sees its path; "" if we are no script of ours."""
    started = os.path.realpath(shutil.which(sys.argv[0]) or sys.argv[0])
    return started if os.path.basename(started) == "sandboxd" else ""


def _apply(found: Sequence[Step]) -> dict[str, str]:
    """Step -> why it could not be done."""
    from sandboxd.probe.setup import carry_out

    return {step.what: why for step in found if step.commands and (why := carry_out(step))}


def to_json(user: str, found: Sequence[Step], failures: dict[str, str]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "user": user,
        "ok": all(step.state == "ok" for step in found),
        "steps": [
            {
                "what": step.what,
                "state": step.state,
                "found": step.found,
                "commands": list(step.commands),
                "failure": failures.get(step.what, ""),
            }
            for step in found
        ],
    }


def render(
    found: Sequence[Step], before: Sequence[Step], failures: dict[str, str]
) -> Iterator[str]:
    """A row a step; commands stand on lines of their own, so that they can be copied."""
    width = max(len(step.what) for step in found)
    was = {step.what: step.state for step in before}
    for step in found:
        state = "done" if step.state == "ok" != was[step.what] else step.state
        yield f"{state:<8}  {step.what:<{width}}  {step.found}"
        if step.what in failures:
            yield f"{'':<8}  {'':<{width}}  failed: {failures[step.what]}"
        for command in step.commands:
            yield f"{'':<8}  {'':<{width}}  run: {command}"
