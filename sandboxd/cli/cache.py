"""`sandboxd cache`: what builds made: listed, checked, removed."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import time as clock
from typing import TYPE_CHECKING, Any

from sandboxd.cli import subcommand
from sandboxd.cli.main import say
from sandboxd.cli.quantities import size, time

if TYPE_CHECKING:
    from sandboxd.stores.builds import Kept, Store

_MIB = 1 << 20
_DESCRIPTION = """\
What `sandboxd build`, `sandboxd judge` and Runner.build made lies in a store, by the digest of all
that went in. Each build lets go of those that nobody used for 30 days, and of those unused for
longest if all are more than $SANDBOXD_BUILDS_SIZE (4G). One that is in use is never removed."""
_EXAMPLE = """\
examples:
  sandboxd cache ls
  sandboxd cache gc --size 1G

`sandboxd cache COMMAND --help` says more about each."""
_LS = "Lists builds, those used last first: key, files, size, when it was used, and what was run."
_RM = "Removes builds by 7 or more digits of their keys."
_GC = """\
Removes what nobody used for a time, then what was unused for longest until the rest fits, and what
interrupted builds left. Without flags: 30 days, and $SANDBOXD_BUILDS_SIZE or 4G."""
_VERIFY = """\
Reads every file of the builds and compares with what was kept. Exit status 1 if one differs.
Without KEY all."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its own commands to the command line."""
    parser = subparsers.add_parser(
        "cache",
        help="list, check and remove what builds made",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    one = subcommand.add(commands, "cache", "ls", "list builds", _LS, "--json")
    one.add_argument("--json", action="store_true", help="print one JSON object")
    one.set_defaults(func=ls)
    one = subcommand.add(commands, "cache", "rm", "remove builds", _RM, "1a2b3c4d")
    one.add_argument("keys", metavar="KEY", nargs="+", help="7 or more digits of a key")
    one.set_defaults(func=rm)
    one = subcommand.add(commands, "cache", "gc", "make room", _GC, "--size 1G --age 604800")
    one.add_argument("--size", type=size, metavar="SIZE", help="what all may have together")
    one.add_argument("--age", type=time, metavar="T", help="unused for longer: it goes")
    one.set_defaults(func=gc)
    one = subcommand.add(commands, "cache", "verify", "find what was changed", _VERIFY, "")
    one.add_argument("keys", metavar="KEY", nargs="*", help="7 or more digits of a key")
    one.set_defaults(func=verify)


def _store() -> Store:
    from sandboxd.stores.builds import Store, own_place

    return Store(own_place())


def ls(args: argparse.Namespace) -> int:
    from sandboxd.judge.text import one_line

    store = _store()
    rows = store.every()
    if args.json:
        builds = [_json(one) for one in rows]
        print(json.dumps({"schema": "sandboxd.builds/1", "store": str(store.place),
                          "builds": builds}))  # fmt: skip
        return 0
    for one in rows:
        record = one.record
        many = f"{len(record.files)} file{'' if len(record.files) == 1 else 's'}"
        line = f"{record.key[:12]}  {many:>9}  {record.size / _MIB:8.1f} MiB  {_when(one.used)}"
        print(one_line(f"{line}  {shlex.join(record.argv)}", 200))
    return 0


def _json(one: Kept) -> dict[str, Any]:
    record = one.record
    files = [
        {"path": file.path.decode("utf-8", "backslashreplace"), "bytes": file.size,
         "sha256": file.sha256, "mode": file.mode}
        for file in record.files
    ]  # fmt: skip
    return {"key": record.key, "argv": list(record.argv), "bytes": record.size, "made": record.made,
            "used": one.used, "files": files}  # fmt: skip


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")


def rm(args: argparse.Namespace) -> int:
    store = _store()
    records = [store.look_up(digits) for digits in args.keys]
    used = [record.key for record in records if not store.remove(record.key)]
    for key in used:
        say(f"{key[:12]} is in use: try again when no run has it")
    return 1 if used else 0


def gc(args: argparse.Namespace) -> int:
    from sandboxd.stores import builds

    neither = args.size is None and args.age is None
    most = builds.largest() if neither else args.size
    gone, used = _store().collect(most, builds.OLDEST if neither else args.age)
    freed = sum(one.record.size for one in gone) / _MIB
    print(f"{len(gone)} build{'' if len(gone) == 1 else 's'} removed, {freed:.1f} MiB")
    if used:
        say(f"{len(used)} more in use: `sandboxd cache gc` afterwards")
    return 0


def verify(args: argparse.Namespace) -> int:
    store = _store()
    wanted = [store.look_up(digits) for digits in args.keys] or [
        one.record for one in store.every()
    ]
    wrong = 0
    for record in wanted:
        began, problem = clock.monotonic(), store.problem(record.key)
        took = clock.monotonic() - began
        print(f"{record.key[:12]}  {problem or f'ok ({record.size / _MIB:.1f} MiB, {took:.2f} s)'}")
        wrong += bool(problem)
    return 1 if wrong else 0
