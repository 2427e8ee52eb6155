"""The launch script's format: records, their image in memory, and the builder that lays it out.

A script is an array of records and the data they point at, at absolute addresses in one fixed
mapping. A record is one raw system call and what to do with its result. Its fields, by offset:

0      nr      system call number; negative: no call, the value is `a0`
8-48   a0-a5   arguments, or addresses of data elsewhere in the image
56     store   if not 0: the address of a u64 that receives the value, also when the call failed
64     flags   bit 0: go on although the call failed; bits 8-15: the condition (`Condition`)
72     compare the address of the u64 that `Condition.EQUAL` compares with
80     target  the address of the record to go on at when the condition holds
88     result  receives the value, always

What an executor does with the record at `p`, exactly and in this order (`machine.py` and
`launch/executor.py` are the two that exist; tests/launch/test_conformance.py holds both to it):

1. value = nr < 0 ? a0 : syscall(nr, a0 ... a5)
2. result field = value; if store != 0: u64 at store = value
3. if nr >= 0, value is in -4095..-1 (an errno) and `IGNORE` is clear: u64 at the image's error
   cell = p; p = the image's handler; go on there
4. p = condition holds ? target : p + 96

Every field is read from memory when its turn comes, so a script may rewrite itself: a result can
be stored into a later record's argument, and recvmsg(2) may write straight into one.

The image starts with a header of three u64 at `BASE`: the handler's address, the error cell's
address and the address of the first record. Scripts that arrive later (a job's blob) have an
origin of their own and whatever words at their head their reader agreed on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

CODE = 0x10000000
BASE = CODE + 0x10000
"""One page table reaches from CODE over the start of all that is ours: see zygote.py."""
HEADER_SIZE = 64
RECORD_SIZE = 96

IGNORE = 1
CONDITION_SHIFT = 8
NO_CALL = -1
NO_TAG = -1
LOWEST_ERROR = -4095  # what the kernel returns between this and -1 is an errno: IS_ERR_VALUE

_MASK = 2**64 - 1


class Condition(IntEnum):
    """When a record goes on at its target instead of at the next record."""

    NEVER = 0
    ZERO = 1
    NONZERO = 2
    EQUAL = 3
    ALWAYS = 4
    NEGATIVE = 5


class Record(NamedTuple):
    """One record as it stands in memory; every field is a signed 64-bit integer."""

    nr: int
    a0: int = 0
    a1: int = 0
    a2: int = 0
    a3: int = 0
    a4: int = 0
    a5: int = 0
    store: int = 0
    flags: int = 0
    compare: int = 0
    target: int = 0
    result: int = 0

    def pack(self) -> bytes:
        return _pack(self)

    @classmethod
    def unpack(cls, content: bytes) -> Record:
        return cls(*struct.unpack("<12q", content))

    @property
    def condition(self) -> Condition:
        return Condition(self.flags >> CONDITION_SHIFT & 0xFF)

    @property
    def errno(self) -> int:
        """The positive errno of a call that failed; 0 if it did not, or was no call."""
        return -self.result if self.nr >= 0 and LOWEST_ERROR <= self.result < 0 else 0


OFFSETS: Mapping[str, int] = MappingProxyType(
    {name: 8 * position for position, name in enumerate(Record._fields)}
)


class _Block:
    """What is laid out as one piece: a record, data, zeroed space, or nothing (a mere position)."""

    __slots__ = ("address", "align", "content", "size")

    def __init__(
        self, content: bytes | tuple[Operand, ...] = b"", size: int = 0, align: int = 8
    ) -> None:
        self.content = content
        self.size = size
        self.align = align
        self.address = 0  # not laid out yet

    def pack(self) -> bytes:
        packed = self.content if isinstance(self.content, bytes) else _pack(self.content)
        return packed.ljust(self.size, b"\0")


class Label:
    """The address of a record, of a field of one, or of data: known once the image is finished.

    Records come before data, so where data lies depends on how many records there will be.
    """

    __slots__ = ("block", "offset")

    def __init__(self, block: _Block, offset: int = 0) -> None:
        self.block = block
        self.offset = offset

    def __add__(self, distance: int) -> Label:
        return Label(self.block, self.offset + distance)

    def field(self, name: str) -> Label:
        """The address of one field of the record labelled, to store into or receive into."""
        return self + OFFSETS[name]


Operand = int | Label


class Image(NamedTuple):
    """A finished script: what to load at `origin`, and what its records and words mean."""

    content: bytes
    tags: tuple[int, ...]
    origin: int
    records_offset: int
    marks: Mapping[str, int]
    memory: int  # bytes from `origin`; what lies beyond `content` starts as zeroes

    def address(self, index: int) -> int:
        return self.origin + self.records_offset + index * RECORD_SIZE

    def number(self, address: int) -> int:
        """Which record stands at an address; ValueError if none does."""
        index, rest = divmod(address - self.address(0), RECORD_SIZE)
        if rest or not 0 <= index < len(self.tags):
            raise ValueError(f"no record at {address:#x}")
        return index

    def tag(self, address: int) -> int:
        """The step of the plan the record at an address belongs to."""
        return self.tags[self.number(address)]

    def record(self, index: int) -> Record:
        start = self.records_offset + index * RECORD_SIZE
        return Record.unpack(self.content[start : start + RECORD_SIZE])

    def patched(self, values: Mapping[str, int]) -> bytes:
        """The content with the u64 at each named mark replaced: all that a job costs here."""
        content = bytearray(self.content)
        for name, value in values.items():
            struct.pack_into("<Q", content, self.marks[name], value & _MASK)
        return bytes(content)


class Assembler:
    """Collects records and data, then lays them out: head words, records, data, zeroed space."""

    def __init__(self, origin: int = BASE) -> None:
        self.origin = origin
        self.tag = NO_TAG  # of records emitted without a tag of their own
        self._records: list[_Block] = []
        self._tags: list[int] = []
        self._data: list[_Block] = []
        self._space: list[_Block] = []
        self._strings: dict[bytes, Label] = {}
        self._marks: dict[str, Operand] = {}

    def label(self) -> Label:
        """A name for a record that is to come; see `place`."""
        return Label(_Block())

    def place(self, label: Label) -> Label:
        """Let the label mean the record emitted next; several labels may mean the same one."""
        if label.block in self._records:
            raise ValueError("this label has been placed already")
        self._records.append(label.block)
        return label

    def emit(
        self,
        nr: int,
        *args: Operand,
        store: Operand = 0,
        ignore: bool = False,
        when: Condition = Condition.NEVER,
        compare: Operand | None = None,
        target: Operand | None = None,
        tag: int | None = None,
    ) -> Label:
        """Append a record; the label returned is its address, and `.field(name)` its fields'."""
        if len(args) > 6:
            raise ValueError("a system call takes at most six arguments")
        if (when is Condition.NEVER) != (target is None):
            raise ValueError("a condition needs a target, and a target a condition")
        if (when is Condition.EQUAL) != (compare is not None):
            raise ValueError("the condition EQUAL, and no other, needs an address to compare with")
        flags = when << CONDITION_SHIFT | (IGNORE if ignore else 0)
        args += (0,) * (6 - len(args))
        words = (nr, *args, store, flags, compare or 0, target or 0, 0)
        self._tags.append(self.tag if tag is None else tag)
        return _append(self._records, words, RECORD_SIZE)

    def jump(self, target: Operand) -> Label:
        """Append a record that does nothing but go on at the target."""
        return self.emit(NO_CALL, when=Condition.ALWAYS, target=target)

    def data(self, content: bytes, align: int = 8) -> Label:
        """The address of these bytes, writable and not shared with equal ones."""
        return _append(self._data, content, len(content), align)

    def string(self, content: bytes) -> Label:
        """The address of a NUL-terminated string; equal strings are one, so leave them as is."""
        if b"\0" in content:
            raise ValueError("a C string cannot contain NUL")
        if content not in self._strings:
            self._strings[content] = self.data(content + b"\0", align=1)
        return self._strings[content]

    def words(self, values: Iterable[Operand], align: int = 8) -> Label:
        """The address of u64 words: a struct whose fields are, or pad to, 64 bits."""
        content = tuple(values)
        return _append(self._data, content, 8 * len(content), align)

    def pointers(self, addresses: Iterable[Operand]) -> Label:
        """The address of an array of addresses that ends with NULL, as execve(2) wants them."""
        return self.words((*addresses, 0))

    def cell(self, value: Operand = 0) -> Label:
        """The address of one u64 that records store into and compare with."""
        return self.words((value,))

    def space(self, size: int, align: int = 8) -> Label:
        """The address of zeroed memory that takes no room in the image's content."""
        return _append(self._space, b"", size, align)

    def mark(self, name: str, where: Operand) -> None:
        """Name a u64 (a cell, a word, a record's field) that `Image.patched` may replace."""
        if name in self._marks:
            raise ValueError(f"there is a mark {name!r} already")
        self._marks[name] = where

    def finish(self, head: Iterable[Operand] = ()) -> Image:
        """Lay everything out; `head` is the words before the records, padded to 64 bytes."""
        if self._records and not self._records[-1].size:
            raise ValueError("a label was placed after the last record")
        words = tuple(head)
        front = _Block(words, -(-8 * len(words) // HEADER_SIZE) * HEADER_SIZE)
        written = [front, *self._records, *self._data]
        address = self.origin
        for block in (*written, *self._space):
            block.address = -(-address // block.align) * block.align
            address = block.address + block.size
        last = written[-1]
        content = bytearray(last.address + last.size - self.origin)
        for block in written:
            start = block.address - self.origin
            content[start : start + block.size] = block.pack()
        marks = {name: _address(where) - self.origin for name, where in self._marks.items()}
        if any(not 0 <= offset <= len(content) - 8 for offset in marks.values()):
            raise ValueError("a mark lies outside the image's content")
        named, memory = MappingProxyType(marks), address - self.origin
        return Image(bytes(content), tuple(self._tags), self.origin, front.size, named, memory)


def _append(
    blocks: list[_Block], content: bytes | tuple[Operand, ...], size: int, align: int = 8
) -> Label:
    blocks.append(_Block(content, size, align))
    return Label(blocks[-1])


def _address(operand: Operand) -> int:
    if isinstance(operand, int):
        return operand
    if not operand.block.address:
        raise ValueError("a label is used that was not placed")
    return operand.block.address + operand.offset


def _pack(words: Iterable[Operand]) -> bytes:
    values = [(word if isinstance(word, int) else _address(word)) & _MASK for word in words]
    return struct.pack(f"<{len(values)}Q", *values)
