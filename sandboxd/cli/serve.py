"""`sandboxd serve`: the daemon in the foreground; systemd, or whoever starts it, does the rest."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd.cli import exitcodes, subtree
from sandboxd.cli.quantities import count, size, time
from sandboxd.errors import JobError

if TYPE_CHECKING:
    from sandboxd.serve.quotas import Quotas
    from sandboxd.serve.server import GoJudgeOptions, Options
    from sandboxd.serve.tls import Shown

_DESCRIPTION = """\
Serves jobs over HTTP, on a Unix socket for this user unless told otherwise, until SIGTERM or
Ctrl-C. What it accepted survives its end, however that comes: the next one on the same directory
goes on."""
_EPILOG = """\
examples:
  sandboxd serve
  sandboxd serve --listen unix:///run/sandboxd/sandboxd.sock --allow-uid 1001
  sandboxd serve --listen http://0.0.0.0:8686 --token-file tokens

A second SIGTERM or Ctrl-C does not wait for running jobs. docs/howto/run-the-daemon.md has more."""
_DAY = 86400.0


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "serve",
        help="serve jobs over HTTP",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subtree.add(parser)
    _add_callers(parser.add_argument_group("who gets in"))
    _add_jobs(parser.add_argument_group("how many jobs"))
    _add_quotas(parser.add_argument_group("what one caller may have"))
    _add_kept(parser.add_argument_group("what is kept"))
    _add_compat(parser.add_argument_group("other protocols"))
    parser.set_defaults(func=run)


def _add_compat(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--compat",
        action="append",
        default=[],
        type=_compat,
        metavar="NAME=ADDRESS",
        help="listen for another protocol, too: go-judge=127.0.0.1:5050",
    )
    group.add_argument(
        "--compat-src",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a directory whose files its callers may name by path; may be repeated",
    )


def _compat(text: str) -> tuple[str, str]:
    name, equals, address = text.partition("=")
    if name != "go-judge" or not equals or not address:
        raise argparse.ArgumentTypeError(f"{text!r} is not go-judge=HOST:PORT")
    return name, address if "://" in address else f"http://{address}"


def _add_callers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--listen",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="unix:///path, http://HOST:PORT or https://HOST:PORT; may be repeated",
    )
    group.add_argument(
        "--allow-uid",
        action="append",
        default=[],
        type=_uid,
        metavar="UID",
        help="a user besides this one who may connect to the Unix socket",
    )
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="lines of NAME TOKEN; needed to listen where other machines reach it",
    )
    group.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="of https:// addresses: its chain, as PEM"
    )
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="the key of --tls-cert")
    group.add_argument(
        "--tls-client-ca",
        type=Path,
        metavar="FILE",
        help="callers need a certificate of these authorities, and are who it names",
    )
    group.add_argument(
        "--overseer",
        action="append",
        default=[],
        metavar="NAME",
        help="a NAME of the tokens that sees what all callers run, in /ui and `top`",
    )


def _add_jobs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--slots", type=count, metavar="N", help="jobs that run at once (default: one a CPU)"
    )
    group.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="the limits of jobs that run at once add up to this at most (default: what is free)",
    )
    group.add_argument(
        "--spares", type=_number, default=0, metavar="N", help="sandboxes of each policy made ahead"
    )
    group.add_argument(
        "--queue",
        type=count,
        default=10_000,
        metavar="N",
        help="jobs of all callers that may wait (default: 10000)",
    )
    group.add_argument(
        "--drain",
        type=time,
        default=30.0,
        metavar="T",
        help="how long running jobs get when it is told to end (default: 30s)",
    )
    group.add_argument(
        "--max-body",
        type=size,
        default=16 << 20,
        metavar="SIZE",
        help="of a request; larger files are stored first (default: 16M)",
    )


def _add_quotas(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--quota-queued",
        type=count,
        default=5_000,
        metavar="N",
        help="jobs that wait (default: 5000)",
    )
    group.add_argument("--quota-running", type=count, metavar="N", help="jobs that run at once")
    group.add_argument(
        "--quota-cpu", type=time, metavar="T", help="CPU time in an hour, e.g. 10min"
    )
    group.add_argument(
        "--quota-stored",
        type=size,
        default=1 << 30,
        metavar="SIZE",
        help="stored files (default: 1G)",
    )


def _add_kept(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--state", type=Path, metavar="DIR", help="where (default: below $XDG_STATE_HOME)"
    )
    group.add_argument(
        "--keep-for",
        type=time,
        default=7 * _DAY,
        metavar="T",
        help="results and files (default: 168h)",
    )
    group.add_argument(
        "--keep-size",
        type=size,
        default=4 << 30,
        metavar="SIZE",
        help="results, all together (default: 4G)",
    )
    group.add_argument(
        "--events",
        type=size,
        default=16 << 20,
        metavar="SIZE",
        help="events of one job (default: 16M)",
    )
    group.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what it says on stderr, a line of JSON each (default: info)",
    )


def _uid(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no uid")
    return int(text)


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) > 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is no number up to 4096")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Serves; returns when it was told to end."""
    import trio

    from sandboxd.serve.lines import open_log
    from sandboxd.serve.server import serve

    open_log(args.log_level)
    trio.run(serve, _options(args))
    return exitcodes.OK


def _options(args: argparse.Namespace) -> Options:
    from sandboxd.serve import address
    from sandboxd.serve.book import Settings
    from sandboxd.serve.callers import Callers, read_tokens
    from sandboxd.serve.room import room
    from sandboxd.serve.routes import Bounds
    from sandboxd.serve.server import Options

    addresses = [address.parse(text) for text in args.listen]
    tokens = read_tokens(args.token_file) if args.token_file is not None else {}
    callers = Callers(
        uids=frozenset({os.getuid(), *args.allow_uid}),
        tokens=tokens,
        overseers=_overseers(args, tokens),
        certificates=args.tls_client_ca is not None,
    )
    return Options(
        settings=Settings(
            apart=callers.many,
            state=(args.state or address.state(os.environ)).absolute(),
            quotas=_quotas(args),
            room=room(args.slots, args.memory),
            events=args.events,
            age=args.keep_for,
            size=args.keep_size,
        ),
        addresses=addresses or [address.default(os.environ)],
        callers=callers,
        tls=_tls(args),
        bounds=Bounds(body=args.max_body, bodies=max(256 << 20, 4 * args.max_body)),
        slots=args.slots,
        spares=args.spares,
        cgroup=args.cgroup,
        drain=args.drain,
        gojudge=_gojudge(args),
    )


def _tls(args: argparse.Namespace) -> Shown | None:
    from sandboxd.serve.tls import Shown

    files = (args.tls_cert, args.tls_key)
    if None not in files:
        return Shown(cert=args.tls_cert, key=args.tls_key, client_ca=args.tls_client_ca)
    if files != (None, None) or args.tls_client_ca is not None:
        raise JobError("--tls-cert and --tls-key belong together", hint="give both")
    return None


def _overseers(args: argparse.Namespace, tokens: Mapping[str, bytes]) -> frozenset[str]:
    for name in args.overseer:
        if name not in tokens:
            raise JobError(f"--overseer {name}: no such name", hint="one of --token-file's")
    return frozenset(args.overseer)


def _gojudge(args: argparse.Namespace) -> GoJudgeOptions | None:
    from sandboxd.serve import address
    from sandboxd.serve.server import GoJudgeOptions

    if not args.compat:
        if args.compat_src:
            raise JobError("--compat-src without --compat", hint="--compat go-judge=127.0.0.1:5050")
        return None
    if len(args.compat) > 1:
        raise JobError("--compat go-judge twice", hint="one address")
    ((_, where),) = args.compat
    return GoJudgeOptions(address=address.parse(where), local=args.compat_src)


def _quotas(args: argparse.Namespace) -> Quotas:
    from sandboxd.serve.quotas import Quotas

    return Quotas(
        queue=args.queue,
        queued=args.quota_queued,
        running=args.quota_running,
        cpu=args.quota_cpu,
        stored=args.quota_stored,
    )
