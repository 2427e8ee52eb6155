"""One command a program, as a person or a Makefile has it: `sandboxd run` and all it has to load.

Everybody else is a small program that does little but start another one. Here sandboxd pays for
Python, for its modules and for a tenant, each time; a Runner or a daemon pays once.
"""

from __future__ import annotations

import resource
import sys

import trio

from tests.bench.contestants import POLICY, Command, Contestant
from tests.bench.images import SANDBOXD
from tests.bench.measures import Bench, Measure, Row, Table, in_turn
from tests.bench.programs import DYNAMIC, PLACE, STATIC

PARTS = {
    "python3, nothing imported": "pass",
    "python3, trio and msgspec imported": "import trio, msgspec",
}
"""What of it is not sandboxd's."""


def ours(bench: Bench) -> Command:
    words = [*SANDBOXD, "run", "--quiet", "--policy", POLICY]
    words += ["--mount", f"type=bind,source={bench.folder},target={PLACE},readonly", "--"]
    return Command("sandboxd run", lambda program: [*words, program])


def part(name: str, code: str) -> Command:
    return Command(name, lambda _: [sys.executable, "-P", "-c", code])


async def command(bench: Bench) -> list[Row]:
    """From the start of the command to its end, and the CPU time of all its processes."""
    whole = Table("one command", "ms")
    cpu = Table("CPU time of one command", "ms")
    program = bench.path(STATIC) if bench.programs else DYNAMIC
    others = [one for one in bench.contestants if type(one) is Command]
    parts = [part(name, code) for name, code in PARTS.items()]

    async def once(contestant: Contestant) -> None:
        began, used = trio.current_time(), _used()
        await contestant.result(program)
        whole.add(contestant.name, (trio.current_time() - began) * 1e3)
        cpu.add(contestant.name, (_used() - used) * 1e3)

    everybody = [ours(bench), *others, *parts]
    await in_turn(everybody, 1, once)  # files come into memory, and the machine is looked at
    for table in (whole, cpu):
        table.rows.clear()
    await in_turn(everybody, max(2, bench.rounds // 3), once)
    return [*whole.all(), *cpu.all()]


def _used() -> float:
    """Of children that were waited for, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


MEASURES: dict[str, Measure] = {"command": command}
