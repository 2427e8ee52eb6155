"""`sandboxd diff`: what a job changed in its root, as docker diff has it."""

from __future__ import annotations

import argparse
import json
import os

from sandboxd.result import carried

_DESCRIPTION = """\
Prints what a job that was run with --keep changed in its root, a path a line: A added, C changed,
D deleted. A directory is changed if something in it is. What lies in /box, /tmp and /dev/shm is no
part of the root."""
_EPILOG = """\
example:
  sandboxd run --keep --name build --image mine --writable-root -- make install
  sandboxd diff build"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "diff",
        help="what a kept run changed in its root",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="its name, or 7 or more letters of it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=diff)


def diff(args: argparse.Namespace) -> int:
    """Prints them; returns the exit status."""
    from sandboxd.cli.kept import described
    from sandboxd.images.kept import find_kept
    from sandboxd.judge.text import one_line

    kept = find_kept(args.run)
    if args.json:
        changes = [{"kind": one.kind, "path": one.path} for one in kept.changes()]
        print(json.dumps(described(kept) | {"changes": carried(changes)}))
        return 0
    for one in kept.changes():
        text = os.fsencode(one.path).decode("utf-8", "backslashreplace")
        print(f"{one.kind} {one_line(text, 1 << 16)}")
    return 0
