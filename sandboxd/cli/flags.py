"""The flags of `run` and `plan` that say what to run and under which policy -> (Policy, Job).

They are docker run's where docker has one. Whoever types them is the operator: together with the
policy named they make an ad-hoc policy of its own ("base+flags"), so they may raise a limit as
well as lower it. A job that comes in over the library or a socket may only tighten.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from sandboxd.cli import inputs, mounts, networks, subtree, users
from sandboxd.cli.quantities import count, cpus, job_name, or_unlimited, size, time
from sandboxd.errors import JobError

if TYPE_CHECKING:  # nothing of it is needed where a daemon does the work
    from sandboxd.job import Job
    from sandboxd.policy import Mount, Policy, Root, Section

Table = TypeVar("Table", bound="Section")

WORK = "/box"
ORIGIN = "command line"

_LIMITS: tuple[tuple[tuple[str, ...], str, str, Callable[[str], float], str], ...] = (
    (("-m", "--memory"), "memory", "SIZE", size, "memory of all processes together"),
    (("--cpus",), "cpus", "N", cpus, "CPU bandwidth: 1.5 is one and a half CPUs"),
    (("--pids-limit",), "processes", "N", count, "processes and threads alive at once"),
    (("--cpu-time",), "cpu_time", "T", time, "CPU seconds of all processes together"),
    (("--wall-time",), "wall_time", "T", time, "seconds from start to end"),
    (("--idle-time",), "idle_time", "T", time, "seconds in a row with almost no CPU used"),
    (("--output",), "output", "SIZE", size, "bytes of stdout and stderr together"),
    (("--disk",), "disk", "SIZE", size, "bytes in all writable places together"),
    (("--inodes",), "inodes", "N", count, "files and directories in all writable places"),
    (("--open-files",), "open_files", "N", count, "open descriptors per process"),
    (("--file-size",), "file_size", "SIZE", size, "bytes of one file"),
    (("--stack",), "stack", "SIZE", size, "bytes of the main thread's stack"),
)
_ULIMITS: Mapping[str, tuple[str, Callable[[str], float]]] = MappingProxyType(
    {
        "as": ("address_space", size),
        "cpu": ("cpu_time", time),
        "fsize": ("file_size", size),
        "nofile": ("open_files", count),
        "nproc": ("processes", count),
        "stack": ("stack", size),
    }
)
_ABSENT = -1
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_HOSTNAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")


# -- the flags -------------------------------------------------------------------------------


def add(parser: argparse.ArgumentParser) -> None:
    """Adds everything shared; what is not given is absent from the namespace or None."""
    parser.add_argument(
        "-p", "--policy", metavar="POLICY", help="a policy (default: base, or bundle)"
    )
    subtree.add(parser)
    _add_program(parser.add_argument_group("the program"))
    _add_limits(parser.add_argument_group("limits", "`unlimited` lifts a limit of the policy's."))
    _add_files(parser.add_argument_group("files"))
    _add_surroundings(parser.add_argument_group("what it sees"))
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="CMD", help="the program and its arguments"
    )


def _add_program(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--entrypoint", metavar="PROGRAM", help="run it with CMD as its arguments")
    group.add_argument(
        "--bundle", metavar="DIR", type=Path,
        help="run what the OCI bundle there describes; CMD takes the place of its words",
    )  # fmt: skip
    group.add_argument(
        "--strict", action="store_true", help="refuse a bundle of which not everything is done"
    )
    group.add_argument(
        "-e", "--env", action="append", default=[], metavar="NAME[=VALUE]",
        help="set a variable, or pass the caller's on",
    )  # fmt: skip
    group.add_argument(
        "--env-file", action="append", default=[], metavar="FILE", help="lines of NAME[=VALUE]"
    )
    group.add_argument("-w", "--workdir", metavar="DIR", help=f"relative to {WORK} (the default)")
    group.add_argument(
        "-i", "--interactive", action="store_true",
        help="forward stdin; without it the program reads nothing, as with docker",
    )  # fmt: skip
    group.add_argument("--stdin", type=Path, metavar="FILE", help="stdin is the content of FILE")
    group.add_argument("-t", "--tty", action="store_true", help="a terminal instead of pipes")
    group.add_argument(
        "--name", type=job_name, metavar="ID", help="the job's id in the result (default: random)"
    )
    group.add_argument("--rm", action="store_true", help="accepted: nothing is ever left behind")
    group.add_argument("--init", action="store_true", help="accepted: there is always an init")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    for names, field, metavar, read, text in _LIMITS:
        group.add_argument(
            *names, dest=f"limits.{field}", default=argparse.SUPPRESS, metavar=metavar,
            type=or_unlimited(read), help=text,
        )  # fmt: skip
    group.add_argument(
        "--ulimit", action="append", default=[], type=_ulimit, metavar="NAME=N",
        help=f"as docker's; NAME is {', '.join(_ULIMITS)}",
    )  # fmt: skip


def _add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--file", action="append", default=[], type=inputs.file, metavar="SRC[:NAME]",
        help=f"copy a file, or a directory with all that is in it, into {WORK}",
    )  # fmt: skip
    group.add_argument(
        "--files-from", action="append", default=[], type=inputs.archive, metavar="TAR[:DIR]",
        help=f"unpack an archive below {WORK}: a file, or - for stdin; plain or compressed",
    )  # fmt: skip
    group.add_argument(
        "--collect-files", type=or_unlimited(count), default=_ABSENT, metavar="N",
        help="collect no more files than that",
    )  # fmt: skip
    group.add_argument(
        "--collect-bytes", type=or_unlimited(size), default=_ABSENT, metavar="SIZE",
        help="collect no more than that, of all files together",
    )  # fmt: skip
    group.add_argument(
        "--built", action="append", default=[], type=inputs.built, metavar="KEY[/PATH][:NAME]",
        help=f"show what `sandboxd build` made, or a part of it, read-only in {WORK}",
    )  # fmt: skip
    group.add_argument(
        "-v", "--volume", action="append", default=[], type=mounts.volume, dest="mounts",
        metavar="SRC:DST[:ro]",
        help="show a host path, or the volume NAME; writable unless it says ro, and then the"
        " program runs as you",
    )  # fmt: skip
    group.add_argument(
        "--mount", action="append", type=mounts.mount, dest="mounts", metavar="KEY=VALUE,...",
        help=mounts.MOUNT_FORM,
    )  # fmt: skip
    group.add_argument(
        "--tmpfs", action="append", type=mounts.tmpfs, dest="mounts", metavar="DST[:size=64M]",
        help="an empty directory in memory",
    )  # fmt: skip
    root = group.add_mutually_exclusive_group()
    root.add_argument(
        "--writable-root", action="store_true", help="a private writable copy of the whole root"
    )
    root.add_argument("--read-only", action="store_true", help="the root cannot be written to")
    group.add_argument(
        "--upper", choices=("tmpfs", "directory"),
        help="where all lies that it writes: in memory, or in a directory on disk",
    )  # fmt: skip
    what = group.add_mutually_exclusive_group()
    what.add_argument(
        "--root", metavar="host|DIR", help="the machine's /usr, or the directory that becomes /"
    )
    what.add_argument(
        "--image", metavar="NAME", help="an image (`sandboxd image ls`); CMD may be left out then"
    )


def _add_surroundings(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-u", "--user", metavar="UID[:GID]|NAME",
        help="the ids seen inside; `caller` or `isolated`: whose they are outside",
    )  # fmt: skip
    group.add_argument("--hostname", type=_hostname, metavar="NAME", help="the host name inside")
    networks.add(group)


def _hostname(text: str) -> str:
    if not _HOSTNAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: up to 63 letters, digits, dots and hyphens")
    return text


def _ulimit(text: str) -> tuple[str, float | None]:
    """NAME=SOFT[:HARD] -> (field of Limits, value). sandboxd has one value for both."""
    name, _, value = text.partition("=")
    soft, _, hard = value.partition(":")
    if name not in _ULIMITS or not soft:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=N, NAME being {', '.join(_ULIMITS)}"
        )
    if hard not in ("", soft):
        raise argparse.ArgumentTypeError(
            f"{text!r}: soft and hard differ, and sandboxd has one value: write {name}={hard}"
        )
    field, read = _ULIMITS[name]
    return field, or_unlimited(read)(soft)


# -- the policy ------------------------------------------------------------------------------


def policy_name(args: argparse.Namespace, default: str = "base") -> str:
    """What -p says; an empty one, as of a variable that is not set, is no policy's name."""
    return default if args.policy is None else args.policy


def described(args: argparse.Namespace) -> tuple[Policy, Job | None]:
    """The policy that flags change, and the job that a bundle describes."""
    from sandboxd.supervise.policies import find

    if args.bundle is None:
        if args.strict:
            raise JobError("--strict without --bundle", hint="it is about bundles")
        return find(policy_name(args)), None
    if args.image is not None:
        raise JobError("--bundle and --image exclude each other", hint="a bundle has its own root")
    from sandboxd.supervise.bundles import POLICY, Instead, load_bundle

    instead = Instead(
        argv=[os.fsencode(word) for word in words(args)],
        root=args.root is not None,
        places={mount.target for mount in args.mounts},
        terminal=args.tty or os.isatty(0),
    )
    job = load_bundle(args.bundle, policy_name(args, POLICY), strict=args.strict, instead=instead)
    assert not isinstance(job.policy, str)
    return job.policy, job


def policy(args: argparse.Namespace, base: Policy) -> Policy:
    """The policy named, or one derived from it where flags say otherwise."""
    changes: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if given := given_limits(args):
        changes["limits"] = _changed(
            base.limits, **{field: value for field, (value, _) in given.items()}
        )
        origins |= {f"limits.{field}": flag for field, (_, flag) in given.items()}
    if artifacts := _artifacts(args):
        changes["artifacts"] = _changed(base.artifacts, **artifacts)
        origins |= {f"artifacts.{field}": f"--collect-{field}" for field in artifacts}
    if args.mounts:
        changes["mounts"], places = _with_mounts(base.mounts, args.mounts)
        origins |= {f"mounts[{place}]": f"the mount on {target}" for place, target in places}
    if root := _given_root(args, base, origins):
        changes["root"] = _changed(base.root, **root)
    if identity := users.identity(args, base, changes.get("root", base.root)):
        changes["identity"] = _changed(base.identity, **identity)
        origins |= {f"identity.{key}": users.flag(args, key) for key in identity}
    network, flags = networks.changed(args, base.network)
    changes |= network
    origins |= flags
    if not changes:
        return base
    changes["name"] = f"{base.name}+flags"
    changes["origins"] = base.origins | {key: f"{ORIGIN}: {flag}" for key, flag in origins.items()}
    return _changed(base, **changes)


def policy_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that make a policy of one's own -> their values; all limits are `limits`."""
    given = {
        "limits": given_limits(args),
        "--collect-files, --collect-bytes": _artifacts(args),
        "-v, --mount, --tmpfs": args.mounts,
        "--writable-root": args.writable_root,
        "--read-only": args.read_only,
        "--upper": args.upper,
        "--root": args.root,
        "--image": args.image,
        "--user": args.user,
        "--hostname": args.hostname,
        "--network": args.network,
        "--allow": args.allow,
        "--publish": args.publish,
        "--network-connections, --network-bytes, --network-rate": networks.caps(args),
    }
    return {flag: value for flag, value in given.items() if value}


def _given_root(args: argparse.Namespace, base: Policy, origins: dict[str, str]) -> dict[str, Any]:
    """The fields of [root] that change, and in `origins` which flag says so."""
    root: dict[str, Any] = {}
    if args.writable_root or args.read_only:
        root["writable"] = args.writable_root
        origins["root.writable"] = "--writable-root" if args.writable_root else "--read-only"
    if args.upper is not None:
        root["upper"] = args.upper
        origins["root.upper"] = "--upper"
    if args.root is not None:
        root["source"] = _root(args.root)
        root["image"] = ""
        origins["root.source"] = "--root"
    if args.image is not None:
        root["image"] = args.image
        origins["root.image"] = "--image"
    if args.user is not None and args.user not in ("caller", "isolated"):
        root["config"] = tuple(one for one in base.root.config if one != "user")
        origins["root.config"] = "--user"
    return root


def _changed(table: Table, **fields: Any) -> Table:
    """A section of a policy, or all of one, with other values here and there."""
    return type(table)(**{name: getattr(table, name) for name in table.__struct_fields__} | fields)


def given_limits(args: argparse.Namespace) -> dict[str, tuple[float | None, str]]:
    """Field of Limits -> value and flag; a flag of its own beats --ulimit."""
    given = {field: (value, "--ulimit") for field, value in args.ulimit}
    for names, field, *_ in _LIMITS:
        if f"limits.{field}" in vars(args):
            given[field] = (vars(args)[f"limits.{field}"], names[-1])
    return given


def _artifacts(args: argparse.Namespace) -> dict[str, float | None]:
    """The fields of [artifacts] that change."""
    given = {"files": args.collect_files, "bytes": args.collect_bytes}
    return {field: value for field, value in given.items() if value != _ABSENT}


def _with_mounts(
    base: Sequence[Mount], wanted: Sequence[Mount]
) -> tuple[tuple[Mount, ...], list[tuple[int, str]]]:
    """Mounts of the policy and of the flags; on one target the last counts, as in docker."""
    every = {mount.target: mount for mount in base}
    for mount in wanted:
        if mount.source is not None and not mount.optional and not os.path.exists(mount.source):
            raise JobError(
                f"cannot show {mount.source} on {mount.target}: no such file or directory",
                hint="sandboxd makes no directory for it as docker does; `optional` skips it",
            )
        every[mount.target] = mount
    ours = {mount.target for mount in wanted}
    places = [(place, target) for place, target in enumerate(every) if target in ours]
    return tuple(every.values()), places


def _root(text: str) -> str:
    if text == "host":
        return text
    path = mounts.source(text)
    if path == "/":
        raise JobError("--root /: a root cannot be the one we are in",
                       hint="`host` is the machine's own /usr")  # fmt: skip
    if not os.path.isdir(path):
        raise JobError(f"--root {text}: no such directory", hint="`host` is the machine's own /usr")
    return path


# -- the job ---------------------------------------------------------------------------------


def words(args: argparse.Namespace) -> list[str]:
    """What was typed."""
    typed = args.command[1:] if args.command[:1] == ["--"] else args.command
    return typed if args.entrypoint is None else [*filter(None, [args.entrypoint]), *typed]


def argv(args: argparse.Namespace, root: Root) -> list[bytes]:
    """The program and its arguments, byte for byte as they were typed; what lacks is an image's.

    As docker has it: what is typed takes the place of the image's Cmd, --entrypoint that of both.
    """
    found = words(args)
    if args.entrypoint is None and root.image:
        from sandboxd.images.store import look_up

        meant = look_up(root.image)[1].config
        found = [*meant.entrypoint, *(found or meant.cmd)]
    if not found:
        raise no_program()
    return [os.fsencode(word) for word in found]


def no_program() -> JobError:
    hint = "name one: sandboxd run -- python3 -c 'print(1)'"
    return JobError("no program to run", hint=hint)


def job(
    args: argparse.Namespace,
    wanted: Policy,
    outcome: Mapping[str, Any] = _NOTHING,
    meant: Job | None = None,
) -> Job:
    """What is asked for; `wanted` is the policy it runs under, `outcome` what is kept of it, and
    `meant` what a bundle describes.
    """
    if args.stdin is not None and args.interactive:
        raise JobError("--stdin and --interactive exclude each other", hint="leave one of them out")
    if args.interactive and any(source == "-" for source, _ in args.files_from):
        raise JobError("--files-from - and --interactive both read stdin",
                       hint="give one of them a file")  # fmt: skip
    from sandboxd.job import Job, Terminal

    env = inputs.environment(args.env_file, args.env, os.environb)
    terminal = None
    if args.tty:
        terminal = Terminal(**window())
        env.setdefault(b"TERM", os.environb.get(b"TERM", b"xterm"))
    cwd: str | bytes | None = (
        None if args.workdir is None else os.fsencode(os.path.join(WORK, args.workdir))
    )
    live = args.interactive
    if meant is not None:
        env = {**meant.env, **env}
        cwd = meant.cwd if cwd is None else cwd
        if meant.terminal is not None and terminal is None:
            terminal = Terminal(**window())
            live = args.stdin is None
    return Job(
        argv=argv(args, wanted.root) if meant is None else meant.argv,
        policy=wanted,
        env=env,
        cwd=cwd,
        stdin=None if live else args.stdin if args.stdin is not None else b"",
        files=inputs.files(args.file, args.files_from, args.built),
        terminal=terminal,
        id=args.name,
        ignored=() if meant is None else meant.ignored,
        **outcome,
    )


def window() -> dict[str, int]:
    """Rows and columns of the terminal we are in; the usual ones where we are in none."""
    for stream in (sys.__stdout__, sys.__stdin__, sys.__stderr__):
        try:
            shown = os.get_terminal_size(stream.fileno() if stream else -1)
        except (OSError, ValueError):
            continue
        if shown.lines and shown.columns:
            return {"rows": shown.lines, "columns": shown.columns}
    return {"rows": 24, "columns": 80}
