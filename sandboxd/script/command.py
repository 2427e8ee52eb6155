"""How to start the programs of launch/: an interpreter with the standard library and no more."""

from __future__ import annotations

import sys

# -I leaves the caller's directory and environment out, so where the package lies must be said.
_BOOTSTRAP = """\
import sys
sys.path.insert(0, sys.argv[1])
from sandboxd.launch.executor import main
main(int(sys.argv[2]), int(sys.argv[3]))
"""
_PORTER = _BOOTSTRAP.replace("executor", "porter")

_AREA = """\
import sys
sys.path.insert(0, sys.argv[1])
from sandboxd.launch.area import main
main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
"""

_NETKEEPER = """\
import sys
sys.path.insert(0, sys.argv[1])
from sandboxd.launch.netkeeper import main
main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
"""


def command(root: str, fd: int, memory: int) -> list[str]:
    """The argv that carries out the image in descriptor `fd`, with `memory` bytes from BASE on.

    `root` is the directory the package `sandboxd` lies in. Only the standard library is needed,
    so no site-packages (-S); and nothing is written (-B).
    """
    return [sys.executable, "-I", "-S", "-B", "-c", _BOOTSTRAP, root, str(fd), str(memory)]


def porter_command(root: str, fd: int, namespace: int = -1) -> list[str]:
    """The argv of a porter that serves the socket `fd`; `namespace` is the descriptor of the user
    namespace to join, or -1 for none.
    """
    return [sys.executable, "-I", "-S", "-B", "-c", _PORTER, root, str(fd), str(namespace)]


def area_command(root: str, fd: int, namespace: int, words: list[str]) -> list[str]:
    """The argv of launch/area.py; `words` are the arguments of its `main` after the descriptors."""
    return [
        *(sys.executable, "-I", "-S", "-B", "-c", _AREA),
        *(root, str(fd), str(namespace), *words),
    ]


def netkeeper_command(root: str, fd: int, namespace: int, server: str) -> list[str]:
    """The argv of launch/netkeeper.py; `server` is where sandboxes have their name server."""
    return [
        *(sys.executable, "-I", "-S", "-B", "-c", _NETKEEPER),
        *(root, str(fd), str(namespace), server),
    ]


_UNPACKER = """\
import sys
sys.path.insert(0, sys.argv[1])
from sandboxd.launch.unpacker import main
main(int(sys.argv[2]), int(sys.argv[3]))
"""


def unpacker_command(root: str, fd: int, ids: int) -> list[str]:
    """The argv of launch/unpacker.py, which serves the socket `fd`.

    `ids` is how many ids its user namespace will have; with 1 it writes the map itself.
    """
    return [sys.executable, "-I", "-S", "-B", "-c", _UNPACKER, root, str(fd), str(ids)]
