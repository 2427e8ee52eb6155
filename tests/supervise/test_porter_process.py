"""The porter as a process of the supervisor: started, shared, lost, given up on."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from sandboxd.errors import JobError, LaunchError
from sandboxd.linux.packets import Entry
from sandboxd.result import Artifact
from sandboxd.supervise.artifacts import Memory
from sandboxd.supervise.porter import DEFAULT, PROCESSES, Porter, open_porter
from tests.supervise.tenants import Tenant, open_tenant


@pytest.fixture
def tenant() -> Iterator[Tenant]:
    with open_tenant() as tenant:
        yield tenant


@contextmanager
def opened(path: Path) -> Iterator[int]:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield folder
    finally:
        os.close(folder)


def pid(porter: Porter) -> int:
    """Of the one that has the next request."""
    return porter._idle[-1].process.pid


async def goes_well(porter: Porter, tenant: Tenant, name: str = "again") -> None:
    await porter.copy_in(tenant.box, {name: name.encode()}, tenant.owner)
    found, errors = await porter.collect(tenant.box, [name])
    assert not errors
    assert [(one.path, one.data) for one in found] == [(name, name.encode())]


@asynccontextmanager
async def stopped(porter: Porter, tenant: Tenant) -> AsyncIterator[int]:
    """The pid of a porter that will not answer."""
    await goes_well(porter, tenant)
    number = pid(porter)
    os.kill(number, signal.SIGSTOP)
    yield number


@pytest.mark.needs("subuid")
async def test_it_starts_when_it_is_needed_and_stays(tenant: Tenant) -> None:
    async with open_porter(tenant.namespace) as porter:
        assert not porter._processes
        await porter.copy_in(tenant.box, {}, tenant.owner)
        assert await porter.collect(tenant.box, []) == ([], [])
        assert not porter._processes
        porter.start()
        number = pid(porter)
        await goes_well(porter, tenant)
        with pytest.raises(JobError):
            await porter.copy_in(tenant.box, {"again/x": b""}, tenant.owner)
        await goes_well(porter, tenant)
        assert pid(porter) == number


@pytest.mark.needs("subuid")
async def test_it_can_do_this_and_nothing_else(tenant: Tenant) -> None:
    async with open_porter(tenant.namespace) as porter:
        await goes_well(porter, tenant)
        status = dict(
            line.split(":\t", 1)
            for line in (await trio.Path(f"/proc/{pid(porter)}/status").read_text()).splitlines()
        )
        there = os.stat(f"/proc/{tenant.process.pid}/ns/user")
        assert os.path.samestat(os.stat(tenant.namespace), there)
    for name in ("CapPrm", "CapEff"):
        assert int(status[name], 16) == 0b1111  # chown, dac_override, dac_read_search, fowner
    assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Threads"] == "1"


@pytest.mark.needs("subuid")
async def test_killed_while_nobody_asks(tenant: Tenant) -> None:
    async with open_porter(tenant.namespace) as porter:
        await goes_well(porter, tenant)
        os.kill(pid(porter), signal.SIGKILL)
        await trio.to_thread.run_sync(os.waitid, os.P_PID, pid(porter), os.WEXITED | os.WNOWAIT)
        await goes_well(porter, tenant)


@pytest.mark.needs("subuid")
async def test_killed_during_a_request(tenant: Tenant) -> None:
    async def fails() -> None:
        with pytest.raises(LaunchError, match="SIGKILL"):
            await porter.copy_in(tenant.box, {"a": b""}, tenant.owner)

    async with open_porter(tenant.namespace) as porter:
        async with stopped(porter, tenant) as number, trio.open_nursery() as nursery:
            nursery.start_soon(fails)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(goes_well, porter, tenant)  # waits for its turn, and has it
            await trio.testing.wait_all_tasks_blocked()
            os.kill(number, signal.SIGKILL)
        await goes_well(porter, tenant)


@pytest.mark.needs("subuid")
async def test_given_up_during_a_request(tenant: Tenant) -> None:
    async def asks(scope: trio.CancelScope) -> None:
        with scope:
            await porter.collect(tenant.box, ["again"])

    async with open_porter(tenant.namespace) as porter:
        async with stopped(porter, tenant) as number, trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            nursery.start_soon(asks, scope)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(goes_well, porter, tenant, "other")
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
        assert scope.cancelled_caught
        assert pid(porter) != number
        await goes_well(porter, tenant)


@pytest.mark.needs("subuid")
async def test_given_up_half_way_through_an_answer(tenant: Tenant) -> None:
    """Wherever it is by then: before, in the midst of, or after it."""
    tenant.run("for number in range(64): open(str(number), 'wb').write(bytes(100_000))")
    async with open_porter(tenant.namespace) as porter:
        for steps in range(40):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(porter.collect, tenant.box, ["*"])
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            await goes_well(porter, tenant)


@pytest.mark.needs("subuid")
async def test_cancelled_before_it_is_our_turn(tenant: Tenant) -> None:
    async with open_porter(tenant.namespace) as porter:
        await goes_well(porter, tenant)
        number = pid(porter)
        with trio.CancelScope() as scope:
            scope.cancel()
            await porter.copy_in(tenant.box, {"a": b""}, tenant.owner)
        assert scope.cancelled_caught
        await goes_well(porter, tenant)
        assert pid(porter) == number


@pytest.mark.needs("subuid")
async def test_left_while_it_does_not_answer(tenant: Tenant) -> None:
    async with open_porter(tenant.namespace) as porter:
        async with stopped(porter, tenant):
            pass


@pytest.mark.needs("subuid")
async def test_many_at_once_get_their_own_answers(tenant: Tenant) -> None:
    async with open_porter(tenant.namespace) as porter, trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(goes_well, porter, tenant, f"d{number}")


class Slow(Memory):
    """A disk that takes nothing for a while."""

    blocks = True

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked = 0

    def take(self, entry: Entry, source: int | None) -> Artifact:
        self.asked += 1
        assert self.go.wait(30)
        return super().take(entry, source)


@pytest.mark.needs("subuid")
async def test_a_long_request_is_not_in_the_way(tenant: Tenant) -> None:
    """Up to a number of them; who comes when all are busy waits for his turn."""
    tenant.run("open('large', 'wb').write(bytes(100_000))")
    sinks = [Slow() for _ in range(PROCESSES + 2)]
    async with open_porter(tenant.namespace) as porter:
        async with trio.open_nursery() as nursery:
            for number, sink in enumerate(sinks):
                if number == PROCESSES - 1:
                    await goes_well(porter, tenant)
                nursery.start_soon(porter.collect, tenant.box, ["large"], DEFAULT, sink)
                while number < PROCESSES and not sink.asked:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            nursery.start_soon(goes_well, porter, tenant, "at last")
            await trio.testing.wait_all_tasks_blocked()
            assert len(porter._processes) == PROCESSES
            assert [sink.asked for sink in sinks] == [1] * PROCESSES + [0, 0]
            for sink in sinks:
                sink.go.set()
        assert len(porter._idle) == PROCESSES
        await goes_well(porter, tenant)


@pytest.mark.needs("subuid")
async def test_all_are_given_up_while_somebody_waits(tenant: Tenant) -> None:
    """Each given up costs its process: who waits for one of them gets another."""
    async with (
        open_porter(tenant.namespace) as porter,
        trio.open_nursery() as nursery,
        trio.open_nursery() as given_up,
    ):
        async with stopped(porter, tenant):
            for number in range(1, PROCESSES + 1):
                given_up.start_soon(porter.collect, tenant.box, ["again"])
                while len(porter._processes) < number or porter._idle:  # noqa: ASYNC110
                    await trio.sleep(0.001)
                os.kill(porter._processes[-1].process.pid, signal.SIGSTOP)
        for _ in range(PROCESSES + 2):
            nursery.start_soon(goes_well, porter, tenant)
        await trio.testing.wait_all_tasks_blocked()
        given_up.cancel_scope.cancel()


@pytest.mark.needs("subuid")
async def test_left_when_it_was_somebodys_turn(tenant: Tenant) -> None:
    """One has become free for him, and he has not yet come to take it."""
    tenant.run("open('large', 'wb').write(bytes(100_000))")
    sinks = [Slow() for _ in range(PROCESSES)]
    refused: list[str] = []

    async def comes_too_late() -> None:
        with pytest.raises(LaunchError) as caught:
            await porter.collect(tenant.box, ["large"])
        refused.append(caught.value.stage)

    async def go_on(sink: Slow) -> None:
        while not sink.asked:  # noqa: ASYNC110
            await trio.sleep(0.01)
        nursery.start_soon(comes_too_late)
        await trio.testing.wait_all_tasks_blocked()
        sink.go.set()

    async with trio.open_nursery() as nursery:
        async with open_porter(tenant.namespace) as porter:
            *others, ours = sinks
            for sink in others:
                nursery.start_soon(porter.collect, tenant.box, ["large"], DEFAULT, sink)
                while not sink.asked:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            nursery.start_soon(go_on, ours)
            await porter.collect(tenant.box, ["large"], DEFAULT, ours)
        for sink in others:
            sink.go.set()
    assert refused == ["porter"]


@pytest.mark.needs("subuid")
async def test_left_while_it_is_asked(tenant: Tenant) -> None:
    """Who has it gets the answer, who waits for his turn learns that there is none any more."""
    tenant.run("open('large', 'wb').write(bytes(100_000))")
    sinks = [Slow() for _ in range(PROCESSES)]
    answers: list[list[int]] = []
    refused: list[str] = []

    async def comes_in_time(sink: Slow) -> None:
        found, _ = await porter.collect(tenant.box, ["large"], DEFAULT, sink)
        answers.append([len(one.data) for one in found])

    async def comes_too_late() -> None:
        with pytest.raises(LaunchError) as caught:
            await porter.collect(tenant.box, ["large"])
        refused.append(caught.value.stage)

    async with trio.open_nursery() as nursery:
        async with open_porter(tenant.namespace) as porter:
            for sink in sinks:
                nursery.start_soon(comes_in_time, sink)
                while not sink.asked:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            nursery.start_soon(comes_too_late)
            nursery.start_soon(comes_too_late)
            await trio.testing.wait_all_tasks_blocked()
        for sink in sinks:
            sink.go.set()
    assert answers == [[100_000]] * PROCESSES
    assert refused == ["porter"] * 2
    assert not porter._processes


@pytest.mark.needs("subuid")
async def test_few_descriptors_are_enough(tenant: Tenant, tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / str(number)).write_bytes(bytes(20_000))
    before = set(os.listdir("/proc/self/fd"))
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, len(set(os.listdir("/proc/self/fd")) - before))
            await trio.lowlevel.checkpoint()

    async with open_porter(tenant.namespace) as porter, trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await porter.copy_in(tenant.box, {"all": tmp_path, "b": bytes(50_000)}, tenant.owner)
        found, _ = await porter.collect(tenant.box, ["**"])
        nursery.cancel_scope.cancel()
    assert len(found) == 201
    assert 16 < most < 40


async def test_a_namespace_that_cannot_be_joined(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        async with open_porter(folder) as porter:
            for _ in range(2):
                with pytest.raises(LaunchError, match="join the user namespace"):
                    await porter.copy_in(folder, {"a": b""}, (0, 0))


async def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        async with open_porter(None) as porter:
            for _ in range(2):
                with pytest.raises(LaunchError, match="Not a directory"):
                    await porter.copy_in(file.fileno(), {"a": b""}, (os.getuid(), os.getgid()))
                with pytest.raises(LaunchError, match="Not a directory"):
                    await porter.collect(file.fileno(), ["a"])


@pytest.mark.parametrize("own", [False, True])
async def test_without_another_namespace(own: bool) -> None:
    """None at all, or our own: the porter has our rights and the ids are those of the host."""
    with tempfile.TemporaryDirectory() as name, opened(Path("/proc/self/ns")) as spaces:
        namespace = os.open("user", os.O_RDONLY | os.O_CLOEXEC, dir_fd=spaces) if own else None
        try:
            with opened(Path(name)) as folder:
                async with open_porter(namespace) as porter:
                    await porter.copy_in(folder, {"a/b": b"1"}, (os.getuid(), os.getgid()))
                    if os.getuid():
                        os.mkdir("closed", 0, dir_fd=folder)
                        os.mkdir("seen", 0o400, dir_fd=folder)
                    found, errors = await porter.collect(folder, ["**", "seen/x"])
        finally:
            if namespace is not None:
                os.close(namespace)
    assert [(one.path, one.data) for one in found] == [("a/b", b"1")]
    denied = [("closed", "Permission denied"), ("seen", "Permission denied")]
    assert [(one.path, one.reason) for one in errors] == (denied if os.getuid() else [])


async def test_what_our_rights_do_not_allow(tmp_path: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root may do it")
    with opened(tmp_path) as folder:
        async with open_porter(None) as porter:
            with pytest.raises(LaunchError, match=r"make files.*Operation not permitted"):
                await porter.copy_in(folder, {"a": b""}, (0, 0))
            os.fchmod(folder, 0)
            found, errors = await porter.collect(folder, ["a", "**"])
            os.fchmod(folder, 0o700)
    assert not found
    assert [(one.path, one.reason) for one in errors] == [(".", "Permission denied")]


@pytest.mark.needs("userns")
async def test_a_tenant_of_a_single_id() -> None:
    with open_tenant(ids=False) as tenant:
        async with open_porter(tenant.namespace) as porter:
            await goes_well(porter, tenant)
            tenant.run("assert open('again').read() == 'again'; os.chmod('again', 0)")
            tenant.die()
            found, _ = await porter.collect(tenant.box, ["*"])
    assert [one.data for one in found] == [b"again"]
