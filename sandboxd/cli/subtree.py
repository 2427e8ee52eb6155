"""The flag --cgroup of every command that looks at the machine."""

from __future__ import annotations

import argparse
import os


def add(parser: argparse.ArgumentParser) -> None:
    """Adds it."""
    parser.add_argument(
        "--cgroup",
        type=_directory,
        metavar="DIR",
        help="a delegated cgroup v2 directory, or `none` (default: $SANDBOXD_CGROUP, else found)",
    )


def _directory(text: str) -> str:
    """An absolute path, or the word none."""
    if text == "none":
        return text
    if not text.strip():
        raise argparse.ArgumentTypeError("name a directory, or none")
    return os.path.abspath(text)
