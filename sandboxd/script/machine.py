"""The interpreter's machine code, for x86-64 and aarch64, as a table to be read line by line.

Theory of operation
-------------------
What stands between a launch script and the kernel has to be trusted, runs beside the untrusted
program, and is started for every job. So it is as small as it can be: one loop over the records
that `record.py` describes, without a libc, a heap, relocations or a compiler. Policy, strings and
decisions are all in the script.

It uses no stack, not even a call. A script may call vfork(2) - or clone(2) with CLONE_VM and
CLONE_VFORK, which is what vfork is - and the child then runs this very loop in the parent's
memory while the parent waits. Whatever the child pushed would overwrite what the parent is about
to pop; but registers belong to each process, and all the state there is fits in three that the
kernel keeps across system calls:

============== ============= ===============================================================
x86-64         aarch64       holds
============== ============= ===============================================================
rbp            x20           BASE, where the image's header is
rbx            x19           the record being carried out
r12            x21           its number; negative: no call was made, so nothing can have failed
rax            x0            its value
rcx, edx       x9, x10       scratch
============== ============= ===============================================================

System calls: number in rax, arguments in rdi rsi rdx r10 r8 r9, value in rax; rcx and r11 are
lost. On aarch64: number in x8, arguments in x0-x5, value in x0; nothing else is lost (syscall(2),
"Architecture calling conventions").

How to read the tables: `name:` labels the next instruction; then bytes as they lie in memory
(aarch64: the 32-bit word as the manual prints it), the instruction as objdump prints it, and why
it is there. Nothing is computed: what is written here is what runs. The tests recompute every
jump, and have objdump disassemble the whole and compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

_X86_64 = """
start:
    bf 00 00 00 20       | mov edi,0x20000000              | from above all that is ours
    be 00 00 00 01       | mov esi,0x1000000               | to above all that can be mapped
    48 c1 e6 20          | shl rsi,0x20                    |
    ba 0a 00 00 00       | mov edx,0xa                     | MADV_DONTFORK: stack, vdso stay behind
    b8 1c 00 00 00       | mov eax,0x1c                    | madvise
    0f 05                | syscall                         | ENOMEM: there are holes, as there must
    bd 00 00 01 10       | mov ebp,0x10010000              | BASE; 32-bit moves clear the upper half
    48 8b 5d 10          | mov rbx,QWORD PTR [rbp+0x10]    | header: the first record
next:
    4c 8b 23             | mov r12,QWORD PTR [rbx]         | nr
    48 8b 7b 08          | mov rdi,QWORD PTR [rbx+0x8]     | a0
    48 8b 73 10          | mov rsi,QWORD PTR [rbx+0x10]    | a1
    48 8b 53 18          | mov rdx,QWORD PTR [rbx+0x18]    | a2
    4c 8b 53 20          | mov r10,QWORD PTR [rbx+0x20]    | a3
    4c 8b 43 28          | mov r8,QWORD PTR [rbx+0x28]     | a4
    4c 8b 4b 30          | mov r9,QWORD PTR [rbx+0x30]     | a5
    48 89 f8             | mov rax,rdi                     | the value, should there be no call
    4d 85 e4             | test r12,r12                    | nr < 0?
    78 05                | js done                         | then there is none
    4c 89 e0             | mov rax,r12                     | the number goes where the value comes
    0f 05                | syscall                         | a vfork comes out of here twice
done:
    48 89 43 58          | mov QWORD PTR [rbx+0x58],rax    | result, always
    48 8b 4b 38          | mov rcx,QWORD PTR [rbx+0x38]    | store
    e3 03                | jrcxz stored                    | 0: nowhere else
    48 89 01             | mov QWORD PTR [rcx],rax         | may hit any field of any record
stored:
    8b 53 40             | mov edx,DWORD PTR [rbx+0x40]    | flags: dl bit 0 IGNORE, dh condition
    4d 85 e4             | test r12,r12                    | no call,
    78 1a                | js condition                    | no failure
    48 3d 01 f0 ff ff    | cmp rax,0xfffffffffffff001      | -4095, compared as unsigned:
    72 12                | jb condition                    | below it is no errno
    f6 c2 01             | test dl,0x1                     | IGNORE?
    75 0d                | jne condition                   | then go on as if nothing had happened
    48 8b 4d 08          | mov rcx,QWORD PTR [rbp+0x8]     | header: where the error cell is
    48 89 19             | mov QWORD PTR [rcx],rbx         | the record that failed
    48 8b 5d 00          | mov rbx,QWORD PTR [rbp+0x0]     | header: the handler
    eb a9                | jmp next                        |
condition:
    80 fe 01             | cmp dh,0x1                      | ZERO?
    75 05                | jne nonzero                     |
    48 85 c0             | test rax,rax                    |
    74 30                | je take                         |
nonzero:
    80 fe 02             | cmp dh,0x2                      | NONZERO?
    75 05                | jne equal                       |
    48 85 c0             | test rax,rax                    |
    75 26                | jne take                        |
equal:
    80 fe 03             | cmp dh,0x3                      | EQUAL?
    75 09                | jne always                      | only now read compare: it may be 0
    48 8b 4b 48          | mov rcx,QWORD PTR [rbx+0x48]    | compare: an address
    48 3b 01             | cmp rax,QWORD PTR [rcx]         | with what stands there now
    74 18                | je take                         |
always:
    80 fe 04             | cmp dh,0x4                      | ALWAYS?
    74 13                | je take                         |
    80 fe 05             | cmp dh,0x5                      | NEGATIVE?
    75 05                | jne advance                     | NEVER, and whatever is not defined
    48 85 c0             | test rax,rax                    |
    78 09                | js take                         |
advance:
    48 83 c3 60          | add rbx,0x60                    | the record behind this one
    e9 6f ff ff ff       | jmp next                        |
take:
    48 8b 5b 50          | mov rbx,QWORD PTR [rbx+0x50]    | target
    e9 66 ff ff ff       | jmp next                        |
"""

_AARCH64 = """
start:
    d2a40000             | mov x0, #0x20000000             | from above all that is ours
    d2e02001             | mov x1, #0x100000000000000      | to above all that can be mapped
    d2800142             | mov x2, #0xa                    | MADV_DONTFORK: stack, vdso stay behind
    d2801d28             | mov x8, #0xe9                   | madvise
    d4000001             | svc #0x0                        | ENOMEM: there are holes, as there must
    d2a20034             | mov x20, #0x10010000            | BASE
    f9400a93             | ldr x19, [x20, #16]             | header: the first record
next:
    a9400275             | ldp x21, x0, [x19]              | nr, a0
    b7f800d5             | tbnz x21, #63, done             | nr < 0: no call, and a0 is the value
    a9410a61             | ldp x1, x2, [x19, #16]          | a1, a2
    a9421263             | ldp x3, x4, [x19, #32]          | a3, a4
    f9401a65             | ldr x5, [x19, #48]              | a5
    aa1503e8             | mov x8, x21                     | the number
    d4000001             | svc #0x0                        | a clone comes out of here twice
done:
    f9002e60             | str x0, [x19, #88]              | result, always
    f9401e69             | ldr x9, [x19, #56]              | store
    b4000049             | cbz x9, stored                  | 0: nowhere else
    f9000120             | str x0, [x9]                    | may hit any field of any record
stored:
    b940426a             | ldr w10, [x19, #64]             | flags
    b7f80115             | tbnz x21, #63, condition        | no call, no failure
    b13ffc1f             | cmn x0, #0xfff                  | value + 4095 carries if it is an errno
    540000c3             | b.cc condition                  | it is not
    370000aa             | tbnz w10, #0, condition         | IGNORE: go on all the same
    f9400689             | ldr x9, [x20, #8]               | header: where the error cell is
    f9000133             | str x19, [x9]                   | the record that failed
    f9400293             | ldr x19, [x20]                  | header: the handler
    17ffffed             | b next                          |
condition:
    53083d4a             | ubfx w10, w10, #8, #8           | flags, bits 8-15
    7100055f             | cmp w10, #0x1                   | ZERO?
    54000041             | b.ne nonzero                    |
    b4000220             | cbz x0, take                    |
nonzero:
    7100095f             | cmp w10, #0x2                   | NONZERO?
    54000041             | b.ne equal                      |
    b50001c0             | cbnz x0, take                   |
equal:
    71000d5f             | cmp w10, #0x3                   | EQUAL?
    540000a1             | b.ne always                     | only now read compare: it may be 0
    f9402669             | ldr x9, [x19, #72]              | compare: an address
    f9400129             | ldr x9, [x9]                    | what stands there now
    eb09001f             | cmp x0, x9                      |
    54000100             | b.eq take                       |
always:
    7100115f             | cmp w10, #0x4                   | ALWAYS?
    540000c0             | b.eq take                       |
    7100155f             | cmp w10, #0x5                   | NEGATIVE?
    54000041             | b.ne advance                    | NEVER, and whatever is not defined
    b7f80060             | tbnz x0, #63, take              |
advance:
    91018273             | add x19, x19, #0x60             | the record behind this one
    17ffffd9             | b next                          |
take:
    f9402a73             | ldr x19, [x19, #80]             | target
    17ffffd7             | b next                          |
"""

_TABLES: Mapping[str, str] = MappingProxyType({"x86_64": _X86_64, "aarch64": _AARCH64})

ARCHITECTURES = tuple(_TABLES)


class Instruction(msgspec.Struct, frozen=True):
    """One line of a table, and where it lies in the code."""

    offset: int
    content: bytes
    text: str
    why: str


class Listing(msgspec.Struct, frozen=True):
    """A table in a form that can be checked: its instructions, and the labels' offsets."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]


def listing(arch: str) -> Listing:
    """The table of an architecture, which is named as uname(2) names it; KeyError if unknown."""
    offset = 0
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in _TABLES[arch].strip().split("\n"):
        first, *rest = (column.strip() for column in line.split("|"))
        if not rest:
            labels[first.removesuffix(":")] = offset
        else:
            text, why = rest
            content = bytes.fromhex(first)
            if arch == "aarch64":
                # Words are written most significant byte first, and fetched the other way round.
                content = content[::-1]
            instructions.append(Instruction(offset, content, text, why))
            offset += len(content)
    return Listing(tuple(instructions), MappingProxyType(labels))


def code(arch: str) -> bytes:
    """The machine's code: it is entered at its first byte and can stand at any address."""
    return b"".join(instruction.content for instruction in listing(arch).instructions)
