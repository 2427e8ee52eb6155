"""What the commands share that talk to a daemon: which one, and what it says of jobs."""

from __future__ import annotations

import argparse
import os
import re
import time
from typing import TYPE_CHECKING, Any

from sandboxd.errors import HostError, SandboxError

if TYPE_CHECKING:
    from sandboxd.serve.plain import Plain

AGAIN = 0.5
PATIENCE = 30.0
"""Seconds in which a daemon that is gone may come back."""


def add(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    line: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    """A command with --host."""
    parser = subparsers.add_parser(
        name,
        help=line,
        description=description,
        epilog=f"example:\n  sandboxd {name} {example}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_host(
        parser, "the daemon: unix:///path, http:// or https://HOST:PORT"
        " (default: $SANDBOXD_HOST, else yours)"
    )  # fmt: skip
    return parser


def add_host(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("-H", "--host", metavar="ADDRESS", help=text)


def daemon(args: argparse.Namespace) -> Plain:
    """A client without trio. The token is in $SANDBOXD_TOKEN: a flag would show in ps(1)."""
    from sandboxd.serve import address
    from sandboxd.serve.plain import Plain

    where = address.parse(args.host) if args.host else address.named(os.environ)
    trace = os.environ.get("TRACEPARENT", "")
    given = (
        trace if re.fullmatch(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", trace) else ""
    )
    token = address.token(os.environ.get("SANDBOXD_TOKEN"))
    return Plain(where, token, traceparent=given or None)


class Patience:
    """With a daemon that was there and has gone: it may be started anew."""

    def __init__(self) -> None:
        self._there = False
        self._gone_since: float | None = None

    def well(self) -> None:
        """It has answered."""
        self._there, self._gone_since = True, None

    def wait(self, error: SandboxError | None = None) -> None:
        """Returns when it is time to ask again; else it is this error."""
        now = time.monotonic()
        if self._gone_since is None:
            self._gone_since = now
        if error is not None:
            gone = isinstance(error, HostError) and error.missing == "daemon"
            if not gone or not self._there or now > self._gone_since + PATIENCE:
                raise error
        time.sleep(AGAIN)


def collected(daemon: Plain, record: dict[str, Any]) -> dict[str, bytes]:
    """The files of a record by their digest, but for those that the daemon could not keep."""
    refused = {one["path"] for one in record["artifact_errors"]}
    found: dict[str, bytes] = {}
    for artifact in record["artifacts"]:
        if artifact["path"] not in refused:
            with daemon.asking("GET", f"/v1/files/{artifact['sha256']}") as answer:
                found[artifact["sha256"]] = answer.body()
    return found


def path(job: str) -> str:
    """The job's path; an id that is none leads nowhere and not elsewhere."""
    from urllib.parse import quote

    return f"/v1/jobs/{quote(job, safe='')}"
