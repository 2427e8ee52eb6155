"""`sandboxd policy`: what policies there are, what they say, whether they are right, and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from sandboxd.cli import subcommand
from sandboxd.errors import PolicyError, PolicyErrors, SandboxError
from sandboxd.policy import Policy

SCHEMA = "sandboxd.policy/1"

_DESCRIPTION = (
    "Policies say what a program may use and see. They are TOML files, looked for by name."
)
_EXAMPLE = """\
examples:
  sandboxd policy list
  sandboxd policy show judge-native
  sandboxd policy check ./my-policy.toml
  sandboxd policy explain ci

`sandboxd policy COMMAND --help` says more about each."""
_LIST = """\
Lists the policies that can be named, with the file each is read from. Of two files with one name
the first counts: of $SANDBOXD_POLICY_PATH, then of $XDG_CONFIG_HOME/sandboxd/policies, then of
/etc/sandboxd/policies.d, then those that come with sandboxd."""
_SHOW = """\
Shows all that is in force under a policy as one TOML file that extends nothing: defaults, what is
inherited, and what the file itself says."""
_CHECK = """\
Reads policy files and prints every error in them, one a line, with file, line and key. Exit status
1 if there is any. With --verify libseccomp is asked for the same system call filter, and every call
that the two would answer differently is an error."""
_EXPLAIN = """\
Explains a policy key by key: what is in force, which file says so, and what the kernel is told. A
name with @ is a group of system calls or rules; without a name the groups are listed."""
_SCHEMA = """\
Prints the JSON Schema of policy files. Editors that know TOML use it for completion and checks if
the first line of a file is `#:schema PATH`."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its own commands to the command line."""
    parser = subparsers.add_parser(
        "policy",
        help="list, show, check and explain policies",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    subcommand.add(
        commands, "policy", "list", "list the policies that can be named", _LIST, ""
    ).set_defaults(func=names)
    one = subcommand.add(
        commands, "policy", "show", "show all that a policy says", _SHOW, "judge-native --json"
    )
    one.add_argument("name", metavar="NAME", help="a policy, or the path of a TOML file")
    one.add_argument("--json", action="store_true", help="print one JSON object with the digest")
    one.set_defaults(func=show)
    one = subcommand.add(
        commands,
        "policy",
        "check",
        "find the errors in policy files",
        _CHECK,
        "--verify ./ours.toml",
    )
    one.add_argument("files", metavar="FILE", nargs="+", help="a policy file")
    one.add_argument("--verify", action="store_true", help="compare the filters with libseccomp's")
    one.set_defaults(func=check)
    one = subcommand.add(
        commands, "policy", "explain", "say what a policy means and why", _EXPLAIN, "judge-native"
    )
    one.add_argument("name", metavar="NAME", nargs="?", help="a policy, a TOML file, or @group")
    one.set_defaults(func=explain)
    text = "> policies/schema.json"
    subcommand.add(
        commands, "policy", "schema", "print the JSON Schema", _SCHEMA, text
    ).set_defaults(func=schema)


# -- list and show ---------------------------------------------------------------------------


def names(args: argparse.Namespace) -> int:
    from sandboxd.judge.text import one_line
    from sandboxd.supervise.policies import available, packaged

    del args
    rows = [
        (one.name, one.description, "" if one.file.parent == packaged() else f" ({one.file})")
        for one in available()
    ]
    width = max((len(name) for name, _, _ in rows), default=0)
    for name, description, file in rows:
        print(one_line(f"{name:<{width}}  {description}{file}", 4096))
    return 0


def show(args: argparse.Namespace) -> int:
    from sandboxd.compile.render import render
    from sandboxd.supervise.policies import find

    policy = find(args.name)
    if args.json:
        print(json.dumps(to_json(policy), indent=2))
    else:
        print(render(policy), end="")
    return 0


def to_json(policy: Policy) -> dict[str, Any]:
    """The policy as JSON types: times in seconds, sizes in bytes, null for no limit."""
    import msgspec

    from sandboxd.compile.load import digest

    return {
        "schema": SCHEMA,
        "sha256": digest(policy),
        **msgspec.to_builtins(policy),
    }


# -- check -----------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> int:
    wrong = sum(_checked(name, verify=args.verify) for name in args.files)
    if not wrong:
        print(f"{len(args.files)} {'policy' if len(args.files) == 1 else 'policies'}: no errors")
    return 1 if wrong else 0


def _checked(name: str, *, verify: bool) -> int:
    """Prints the errors of one file; returns their number."""
    from sandboxd.judge.text import one_line
    from sandboxd.supervise.policies import find, is_path

    try:
        policy = find(name if is_path(name) else f"./{name}")
        errors = list(_differences(name, policy)) if verify else []
        if verify and policy.syscalls.oci:
            text = f"{name}: syscalls.oci: profiles are not compared with libseccomp"
            print(one_line(text, 4096), file=sys.stderr)
    except PolicyErrors as error:
        errors = [str(one) for one in error.errors]
    except SandboxError as error:
        errors = [str(error)]
    for one in errors:
        print(one_line(one, 4096), file=sys.stderr)
    return len(errors)


def _differences(name: str, policy: Policy) -> Iterator[str]:
    """Where our filter and libseccomp's do not agree, on both architectures."""
    from sandboxd.compile.numbers import ARCHITECTURES
    from sandboxd.compile.seccomp import verify

    for arch in ARCHITECTURES:
        try:
            found = verify(policy.syscalls, arch)
        except ImportError as error:
            raise PolicyError(
                name, f"cannot be verified: {error}", hint="install libseccomp2"
            ) from None
        for one in found:
            call = f"call {one.number}({', '.join(map(hex, one.args))}) on {one.arch}"
            yield f"{name}: syscalls: {call}: {one.ours}, but libseccomp says {one.theirs}"


# -- explain and schema ----------------------------------------------------------------------


def explain(args: argparse.Namespace) -> int:
    if args.name is None:
        lines = _groups()
    elif args.name.startswith("@"):
        lines = _group(args.name)
    else:
        lines = _policy(args.name)
    for line in lines:
        print(line)
    return 0


def _policy(name: str) -> Iterator[str]:
    from sandboxd.compile import explain as explaining
    from sandboxd.supervise.policies import find

    policy = find(name)
    yield f"{policy.name}: {policy.description}"
    section = ""
    for row in explaining.explain(policy):
        if (head := row.key.partition(".")[0].partition("[")[0]) != section:
            section = head
            yield ""
        yield f"{row.key} = {row.value}  # {row.origin.removesuffix(f': {row.key}')}"
        yield f"    {row.meaning}"


def _groups() -> Iterator[str]:
    from sandboxd.compile.syscalls import GROUPS, RULES

    yield "groups of system calls, for syscalls.allow, deny, enosys, eafnosupport and kill:"
    yield from _rows([(name, one.purpose) for name, one in GROUPS.items()])
    yield "\ngroups of rules, for syscalls.rules:"
    yield from _rows([(name, one.purpose) for name, one in RULES.items()])


def _rows(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        yield f"  {name:<{width}}  {text}"


def _group(name: str) -> Iterator[str]:
    from sandboxd.compile import explain as explaining
    from sandboxd.compile.syscalls import GROUPS, RULES, members, rules, unknown

    if name in GROUPS:
        yield f"{name}: {GROUPS[name].purpose}"
        yield from (f"  {call}" for call in members(name))
    elif name in RULES:
        yield f"{name}: {RULES[name].purpose}"
        yield from (f"  {explaining.toml(rule)}" for rule in rules(name, name))
    else:
        raise unknown(name, [*GROUPS, *RULES], "")


def schema(args: argparse.Namespace) -> int:
    print(schema_text(), end="")
    return 0


def schema_text() -> str:
    """policies/schema.json, with what policy.py says about its keys."""
    import inspect

    from sandboxd import policy
    from sandboxd.compile import schema as derived

    return json.dumps(derived.schema(inspect.getsource(policy)), indent=2) + "\n"
