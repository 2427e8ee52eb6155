"""Classic BPF as seccomp uses it: writing programs, running them on paper, printing them.

A program is an array of struct sock_filter {u16 code; u8 jt; u8 jf; u32 k} (linux/filter.h) over
struct seccomp_data {s32 nr; u32 arch; u64 instruction_pointer; u64 args[6]} (linux/seccomp.h). It
knows 32-bit words only, so a 64-bit argument is two of them, on our machines low word first. Jumps
go forward, conditional ones by at most 255 instructions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

INSTRUCTION = struct.Struct("<HBBI")
MAX_INSTRUCTIONS = 4096
"""BPF_MAXINSNS: the kernel refuses a longer program (seccomp(2): EINVAL)."""

LOAD, AND, JUMP, RETURN = 0x20, 0x54, 0x05, 0x06  # LD|W|ABS, ALU|AND|K, JMP|JA, RET|K
IF_EQUAL, IF_GREATER, IF_AT_LEAST, IF_ANY_BIT = 0x15, 0x25, 0x35, 0x45  # JMP|JEQ|K ...

ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
KILL_THREAD, TRAP, TRACE, LOG = 0, 0x00030000, 0x7FF00000, 0x7FFC0000
_ACTION = 0xFFFF0000

NUMBER, ARCH = 0, 4
_DATA = struct.Struct("<IIQ6Q")
_FAR = 250


def low(index: int) -> int:
    """Where the lower half of an argument lies in struct seccomp_data."""
    return 16 + 8 * index


def high(index: int) -> int:
    return low(index) + 4


class Writer:
    """Builds a program back to front: every jump's target is already there when it is written.

    A place is an index into what is written so far; an instruction falls through to the one written
    just before it. (After Chromium's sandbox/linux/bpf_dsl/codegen.cc.)
    """

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int]] = []
        self._returns: dict[int, int] = {}

    def _emit(self, code: int, k: int, jt: int = 0, jf: int = 0) -> int:
        self._code.append((code, jt, jf, k))
        return len(self._code) - 1

    def returning(self, action: int) -> int:
        """The place of a return, one that is near enough or a new one."""
        place = self._returns.get(action)
        if place is None or len(self._code) - place > _FAR:
            place = self._returns[action] = self._emit(RETURN, action)
        return place

    def _near(self, target: int) -> int:
        """The target, or a long jump to it: two more instructions may come in between."""
        distance = len(self._code) - target
        return target if distance <= _FAR else self._emit(JUMP, distance - 1)

    def load(self, offset: int) -> int:
        return self._emit(LOAD, offset)

    def mask(self, bits: int) -> int:
        return self._emit(AND, bits)

    def branch(self, code: int, k: int, yes: int, no: int) -> int:
        yes, no = self._near(yes), self._near(no)
        place = len(self._code)
        return self._emit(code, k, place - yes - 1, place - no - 1)

    def __len__(self) -> int:
        return len(self._code)

    def program(self) -> bytes:
        return b"".join(
            INSTRUCTION.pack(code, jt, jf, k) for code, jt, jf, k in reversed(self._code)
        )


def simulate(program: bytes, number: int, arch: int, args: Sequence[int] = ()) -> int:
    """The action that a program returns for a call, as the kernel's interpreter would."""
    arguments = [value & 0xFFFFFFFFFFFFFFFF for value in (*args, *([0] * (6 - len(args))))]
    data = _DATA.pack(number & 0xFFFFFFFF, arch, 0, *arguments)
    accumulator = at = 0
    while True:
        code, jt, jf, k = INSTRUCTION.unpack_from(program, at * INSTRUCTION.size)
        at += 1
        if code == RETURN:
            return int(k)
        if code == LOAD:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == AND:
            accumulator &= k
        elif code == JUMP:
            at += k
        else:
            at += jt if _holds(code, accumulator, k) else jf


def _holds(code: int, accumulator: int, k: int) -> bool:
    if code == IF_EQUAL:
        return accumulator == k
    if code == IF_GREATER:
        return accumulator > k
    if code == IF_AT_LEAST:
        return accumulator >= k
    if code == IF_ANY_BIT:
        return bool(accumulator & k)
    raise ValueError(f"instruction {code:#x} is not one that seccomp programs of ours have")


def decide(programs: Sequence[bytes], number: int, arch: int, args: Sequence[int] = ()) -> int:
    """What a process under all of these programs gets: the strictest answer (seccomp(2)).

    That is the lowest as a signed number; KILL_PROCESS is the only negative one. Between equals
    the program that was loaded last wins, for it is asked first.
    """
    answers = [simulate(program, number, arch, args) for program in reversed(programs)]
    return min(answers, key=lambda one: (one & _ACTION) - ((one & KILL_PROCESS) << 1))


_OPERATORS = {IF_EQUAL: "==", IF_GREATER: ">", IF_AT_LEAST: ">=", IF_ANY_BIT: "&"}


def disassemble(program: bytes) -> Iterator[str]:
    """One line per instruction: `12: if A >= 0x2a goto 40 else 13`."""
    for at, (code, jt, jf, k) in enumerate(INSTRUCTION.iter_unpack(program)):
        if code == LOAD:
            text = f"A = {_word(k)}"
        elif code == AND:
            text = f"A &= {k:#x}"
        elif code == JUMP:
            text = f"goto {at + 1 + k}"
        elif code == RETURN:
            text = f"return {action_name(k)}"
        elif code in _OPERATORS:
            text = f"if A {_OPERATORS[code]} {k:#x} goto {at + 1 + jt} else {at + 1 + jf}"
        else:
            text = f"? {code:#x} {jt} {jf} {k:#x}"
        yield f"{at}: {text}"


def _word(offset: int) -> str:
    if offset in {NUMBER, ARCH}:
        return "number" if offset == NUMBER else "arch"
    index, rest = divmod(offset - 16, 8)
    return f"args[{index}].{'high' if rest else 'low'}"


_NAMES = {
    ALLOW: "allow", KILL_PROCESS: "kill process", KILL_THREAD: "kill thread", TRAP: "trap",
    LOG: "log",
}  # fmt: skip


def action_name(action: int) -> str:
    if action in _NAMES:
        return _NAMES[action]
    name = {ERRNO: "errno", TRACE: "trace"}.get(action & _ACTION)
    return f"{name} {action & 0xFFFF}" if name else f"{action:#x}"
