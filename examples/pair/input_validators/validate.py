"""Exits with 42 if standard input is a valid input, as the package format wants it."""

import re
import sys


def main() -> int:
    text = sys.stdin.read()
    if not re.fullmatch(r"[1-9][0-9]* [1-9][0-9]*\n[1-9][0-9]*( [1-9][0-9]*)*\n", text):
        return 43
    (count, _), weights = (list(map(int, line.split())) for line in text.splitlines())
    return 42 if 2 <= count == len(weights) <= 1000 and max(weights) <= 10**6 else 43


if __name__ == "__main__":
    sys.exit(main())
