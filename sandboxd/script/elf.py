"""Wraps the machine and an image into a program the kernel can execute, with no linker.

A static ELF of two segments (elf(5)): the headers and the machine's code, readable and
executable, at `CODE`; and the image, readable and writable, at `BASE`, followed by zeroes up to
the memory the script asked for. Nothing is both writable and executable, the stack included.
There are no sections: they are for linkers and debuggers.
"""

from __future__ import annotations

import struct

from sandboxd.script import machine
from sandboxd.script.record import BASE, CODE

# e_machine, and the largest page the architecture's kernels use: a segment can be mapped only
# where its file offset and its address agree modulo the page size.
_ARCHITECTURES = {"x86_64": (62, 0x1000), "aarch64": (183, 0x10000)}

_HEADER = struct.Struct("<4sBBBB8xHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")

_ELFCLASS64, _ELFDATA2LSB, _EV_CURRENT, _ELFOSABI_NONE = 2, 1, 1, 0
_ET_EXEC = 2
_PT_LOAD, _PT_GNU_STACK = 1, 0x6474E551
_EXECUTE, _WRITE, _READ = 1, 2, 4


def program(arch: str, image: bytes, memory: int) -> bytes:
    """An executable that runs the image's script, with `memory` bytes from `BASE` on."""
    if memory < len(image):
        raise ValueError(f"an image of {len(image)} bytes does not fit in {memory}")
    number, page = _ARCHITECTURES[arch]
    headers = _HEADER.size + 3 * _SEGMENT.size
    text = machine.code(arch)
    end = headers + len(text)
    image_at = -(-end // page) * page
    header = _HEADER.pack(
        b"\x7fELF",
        _ELFCLASS64,
        _ELFDATA2LSB,
        _EV_CURRENT,
        _ELFOSABI_NONE,
        _ET_EXEC,
        number,
        _EV_CURRENT,
        CODE + headers,  # entry point
        _HEADER.size,  # where the segments' headers are
        0,  # no sections' headers
        0,  # flags
        _HEADER.size,
        _SEGMENT.size,
        3,
        0,
        0,
        0,
    )
    segments = (
        (_PT_LOAD, _READ | _EXECUTE, 0, CODE, CODE, end, end, page),
        (_PT_LOAD, _READ | _WRITE, image_at, BASE, BASE, len(image), memory, page),
        (_PT_GNU_STACK, _READ | _WRITE, 0, 0, 0, 0, 0, 16),
    )
    content = header + b"".join(_SEGMENT.pack(*segment) for segment in segments) + text
    return content.ljust(image_at, b"\0") + image
