"""Jobs of all kinds at once, while at random what serves them is killed and callers go away.

Each call ends with a result or with an error that sandboxd raises on purpose, the runner works on,
and nothing is left of it (conftest looks).
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import trio

from sandboxd.errors import HostError, LaunchError, SandboxError
from sandboxd.group import Group, Member
from sandboxd.job import Job, Pipe
from sandboxd.policy import Limits, Mount, Policy, Root
from sandboxd.supervise.runner import Runner, open_runner
from tests import needs
from tests.supervise.endings import with_way_out
from tests.supervise.overlays import CALLER
from tests.supervise.test_lifecycle import descendants
from tests.supervise.variants import policy, without

SECONDS = float(os.environ.get("SANDBOXD_TEST_STRESS", "5"))
CALLERS = 6
LIMITS = Limits(wall_time=20.0, disk=16 << 20, inodes=2000)
SCRIPT = "head -c 50000 /dev/zero > big; mkdir d; echo one > d/one; cat a; sleep 0.0$(($$ % 3))"
Call = Callable[[Runner], Awaitable[object]]


def job(chosen: Policy, **more: object) -> Job:
    return Job(argv=["sh", "-c", SCRIPT], policy=chosen, files={"a": b"x"}, **more)  # type: ignore[arg-type]


def plain(chance: random.Random) -> list[Call]:
    """Policies that share a tenant and that do not, with files and without."""
    own = policy(Limits(wall_time=chance.choice([20.0, 21.0, 22.0])))
    other = msgspec.structs.replace(own, mounts=(Mount(source="/usr", target="/mnt"),))
    short, busy = ["true"], ["sh", "-c", "trap '' TERM; sleep 1000 & sleep 0.02"]
    return [
        lambda runner: runner.run(Job(argv=short, policy=own)),
        lambda runner: runner.run(Job(argv=busy, policy=other)),
        lambda runner: runner.run(job(own, collect=["*", "d/*"])),
    ]


def on_disk(_: random.Random) -> list[Call]:
    directory = policy(LIMITS, Root(upper="directory", proc="masked"))
    calls: list[Call] = [lambda runner: runner.run(job(directory, collect=["big"]))]
    if not needs.missing("fuse"):
        fuse = policy(LIMITS, Root(writable=True, driver="fuse", proc="masked"), CALLER)
        calls.append(lambda runner: runner.run(Job(argv=["touch", "/etc/x"], policy=fuse)))
    return calls


def together(chance: random.Random) -> list[Call]:
    own = policy()
    cat = Job(argv=["cat"], policy=own)
    members = {
        "a": Member(job=Job(argv=["sleep", "0.05"], policy=own)),
        "b": Member(job=Job(argv=["true"], policy=own), after=["a"]),
    }
    writer = Job(argv=["sh", "-c", "head -c 200000 /dev/zero"], policy=own)
    pipe = Pipe(writer=0, reader=1, relay=chance.random() < 0.5)
    return [
        lambda runner: runner.run_group(Group(members=members)),
        lambda runner: runner.run_pipeline([writer, cat], [pipe]),
    ]


def way_out(_: random.Random) -> list[Call]:
    """Where this user may have one."""
    if needs.missing("tun") or needs.missing("slirp4netns"):
        return []
    chosen = with_way_out()
    return [lambda runner: runner.run(Job(argv=["sleep", "0.01"], policy=chosen))]


def followed(chance: random.Random) -> list[Call]:
    roots = Root(proc="masked"), Root(upper="directory", proc="masked")
    own = policy(LIMITS, chance.choice(roots))

    async def follow(runner: Runner) -> None:
        async with runner.start(job(own, collect=["*"], collect_to="stream")) as run:
            async for event in run.events:
                if event.type == "stdout" and chance.random() < 0.3:
                    with suppress(SandboxError):
                        await run.pause()
                        run.resume()
                if chance.random() < 0.05:
                    run.kill()
            await run.wait()
            async for one in run.artifacts():
                await one.read(1000)

    return [follow]


def every(chance: random.Random) -> list[Call]:
    kinds = plain, on_disk, together, way_out, followed
    return [call for kind in kinds for call in kind(chance)]


async def end_one(chance: random.Random, how: Counter[str]) -> None:
    """A process of ours, by a pidfd that is held before it is looked at whose it is. Some stand
    still for a moment before that."""
    pids = descendants(os.getpid())
    if not pids:
        return
    pid = chance.choice(pids)
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if pid in descendants(os.getpid()):
                how[Path(f"/proc/{pid}/comm").read_text().strip()] += 1  # noqa: ASYNC240
                if chance.random() < 0.3:
                    signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
                    with trio.CancelScope(shield=True):
                        await trio.sleep(chance.random() * 0.1)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except (FileNotFoundError, PermissionError):
            pass
        finally:
            os.close(pidfd)


async def caller(runner: Runner, until: float, chance: random.Random, ended: Counter[str]) -> None:
    """Asks for one after the other, and sometimes does not wait for it."""
    while trio.current_time() < until and not runner._closed:
        patience = chance.choice([0.0, 0.01, 0.03, 0.1, 60.0, 60.0, 60.0, 60.0])
        with trio.move_on_after(patience) as scope:
            try:
                await chance.choice(every(chance))(runner)
                ended["well"] += 1
            except (LaunchError, HostError) as error:  # and none is the caller's mistake
                ended[type(error).__name__] += 1
            except SandboxError as error:
                if "the runner is closed" not in str(error):
                    raise
                ended["closed"] += 1
        ended["cancelled"] += scope.cancelled_caught


async def works(runner: Runner, call: Call) -> None:
    """Now, or when the last that was killed is dead: who takes a spare cannot see that it dies."""
    for _ in range(3):
        with suppress(LaunchError):
            await call(runner)
            return
    await call(runner)


@pytest.mark.time_limit(60.0 + SECONDS)
@pytest.mark.parametrize("host", ["nothing", "subuid"])
async def test_whatever_is_killed(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SANDBOXD_TEST_STRESS=60 for so many seconds; the seed is printed."""
    seed = int(os.environ.get("SANDBOXD_TEST_SEED", random.randrange(1 << 32)))
    sys.stdout.write(f"SANDBOXD_TEST_SEED={seed}\n")
    chance = random.Random(seed)
    monkeypatch.setenv("SANDBOXD_UPPERS", str(tmp_path / "uppers"))
    for name, most in (("MOST", 8), ("MOST_LIVING", 1), ("MOST_AHEAD", 3)):
        monkeypatch.setattr(f"sandboxd.supervise.known.{name}", most)
    ended: Counter[str] = Counter()
    killed: Counter[str] = Counter()

    async with trio.open_nursery() as late, open_runner(
        slots=4, spares=chance.choice([0, 1]), host=without(host),
        cgroup=chance.choice([None, "none"]),
    ) as runner:  # fmt: skip
        until = trio.current_time() + SECONDS
        async with trio.open_nursery() as nursery:
            for _ in range(CALLERS):
                nursery.start_soon(caller, runner, until, chance, ended)
            while trio.current_time() < until:
                await trio.sleep(chance.random() * 0.1)
                await end_one(chance, killed)
        assert runner.statistics().running == runner.statistics().waiting == 0
        for call in every(chance):
            await works(runner, call)
        for _ in range(CALLERS):
            late.start_soon(caller, runner, math.inf, chance, ended)
        await trio.sleep(chance.random() * 0.2)
    sys.stdout.write(f"{dict(ended)} {dict(killed)}\n")
    assert ended["well"]
