"""The tables of machine code: that they say what they do, and do what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sandboxd.script import machine
from sandboxd.script.record import BASE, CONDITION_SHIFT, IGNORE, OFFSETS, RECORD_SIZE, Condition

# How binutils names the disassembler of a foreign architecture, and how it is told what it reads.
OBJDUMP = {
    "x86_64": ("objdump", ["-m", "i386:x86-64", "-M", "intel"]),
    "aarch64": ("aarch64-linux-gnu-objdump", ["-m", "aarch64"]),
}
JUMPS = {
    "x86_64": {"js", "jmp", "jrcxz", "jb", "jne", "je"},
    "aarch64": {"b", "b.cc", "b.ne", "b.eq", "cbz", "cbnz", "tbnz"},
}


@pytest.fixture(params=machine.ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


def test_the_code_is_the_table(arch: str) -> None:
    listing = machine.listing(arch)
    assert machine.code(arch) == b"".join(line.content for line in listing.instructions)
    offsets = {line.offset for line in listing.instructions}
    assert set(listing.labels.values()) <= offsets
    assert listing.labels["start"] == 0


def test_it_is_small(arch: str) -> None:
    assert len(machine.code(arch)) == {"x86_64": 189, "aarch64": 196}[arch]


def test_an_unknown_architecture_is_an_error() -> None:
    with pytest.raises(KeyError):
        machine.code("m68k")


def test_every_jump_lands_on_its_label(arch: str) -> None:
    """Decoded by hand, so that it is checked where no objdump is."""
    listing = machine.listing(arch)
    seen = set()
    for line in listing.instructions:
        mnemonic, *operands = re.split(r"[ ,]+", line.text)
        if mnemonic not in JUMPS[arch]:
            assert mnemonic[0] not in "jb", line.text
            continue
        seen.add(mnemonic)
        assert _destination(arch, line) == listing.labels[operands[-1]], line
    assert seen == JUMPS[arch]


def _destination(arch: str, line: machine.Instruction) -> int:
    if arch == "x86_64":
        distance = int.from_bytes(line.content[1:], "little", signed=True)
        return line.offset + len(line.content) + distance
    word = int.from_bytes(line.content, "little")
    mnemonic = line.text.split()[0]
    # Arm ARM, C4.1: the immediate's first bit and width, for B, for TBNZ, and for all others here.
    first, width = {"b": (0, 26), "tbnz": (5, 14)}.get(mnemonic, (5, 19))
    distance = word >> first & (1 << width) - 1
    if distance >> width - 1:
        distance -= 1 << width
    return line.offset + 4 * distance


def test_objdump_reads_the_same_instructions(arch: str, tmp_path: Path) -> None:
    program, options = OBJDUMP[arch]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    binary = tmp_path / "machine"
    binary.write_bytes(machine.code(arch))
    output = subprocess.run(
        [program, "-D", "-b", "binary", *options, str(binary)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    listing = machine.listing(arch)
    names = {f"0x{offset:x}": name for name, offset in listing.labels.items()}
    jumps = JUMPS[arch]
    assert _disassembled(output, names, jumps) == {
        line.offset: (line.content, line.text) for line in listing.instructions
    }


def _disassembled(
    output: str, names: dict[str, str], jumps: set[str]
) -> dict[int, tuple[bytes, str]]:
    """objdump's lines: `  2a:\\t78 05 \\tjs     0x31`, or with one word instead of the bytes."""
    found = {}
    for line in output.splitlines():
        match = re.fullmatch(r"\s*([0-9a-f]+):\t([0-9a-f ]+?)\s*\t(.*)", line)
        if match is None:
            continue
        offset, code, text = match.groups()
        content = bytes.fromhex(code)
        if re.fullmatch("[0-9a-f]{8}", code):
            content = content[::-1]
        mnemonic, _, operands = text.partition("//")[0].replace("\t", " ").strip().partition(" ")
        operands = operands.strip()
        if mnemonic in jumps:
            before, comma, last = operands.rpartition(" ")
            operands = before + comma + names[last]
        found[int(offset, 16)] = content, f"{mnemonic} {operands}".strip()
    return found


def test_the_numbers_in_the_tables_are_the_formats(arch: str) -> None:
    """The tables are literal: whoever changes the format has to be told to change them too."""
    text = "\n".join(line.text for line in machine.listing(arch).instructions)
    memory = r"\[(?:rbx|x19)(?:\+0x|, #)?([0-9a-f]*)\]"
    base = 16 if arch == "x86_64" else 10
    named = {int(digits or "0", base) for digits in re.findall(memory, text)}
    # aarch64 loads a1 and a2, a3 and a4, and nr and a0, in pairs: the second is not written.
    implied = {OFFSETS[name] for name in ("a0", "a2", "a4")} if arch == "aarch64" else set()
    assert named | implied == set(OFFSETS.values())
    assert hex(BASE) in text
    assert hex(RECORD_SIZE) in text
    conditions = re.findall(r"cmp (?:dh,|w10, #)0x(\d)", text)
    assert [int(digit) for digit in conditions] == [1, 2, 3, 4, 5] == list(Condition)[1:]
    assert (IGNORE, CONDITION_SHIFT) == (1, 8)


def test_there_is_no_stack(arch: str) -> None:
    """Not even a call: a vfork child would overwrite what its parent returns to."""
    for line in machine.listing(arch).instructions:
        assert not re.search(r"\b(push|pop|call|ret|bl|blr|rsp|esp|sp|x29|x30)\b", line.text)
