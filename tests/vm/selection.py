"""What `./do vm` runs without arguments: the tests that want what most hosts lack.

Those marked with needs() for cgroups or a controller, all of tests/vm and tests/cgroup, and of
tests/probe and tests/supervise what has to do with runs in a cgroup. What is the same with and
without controllers is not run here: it would take most of the time.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import needs

WANTED = frozenset({"cgroup", *needs.CONTROLLERS})
ROOMS = (
    "tests/cgroup/",
    "tests/probe/test_probe.py",
    "tests/probe/test_setup.py",
    "tests/vm/",
    *(f"tests/supervise/test_{name}.py" for name in (
        "lifecycle", "many", "pause", "run", "runner", "status", "usage",
    )),
)  # fmt: skip

NAMED = re.compile("|".join(f'"{fact}"' for fact in sorted(WANTED)))

LESSER = re.compile(r"\bno-(?!nothing\b)")
"""A machine that lacks something (tests/supervise/variants.py) is the same here and elsewhere."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Reading a file is much faster than importing it, where everything is slow."""
    if not collection_path.name.startswith("test_") or collection_path.is_dir():
        return None
    if any(room in f"{collection_path}" for room in ROOMS):
        return None
    return None if NAMED.search(collection_path.read_text()) else True


def wanted(item: pytest.Item) -> bool:
    facts = {fact for marker in item.iter_markers("needs") for fact in marker.args}
    if facts & WANTED:
        return True
    return item.nodeid.startswith(ROOMS) and not LESSER.search(item.name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = [item for item in items if not wanted(item)]
    items[:] = [item for item in items if wanted(item)]
    config.hook.pytest_deselected(items=left)
