"""What becomes of each system call under a [syscalls]: one answer for people and programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import msgspec

from sandboxd.compile.numbers import ARCHITECTURES, table
from sandboxd.compile.syscalls import calls, members, rules
from sandboxd.errors import PolicyError, PolicyErrors
from sandboxd.policy import Attached, Rule, Syscalls

Action = Literal["allow", "eperm", "enosys", "eafnosupport", "success", "kill"]

LISTS: Mapping[str, Action] = MappingProxyType(
    {
        "kill": "kill",
        "deny": "eperm",
        "enosys": "enosys",
        "eafnosupport": "eafnosupport",
        "allow": "allow",
    }
)
"""The lists of [syscalls] and what they answer; a call in two of them gets the first one's."""

MOST = PolicyErrors.MOST
"""Errors that will be shown; of the rest nobody sees what name was near."""

INTS = {
    "socket": {0, 1, 2}, "socketpair": {0, 1, 2}, "ioctl": {0, 1}, "fcntl": {0, 1},
    "fcntl64": {0, 1}, "personality": {0}, "prlimit64": {0, 1}, "setrlimit": {0},
    "getrlimit": {0}, "prctl": {0}, "kill": {0, 1}, "tgkill": {0, 1, 2}, "tkill": {0, 1},
    "open": {1, 2}, "openat": {0, 2, 3}, "unshare": {0}, "clone": {0}, "setns": {0, 1},
    "mq_open": {1, 2}, "memfd_create": {1}, "pipe2": {1}, "keyctl": {0}, "bpf": {0, 2},
    "futex": {1, 2}, "madvise": {2}, "seccomp": {0, 1}, "getpriority": {0, 1},
    "setpriority": {0, 1, 2}, "flock": {0, 1}, "shmget": {0, 2}, "semget": {0, 1, 2},
    "setsockopt": {0, 1, 2, 4}, "getsockopt": {0, 1, 2}, "listen": {0, 1},
}  # fmt: skip
"""Arguments that the kernel cuts to 32 bits (include/linux/syscalls.h; clone: lower_32_bits)."""


class Decision(msgspec.Struct, frozen=True):
    """What becomes of one system call: the first rule that holds, else `otherwise`."""

    name: str
    number: int
    rules: tuple[Rule, ...]
    otherwise: Action
    because: str
    """The entry that says so: "deny: @keyring", or "default"."""


class _Reading(msgspec.Struct, frozen=True):
    """A [syscalls] with its groups resolved, and what is wrong with it."""

    lists: dict[str, dict[str, str]]
    """List -> call -> the entry that brought it in."""
    rules: tuple[tuple[Rule, frozenset[str], str], ...]
    """Rule, the calls it is for, and the entry that brought it in."""
    errors: tuple[PolicyError, ...]


def _read(syscalls: Syscalls) -> _Reading:
    errors: list[PolicyError] = []
    lists: dict[str, dict[str, str]] = {}
    for key in LISTS:
        lists[key] = {}
        for at, name in enumerate(getattr(syscalls, key)):
            try:
                for call in calls(name, f"syscalls.{key}[{at}]", near=len(errors) < MOST):
                    lists[key].setdefault(call, name)
            except PolicyError as error:
                errors.append(error)
    resolved: list[tuple[Rule, frozenset[str], str]] = []
    for at, entry in enumerate(syscalls.rules):
        where = f"syscalls.rules[{at}]"
        try:
            near = len(errors) < MOST
            for rule in rules(entry, where, near=near):
                named = frozenset(
                    call for name in rule.calls for call in calls(name, where, near=near)
                )
                _lint(rule, named, where)
                resolved.append((rule, named, entry if isinstance(entry, str) else f"[{at}]"))
        except PolicyError as error:
            errors.append(error)
    return _Reading(lists, tuple(resolved), tuple(errors))


def _lint(rule: Rule, named: Iterable[str], where: str) -> None:
    """Refuse comparisons that cannot mean what they say."""
    if not rule.calls:
        raise PolicyError(where, "a rule without calls")
    for at, argument in enumerate(rule.args):
        here = f"{where}.args[{at}]"
        bits = argument.width
        for value in (argument.value, argument.mask or 0):
            if not -(1 << (bits - 1)) <= value < 1 << bits:
                raise PolicyError(here, f"{value:#x} does not fit into {bits} bits")
        narrow = sorted(call for call in named if argument.index in INTS.get(call, ()))
        if bits == 64 and narrow:
            raise PolicyError(
                here,
                f"argument {argument.index} of {narrow[0]} is an int: the kernel ignores the upper"
                " 32 bits, so comparing them lets a caller get past the rule",
                hint="leave width = 64 out",
            )


def problems(syscalls: Syscalls) -> tuple[PolicyError, ...]:
    """Everything wrong with a [syscalls]; `where` of each is the dotted key."""
    return () if syscalls.oci else _problems_of_lists(syscalls)


def problems_of_profiles(syscalls: Syscalls, kernel: str = "") -> tuple[PolicyError, ...]:
    """The same of the profiles, on this kernel; `where` is the place in their file."""
    if not syscalls.oci and not isinstance(syscalls, Attached):
        return ()
    from sandboxd.compile import oci_filter

    try:
        every = oci_filter.attached(syscalls)
    except PolicyError as error:
        return (error,)
    return tuple(wrong for one in every for wrong in oci_filter.problems(one, kernel))


def _problems_of_lists(syscalls: Syscalls) -> tuple[PolicyError, ...]:
    found = _read(syscalls).errors
    if found:
        return found
    # No process of a sandbox would ever start without these.
    refused = [
        f"{one.name} ({one.because})"
        for one in _decide(syscalls, ARCHITECTURES[0])
        if one.name in members("@init")
        and "allow" not in {one.otherwise, *(rule.action for rule in one.rules)}
    ]
    if not refused:
        return ()
    more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
    message = "sandboxd's own first process in a sandbox would be refused "
    hint = '"@base" and "@init" in allow have all that it needs'
    return (PolicyError("syscalls.allow", message + ", ".join(refused[:3]) + more, hint=hint),)


def decisions(syscalls: Syscalls, arch: str) -> tuple[Decision, ...]:
    """What becomes of every call that this architecture has, by number; PolicyError if unclear."""
    wrong = problems(syscalls)
    if wrong:
        raise wrong[0] if len(wrong) == 1 else PolicyErrors(wrong)
    return _decide(syscalls, arch)


@lru_cache(maxsize=256)
def _decide(syscalls: Syscalls, arch: str) -> tuple[Decision, ...]:
    reading = _read(syscalls)
    found = []
    for name, number in sorted(table(arch).items(), key=lambda item: item[1]):
        otherwise, because = _otherwise(reading, name, syscalls.default)
        mine: list[Rule] = []
        for rule, named, entry in reading.rules:
            if name not in named:
                continue
            if not rule.args:  # always holds: what comes after it never counts
                otherwise, because = rule.action, f"rules: {entry}"
                break
            mine.append(rule)
        found.append(Decision(name, number, tuple(mine), otherwise, because))
    return tuple(found)


def _otherwise(reading: _Reading, name: str, default: Action) -> tuple[Action, str]:
    for key, action in LISTS.items():
        entry = reading.lists[key].get(name)
        if entry is not None:
            return action, f"{key}: {entry}"
    return default, "default"
