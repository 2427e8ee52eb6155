"""Exits with 42 if standard input is a valid input, as the package format wants it."""

import re
import sys

LINE = re.compile(rb"(0|-?[1-9][0-9]{0,18}) (0|-?[1-9][0-9]{0,18})\n")


def main() -> int:
    count = 0
    for line in sys.stdin.buffer:
        found = LINE.fullmatch(line)
        if not found or not all(-(2**63) <= int(number) < 2**63 for number in found.groups()):
            print(f"line {count + 1}: not two integers of 64 bits", file=sys.stderr)
            return 43
        count += 1
    return 42 if 1 <= count <= 100_000 else 43


if __name__ == "__main__":
    sys.exit(main())
