"""`sandboxd kept`: what runs changed in their roots and was kept: listed and removed."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from sandboxd.cli import subcommand

if TYPE_CHECKING:
    from sandboxd.images.kept import KeptRoot

_DESCRIPTION = """\
What runs changed in their roots is kept if they are run with --keep: `sandboxd diff` shows it,
`sandboxd commit` makes an image of it. It stays until it is removed."""
_EXAMPLE = """\
examples:
  sandboxd run --keep --name build --writable-root -- make install
  sandboxd kept ls
  sandboxd kept rm build

`sandboxd kept COMMAND --help` says more about each."""
_LS = """\
Lists what is kept: name, status of the run, the image or directory that its root was, how many
paths were added, changed and deleted, size, and since when."""
_RM = "Removes what is kept of these runs. Images that were made of it stay."
_MIB = 1 << 20


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its own commands to the command line."""
    parser = subparsers.add_parser(
        "kept",
        help="list and remove what runs with --keep changed",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    one = subcommand.add(commands, "kept", "ls", "list what is kept", _LS, "--json")
    one.add_argument("--json", action="store_true", help="print one JSON object")
    one.set_defaults(func=ls)
    one = subcommand.add(commands, "kept", "rm", "remove what is kept", _RM, "build")
    one.add_argument("names", metavar="RUN", nargs="+", help="a name, or 7 or more letters of it")
    one.set_defaults(func=rm)


def described(kept: KeptRoot) -> dict[str, Any]:
    """All that is known of one, as JSON types."""
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(kept.record)
    return found | {"layer": str(kept.folder / "layer.tar")}


def ls(args: argparse.Namespace) -> int:
    import datetime

    from sandboxd.images.kept import kept_roots
    from sandboxd.judge.text import one_line

    every = kept_roots()
    if args.json:
        print(json.dumps({"schema": "sandboxd.kept-list/1", "kept": [*map(described, every)]}))
        return 0
    width = max((len(one.record.name) for one in every), default=0)
    for one in every:
        record, counts = one.record, one.record.counts
        numbers = " ".join(
            f"{letter}{counts.get(what, 0)}"
            for letter, what in (("A", "added"), ("C", "changed"), ("D", "deleted"))
        )
        when = datetime.datetime.fromtimestamp(record.kept).astimezone()
        line = f"{record.name:<{width}}  {record.status}  {record.image or record.source}"
        size = f"{record.bytes / _MIB:.1f} MiB"
        print(one_line(f"{line}  {numbers}  {size}  {when.isoformat(' ', 'minutes')}", 1000))
    return 0


def rm(args: argparse.Namespace) -> int:
    from sandboxd.images.kept import find_kept

    for kept in [find_kept(name) for name in args.names]:
        kept.remove()
        print(kept.record.name)
    return 0
