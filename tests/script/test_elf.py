"""The program around the machine and an image: headers as elf(5) has them."""

from __future__ import annotations

import struct

import pytest

from sandboxd.script import elf, machine
from sandboxd.script.record import BASE, CODE

IMAGE = bytes(range(100))
READ, WRITE, EXECUTE = 4, 2, 1


def segments(program: bytes) -> list[tuple[int, ...]]:
    """Type, flags, offset, virtual and physical address, file and memory size, alignment."""
    at, count = struct.unpack_from("<Q", program, 32)[0], struct.unpack_from("<H", program, 56)[0]
    return [struct.unpack_from("<IIQQQQQQ", program, at + 56 * i) for i in range(count)]


@pytest.fixture(params=machine.ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


def test_it_is_a_static_program_of_the_architecture(arch: str) -> None:
    program = elf.program(arch, IMAGE, 4096)
    assert program[:7] == b"\x7fELF\x02\x01\x01"
    kind, number, version, entry = struct.unpack_from("<HHIQ", program, 16)
    assert (kind, number, version) == (2, {"x86_64": 62, "aarch64": 183}[arch], 1)
    size, segment_size, count, _, sections, _ = struct.unpack_from("<6H", program, 52)
    assert (size, segment_size, count, sections) == (64, 56, 3, 0)
    assert program[entry - CODE :].startswith(machine.code(arch))


def test_code_is_not_writable_and_data_not_executable(arch: str) -> None:
    text, data, stack = segments(elf.program(arch, IMAGE, 123456))
    assert (text[0], text[1], text[3]) == (1, READ | EXECUTE, CODE)
    assert (data[0], data[1], data[3]) == (1, READ | WRITE, BASE)
    assert (stack[0], stack[1]) == (0x6474E551, READ | WRITE)


def test_the_image_is_loaded_whole_and_followed_by_zeroes(arch: str) -> None:
    program = elf.program(arch, IMAGE, 123456)
    _, data, _ = segments(program)
    offset, address, _, in_file, in_memory, align = data[2:]
    assert program[offset:] == IMAGE
    assert (in_file, in_memory) == (100, 123456)
    assert offset % align == address % align == 0
    assert align >= {"x86_64": 4096, "aarch64": 65536}[arch]


def test_the_image_must_fit_its_memory(arch: str) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        elf.program(arch, IMAGE, 99)


def test_the_same_image_gives_the_same_program(arch: str) -> None:
    assert elf.program(arch, IMAGE, 4096) == elf.program(arch, IMAGE, 4096)
