"""`sandboxd commit`: an image of what a job changed in its root, above the image it ran in."""

from __future__ import annotations

import argparse

_DESCRIPTION = """\
Makes an image of a run that was kept: the layers of the image it ran in, and above them one of what
it changed. How the image is to be run stays the same. A layer obeys the rules of an import: device
nodes, sockets, set-user-id bits and foreign attributes are left out and counted."""
_EPILOG = """\
example:
  sandboxd run --keep --name build --image mine --writable-root -- make install
  sandboxd commit build mine:installed
  sandboxd run --image mine:installed -- program"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "commit",
        help="make an image of a kept run",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="its name, or 7 or more letters of it")
    parser.add_argument("name", metavar="NAME", help="of the new image, NAME[:TAG]")
    parser.set_defaults(func=commit)


def commit(args: argparse.Namespace) -> int:
    """Makes it; returns the exit status."""
    from sandboxd.cli.image import tell
    from sandboxd.images.kept import find_kept
    from sandboxd.supervise import keeping

    tell(keeping.commit(find_kept(args.run), args.name))
    return 0
