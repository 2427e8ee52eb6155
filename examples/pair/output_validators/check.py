"""check.py input answer feedback/ at_most N < output: whether these two boxes will do.

Exits with 42 if they do, with 43 if not; any other end is the validator's own failure.
"""

import sys
from pathlib import Path


def complain(words: list[str], weights: list[int], wanted: int, solvable: bool) -> str:
    """What is wrong with the output; "" if nothing is."""
    if words == ["none"]:
        return "there are two such boxes" if solvable else ""
    if len(words) != 2:
        return f"{len(words)} words, not two numbers"
    if not all(word.isascii() and word.isdigit() and len(word) <= 4 for word in words):
        return f"not two numbers: {' '.join(words)[:40]}"
    first, second = map(int, words)
    if first == second:
        return f"box {first} twice"
    if not all(1 <= number <= len(weights) for number in (first, second)):
        return f"there is no box {max(first, second)}"
    total = weights[first - 1] + weights[second - 1]
    return f"boxes {first} and {second} weigh {total}, not {wanted}" if total != wanted else ""


def main(given: str, answer: str, feedback: str, *flags: str) -> int:
    most = int(flags[flags.index("at_most") + 1])
    (_, wanted), weights = (
        list(map(int, line.split())) for line in Path(given).read_text().splitlines()
    )
    output = sys.stdin.buffer.read(4096).decode("utf-8", "replace")
    solvable = Path(answer).read_text().strip() != "none"
    why = complain(output.split()[: most + 1], weights, wanted, solvable)
    if why:
        Path(feedback, "judgemessage.txt").write_text(why + "\n")
        return 43
    return 42


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
