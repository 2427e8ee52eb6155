"""`sandboxd run --commit`: its flags, what is checked before, and what is done after."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sandboxd.cli.main import say
from sandboxd.errors import JobError

if TYPE_CHECKING:
    from sandboxd.policy import Policy
    from sandboxd.result import Result


def add(group: argparse._ArgumentGroup) -> None:
    """The flags."""
    group.add_argument(
        "--keep", action="store_true",
        help="keep what it changes in its writable root, as --name: see `diff`, `commit`, `kept`",
    )  # fmt: skip
    group.add_argument(
        "--commit", metavar="NAME",
        help="make an image NAME of its image and what it changes, if it ends with `ok`",
    )  # fmt: skip


def check(name: str, policy: Policy) -> None:
    """JobError or ImageError if it could come to nothing."""
    from sandboxd.images.store import check_name

    check_name(name)
    if not policy.root.image:
        raise JobError("--commit without an image to run in", hint="--image NAME")


def finish(result: Result, name: str, *, stays: bool) -> None:
    """Make the image, if the run ended well; what was kept goes, if only this wanted it."""
    from sandboxd.cli.image import left_out
    from sandboxd.images.kept import find_kept
    from sandboxd.supervise import keeping

    if result.kept is None:
        say(f"not committed: {result.status}")
        return
    kept = find_kept(result.kept.name)
    try:
        if not result.ok:
            say(f"not committed: {result.status}")
            return
        made = keeping.commit(kept, name)
        say(f"committed: {made.record.name} {made.record.id[7:19]}")
        for line in left_out(made):
            say(line)
    finally:
        if not stays:
            kept.remove()
