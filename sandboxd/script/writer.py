"""An assembler for scripts: numbers of system calls and descriptors, and what all scripts do."""

from __future__ import annotations

from sandboxd.script.numbers import numbers
from sandboxd.script.record import NO_CALL, Assembler, Condition, Label, Operand

AT_FDCWD = -100
O_RDONLY, O_WRONLY, O_CREAT, O_EXCL = 0, 1, 0o100, 0o200
O_CLOEXEC = 0o2000000
O_PATH = 0o10000000
# O_DIRECTORY and O_NOFOLLOW differ between the architectures (asm/fcntl.h).
O_DIRECTORY = {"x86_64": 0o200000, "aarch64": 0o40000}
# include/uapi/linux/openat2.h
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_IN_ROOT = 2, 4, 0x10

SOCKET = 3
"""The socket of zygote and init: always this descriptor."""
FIRST_DESCRIPTOR = 4
"""What arrives over the socket gets the lowest free numbers, from here on."""
RULESET = 4
"""init's Landlock ruleset, where there is one; the job's descriptors then start one higher."""
SYSCTLS = 60
TREE = 61
"""A mount on its way to its place."""
PROCESS = 62
"""init's own directory in /proc, until its ids are mapped."""
FIRST_SLOT = 100
"""Mounts taken by OpenTree wait at FIRST_SLOT + slot."""


class Writer:
    """An assembler that knows the architecture's numbers and the idioms of scripts."""

    def __init__(self, arch: str, asm: Assembler) -> None:
        self.arch = arch
        self.asm = asm
        self.nr = numbers(arch)
        self._marks = 0

    def call(
        self,
        name: str,
        *args: Operand,
        store: Operand = 0,
        ignore: bool = False,
        when: Condition = Condition.NEVER,
        compare: Operand | None = None,
        target: Operand | None = None,
    ) -> Label:
        return self.asm.emit(
            self.nr[name], *args, store=store, ignore=ignore, when=when, compare=compare,
            target=target,
        )  # fmt: skip

    def path(self, text: str | bytes) -> Label:
        """Of text that stands for other bytes than UTF-8, these bytes (PEP 383)."""
        raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        return self.asm.string(raw)

    def mark(self, name: str, where: Operand) -> None:
        """Name a place for a value that is known only when a sandbox is made."""
        self._marks += 1
        self.asm.mark(f"{name}.{self._marks}", where)

    def assign(self, value: Operand, where: Operand) -> None:
        self.asm.emit(NO_CALL, value, store=where)

    def write_file(self, path: str | bytes, content: bytes | Label, length: int = 0, *,
                   flags: int = O_WRONLY, mode: int = 0, optional: bool = False,
                   directory: Operand = AT_FDCWD) -> None:  # fmt: skip
        """open, write, close (with all strays: a descriptor can be stored in one place only)."""
        if isinstance(content, bytes):
            length, content = len(content), self.asm.data(content)
        write = self.asm.label()
        self.call(
            "openat", directory, self.path(path), flags | O_CLOEXEC, mode,
            store=write.field("a0"), ignore=optional,
        )  # fmt: skip
        self.asm.place(write)
        self.call("write", 0, content, length, ignore=optional)
        self.close_strays()

    def close_strays(self, first: int = FIRST_DESCRIPTOR, last: int = SYSCTLS - 1) -> None:
        self.call("close_range", first, last, 0)

    def enter(self, root: str, path: str, where: Operand) -> None:
        """A descriptor of what `path` is in `root`: no link in it leads out (openat2(2))."""
        relative = self.path(path.strip("/") or ".")
        how = self.asm.words((O_PATH | O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS))
        inner = self.asm.label()
        flags = O_PATH | O_DIRECTORY[self.arch] | O_CLOEXEC
        self.call("openat", AT_FDCWD, self.path(root), flags, 0, store=inner.field("a0"))
        self.asm.place(inner)
        self.call("openat2", 0, relative, how, 24, store=where)

    def attributes(self, set_: int, clear: int = 0) -> Label:
        """struct mount_attr: attr_set, attr_clr, propagation, userns_fd (mount_setattr(2))."""
        return self.asm.words((set_, clear, 0, 0))
