"""A script as text: one line a record, with the call's name, its arguments and where it goes on.

For people (`sandboxd plan --script`); pure. What an argument points at is shown in its place where
it is known what it is: a path, bytes to write, a struct of two or three words.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from sandboxd import plan
from sandboxd.script import lower, writer
from sandboxd.script.numbers import numbers
from sandboxd.script.record import IGNORE, OFFSETS, RECORD_SIZE, Condition, Image, Record

SHOWN = 64
"""Characters of a string, and SHOWN_WORDS of an argv, that are shown."""
SHOWN_WORDS = 8

_BY_OFFSET: Mapping[int, str] = MappingProxyType({at: name for name, at in OFFSETS.items()})
_OPEN = {
    0o1: "O_WRONLY", 0o100: "O_CREAT", 0o200: "O_EXCL", 0o2000000: "O_CLOEXEC",
    0o10000000: "O_PATH",
}  # fmt: skip
_MOUNT = {
    1: "MS_RDONLY", 2: "MS_NOSUID", 4: "MS_NODEV", 8: "MS_NOEXEC", 0x1000: "MS_BIND",
    0x4000: "MS_REC", 0x40000: "MS_PRIVATE",
}  # fmt: skip
_AT = {0x100: "AT_SYMLINK_NOFOLLOW", 0x1000: "AT_EMPTY_PATH", 0x8000: "AT_RECURSIVE"}
_TREE = {1: "OPEN_TREE_CLONE", 0x8000: "AT_RECURSIVE", 0o2000000: "O_CLOEXEC"}
_CLONE = {0x100: "CLONE_VM", 0x4000: "CLONE_VFORK"} | {
    flag: f"CLONE_NEW{name.upper()}" for name, flag in plan.NAMESPACES.items()
}
_PRCTL = {
    1: "PR_SET_PDEATHSIG", 4: "PR_SET_DUMPABLE", 24: "PR_CAPBSET_DROP",
    38: "PR_SET_NO_NEW_PRIVS", 47: "PR_CAP_AMBIENT",
}  # fmt: skip
_RESOURCES = {number: f"RLIMIT_{name}" for name, number in lower.RESOURCES.items()}


@dataclass(frozen=True, slots=True)
class _Listed:
    """An image and what is needed to read it."""

    image: Image
    arch: str
    late: Mapping[int, str]
    """Addresses whose words are known only later -> where they come from."""

    def data(self, address: int, size: int) -> bytes | None:
        """What lies at an address before the script starts; None outside of the image."""
        start = address - self.image.origin
        if not 0 <= start < self.image.memory:
            return None
        return self.image.content[start : start + size].ljust(size, b"\0")

    def string(self, address: int) -> bytes | None:
        start = address - self.image.origin
        if not 0 <= start < len(self.image.content):
            return None
        end = self.image.content.find(b"\0", start)
        return self.image.content[start : end if end >= 0 else None]

    def place(self, address: int) -> str:
        """A record's field, or data, by name."""
        offset = address - self.image.address(0)
        index, field = divmod(offset, RECORD_SIZE)
        if 0 <= index < len(self.image.tags):
            name = _BY_OFFSET.get(field, f"+{field}")
            return f"#{index}" if field == 0 else f"#{index}.{name}"
        inside = 0 <= address - self.image.origin < self.image.memory
        return f"&{address - self.image.origin:x}" if inside else f"{address:#x}"


Reader = Callable[[_Listed, Record, int], str]


def _number(listed: _Listed, _: Record, value: int) -> str:
    inside = 0 <= value - listed.image.origin < listed.image.memory
    return listed.place(value) if inside else str(value) if abs(value) < 65536 else hex(value)


def _path(listed: _Listed, record: Record, value: int) -> str:
    text = listed.string(value) if value else None
    return _number(listed, record, value) if text is None else _quoted(text)


def _directory(listed: _Listed, record: Record, value: int) -> str:
    return "AT_FDCWD" if value == writer.AT_FDCWD else _number(listed, record, value)


def _mode(_: _Listed, __: Record, value: int) -> str:
    return f"{value:#o}" if value else "0"


def _flags(names: Mapping[int, str]) -> Reader:
    def read(listed: _Listed, record: Record, value: int) -> str:
        known = [name for flag, name in names.items() if flag and value & flag]
        rest = value & ~sum(flag for flag in names if flag and value & flag)
        if rest or not known:
            known.append(_number(listed, record, rest))
        return "|".join(known)

    return read


def _one_of(names: Mapping[int, str]) -> Reader:
    return lambda listed, record, value: names.get(value) or _number(listed, record, value)


def _content(length: str) -> Reader:
    """Bytes whose number is another argument."""

    def read(listed: _Listed, record: Record, value: int) -> str:
        found = listed.data(value, min(getattr(record, length), 4 * SHOWN))
        return _number(listed, record, value) if found is None else _quoted(found)

    return read


def _words(count: int) -> Reader:
    def read(listed: _Listed, record: Record, value: int) -> str:
        found = listed.data(value, 8 * count)
        if not value or found is None:
            return _number(listed, record, value)
        words = struct.unpack(f"<{count}Q", found)
        shown = ("unlimited" if word == lower.RLIM_INFINITY else hex(word) for word in words)
        return f"{{{', '.join(shown)}}}"

    return read


def _strings(listed: _Listed, record: Record, value: int) -> str:
    """An array of pointers to strings that ends with NULL (execve(2))."""
    words: list[str] = []
    for at in range(value, value + 8 * SHOWN_WORDS, 8):
        pointer = int.from_bytes(listed.data(at, 8) or b"", "little")
        text = listed.string(pointer) if pointer else None
        if text is None:
            return f"[{', '.join(words)}]"
        words.append(_quoted(text))
    return f"[{', '.join(words)}, ...]"


def _quoted(data: bytes) -> str:
    """In double quotes, as C writes it; what is too long is cut."""
    text = repr(data)[2:-1].replace('"', '\\"').replace("\\'", "'")
    return f'"{text}"' if len(text) <= SHOWN else f'"{text[:SHOWN]}"...'


_READERS: Mapping[str, tuple[Reader, ...]] = MappingProxyType(
    {
        "capset": (_number, _words(3)),
        "chdir": (_path,),
        "clone": (_flags(_CLONE),),
        "execve": (_path, _strings, _strings),
        "fchmodat": (_directory, _path),
        "fchownat": (_directory, _path),
        "landlock_create_ruleset": (_words(3), _number, _number),
        "landlock_add_rule": (_number, _number, _words(2)),
        "mkdirat": (_directory, _path, _mode),
        "mount": (_path, _path, _path, _flags(_MOUNT), _path),
        "mount_setattr": (_directory, _path, _flags(_AT), _words(4), _number),
        "move_mount": (_number, _path, _directory, _path, _number),
        "open_tree": (_directory, _path, _flags(_TREE)),
        "openat": (_directory, _path, _flags(_OPEN), _mode),
        "pivot_root": (_path, _path),
        "prctl": (_one_of(_PRCTL),),
        "prlimit64": (_number, _one_of(_RESOURCES), _words(2)),
        "sendto": (_number, _content("a2")),
        "setns": (_number, _flags(_CLONE)),
        "sethostname": (_content("a1"),),
        "statfs": (_path,),
        "symlinkat": (_path, _directory, _path),
        "umount2": (_path,),
        "unlinkat": (_directory, _path),
        "unshare": (_flags(_CLONE),),
        "write": (_number, _content("a2")),
    }
)
_ARITY: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("close", "exit_group", "setgroups", "umask"), 1),
        **dict.fromkeys(("dup3", "close_range", "ioctl", "read", "seccomp", "socket"), 3),
        **dict.fromkeys(("recvmsg", "sendmsg", "setresuid", "setresgid", "unlinkat"), 3),
        **dict.fromkeys(("clock_gettime", "getrusage", "kill", "landlock_restrict_self"), 2),
        **dict.fromkeys(("capset", "clone3", "pivot_root", "setgroups", "setns"), 2),
        **dict.fromkeys(("sethostname", "statfs", "umount2"), 2),
        **dict.fromkeys(("rt_sigaction", "rt_sigprocmask", "rt_sigtimedwait", "wait4"), 4),
        **dict.fromkeys(("landlock_add_rule", "openat", "prlimit64"), 4),
        **dict.fromkeys(("execve", "mkdirat", "open_tree", "symlinkat", "write"), 3),
        **dict.fromkeys(("fchownat", "mount", "mount_setattr", "move_mount", "prctl"), 5),
        **dict.fromkeys(("setsid", "getppid"), 0),
        "chdir": 1,
        "landlock_create_ruleset": 3,
        "unshare": 1,
    }
)
"""Arguments a call has (man 2); six for what is not named here."""


def listing(image: Image, arch: str) -> Iterator[tuple[int, str]]:
    """(tag, line) of every record; the tag is the number of the plan's step, or -1."""
    listed = _Listed(image, arch, MappingProxyType(_late(image)))
    for index, tag in enumerate(image.tags):
        record = image.record(index)
        yield tag, f"#{index:<4} {_call(listed, record, index)}{_effects(listed, record)}"


def _late(image: Image) -> dict[int, str]:
    """What other records store, and what is put in when the script is used."""
    late = {image.origin + at: name.partition(".")[0] for name, at in image.marks.items()}
    stores = ((index, image.record(index).store) for index in range(len(image.tags)))
    return late | {store: f"#{index}" for index, store in stores if store}


@cache
def _names(arch: str) -> Mapping[int, str]:
    return MappingProxyType({number: name for name, number in numbers(arch).items()})


def _call(listed: _Listed, record: Record, index: int) -> str:
    name = _names(listed.arch).get(record.nr, f"syscall_{record.nr}")
    readers = _READERS.get(name, ())
    values = [record.a0, record.a1, record.a2, record.a3, record.a4, record.a5]
    shown = []
    for place, value in enumerate(values[: _ARITY.get(name, 6) if record.nr >= 0 else 1]):
        field = listed.image.address(index) + OFFSETS[f"a{place}"]
        read = readers[place] if place < len(readers) else _number
        late = listed.late.get(field)
        shown.append(f"<{late}>" if late is not None else read(listed, record, value))
    return f"{name}({', '.join(shown)})" if record.nr >= 0 else shown[0]


def _effects(listed: _Listed, record: Record) -> str:
    """Where the value goes, whether failure counts, and where to go on."""
    parts = [f"-> {listed.place(record.store)}"] if record.store else []
    if record.nr >= 0 and record.flags & IGNORE:
        parts.append("may fail")
    if record.condition is not Condition.NEVER:
        when = record.condition.name.lower()
        if record.condition is Condition.EQUAL:
            when += f" {listed.place(record.compare)}"
        go = f"go to {listed.place(record.target)}"
        parts.append(go if record.condition is Condition.ALWAYS else f"if {when} {go}")
    return "".join(f"  {part}" for part in parts)
