"""`sandboxd cancel`: jobs of the daemon end, or never begin."""

from __future__ import annotations

import argparse

from sandboxd.cli import exitcodes, remote
from sandboxd.cli.main import complain
from sandboxd.errors import SandboxError

_DESCRIPTION = """\
Cancels jobs: one that waits never begins, one that runs is killed. Nothing happens to one that is
over."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = remote.add(subparsers, "cancel", "cancel jobs", _DESCRIPTION, "ID")
    parser.add_argument("jobs", nargs="+", metavar="ID", help="the jobs")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Cancels all of them, whatever comes of one."""
    daemon, status = remote.daemon(args), exitcodes.OK
    for job in args.jobs:
        try:
            daemon.ask("DELETE", remote.path(job))
        except SandboxError as error:
            if getattr(error, "missing", "") == "daemon":
                raise
            complain(error)
            status = exitcodes.FAILED
    return status
