"""`sandboxd group`: jobs that run together and reach each other, as a file describes them."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandboxd.cli import attach, away, exitcodes, remote, subcommand
from sandboxd.cli.main import complain, say
from sandboxd.errors import JobError, PolicyError, SandboxError
from sandboxd.result import event_json, to_json

if TYPE_CHECKING:
    import trio

    from sandboxd.group import Group
    from sandboxd.result import Event, Result
    from sandboxd.serve.client import Client
    from sandboxd.serve.joined import ClientGroup
    from sandboxd.supervise.groups import GroupRun
    from sandboxd.supervise.runner import Runner

SCHEMA = "sandboxd.group/1"
_LONGEST = 1 << 16
_DESCRIPTION = """\
A group is a few jobs that run at the same time, each in a sandbox of its own, and reach each other
by name over a private network, and nobody else. A file describes it: [group], and a [members.NAME]
for each job."""
_EXAMPLE = """\
examples:
  sandboxd group check shop.toml
  sandboxd group run shop.toml
  sandboxd group run --json shop.toml

`sandboxd group COMMAND --help` says more about each."""
_RUN = """\
Runs a group to its end. What members print comes as lines with their names in front, stdout as
stdout and stderr as stderr; what each used follows on stderr. Ctrl-C and SIGTERM kill all of them.

exit status: as `sandboxd run` would exit for the member that decides: [group] main; without one the
first that did not end well by itself; 0 if all did. 125 sandboxd failed, or the file is wrong."""
_CHECK = """\
Reads a group file and the policies it names, and says what is wrong (exit status 1). Nothing is
started; the members' addresses are printed."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its own commands to the command line."""
    parser = subparsers.add_parser(
        "group",
        help="run jobs that reach each other",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    one = subcommand.add(commands, "group", "run", "run a group to its end", _RUN, "shop.toml")
    one.add_argument("file", metavar="FILE")
    one.add_argument(
        "--json",
        action="store_const",
        const="once",
        help=f"print nothing but one JSON object when done (schema {SCHEMA})",
    )
    one.add_argument(  # an option string with its value, so that `--json FILE` is not misread
        "--json=stream",
        action="store_const",
        const="stream",
        dest="json",
        help="print nothing but events, one JSON object a line with its member; then the object",
    )
    one.add_argument("-q", "--quiet", action="store_true", help="no accounting on stderr")
    one.add_argument(
        "--cgroup", metavar="DIR", help="a delegated cgroup to use and no other; `none`: no cgroup"
    )
    remote.add_host(
        one, "have it run by a daemon: unix:///path or http://HOST:PORT (default:"
        " $SANDBOXD_HOST, else here; `local`: here)"
    )  # fmt: skip
    one.set_defaults(func=run)
    one = subcommand.add(commands, "group", "check", "check a file", _CHECK, "shop.toml")
    one.add_argument("file", metavar="FILE")
    one.set_defaults(func=check)


def check(args: argparse.Namespace) -> int:
    from sandboxd.compile.grouping import lay_out
    from sandboxd.supervise.group_files import load_group

    try:
        group = load_group(args.file)
        addresses = lay_out(group).addresses
    except (PolicyError, JobError) as error:
        complain(error)
        return exitcodes.FAILED
    for name, address in addresses.items():
        print(f"{address}\t{name}\t{name}.{group.name}")
    return exitcodes.OK


def run(args: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    import trio

    from sandboxd.supervise.group_files import load_group

    if args.cgroup and away.wanted(args):
        raise JobError("--cgroup: not by a daemon, which has its own", hint=away.HERE)
    group = load_group(args.file)
    shown = Shown(group, args.json)
    ending = trio.run(_run, group, shown, args)
    if ending.error is not None:
        if not isinstance(ending.error, BrokenPipeError):
            raise SandboxError(f"output cannot be written: {ending.error.strerror}")
        return exitcodes.BROKEN_PIPE
    if ending.results is None:
        return exitcodes.SIGNAL + (ending.signal or 0)
    status = _status(ending)
    if args.json:
        attach.write_all(attach.STDOUT, _line(_object(group, ending, status)))
    elif not args.quiet:
        _account(ending.results)
    return status


@dataclass(slots=True)
class Ending:
    """How it went: the results, unless we were in too much of a hurry, and what made us stop."""

    results: dict[str, Result] | None = None
    decisive: str | None = None
    ended_by: str | None = None
    signal: int | None = None
    error: OSError | None = None
    """Why output could not be written."""


@contextlib.asynccontextmanager
async def _opened(group: Group, args: argparse.Namespace) -> AsyncIterator[Runner | Client]:
    """Who runs it."""
    if away.wanted(args):
        from sandboxd.serve.client import connect

        async with connect(args.host) as client:
            yield client
        return
    from sandboxd.supervise.runner import open_runner

    async with open_runner(slots=len(group.members), cgroup=args.cgroup) as runner:
        yield runner


async def _run(group: Group, shown: Shown, args: argparse.Namespace) -> Ending:
    import trio

    ending = Ending()
    wanted = [one for one in attach.wanted_signals() if one != signal.SIGWINCH]
    with trio.open_signal_receiver(*wanted) as signals:
        async with (
            _opened(group, args) as either,
            either.start_group(group) as live,
        ):
            here = _Foreground(live, shown, ending, trio.CancelScope(), trio.Lock())
            with here.everything:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(here.obey, signals)
                    async with trio.open_nursery() as readers:
                        for name in live.runs:
                            readers.start_soon(here.follow, name)
                    nursery.cancel_scope.cancel()
                ending.results = await live.wait()
                ending.decisive = live.decisive(ending.results)
                ending.ended_by = live.ended_by
    return ending


@dataclass(frozen=True, slots=True)
class _Foreground:
    live: GroupRun | ClientGroup
    shown: Shown
    ending: Ending
    everything: trio.CancelScope
    writing: trio.Lock

    async def obey(self, signals: AsyncIterator[int]) -> None:
        import trio

        async for number in signals:
            if self.ending.signal is not None:  # a second one does not wait
                self.everything.cancel()
            self.ending.signal = self.ending.signal or number
            self.live.kill()
            self.everything.deadline = trio.current_time() + attach.PATIENCE

    async def follow(self, name: str) -> None:
        """Show one member's events to the last one."""
        async for event in self.live.runs[name].events:
            async with self.writing:
                if self.ending.error is not None:
                    continue
                try:
                    for piece in self.shown.pieces(name, event):
                        await attach.write(*piece)
                except OSError as error:
                    self.ending.error = error
                    self.live.kill()


class Shown:
    """What goes where for each event of a member."""

    def __init__(self, group: Group, form: str | None) -> None:
        self._form = form
        self._width = max(map(len, group.members))
        self._open: dict[tuple[str, str], bytes] = {}
        self._numbers = itertools.count()

    def pieces(self, name: str, event: Event) -> list[tuple[int, bytes]]:
        if self._form == "stream":
            line = {**event_json(event), "seq": next(self._numbers), "member": name}
            return [(attach.STDOUT, _line(line))]
        if self._form == "once":
            return []
        if event.type in ("stdout", "stderr"):
            return self._lines(name, event.type, event.data)
        return self._rest(name) if event.type == "exit" else []

    def _lines(self, name: str, stream: str, data: bytes) -> list[tuple[int, bytes]]:
        """Whole lines, each with its member's name; one that does not end is broken up."""
        *lines, rest = (self._open.pop((name, stream), b"") + data).split(b"\n")
        while len(rest) > _LONGEST:
            lines.append(rest[:_LONGEST])
            rest = rest[_LONGEST:]
        if rest:
            self._open[name, stream] = rest
        return [self._piece(name, stream, b"".join(self._named(name, one) for one in lines))]

    def _rest(self, name: str) -> list[tuple[int, bytes]]:
        left = [(stream, self._open.pop((name, stream), b"")) for stream in ("stdout", "stderr")]
        return [self._piece(name, stream, self._named(name, one)) for stream, one in left if one]

    def _named(self, name: str, line: bytes) -> bytes:
        return f"{name:{self._width}} | ".encode() + line + b"\n"

    def _piece(self, name: str, stream: str, text: bytes) -> tuple[int, bytes]:
        return (attach.STDOUT if stream == "stdout" else attach.STDERR), text


def _status(ending: Ending) -> int:
    if ending.signal is not None:
        return exitcodes.SIGNAL + ending.signal
    if ending.decisive is None or ending.results is None:
        return exitcodes.OK
    return exitcodes.exit_code(ending.results[ending.decisive])


def _object(group: Group, ending: Ending, status: int) -> dict[str, Any]:
    results = ending.results or {}
    return {
        "schema": SCHEMA,
        "group": group.name,
        "decisive": ending.decisive,
        "ended_by": ending.ended_by,
        "exit_code": status,
        "members": {name: to_json(result) for name, result in results.items()},
    }


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _account(results: dict[str, Result]) -> None:
    from sandboxd.cli.run import accounting

    sys.stdout.flush()
    width = max(map(len, results))
    told: set[str] = set()
    for name, result in results.items():
        for line in accounting(result, told):
            say(f"{name:{width}}  {line}")
        told |= {one.what for one in result.degraded}  # the same for all: once is enough
