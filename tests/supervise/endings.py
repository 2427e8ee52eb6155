"""Bringing about moments for tests: a process that is stopped, no descriptor that is left."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec
import pytest
import trio
import trio.testing

from sandboxd.errors import SandboxError
from sandboxd.job import Job
from sandboxd.policy import Mount, Network, Policy
from sandboxd.supervise.homes import Kept
from sandboxd.supervise.runner import Runner
from sandboxd.supervise.tenants import Tenant
from tests.supervise.test_lifecycle import children
from tests.supervise.variants import policy

TRUE = Job(argv=["true"], policy=policy())
FILES = Job(argv=["true"], policy=policy(), files={"a": b"x"})


def only(runner: Runner) -> tuple[Kept, Tenant]:
    """The only policy of a runner, and its living tenant."""
    (kept,) = runner._known.all()
    assert kept.home.living is not None
    return kept, kept.home.living


def zygote_of(tenant: Tenant) -> int:
    (zygote,) = children(tenant.pid)
    return zygote


def with_mount(target: str) -> Policy:
    """A policy of another root, and so of another tenant."""
    return msgspec.structs.replace(policy(), mounts=(Mount(source="/usr", target=target),))


def with_way_out() -> Policy:
    return msgspec.structs.replace(policy(), network=Network(mode="user", allow=("*",)))


async def until(true: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not true():  # noqa: ASYNC110
            await trio.sleep(0.001)


async def refused(call: Callable[[], Awaitable[object]], into: list[SandboxError]) -> None:
    """What a call is refused with; only what sandboxd says on purpose will do."""
    with pytest.raises(SandboxError) as caught:
        await call()
    into.append(caught.value)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Meanwhile we may open no more than so many."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    most = max(map(int, os.listdir("/proc/self/fd"))) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (most + count, limits[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
