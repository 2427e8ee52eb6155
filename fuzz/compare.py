"""Whatever two texts and flags: compare() agrees with the slow comparison and says where, briefly.

Runs under atheris where that is installed, else on chance alone: fuzz/compare.py [RUNS [SEED]].
"""

from __future__ import annotations

import random
import sys

from sandboxd.judge import compare as module
from sandboxd.judge.compare import Options, compare
from tests.judge import slow_compare

NUMBERS = (b"1", b"1.0", b"17", b".5", b"5.", b"1e3", b"1e400", b"-0", b"nan", b"inf", b"0x1")
WORDS = (b"a", b"A", b"\0", b"\xff", b"\x1b[2J")
SPACES = (b" ", b"\n", b"\r\n", b"\t", b"\v", b"\f", b" " * 70)
PIECES = NUMBERS + WORDS + SPACES
TOLERANCES = (None, 0.0, 1e-6, 0.5)


def one_input(data: bytes) -> None:
    """A byte of flags, a byte of tolerances, then the two texts with a 0xfe in between."""
    if len(data) < 2:
        return
    flags, tolerances = data[0], data[1]
    expected, _, actual = data[2:].partition(b"\xfe")
    options = Options(
        case_sensitive=bool(flags & 1),
        space_change_sensitive=bool(flags & 2),
        float_absolute_tolerance=TOLERANCES[tolerances & 3],
        float_relative_tolerance=TOLERANCES[tolerances >> 2 & 3],
    )
    module.BLOCK = 1 + (flags >> 2)
    found = compare(expected, actual, options)
    wanted = slow_compare.kind(expected, actual, options)
    assert found.kind == wanted, (expected, actual, options, found)
    assert (found.where == "") == (found.kind == "same"), (expected, actual, options, found)
    assert found.where.isprintable(), found
    assert len(found.where) <= 500, found


def by_chance(runs: int, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(runs):
        text = [chance.choice(PIECES) for _ in range(chance.randrange(20))]
        other = [piece for piece in text if chance.random() < 0.95]
        other += [chance.choice(PIECES) for _ in range(chance.choice((0, 0, 1, 5)))]
        head = bytes((chance.randrange(256), chance.randrange(256)))
        one_input(head + b"".join(text) + b"\xfe" + b"".join(other))
    print(f"{runs} runs from seed {seed}: all agree")


def main() -> None:
    try:
        import atheris
    except ImportError:
        numbers = [int(word) for word in sys.argv[1:]]
        by_chance(numbers[0] if numbers else 50_000, numbers[1] if len(numbers) > 1 else 1)
        return
    argv = sys.argv if len(sys.argv) > 1 else [*sys.argv, "-runs=200000", "-max_len=512"]
    atheris.instrument_all()
    atheris.Setup(argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
