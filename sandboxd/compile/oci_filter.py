"""A seccomp profile of the OCI's on one machine -> what is decided on each call, and programs.

The format leaves open what holds where two of its rules do. Those who made it feed libseccomp, and
what comes of that is taken for the meaning here: a rule that answers as the default does is none;
a rule without comparisons counts for its calls whatever rules with comparisons say, wherever these
stand; of two without, the first; a rule that compares one argument twice is two rules. Where two
rules with comparisons can hold at once and differ, libseccomp's answer depends on how it sorts its
tree: that is refused, with both places.

i386's socketcall and ipc are calls that stand for others (socketcall(2), ipc(2)): a rule for one of
those is a rule for them, too, with the number that they have there as the first argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import msgspec

from sandboxd.compile import bpf
from sandboxd.compile.assemble import M32, M64, Check, Leaf, Part, fit
from sandboxd.compile.numbers import ARCHITECTURES, names, table
from sandboxd.compile.oci import Comparison, Entry, OciFilter, When, parse, release
from sandboxd.compile.syscalls import members
from sandboxd.errors import PolicyError
from sandboxd.policy import Argument, Attached, Syscalls

_OF_GO = {"x86_64": "amd64", "aarch64": "arm64"}
"""What includes.arches calls an architecture."""
_OF_SECCOMP = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
IN_BUNDLE = "linux.seccomp"
"""Where a profile on top stands in its file."""
MOST_CHECKS = 512
"""For one call: far more than any profile has, and few enough to compare each with each."""


_SOCKETCALL = (
    *("socket", "bind", "connect", "listen", "accept", "getsockname", "getpeername", "socketpair"),
    *("send", "recv", "sendto", "recvfrom", "shutdown", "setsockopt", "getsockopt", "sendmsg"),
    *("recvmsg", "accept4", "recvmmsg", "sendmmsg"),
)
_THROUGH: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "socketcall": {name: number for number, name in enumerate(_SOCKETCALL, 1)},
        "ipc": {
            "semop": 1, "semget": 2, "semctl": 3, "semtimedop": 4,
            "msgsnd": 11, "msgrcv": 12, "msgget": 13, "msgctl": 14,
            "shmat": 21, "shmdt": 22, "shmget": 23, "shmctl": 24,
        },
    }
)  # fmt: skip
"""The numbers of calls within these two (linux/net.h, linux/ipc.h)."""
_KNOWN = names().union(*_THROUGH.values())


class _Rule(msgspec.Struct, frozen=True):
    args: tuple[Argument, ...]
    action: int
    where: str


def attached(syscalls: Syscalls) -> tuple[OciFilter, ...]:
    """The profiles of a [syscalls]: that in place of its lists, and that on top."""
    found = []
    has = syscalls if isinstance(syscalls, Attached) else Attached()
    if syscalls.oci:
        if not has.profile:
            raise PolicyError("syscalls.oci", f"{syscalls.oci} has not been read",
                              hint="find_policy reads it")  # fmt: skip
        found.append(parse(has.profile, syscalls.oci))
    if has.on_top:
        found.append(parse(has.on_top, has.on_top_name, IN_BUNDLE))
    return tuple(found)


def programs(profile: OciFilter, arch: str, kernel: str, part: Part) -> Iterator[bytes]:
    """The profile's part of the filter on a machine; "" is a kernel that is new enough for all."""
    sections = [
        part.section(abi, leaves(profile, arch, kernel, abi), Leaf((), profile.default))
        for abi in abis(profile, arch)
    ]
    yield from fit(sections, profile.where)


def abis(profile: OciFilter, arch: str) -> tuple[str, ...]:
    """The kinds of programs that are let in. x32, and 32-bit programs on aarch64, never are."""
    listed = profile.architectures or dict(profile.subordinate).get(_OF_SECCOMP[arch], ())
    return (arch, "i386") if arch == "x86_64" and "SCMP_ARCH_X86" in listed else (arch,)


def unknown(profile: OciFilter) -> tuple[str, ...]:
    """Names of no system call that is known here, which are passed over."""
    every = dict.fromkeys(name for entry in profile.entries for name in entry.names)
    return tuple(name for name in every if name not in _KNOWN)


def problems(profile: OciFilter, kernel: str = "") -> tuple[PolicyError, ...]:
    """Why no sandbox can be had with it, on this kernel."""
    for arch in ARCHITECTURES:
        try:
            for abi in abis(profile, arch):
                leaves(profile, arch, kernel, abi)
        except PolicyError as error:
            return (error,)
        found, default = leaves(profile, arch, kernel, arch), Leaf((), profile.default)
        wanted = [name for name in members("@init") if name in table(arch)]
        refused = [name for name in wanted if not _lets(found.get(name, default))]
        if refused:
            more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
            message = "sandboxd's own first process in a sandbox would be refused "
            hint = "`sandboxd policy explain @init` has all that it needs"
            return (PolicyError(profile.where, message + ", ".join(refused[:3]) + more, hint=hint),)
    return ()


def _lets(leaf: Leaf) -> bool:
    """Whether a call is ever made."""
    answers = {leaf.otherwise, *(check.action for check in leaf.checks)}
    return not answers.isdisjoint({bpf.ALLOW, bpf.LOG})


@lru_cache(maxsize=64)
def leaves(profile: OciFilter, arch: str, kernel: str, abi: str) -> Mapping[str, Leaf]:
    """What is decided on every call that a rule names, for programs of this kind."""
    always: dict[str, int] = {}
    some: dict[str, list[_Rule]] = {}
    for entry in profile.entries:
        if entry.action == profile.default or not _applies(entry, arch, kernel):
            continue
        for call, args in _cases(entry, abi):
            if args:
                some.setdefault(call, []).append(_Rule(args, entry.action, entry.where))
            else:
                always.setdefault(call, entry.action)
    found = {call: Leaf((), action) for call, action in always.items()}
    for call, rules in some.items():
        if call not in always:
            _check_order(call, rules)
            checks = dict.fromkeys(Check(rule.args, rule.action) for rule in rules)
            found[call] = Leaf(tuple(checks), profile.default)
    return MappingProxyType(found)


def _applies(entry: Entry, arch: str, kernel: str) -> bool:
    wanted, unwanted, running = entry.includes, entry.excludes, release(kernel)

    def reached(when: When) -> bool:
        return when.kernel is not None and (running is None or running >= when.kernel)

    if _OF_GO[arch] in unwanted.arches or reached(unwanted):
        return False
    if wanted.caps:  # a job has no capability, so excludes.caps never counts and this always
        return False
    if wanted.arches and _OF_GO[arch] not in wanted.arches:
        return False
    return wanted.kernel is None or reached(wanted)


def _cases(entry: Entry, abi: str) -> Iterator[tuple[str, tuple[Argument, ...]]]:
    """The calls of a rule, each with comparisons that must hold; none: it always counts."""
    numbers = table(abi)
    conjunctions = tuple(_conjunctions(entry.comparisons, 32 if abi == "i386" else 64))
    for name in entry.names:
        for args in conjunctions:
            if name in numbers:
                yield name, args
            for through, within in _THROUGH.items() if abi == "i386" else ():
                if name in within:
                    first = Argument(index=0, op="eq", value=within[name])
                    yield through, (first, *(one for one in args if one.index != 0))


def _conjunctions(
    comparisons: tuple[Comparison, ...], width: Literal[32, 64]
) -> Iterator[tuple[Argument, ...]]:
    every = [(_argument(one, width),) for one in comparisons]
    if len({one.index for one in comparisons}) < len(comparisons):
        yield from (tuple(filter(None, one)) for one in every)
    else:
        yield tuple(one for (one,) in every if one is not None)


def _argument(one: Comparison, width: Literal[32, 64]) -> Argument | None:
    """The comparison as ours; None if it holds for everything. i386 has no upper halves."""
    bits = M32 if width == 32 else M64
    value = one.value & bits
    if one.op != "masked_eq":
        return Argument(index=one.index, op=one.op, value=value, width=width)
    if not value:
        return None
    return Argument(index=one.index, op="eq", value=one.second & value, mask=value, width=width)


# -- rules that would have to be in order ----------------------------------------------------


def _check_order(call: str, rules: list[_Rule]) -> None:
    if len(rules) > MOST_CHECKS:
        raise PolicyError(rules[MOST_CHECKS].where, f"more than {MOST_CHECKS} rules for {call}")
    if len({rule.action for rule in rules}) == 1:
        return
    for at, later in enumerate(rules):
        for rule in rules[:at]:
            if rule.action != later.action and _meet(rule.args, later.args):
                raise PolicyError(
                    later.where,
                    f"for {call} it can hold together with {rule.where.rpartition(': ')[2]}, which"
                    " answers differently, and nothing says which counts",
                    hint="make the comparisons exclude one another",
                )


def _meet(some: tuple[Argument, ...], others: tuple[Argument, ...]) -> bool:
    """Whether there are arguments for which both hold."""
    return all(
        meets(one, other) for one in some for other in others if one.index == other.index
    ) and all(meets(one, one) for one in (*some, *others))


def meets(one: Argument, other: Argument) -> bool:
    """Whether some value of the argument satisfies both comparisons."""
    if one.op == "ne" or other.op == "ne":
        if one.op == other.op:
            return True
        equal, unequal = (other, one) if one.op == "ne" else (one, other)
        return not _is_only(equal, unequal.value)
    if one.op == "eq" and other.op == "eq":
        common = _mask(one) & _mask(other)
        return (one.value ^ other.value) & common == 0
    if one.op == "eq" or other.op == "eq":
        masked, ordered = (one, other) if one.op == "eq" else (other, one)
        low, high = _bounds(ordered)
        least = _least(_mask(masked), masked.value, low, masked.width)
        return least is not None and least <= high
    (low, high), (low2, high2) = _bounds(one), _bounds(other)
    return max(low, low2) <= min(high, high2)


def _mask(one: Argument) -> int:
    return (1 << one.width) - 1 if one.mask is None else one.mask


def _bounds(one: Argument) -> tuple[int, int]:
    """The least and the greatest value that an ordering admits; crossed if there is none."""
    most = (1 << one.width) - 1
    return {
        "lt": (0, one.value - 1), "le": (0, one.value),
        "gt": (one.value + 1, most), "ge": (one.value, most),
    }[one.op]  # fmt: skip


def _is_only(one: Argument, value: int) -> bool:
    """Whether a comparison holds for this value and no other, or for none at all."""
    if one.op == "eq":
        return _mask(one) == (1 << one.width) - 1 and one.value == value
    low, high = _bounds(one)
    return low > high or low == high == value


def _least(mask: int, value: int, low: int, width: int) -> int | None:
    """The least number from `low` on that is `value` under the mask."""
    if low & mask == value and low >> width == 0:
        return low
    for bit in range(width):  # the first that agrees with `low` above this bit and is larger here
        if not low >> bit & 1:
            found = (low >> bit | 1) << bit | value & ((1 << bit) - 1)
            if found & mask == value and found >> width == 0:
                return found
    return None
