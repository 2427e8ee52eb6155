"""A program that does nothing: it writes one byte and sleeps until it is killed.

What a run of it holds is what every run of its policy holds (supervise/floor.py).
"""

from __future__ import annotations

from functools import cache

from sandboxd.script import elf
from sandboxd.script.record import BASE, Assembler, Condition
from sandboxd.script.writer import Writer

RUNS = b"."
"""What it writes to its stdout."""


@cache
def empty_program(arch: str) -> bytes:
    """The file of it."""
    asm = Assembler(BASE)
    w = Writer(arch, asm)
    start = w.call("write", 1, asm.data(RUNS), len(RUNS))
    sleep = asm.place(asm.label())
    w.call("ppoll", 0, 0, 0, 0, 0, ignore=True, when=Condition.ALWAYS, target=sleep)
    handler = w.call("exit_group", 1)
    image = asm.finish((handler, asm.cell(), start))
    return elf.program(arch, image.content, len(image.content))
