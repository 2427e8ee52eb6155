"""What is decided on every system call number -> seccomp programs, in the kernel's own bytes.

A program looks at the architecture, then finds the number by a balanced tree of `>=` (8 or 9
comparisons), and only then, and only for numbers with tests, at arguments. For every other allowed
call the kernel finds out when loading that the answer is always ALLOW and does not run the program
any more (seccomp_cache_prepare in kernel/seccomp.c, Linux 5.11).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import msgspec

from sandboxd.compile import bpf
from sandboxd.compile.numbers import table
from sandboxd.compile.syscalls import LAUNCH
from sandboxd.errors import PolicyError
from sandboxd.policy import Argument

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "i386": 0x40000003}  # linux/audit.h
X32_BIT = 0x40000000
"""__X32_SYSCALL_BIT: x32 calls say they are x86-64 and have this bit in their number."""
SKIPPED = 0xFFFFFFFF
"""Number -1: a tracer skipped the call. The program is still asked, and must not kill for it."""
M32 = 0xFFFFFFFF
M64 = 0xFFFFFFFFFFFFFFFF
MAX_RANGES = 1 << 16


class Check(msgspec.Struct, frozen=True):
    """When all comparisons hold, this is returned."""

    args: tuple[Argument, ...]
    action: int


class Leaf(msgspec.Struct, frozen=True):
    """What the tree ends in: the first check that holds, else `otherwise`."""

    checks: tuple[Check, ...]
    otherwise: int


KILL = Leaf((), bpf.KILL_PROCESS)
ALLOW = Leaf((), bpf.ALLOW)
Section = tuple[int, tuple[tuple[int, Leaf], ...]]
"""AUDIT_ARCH of an architecture, and all 2**32 numbers as ranges: each with its first number."""


class Part(msgspec.Struct, frozen=True):
    """Which calls a program answers for: those in LAUNCH, the rest. It allows the others."""

    launch: bool
    rest: bool

    def section(self, arch: str, leaves: Mapping[str, Leaf], unknown: Leaf) -> Section:
        """The ranges of one architecture; `unknown` is for what is none of `leaves`."""
        found: dict[int, Leaf] = {}
        for name, number in table(arch).items():
            launch = name in LAUNCH and arch != "i386"  # nothing of ours makes 32-bit calls
            mine = self.launch if launch else self.rest
            found[number] = leaves.get(name, unknown) if mine else ALLOW
        unknown = unknown if self.rest else ALLOW
        for number in tuple(found):
            found.setdefault(number + 1, unknown)
        if arch == "x86_64":
            found |= {X32_BIT: KILL, SKIPPED: unknown}
        ranges: list[tuple[int, Leaf]] = [(0, unknown)]
        for number, leaf in sorted(found.items()):
            if number == ranges[-1][0]:
                ranges[-1] = (number, leaf)
            elif leaf != ranges[-1][1]:
                ranges.append((number, leaf))
        return AUDIT_ARCH[arch], tuple(ranges)


WHOLE = Part(launch=True, rest=True)
BASE = Part(launch=False, rest=True)
"""What a tenant loads once: it leaves open what sandboxes are made with."""
OWN = Part(launch=True, rest=False)
"""What each sandbox adds."""


def fit(sections: Sequence[Section], where: str) -> Iterator[bytes]:
    """One program, or several that share the numbers: each allows what is another's business.

    `where` is what PolicyError names if there are more checks than the kernel takes.
    """
    program = _assemble(sections)
    if len(program) <= bpf.MAX_INSTRUCTIONS * bpf.INSTRUCTION.size:
        yield program
        return
    heavy = [
        place
        for place, (_, leaf) in enumerate(one for _, ranges in sections for one in ranges)
        if leaf.checks
    ]
    if len(heavy) < 2:
        raise PolicyError(where, "more rules for one system call than the kernel takes")
    middle = heavy[len(heavy) // 2]
    yield from fit(_part(sections, range(middle)), where)
    yield from fit(_part(sections, range(middle, MAX_RANGES)), where)


def _part(sections: Sequence[Section], kept: range) -> list[Section]:
    """The sections with every range allowed whose place, counted through all, is not kept."""
    places = count()
    return [
        (
            audit,
            tuple((first, leaf if next(places) in kept else ALLOW) for first, leaf in ranges),
        )
        for audit, ranges in sections
    ]


def _assemble(sections: Sequence[Section]) -> bytes:
    """Back to front: the trees, each after loading the number; before them, the architecture."""
    w = bpf.Writer()
    trees = []
    for audit, ranges in reversed(sections):
        _tree(w, ranges, {})
        trees.append((audit, w.load(bpf.NUMBER)))
    other = w.returning(bpf.KILL_PROCESS)
    for audit, tree in trees:
        other = w.branch(bpf.IF_EQUAL, audit, tree, other)
    w.load(bpf.ARCH)
    return w.program()


def _tree(w: bpf.Writer, ranges: tuple[tuple[int, Leaf], ...], places: dict[Leaf, int]) -> int:
    if len(ranges) == 1:
        return _leaf(w, ranges[0][1], places)
    middle = len(ranges) // 2
    above = _tree(w, ranges[middle:], places)
    below = _tree(w, ranges[:middle], places)
    return w.branch(bpf.IF_AT_LEAST, ranges[middle][0], above, below)


def _leaf(w: bpf.Writer, leaf: Leaf, places: dict[Leaf, int]) -> int:
    if not leaf.checks:
        return w.returning(leaf.otherwise)
    if leaf not in places:
        place = w.returning(leaf.otherwise)
        for check in reversed(leaf.checks):
            no, place = place, w.returning(check.action)
            for argument in reversed(check.args):
                place = _compare(w, argument, place, no)
        places[leaf] = place
    return places[leaf]


OPERATIONS = {
    # operator: (instruction, whether its answer is turned round)
    "eq": (bpf.IF_EQUAL, False), "ne": (bpf.IF_EQUAL, True),
    "ge": (bpf.IF_AT_LEAST, False), "lt": (bpf.IF_AT_LEAST, True),
    "gt": (bpf.IF_GREATER, False), "le": (bpf.IF_GREATER, True),
    "any_bits": (bpf.IF_ANY_BIT, False), "no_bits": (bpf.IF_ANY_BIT, True),
}  # fmt: skip


def _compare(w: bpf.Writer, argument: Argument, yes: int, no: int) -> int:
    """Go to `yes` if the comparison holds. For an int, its upper half is never even loaded."""
    code, turned = OPERATIONS[argument.op]
    if turned:
        yes, no = no, yes
    mask = M64 if argument.mask is None else argument.mask & M64
    value = argument.value & M64
    place = w.branch(code, value & M32, yes, no)
    place = _load(w, bpf.low(argument.index), mask & M32)
    if argument.width == 32:
        return place
    upper = value >> 32
    if code == bpf.IF_EQUAL:
        w.branch(code, upper, place, no)
    elif code == bpf.IF_ANY_BIT:
        w.branch(code, upper, yes, place)
    else:  # the lower halves decide only between equal upper ones
        place = w.branch(bpf.IF_EQUAL, upper, place, no)
        w.branch(bpf.IF_GREATER, upper, yes, place)
    return _load(w, bpf.high(argument.index), mask >> 32)


def _load(w: bpf.Writer, offset: int, mask: int) -> int:
    if mask != M32:
        w.mask(mask)
    return w.load(offset)
