"""A seccomp profile of the OCI's -> OciFilter: what its rules say, not yet for any machine.

The format is that of the runtime specification (config-linux.md, "Seccomp"), with what engines add
to it in the files that they are configured with: archMap, includes and excludes by capability,
architecture and kernel, a single `name`, `comment`, errnos by name. What cannot be honoured is a
PolicyError; it names the file and the place in it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import msgspec

from sandboxd.compile import bpf
from sandboxd.compile.document import Node, read
from sandboxd.compile.reading import did_you_mean

_RETURNS = MappingProxyType(
    {
        "SCMP_ACT_ALLOW": bpf.ALLOW,
        "SCMP_ACT_ERRNO": bpf.ERRNO,
        "SCMP_ACT_KILL": bpf.KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS": bpf.KILL_PROCESS,
        "SCMP_ACT_KILL_THREAD": bpf.KILL_THREAD,
        "SCMP_ACT_LOG": bpf.LOG,
        "SCMP_ACT_TRACE": bpf.TRACE,
        "SCMP_ACT_TRAP": bpf.TRAP,
    }
)
NOTIFY = "SCMP_ACT_NOTIFY"
_WITH_ERRNO = frozenset({"SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"})
_MOST_ERRNO = 0xFFFF
"""SECCOMP_RET_DATA; the kernel makes 4095 of what is more (__seccomp_filter)."""

Operator = Literal["ne", "lt", "le", "eq", "ge", "gt", "masked_eq"]
_OPERATORS: MappingProxyType[str, Operator] = MappingProxyType(
    {
        "SCMP_CMP_NE": "ne", "SCMP_CMP_LT": "lt", "SCMP_CMP_LE": "le", "SCMP_CMP_EQ": "eq",
        "SCMP_CMP_GE": "ge", "SCMP_CMP_GT": "gt", "SCMP_CMP_MASKED_EQ": "masked_eq",
    }
)  # fmt: skip
_ARCHITECTURES = tuple(
    f"SCMP_ARCH_{one}"
    for one in (
        *("X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL"),
        *("MIPSEL64", "MIPSEL64N32", "PPC", "PPC64", "PPC64LE", "S390", "S390X", "PARISC"),
        *("PARISC64", "RISCV64", "LOONGARCH64", "M68K", "SH", "SHEB"),
    )
)
_FLAGS = MappingProxyType(
    {
        "SECCOMP_FILTER_FLAG_TSYNC": True,  # there is one thread
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW": True,  # asks for less; not taking it is stricter
        "SECCOMP_FILTER_FLAG_LOG": False,
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": True,  # of NOTIFY, which is refused itself
    }
)
"""Flag -> whether a filter without it does as the profile says."""
MOST_RULES = 8192
MOST_COMPARISONS = 6


class Comparison(msgspec.Struct, frozen=True):
    """One of a rule's: argument `op` value; for masked_eq (argument & value) == second."""

    index: int
    op: Operator
    value: int
    second: int


class When(msgspec.Struct, frozen=True):
    """`includes` or `excludes` of a rule."""

    arches: tuple[str, ...] = ()
    caps: tuple[str, ...] = ()
    kernel: tuple[int, int] | None = None


class Entry(msgspec.Struct, frozen=True):
    """One rule: for these names, when all comparisons hold, this is returned."""

    names: tuple[str, ...]
    action: int
    comparisons: tuple[Comparison, ...]
    includes: When
    excludes: When
    where: str


class OciFilter(msgspec.Struct, frozen=True):
    """A profile as it was written."""

    default: int
    architectures: tuple[str, ...]
    subordinate: tuple[tuple[str, tuple[str, ...]], ...]
    """archMap: an architecture, and what goes with it where it is the machine's own."""
    entries: tuple[Entry, ...]
    where: str


@lru_cache(maxsize=16)
def parse(text: str, file: str, path: str = "") -> OciFilter:
    """The profile in this text; `path` is the place of it in a larger document."""
    return of(read(text, file, path))


def of(top: Node) -> OciFilter:
    """The profile that a part of a document is."""
    top.only(
        "defaultAction", "defaultErrnoRet", "defaultErrno", "architectures", "archMap", "flags",
        "listenerPath", "listenerMetadata", "syscalls", "comment",
    )  # fmt: skip
    default = _action(top, "defaultAction", "defaultErrnoRet", "defaultErrno")
    if top.entries("archMap") and top.entries("architectures"):
        raise top.below("archMap").wrong("there are architectures, too", hint="leave one out")
    for flag in top.entries("flags"):
        if not _FLAGS[_one_of(flag, _FLAGS)]:
            raise flag.wrong("filters are loaded without this flag", hint="leave it out")
    rules = top.entries("syscalls")
    if len(rules) > MOST_RULES:
        raise top.below("syscalls").wrong(f"{len(rules)} rules, more than {MOST_RULES}")
    return OciFilter(
        default=default,
        architectures=_architectures(top, "architectures"),
        subordinate=tuple(map(_mapped, top.entries("archMap"))),
        entries=tuple(map(_entry, rules)),
        where=top.where,
    )


def _one_of(node: Node, known: Collection[str]) -> str:
    word = node.text
    if word not in known:
        hint = did_you_mean(word, known) or f"one of {', '.join(known)}"
        raise node.wrong(f"{word!r} is not among the choices", hint=hint)
    return word


def _architectures(node: Node, key: str) -> tuple[str, ...]:
    return tuple(_one_of(one, _ARCHITECTURES) for one in node.entries(key))


def _mapped(node: Node) -> tuple[str, tuple[str, ...]]:
    node.only("architecture", "subArchitectures")
    own = _one_of(node.need("architecture"), _ARCHITECTURES)
    return own, _architectures(node, "subArchitectures")


def _action(node: Node, key: str, number: str, name: str) -> int:
    """What SECCOMP_RET_... an action is, with its errno."""
    where = node.need(key)
    if where.value == NOTIFY:
        raise where.wrong("there is nobody to be asked", hint="SCMP_ACT_ERRNO answers without")
    word = _one_of(where, _RETURNS)
    given = [one for one in (node.get(number), node.get(name)) if one is not None]
    if word not in _WITH_ERRNO:
        for one in given:
            raise one.wrong(f"{word} has no errno", hint="leave it out")
        return _RETURNS[word]
    values = {_errno(one) for one in given} or {errno.EPERM}
    if len(values) > 1:
        raise given[1].wrong(f"{number} says something else", hint="leave one out")
    return _RETURNS[word] | values.pop()


def _errno(node: Node) -> int:
    if not isinstance(node.value, str):
        return node.number(0, _MOST_ERRNO)
    number: int | None = getattr(errno, node.value, None) if node.value.isupper() else None
    if number is None:
        raise node.wrong(f"{node.value!r} is no errno", hint="e.g. EPERM, or its number")
    return number


def _entry(node: Node) -> Entry:
    node.only(
        "names", "name", "action", "errnoRet", "errno", "args", "comment", "includes", "excludes"
    )
    names = node.texts("names")
    if single := node.get("name"):
        if names:
            raise single.wrong("there are names, too", hint="leave one out")
        names = (single.text,)
    if not names:
        raise node.wrong("a rule without names", hint='"names": ["read"]')
    comparisons = node.entries("args")
    if len(comparisons) > MOST_COMPARISONS:
        raise node.below("args").wrong(f"more than {MOST_COMPARISONS} comparisons")
    return Entry(
        names=names,
        action=_action(node, "action", "errnoRet", "errno"),
        comparisons=tuple(map(_comparison, comparisons)),
        includes=_when(node.get("includes")),
        excludes=_when(node.get("excludes")),
        where=node.where,
    )


def _comparison(node: Node) -> Comparison:
    node.only("index", "value", "valueTwo", "op")
    second = node.get("valueTwo")
    return Comparison(
        index=node.need("index").number(0, 5),
        op=_OPERATORS[_one_of(node.need("op"), _OPERATORS)],
        value=node.need("value").number(),
        second=0 if second is None else second.number(),
    )


def _when(node: Node | None) -> When:
    if node is None:
        return When()
    node.only("arches", "caps", "minKernel")
    least = node.get("minKernel")
    return When(
        arches=node.texts("arches"),
        caps=node.texts("caps"),
        kernel=None if least is None else _kernel(least),
    )


def _kernel(node: Node) -> tuple[int, int]:
    found = release(node.text)
    if found is None:
        raise node.wrong(f"{node.text!r} is no kernel version", hint='e.g. "4.8"')
    return found


def release(text: str) -> tuple[int, int] | None:
    """The first two numbers of a kernel's version."""
    found = re.match(r"([0-9]{1,9})\.([0-9]{1,9})", text)
    return (int(found[1]), int(found[2])) if found else None
