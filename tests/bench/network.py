"""`./do bench network`: what a way out costs, beside none and beside the bare program.

The server is in a network namespace of this machine (tests/network/world.py). All take turns, and
what is compared is of one round: a machine that is slower for a while is so for all of them. Of the
rounds the median counts, and between which values half of them lie.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence

from tests.network.conftest import open_world


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="./do bench network", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, metavar="N", help="starts (100)")
    parser.add_argument("--streams", type=int, default=40, metavar="N", help="streams (40)")
    parser.add_argument("--size", type=int, default=100 << 20, metavar="BYTES", help="of a stream")
    parser.add_argument("--json", action="store_true", help="all samples as JSON on stdout")
    args = parser.parse_args(words)
    with open_world() as world:
        fields = {"rounds": args.rounds, "streams": args.streams, "size": args.size}
        found = world.ask("measure", **fields)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print("first byte, ms (network made ahead)     min   median   after none, of a round")
    starts: dict[str, list[float]] = found["first byte"]
    for who, samples in starts.items():
        later = [1e3 * (one - none) for one, none in zip(samples, starts["none"], strict=True)]
        low, middle = min(samples) * 1e3, statistics.median(samples) * 1e3
        print(f"  {who:36} {low:6.2f}   {middle:6.2f}   {spread(later, '+.2f')}")
    print("one TCP stream, MB/s                    max   median   of the bare program, of a round")
    streams: dict[str, list[float]] = found["stream"]
    for who, samples in streams.items():
        high, middle = max(samples) / 1e6, statistics.median(samples) / 1e6
        bare = streams.get(f"bare {who}", samples)
        ratios = [one / other for one, other in zip(samples, bare, strict=True)]
        print(f"  {who:36} {high:6.0f}   {middle:6.0f}   {spread(ratios, '.3f')}")


def spread(samples: Sequence[float], form: str) -> str:
    """The median, and the quartiles."""
    several = samples if len(samples) > 1 else [*samples, *samples]
    low, middle, high = statistics.quantiles(several, n=4)
    return f"{middle:{form}} ({low:{form}} .. {high:{form}})"
