"""`./do bench network`: what a way out costs, beside none and beside the bare program.

The server is in a network namespace of this machine (tests/network/world.py). All take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics

from tests.network.conftest import open_world


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="./do bench network", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="starts (default: 50)")
    parser.add_argument("--streams", type=int, default=5, metavar="N", help="streams (default: 5)")
    parser.add_argument("--size", type=int, default=300 << 20, metavar="BYTES", help="of a stream")
    parser.add_argument("--json", action="store_true", help="all samples as JSON on stdout")
    args = parser.parse_args(words)
    with open_world() as world:
        fields = {"rounds": args.rounds, "streams": args.streams, "size": args.size}
        found = world.ask("measure", **fields)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print("first byte, ms (network made ahead)     min   median")
    for who, samples in found["first byte"].items():
        low, middle = min(samples) * 1e3, statistics.median(samples) * 1e3
        print(f"  {who:36} {low:6.2f}   {middle:6.2f}")
    print("one TCP stream, MB/s                    max   median")
    for who, samples in found["stream"].items():
        high, middle = max(samples) / 1e6, statistics.median(samples) / 1e6
        print(f"  {who:36} {high:6.0f}   {middle:6.0f}")
