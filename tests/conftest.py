"""What every test gets: trio for `async def`, a skip that names the missing fact, a clean end."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import trio
import trio.testing

from tests import leftovers, needs

# ./do gives hypothesis a directory outside the checkout; times on a shared machine mean nothing.
hypothesis.settings.register_profile("sandboxd", deadline=None, print_blob=True)
hypothesis.settings.load_profile("sandboxd")

TIME_LIMIT = 60.0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for fact in marker.args:
            if reason := needs.missing(fact):
                pytest.skip(f"needs {fact}: {reason}")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs `async def test_*` under trio, with a time limit; sync tests have only the watchdog."""
    if not inspect.iscoroutinefunction(inspect.unwrap(pyfuncitem.obj)):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in wanted}
    virtual = pyfuncitem.get_closest_marker("autojump_clock")
    marker = pyfuncitem.get_closest_marker("time_limit")
    # On the virtual clock whoever hangs gets to the limit at once, however far away it is.
    seconds = marker.args[0] if marker else 86400.0 if virtual else TIME_LIMIT
    seconds *= leftovers.STRETCH

    async def limited() -> None:
        with trio.fail_after(seconds):
            await pyfuncitem.obj(**arguments)

    clock = trio.testing.MockClock(autojump_threshold=0) if virtual else None
    trio.run(limited, clock=clock)
    return True


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fails the test that leaves a process, mount, cgroup, descriptor or directory behind."""
    before = leftovers.now()
    yield
    if left := leftovers.since(before):
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="session")
def cgroup_top() -> Path:
    """The delegated cgroup v2 subtree; mark the test with needs("cgroup")."""
    return Path(os.environ["SANDBOXD_CGROUP"])
