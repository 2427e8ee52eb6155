"""The sidecar of a root by fuse-overlayfs: whoever dies, nothing hangs and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import trio

from sandboxd.errors import LaunchError
from sandboxd.job import Job
from sandboxd.policy import Limits, Root
from sandboxd.supervise.runner import Runner, open_runner
from tests.supervise.overlays import CALLER, LIMITS, PYTHON
from tests.supervise.test_lifecycle import all_end, children, descendants
from tests.supervise.variants import as_found, policy

pytestmark = pytest.mark.needs("fuse")
FUSE = policy(LIMITS, Root(writable=True, driver="fuse", proc="masked"), CALLER)
WAITING = Job(argv=["sh", "-c", "echo there; exec sleep 1000"], policy=FUSE, stdin=None)


def servers(pid: int) -> list[int]:
    """The processes of fuse-overlayfs below a process of ours."""
    return [one for one in descendants(pid) if comm(one) == "fuse-overlayfs"]


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def lost(runner: Runner, victim: str, how: signal.Signals) -> LaunchError:
    """What the caller learns when it is ended while a job runs."""
    try:
        async with runner.start(WAITING) as run:
            async for event in run.events:
                if event.data == b"there\n":
                    (server,) = servers(os.getpid())
                    os.kill(server if victim == "server" else parent(server), how)
            await run.wait()
    except LaunchError as error:
        return error
    raise AssertionError("it went on")


@pytest.mark.parametrize("victim", ["server", "sidecar"])
async def test_it_is_killed(victim: str) -> None:
    async with open_runner() as runner:
        error = await lost(runner, victim, signal.SIGKILL)
        assert error.stage == "fuse_overlayfs"
        assert "ended while it was needed" in str(error)
        assert not servers(os.getpid())
        assert (await runner.run(Job(argv=["touch", "/etc/x"], policy=FUSE))).ok


async def test_it_is_killed_while_nobody_listens() -> None:
    """Runner.run hears of it as well, and what the program printed is no result."""
    async with open_runner() as runner, trio.open_nursery() as nursery:

        async def killer() -> None:
            while not (found := servers(os.getpid())):  # noqa: ASYNC110
                await trio.sleep(0.001)
            os.kill(found[0], signal.SIGKILL)

        nursery.start_soon(killer)
        with pytest.raises(LaunchError):
            await runner.run(Job(argv=["sleep", "1000"], policy=FUSE))


async def test_it_stops_answering() -> None:
    """The program waits, and is ended at its limit; but that is none of the program's doing."""
    limits = Limits(wall_time=0.5)
    chosen = policy(limits, FUSE.root, CALLER)
    script = "import os, sys; print('there', flush=True); sys.stdin.read(1); os.stat('/usr/gone')"
    job = Job(argv=[PYTHON, "-c", script], policy=chosen, stdin=None)
    async with open_runner() as runner:
        try:
            async with runner.start(job) as run:
                async for event in run.events:
                    if event.data == b"there\n":
                        (server,) = servers(os.getpid())
                        os.kill(server, signal.SIGSTOP)
                        assert run.stdin is not None
                        await run.stdin.send_all(b"x")
                await run.wait()
        except LaunchError as error:
            found = str(error)  # what ends the program at its limit may be first to end the server
            assert "does not answer" in found or "ended while it was needed" in found
        else:
            pytest.fail("it went on")


async def test_a_spare_whose_server_died_is_not_used() -> None:
    async with open_runner(slots=1, spares=1) as runner:
        await runner.run(Job(argv=["true"], policy=FUSE))
        while not (runner.statistics().spares and servers(os.getpid())):  # noqa: ASYNC110
            await trio.sleep(0.001)
        (server,) = servers(os.getpid())
        with all_end([server, parent(server)]):
            os.kill(server, signal.SIGKILL)
            (spare,) = next(iter(runner._known.all())).spares
            assert spare.area is not None
            await trio.lowlevel.wait_readable(spare.area.link)
            assert spare.area.is_lost()
            assert (await runner.run(Job(argv=["touch", "/etc/x"], policy=FUSE))).ok


SUPERVISOR = """
import trio
from tests.supervise.test_areas import WAITING
from sandboxd.supervise.runner import open_runner
async def main():
    async with open_runner(cgroup="none") as runner, runner.start(WAITING) as run:
        async for event in run.events:
            if event.data:
                print("there", flush=True)
trio.run(main)
"""


def test_the_supervisor_is_killed() -> None:
    before = Path("/proc/self/mountinfo").read_text()
    words = [sys.executable, "-c", SUPERVISOR]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=root) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == b"there\n"
        left = descendants(supervisor.pid)
        assert servers(supervisor.pid)
        assert children(supervisor.pid)
        with all_end(left):
            supervisor.kill()
    assert Path("/proc/self/mountinfo").read_text() == before


async def test_what_it_cannot_mount() -> None:
    """A program that is no fuse-overlayfs: what it says is in the error."""
    host = msgspec.structs.replace(as_found(), fuse_overlayfs="/bin/false")
    async with open_runner(host=host) as runner:
        with pytest.raises(LaunchError, match="fuse_overlayfs"):
            await runner.run(Job(argv=["true"], policy=FUSE))


async def test_one_limit_for_the_root_and_all_else() -> None:
    """What is written through fuse-overlayfs and what is not lie on one tmpfs."""
    script = "head -c 5M /dev/zero > /usr/local/x 2>/dev/null || head -c 5M /dev/zero > /var/x;"
    chosen = policy(Limits(wall_time=30.0, disk=8 << 20), FUSE.root, CALLER)
    async with open_runner() as runner:
        half = await runner.run(Job(argv=["sh", "-ec", script], policy=chosen))
        assert half.ok, half
        assert 5 << 20 <= (half.usage.disk_used or 0) < 6 << 20
        script += "head -c 5M /dev/zero > /box/y"
        result = await runner.run(Job(argv=["sh", "-ec", script], policy=chosen))
    assert result.status == "disk_limit", result
    assert result.limits["disk"].exceeded
    assert "disk" not in [one.what for one in result.degraded]


async def test_one_is_made_ahead() -> None:
    """From the second run on there is one for the next; it ends with the runner, or is not used."""
    async with open_runner(slots=1) as runner:
        for _ in range(2):
            assert (await runner.run(Job(argv=["true"], policy=FUSE))).ok
        (kept,) = runner._known.all()
        while kept.ahead is None:  # noqa: ASYNC110
            await trio.sleep(0.001)
        (ahead,) = servers(os.getpid())
        assert (await runner.run(Job(argv=["touch", "/etc/x"], policy=FUSE))).ok
        while kept.ahead is None:  # noqa: ASYNC110  the next one
            await trio.sleep(0.001)
        (server,) = servers(os.getpid())
        assert server != ahead
        with all_end([server]):
            os.kill(server, signal.SIGKILL)
            await trio.lowlevel.wait_readable(kept.ahead.link)
        assert (await runner.run(Job(argv=["test", "!", "-e", "/etc/x"], policy=FUSE))).ok
