"""`sandboxd volume`: named places that outlive a run, and the caches that jobs share."""

from __future__ import annotations

import argparse
import datetime
import json
from typing import TYPE_CHECKING, Any

from sandboxd.cli import subcommand
from sandboxd.cli.main import say
from sandboxd.cli.quantities import size

if TYPE_CHECKING:
    from sandboxd.stores.volumes import Shelf, VolumeRecord

_MIB = 1 << 20
_DESCRIPTION = """\
A volume is a directory of sandboxd's that outlives runs: `-v NAME:DST` shows it. It is made here
and belongs to who made it. A cache is one that jobs share by a lock, made when first used."""
_EXAMPLE = """\
examples:
  sandboxd volume create data --size 1G
  sandboxd run -v data:/data -- sh -c 'date >>/data/log'
  sandboxd run --mount type=cache,source=pip,target=/cache,lock=copy -- ls /cache

`sandboxd volume COMMAND --help` says more about each."""
_CREATE = """\
Makes an empty volume. A run that writes to it is refused when it is full, and stopped when it is
found to be larger, which is looked at every quarter of a second: the kernel keeps no such size for
ordinary users."""
_LS = "Lists volumes and caches: what, name, size, what it may grow to, and when it was made."
_INSPECT = "Prints all that is known about a volume as one JSON object, with where it lies."
_RM = "Removes volumes with all that is in them. One that a runner has in use stays: exit status 1."


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its own commands to the command line."""
    parser = subparsers.add_parser(
        "volume",
        help="make, list and remove volumes and caches",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    one = subcommand.add(commands, "volume", "create", "make a volume", _CREATE, "data --size 1G")
    one.add_argument("name", metavar="NAME", help="letters, digits, and _.- after the first")
    one.add_argument("--size", type=size, metavar="SIZE", help="what it may grow to (default: any)")
    one.set_defaults(func=create)
    one = subcommand.add(commands, "volume", "ls", "list volumes and caches", _LS, "--json")
    one.add_argument("--json", action="store_true", help="print one JSON object")
    one.set_defaults(func=ls)
    one = subcommand.add(commands, "volume", "inspect", "say all about one", _INSPECT, "data")
    one.add_argument("name", metavar="NAME")
    _add_cache(one)
    one.set_defaults(func=inspect)
    one = subcommand.add(commands, "volume", "rm", "remove volumes", _RM, "data")
    one.add_argument("names", metavar="NAME", nargs="+")
    _add_cache(one)
    one.set_defaults(func=rm)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", action="store_true", help="a cache is meant, not a volume")


def _shelf(args: argparse.Namespace) -> Shelf:
    from sandboxd.stores.volumes import Shelf

    return Shelf.own("cache" if getattr(args, "cache", False) else "volume")


def create(args: argparse.Namespace) -> int:
    if not _shelf(args).create(args.name, args.size):
        say(f"volume {args.name}: there is one already")
        return 1
    print(args.name)
    return 0


def ls(args: argparse.Namespace) -> int:
    from sandboxd.stores.volumes import Shelf

    rows = [(shelf, record) for kind in ("volume", "cache")
            for shelf in [Shelf.own(kind)] for record in shelf.every()]  # fmt: skip
    known = [_json(shelf, record) for shelf, record in rows]
    if args.json:
        print(json.dumps({"schema": "sandboxd.volumes/1", "volumes": known}))
        return 0
    width = max((len(one["name"]) for one in known), default=0)
    for one in known:
        most = "any" if one["size"] is None else f"{one['size'] / _MIB:.1f} MiB"
        made = datetime.datetime.fromtimestamp(one["made"]).astimezone().isoformat(" ", "minutes")
        used = one["bytes"] / _MIB
        print(f"{one['kind']:6}  {one['name']:<{width}}  {used:9.1f} MiB of {most:>12}  {made}")
    return 0


def inspect(args: argparse.Namespace) -> int:
    shelf = _shelf(args)
    print(json.dumps(_json(shelf, shelf.get(args.name)), indent=2))
    return 0


def _json(shelf: Shelf, record: VolumeRecord) -> dict[str, Any]:
    import msgspec

    from sandboxd.stores.volumes import used

    there = used(shelf.data(record.name))
    known: dict[str, Any] = msgspec.to_builtins(record)
    path = str(shelf.data(record.name))
    return known | {"path": path, "bytes": there.bytes, "entries": there.entries}


def rm(args: argparse.Namespace) -> int:
    shelf = _shelf(args)
    for name in args.names:
        shelf.get(name)
    used = [name for name in args.names if not shelf.remove(name)]
    for name in used:
        say(f"the {shelf.kind} {name} is in use: try again when no runner has it")
    return 1 if used else 0
