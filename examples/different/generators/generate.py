"""Writes data/sample and data/secret of this package; the same bytes every time it runs."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"
LEAST, MOST = -(2**63), 2**63 - 1

Pair = tuple[int, int]


def write(name: str, pairs: Iterable[Pair]) -> None:
    lines = list(pairs)
    inputs = "".join(f"{a} {b}\n" for a, b in lines)
    answers = "".join(f"{abs(a - b)}\n" for a, b in lines)
    (DATA / f"{name}.in").write_text(inputs, "ascii")
    (DATA / f"{name}.ans").write_text(answers, "ascii")


def main() -> None:
    chance = random.Random(20261121)
    write("sample/1", [(3, 8), (-17, 25), (4294967296, -4294967295)])
    write("secret/01-one-line", [(5, 5)])
    write("secret/02-near-zero", [(a, b) for a in range(-4, 5) for b in range(-4, 5)])
    edges = [LEAST, LEAST + 1, -(2**31), -1, 0, 1, 2**31 - 1, 2**32, MOST - 1, MOST]
    write("secret/03-edges", [(a, b) for a in edges for b in edges])
    wide = ((chance.randint(LEAST, MOST), chance.randint(LEAST, MOST)) for _ in range(3000))
    write("secret/04-wide", wide)
    long = ((chance.randint(-999, 9999), chance.randint(-999, 9999)) for _ in range(100_000))
    write("secret/05-long", long)


if __name__ == "__main__":
    main()
