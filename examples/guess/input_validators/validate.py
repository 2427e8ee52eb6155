"""Exits with 42 if standard input is a valid input, as the package format wants it."""

import re
import sys


def main() -> int:
    line = rb"([1-9][0-9]{0,9}) ([1-9][0-9]{0,9}) ([1-9][0-9]?)\n"
    found = re.fullmatch(line, sys.stdin.buffer.read())
    if not found:
        return 43
    most, secret, tries = map(int, found.groups())
    return 42 if secret <= most <= 10**9 and 2**tries > most else 43


if __name__ == "__main__":
    sys.exit(main())
