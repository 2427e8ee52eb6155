"""What `./do vm` runs without arguments: the tests that want what most hosts lack.

Those marked with needs() for cgroups or a controller, all of tests/vm, and all of tests/supervise.
"""

from __future__ import annotations

import pytest

from tests import needs

WANTED = frozenset({"cgroup", *needs.CONTROLLERS})
ROOMS = ("tests/vm/", "tests/supervise/")


def wanted(item: pytest.Item) -> bool:
    facts = {fact for marker in item.iter_markers("needs") for fact in marker.args}
    return bool(facts & WANTED) or item.nodeid.startswith(ROOMS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = [item for item in items if not wanted(item)]
    items[:] = [item for item in items if wanted(item)]
    config.hook.pytest_deselected(items=left)
