"""`sandboxd wait`: until a job is over; then as `sandboxd run` would have ended."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd.cli import exitcodes, remote
from sandboxd.cli.main import say
from sandboxd.errors import SandboxError

if TYPE_CHECKING:
    from sandboxd.serve.plain import Plain

_DESCRIPTION = """\
Waits for a job of the daemon and exits as it did, with the exit status of `sandboxd run`. Output
is not shown; `sandboxd logs` does that. Where the connection breaks, or the daemon is started anew,
it goes on waiting."""
LONGEST = 300


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = remote.add(
        subparsers, "wait", "wait for a job, and exit as it did", _DESCRIPTION, "--json ID"
    )
    parser.add_argument("--json", action="store_true", help="print its record")
    parser.add_argument(
        "--collect-to", type=Path, metavar="DIR", help="where collected files are written to"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no accounting on stderr")
    parser.add_argument("job", metavar="ID", help="the job")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Waits; returns the exit status."""
    daemon = remote.daemon(args)
    record = _over(daemon, remote.path(args.job))["result"]
    if args.json:
        print(json.dumps(record))
    if record["status"] == "error":
        from sandboxd.serve.wire import error_of

        raise error_of(record["error"])
    from sandboxd.cli.run import accounting
    from sandboxd.serve.wire import result_of

    found = {} if args.collect_to is None else remote.collected(daemon, record)
    result = result_of(record, found)
    if args.collect_to is not None:
        from sandboxd.supervise.artifacts import save

        save([one for one in result.artifacts if one.sha256 in found], args.collect_to)
    if not args.quiet and not args.json:
        for line in accounting(result):
            say(line)
    return exitcodes.exit_code(result)


def _over(daemon: Plain, target: str) -> dict[str, Any]:
    """The job, once it is over."""
    patience, seconds = remote.Patience(), 0
    while True:
        try:
            view: dict[str, Any] = daemon.ask("GET", f"{target}?wait={seconds}")
        except SandboxError as error:
            patience.wait(error)
            continue
        if view["state"] == "done":
            return view
        patience.well()
        seconds = LONGEST
