"""The kinds of [syscalls] that the policies have, and what a reader would say they mean."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import msgspec

from sandboxd.compile import bpf
from sandboxd.compile.decisions import Action, Decision, decisions
from sandboxd.policy import Argument, Rule, Syscalls

POLICIES = Path(__file__).resolve().parent.parent.parent / "policies"

TOML = {
    "base": "",
    "judge": """
        allow = ["@base"]
        rules = ["@sockets", "@no-namespaces", "@guards", "@no-locks"]
    """,
    "ci": """
        allow = ["@base", "@locks", "@ptrace", "@splice", "@numa-query"]
        deny = ["@dangerous", "@numa", "@ldt"]
        rules = ["@sockets", "@no-namespaces", "@guards", "@personality-aslr"]
    """,
    "shell": """
        allow = ["@base", "@locks", "@ptrace", "@splice", "@numa", "@numa-query", "@ldt"]
        deny = ["@dangerous"]
        rules = ["@sockets", "@no-namespaces", "@guards", "@sockets-diag", "@personality-aslr"]
        abi32 = "allow"
    """,
}

TIERS = {name: msgspec.convert(tomllib.loads(text), Syscalls) for name, text in TOML.items()}

ERRNO = {"success": 0, "eperm": 1, "enosys": 38, "eafnosupport": 97}


def shipped() -> dict[str, Syscalls]:
    """The [syscalls] of the policy files, inherited ones and all."""
    return {path.stem: _syscalls(path) for path in sorted(POLICIES.glob("*.toml"))}


def _syscalls(path: Path) -> Syscalls:
    file = tomllib.loads(path.read_text())
    parent = file.get("extends")
    section = msgspec.to_builtins(_syscalls(POLICIES / f"{parent}.toml")) if parent else {}
    for key, value in file.get("syscalls", {}).items():
        if isinstance(value, list) and value[:1] == ["!reset"]:
            section[key] = value[1:]
        elif isinstance(value, list):
            section[key] = [*section.get(key, ()), *value]
        else:
            section[key] = value
    return msgspec.convert(section, Syscalls)


def action(name: Action) -> int:
    if name in ERRNO:
        return bpf.ERRNO | ERRNO[name]
    return bpf.ALLOW if name == "allow" else bpf.KILL_PROCESS


def holds(argument: Argument, args: Sequence[int]) -> bool:
    every = (1 << argument.width) - 1
    seen = args[argument.index] & every
    if argument.mask is not None:
        seen &= argument.mask
    value = argument.value & every
    return {
        "eq": seen == value,
        "ne": seen != value,
        "lt": seen < value,
        "le": seen <= value,
        "gt": seen > value,
        "ge": seen >= value,
        "any_bits": seen & value != 0,
        "no_bits": seen & value == 0,
    }[argument.op]


def first(rules: Sequence[Rule], args: Sequence[int], otherwise: Action) -> Action:
    for rule in rules:
        if all(holds(argument, args) for argument in rule.args):
            return rule.action
    return otherwise


def meant(syscalls: Syscalls, arch: str, number: int, args: Sequence[int]) -> int:
    """What the policy's text says about a call, read without any cleverness."""
    if arch == "x86_64" and number != 0xFFFFFFFF and number >= 0x40000000:
        return bpf.KILL_PROCESS
    one = known(syscalls, arch).get(number)
    return action(first(one.rules, args, one.otherwise) if one else syscalls.default)


@cache
def known(syscalls: Syscalls, arch: str) -> dict[int, Decision]:
    return {one.number: one for one in decisions(syscalls, arch)}
