"""[syscalls] of a policy -> seccomp programs, in the kernel's own bytes.

The lists and rules of a policy are one program (assemble.py says how it works). A profile of the
OCI's is another (oci_filter.py): in place of the lists, with a third that closes what must stay
closed for the sandbox's own sake; or on top of them. Of several the strictest answer counts.

Why not libseccomp's own output: it compares whole 64-bit arguments where the kernel takes an int,
drops a rule whose action is the default, has no rules in order, cannot name calls newer than
itself, and its program is longer and slower to load. It is the oracle instead: `verify` asks it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Any

import msgspec

from sandboxd.compile import bpf
from sandboxd.compile.assemble import (
    ALLOW,
    AUDIT_ARCH,
    BASE,
    M32,
    M64,
    OWN,
    SKIPPED,
    WHOLE,
    Check,
    Leaf,
    Part,
    Section,
    fit,
)
from sandboxd.compile.decisions import Action, Decision, decisions, problems_of_profiles
from sandboxd.compile.numbers import table
from sandboxd.compile.syscalls import rules
from sandboxd.errors import PolicyError
from sandboxd.policy import Argument, Attached, Rule, Syscalls

ACTIONS: dict[str, int] = {
    "allow": bpf.ALLOW,
    "success": bpf.ERRNO,  # errno 0: the call is not made, the program sees 0
    "eperm": bpf.ERRNO | 1,
    "enosys": bpf.ERRNO | 38,
    "eafnosupport": bpf.ERRNO | 97,
    "kill": bpf.KILL_PROCESS,
}
ABIS = {"x86_64": ("x86_64", "i386"), "aarch64": ("aarch64",)}
GUARDS = "@guards"
"""The group of rules that stays under a profile that takes the lists' place."""


class Summary(msgspec.Struct, frozen=True):
    """A policy's [syscalls] on one architecture, for people."""

    arch: str
    decisions: tuple[Decision, ...]
    counts: dict[str, int]
    """How many calls are answered how; calls with rules count under "rules"."""
    instructions: tuple[int, ...]
    """The length of each program."""


class Difference(msgspec.Struct, frozen=True):
    """A call on which our program and libseccomp's do not agree."""

    arch: str
    number: int
    args: tuple[int, ...]
    ours: str
    theirs: str


@lru_cache(maxsize=256)
def programs(syscalls: Syscalls, arch: str, kernel: str = "") -> tuple[bytes, ...]:
    """The programs to load, all of them: one for the lists, unless its rules are longer than the
    kernel takes, and what profiles add.

    `kernel` is the release for which a profile's minKernel is decided; "" meets any.
    """
    return _make(syscalls, arch, kernel, WHOLE)


@lru_cache(maxsize=256)
def layers(
    syscalls: Syscalls, arch: str, kernel: str = ""
) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """The same in two parts: what a tenant loads once, and what each of its sandboxes adds.

    A process has all filters of those it descends from (seccomp(2)), and the strictest answer
    counts. So the first part leaves open what a sandbox is made with, the second answers for just
    that: it is short, and is loaded in less than half the time.
    """
    return _make(syscalls, arch, kernel, BASE), _make(syscalls, arch, kernel, OWN)


def _make(syscalls: Syscalls, arch: str, kernel: str, part: Part) -> tuple[bytes, ...]:
    found = tuple(_sources(syscalls, arch, kernel, part))
    # MAX_INSNS_PER_PATH of kernel/seccomp.c: 256 KB, with four instructions' fee for each program.
    if sum(len(program) // bpf.INSTRUCTION.size + 4 for program in found) > 32768:
        raise PolicyError("syscalls.rules", "more rules than the kernel takes")
    return found


def _sources(syscalls: Syscalls, arch: str, kernel: str, part: Part) -> Iterator[bytes]:
    """Programs of the lists, or of the profile in their place; of a profile on top of these."""
    for wrong in problems_of_profiles(syscalls, kernel):
        raise wrong
    if syscalls.oci:
        yield from fit([_guards(abi, part) for abi in ABIS[arch]], "syscalls.oci")
    else:
        sections = [_section(syscalls, arch, part)]
        if arch == "x86_64" and syscalls.abi32 == "allow":
            sections.append(_section(syscalls, "i386", part))
        yield from fit(sections, "syscalls.rules")
    if syscalls.oci or isinstance(syscalls, Attached):
        from sandboxd.compile import oci_filter

        for one in oci_filter.attached(syscalls):
            yield from oci_filter.programs(one, arch, kernel, part)


def _guards(abi: str, part: Part) -> Section:
    """What no profile opens; all else is left to it."""
    found: dict[str, Leaf] = {}
    every = rules(GUARDS, "")
    for name in {call for rule in every for call in rule.calls} & set(table(abi)):
        mine = [rule for rule in every if name in rule.calls]
        end = next((at for at, rule in enumerate(mine) if not rule.args), len(mine))
        checks = tuple(Check(rule.args, ACTIONS[rule.action]) for rule in mine[:end])
        found[name] = Leaf(checks, ACTIONS[mine[end].action] if mine[end:] else bpf.ALLOW)
    return part.section(abi, found, ALLOW)


def _section(syscalls: Syscalls, arch: str, part: Part) -> Section:
    leaves = {
        one.name: Leaf(
            tuple(Check(rule.args, ACTIONS[rule.action]) for rule in one.rules),
            ACTIONS[one.otherwise],
        )
        for one in decisions(syscalls, arch)
    }
    return part.section(arch, leaves, Leaf((), ACTIONS[syscalls.default]))


def summary(syscalls: Syscalls, arch: str) -> Summary:
    """The decisions with their counts, and how long the programs are."""
    every = decisions(syscalls, arch)
    counts = Counter("rules" if one.rules else one.otherwise for one in every)
    lengths = tuple(len(program) // bpf.INSTRUCTION.size for program in programs(syscalls, arch))
    return Summary(arch, every, dict(counts), lengths)


# --- The oracle -----------------------------------------------------------------------------------


def verify(syscalls: Syscalls, arch: str) -> list[Difference]:
    """Ask libseccomp for the same policy, run both on paper, and say where they differ.

    Every number from 0 to 600, the x32 and foreign ones, and for calls with rules mixes of values
    next to a boundary, with and without rubbish in the upper halves. libseccomp has no rules
    in order, so each comparison is a filter of its own; "in order" and "all of them" are decided
    here. Names that libseccomp does not know can only be checked on the machine's own architecture,
    and calls that it maps to i386's socketcall and ipc not at all. Profiles are not compared.
    ImportError without libseccomp.
    """
    if syscalls.oci:
        return []
    oracle = _Oracle(syscalls, arch)
    ours = tuple(program for layer in layers(syscalls, arch) for program in layer)
    found = []
    for one in oracle.questions():
        mine = bpf.decide(ours, one.number, one.audit, one.args)
        theirs = oracle.answer(one)
        if mine != theirs:
            names = bpf.action_name(mine), bpf.action_name(theirs)
            found.append(Difference(one.arch, one.number, one.args, *names))
    return found


class _Question(msgspec.Struct, frozen=True):
    arch: str
    audit: int
    number: int
    args: tuple[int, ...] = ()


class _Oracle:
    """libseccomp's filters for one policy: one for the lists, one for every n-th comparison."""

    def __init__(self, syscalls: Syscalls, arch: str) -> None:
        try:
            import seccomp as library
        except ImportError:
            import pyseccomp as library
        self._library = library
        machine = library.system_arch() & M32
        self._native = next(arch for arch, audit in AUDIT_ARCH.items() if audit == machine)
        self._default = syscalls.default
        compat = arch == "x86_64" and syscalls.abi32 == "allow"
        self._decisions = {
            one: {each.number: each for each in decisions(syscalls, one)}
            for one in ((arch, "i386") if compat else (arch,))
        }
        self._lists = {one: self._export_lists(one) for one in self._decisions}
        self._comparisons = {one: self._export_comparisons(one) for one in self._decisions}

    def questions(self) -> Iterator[_Question]:
        for arch, known in self._decisions.items():
            audit = AUDIT_ARCH[arch]
            for number in (*range(601), 1 << 30, 1 << 30 | 59, 1 << 31, SKIPPED - 1, SKIPPED):
                one = known.get(number)
                if one is None:
                    yield _Question(arch, audit, number)
                elif self._token(arch, one.name) is not None:
                    most = M32 if arch == "i386" else M64
                    for args in boundaries(one.rules):
                        seen = tuple(value & most for value in args)
                        yield _Question(arch, audit, number, seen)
        for arch, audit in AUDIT_ARCH.items():
            if arch not in self._decisions:
                yield from (_Question(arch, audit, number) for number in (0, 1, 59, SKIPPED))

    def answer(self, one: _Question) -> int:
        decision = self._decisions.get(one.arch, {}).get(one.number)
        for at, rule in enumerate(decision.rules if decision else ()):
            holds = (
                bpf.simulate(
                    self._comparisons[one.arch][at, which], one.number, one.audit, one.args
                )
                for which in range(len(rule.args))
            )
            if all(answer != bpf.ALLOW for answer in holds):
                return ACTIONS[rule.action]
        lists = self._lists.get(one.arch) or next(iter(self._lists.values()))
        return bpf.simulate(lists, one.number, one.audit, one.args)

    def _token(self, arch: str, name: str) -> int | None:
        """What libseccomp calls this call of any architecture; None if it cannot be said."""
        number = table(arch)[name]
        if arch == self._native:
            return number
        token: int = self._library.resolve_syscall(self._library_arch(self._native), name)
        known = self._library.resolve_syscall(self._library_arch(arch), name) == number
        return token if known and token != -1 else None

    def _library_arch(self, arch: str) -> Any:
        own = self._library.Arch
        return {"x86_64": own.X86_64, "aarch64": own.AARCH64, "i386": own.X86}[arch]

    def _action(self, action: Action) -> Any:
        if action in {"allow", "kill"}:
            return self._library.ALLOW if action == "allow" else self._library.KILL_PROCESS
        return self._library.ERRNO(ACTIONS[action] & 0xFFFF)

    def _filter(self, arch: str, default: Action) -> Any:
        new = self._library.SyscallFilter(self._action(default))
        new.set_attr(self._library.Attr.ACT_BADARCH, self._library.KILL_PROCESS)
        if arch != self._native:
            new.add_arch(self._library_arch(arch))
            new.remove_arch(self._library_arch(self._native))
        return new

    def _export_lists(self, arch: str) -> bytes:
        new = self._filter(arch, self._default)
        for one in self._decisions[arch].values():
            token = self._token(arch, one.name)
            if token is not None and one.otherwise != self._default:
                new.add_rule(self._action(one.otherwise), token)
        return _exported(new)

    def _export_comparisons(self, arch: str) -> dict[tuple[int, int], bytes]:
        filters: dict[tuple[int, int], Any] = {}
        for one in self._decisions[arch].values():
            token = self._token(arch, one.name)
            if token is None:
                continue
            for at, rule in enumerate(one.rules):
                for which, argument in enumerate(rule.args):
                    if (at, which) not in filters:
                        filters[at, which] = self._filter(arch, "allow")
                    self._add(filters[at, which], token, argument, arch)
        return {place: _exported(new) for place, new in filters.items()}

    def _add(self, new: Any, token: int, argument: Argument, arch: str) -> None:
        hit, compare = self._library.ERRNO(1), self._library.MASKED_EQ
        for mask, value in alternatives(argument):
            if arch == "i386":  # has no upper halves; libseccomp would take any for equal
                if value > M32:
                    continue
                mask &= M32
            args = (self._library.Arg(argument.index, compare, mask, value),) if mask else ()
            new.add_rule(hit, token, *args)
            if not mask:  # holds for every value
                return


def _exported(new: Any) -> bytes:
    with os.fdopen(os.memfd_create("bpf"), "w+b") as file:
        new.export_bpf(file)
        file.seek(0)
        return file.read()


def alternatives(argument: Argument) -> list[tuple[int, int]]:
    """A comparison as (mask, value) pairs: it holds where argument & mask == value for one of them.

    libseccomp compares in no other way below 64 bits. A smaller number is one that agrees with the
    larger down to some bit that it lacks.
    """
    width = (1 << argument.width) - 1
    mask = (width if argument.mask is None else argument.mask) & width
    value = argument.value & width
    op = argument.op
    bits = [1 << place for place in reversed(range(argument.width))]
    equal = [(mask, value)] if value & ~mask == 0 else []
    if op in {"any_bits", "no_bits"}:
        wanted = value & mask
        return [(bit, bit) for bit in bits if wanted & bit] if op == "any_bits" else [(wanted, 0)]
    if op == "ne":
        return [(bit, ~value & bit) for bit in bits if mask & bit] if equal else [(0, 0)]
    found = equal if op in {"eq", "le", "ge"} else []
    for bit in bits if op != "eq" else ():
        above = width & ~(bit | bit - 1)
        if value & above & ~mask:
            break  # agreeing so far is impossible, and further down, too
        if op in {"lt", "le"} and value & bit:
            found.append((mask & (above | bit), value & above))
        elif op in {"gt", "ge"} and ~value & bit & mask:
            found.append((mask & (above | bit), value & above | bit))
    return found


MOST_MIXES = 2000
STRIDE = 999_983
"""A prime, so that steps of this size visit all places of any list before one comes twice."""
RUBBISH = (1 << 32, 0xDEADBEEF << 32, 1 << 63)


def boundaries(rules: tuple[Rule, ...]) -> Iterator[tuple[int, ...]]:
    """Arguments at the edges of these rules: mixed, and again with bits that no int has."""
    values: list[dict[int, None]] = [{0: None} for _ in range(6)]
    for argument in (each for rule in rules for each in rule.args):
        value = argument.value & ((1 << argument.width) - 1)
        edges = [value, value + 1, value - 1, *(value & 1 << bit for bit in range(argument.width))]
        edges += [] if argument.mask is None else [value | ~argument.mask]
        values[argument.index].update(dict.fromkeys(edge & M64 for edge in edges))
    choices = [tuple(each) for each in values]
    mixes = prod(len(each) for each in choices)
    for turn in range(min(mixes, MOST_MIXES)):
        place, args = turn * (STRIDE if mixes > MOST_MIXES else 1), []
        for each in choices:
            place, at = divmod(place, len(each))
            args.append(each[at])
        yield tuple(args)
        rubbish = RUBBISH[turn % len(RUBBISH)]
        yield tuple(value ^ rubbish for value in args)
        yield tuple(v ^ rubbish if at == turn % 6 else v for at, v in enumerate(args))
