"""`sandboxd logs`: the output of a job, byte for byte, on the streams it was written to."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from typing import Any, TextIO

from sandboxd.cli import exitcodes, remote
from sandboxd.errors import HostError

_DESCRIPTION = """\
Shows what a job has written so far, stdout on stdout and stderr on stderr; with -f also what comes,
to its end. Where the connection breaks, or the daemon is started anew, it goes on where it was."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = remote.add(subparsers, "logs", "show the output of a job", _DESCRIPTION, "-f ID")
    parser.add_argument("-f", "--follow", action="store_true", help="go on to its end")
    parser.add_argument("--json", action="store_true", help="all events, a JSON object a line")
    parser.add_argument("job", metavar="ID", help="the job")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Shows it."""
    following, patience = -1, remote.Patience()
    while True:
        try:
            for event, line in _events(args, following, patience):
                following = event["seq"] + 1
                if args.json:
                    _write(sys.stdout, line + b"\n")
                elif event["type"] in ("stdout", "stderr"):
                    stream = sys.stdout if event["type"] == "stdout" else sys.stderr
                    _write(stream, _data(event))
                if event["type"] == "exit":
                    return exitcodes.OK
            if not args.follow:
                return exitcodes.OK
            patience.wait()  # the daemon ended, and the job may go on
        except HostError as error:
            if not args.follow:
                raise
            patience.wait(error)


def _events(args: argparse.Namespace, following: int, patience: remote.Patience) -> Any:
    query = f"?follow={int(args.follow)}" + (f"&from={following}" if following >= 0 else "")
    target = f"{remote.path(args.job)}/events{query}"
    with remote.daemon(args).asking("GET", target) as answer:
        patience.well()
        for line in answer.lines():
            yield json.loads(line), line


def _write(stream: TextIO, data: bytes) -> None:
    stream.buffer.write(data)
    stream.buffer.flush()


def _data(event: dict[str, Any]) -> bytes:
    if "data_b64" in event:
        return base64.b64decode(event["data_b64"])
    return str(event.get("data", "")).encode()
