"""A subcommand of a command, as all of them are."""

from __future__ import annotations

import argparse


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    group: str,
    name: str,
    line: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    """`sandboxd GROUP NAME`: one line for the group's help, the rest and an example for its own."""
    return commands.add_parser(
        name,
        help=line,
        description=description,
        epilog=f"example:\n  sandboxd {group} {name} {example}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
