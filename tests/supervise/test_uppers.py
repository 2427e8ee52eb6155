"""Areas in a directory: what a run writes is on disk, within its budget, and gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sandboxd.errors import HostError, JobError, LaunchError
from sandboxd.job import Job
from sandboxd.policy import Limits, Policy, Root
from sandboxd.result import Result
from sandboxd.stores import folders
from sandboxd.supervise import uppers
from sandboxd.supervise.runner import open_runner
from tests.supervise.overlays import DRIVERS, PRELUDE, PYTHON, lower
from tests.supervise.overlays import policy as overlay_policy
from tests.supervise.test_lifecycle import all_end, children, descendants
from tests.supervise.variants import hosts, policy, without

pytestmark = pytest.mark.needs("userns")
DIRECTORY = Root(upper="directory", proc="masked")
LIMITS = Limits(wall_time=30.0, disk=16 << 20, inodes=2000)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the directories are; nothing is in there in the end."""
    found = tmp_path / "uppers"
    monkeypatch.setenv("SANDBOXD_UPPERS", str(found))
    yield found
    assert not found.exists() or os.listdir(found) == []


def directories(place: Path) -> set[Path]:
    return {*place.glob("*/*/")}


async def run(script: str, chosen: Policy, host: str = "nothing") -> Result:
    async with open_runner(host=without(host)) as runner:
        return await runner.run(Job(argv=["sh", "-ec", script], policy=chosen))


@hosts("nothing", "subuid", "machine")
async def test_it_is_on_disk(host: str, place: Path) -> None:
    chosen = policy(LIMITS, DIRECTORY)
    script = "stat -f -c %T /box /tmp /dev/shm; head -c 5M /dev/zero > /box/x; mkdir -p /tmp/a/b"
    result = await run(script, chosen, host)
    assert result.ok, result
    kind = await trio.run_process(["stat", "-f", "-c", "%T", str(place)], capture_stdout=True)
    assert set(result.stdout.split()) == set(kind.stdout.split())
    assert 5 << 20 <= (result.usage.disk_used or 0) < 6 << 20
    assert 6 <= (result.usage.inodes_used or 0) < 20
    assert result.enforcement["disk"] == result.enforcement["inodes"] == "watched directory"
    assert "disk" in [one.what for one in result.degraded]


@pytest.mark.parametrize("spares", [0, 1])
@pytest.mark.parametrize("read", [True, False])
async def test_collected_files_outlive_the_sandbox(spares: int, read: bool, place: Path) -> None:
    """As a stream they are read when it is dead; the directory goes with the last of them."""
    job = Job(
        argv=["sh", "-c", "echo one > /box/a; head -c 3M /dev/zero > /box/b"],
        policy=policy(LIMITS, DIRECTORY), collect=["*"], collect_to="stream",
    )  # fmt: skip
    found = {}
    async with open_runner(spares=spares) as runner:
        for _ in range(2):
            async with runner.start(job) as run:
                async for _ in run.events:
                    pass
                assert (await run.wait()).ok
                async for one in run.artifacts():
                    found[one.record.path] = len([piece async for piece in one])
                    if not read:
                        break
                kept = directories(place)
            assert found == ({"a": 1, "b": 3} if read else {"a": 1})
            assert kept - directories(place)
        with pytest.raises(KeyError):  # noqa: PT012
            async with runner.start(job) as run:
                async for _ in run.events:
                    pass
                raise KeyError


@hosts("nothing", "subuid")
@pytest.mark.parametrize("how", ["retired", "killed"])
async def test_collected_files_outlive_the_tenant(host: str, how: str, place: Path) -> None:
    """Whose other directories go with it; this one when it has been read."""
    job = Job(
        argv=["sh", "-c", "echo one > /box/a; head -c 3M /dev/zero > /box/b"],
        policy=policy(LIMITS, DIRECTORY), collect=["*"], collect_to="stream",
    )  # fmt: skip
    async with open_runner(host=without(host), slots=1) as runner:
        async with runner.start(job) as run:
            async for _ in run.events:
                pass
            assert (await run.wait()).ok
            (home,) = runner._known.homes
            if how == "retired":
                await home.retire()
            else:
                assert home.living is not None
                (zygote,) = children(home.living.pid)
                with all_end([zygote]):
                    os.kill(zygote, signal.SIGKILL)
                assert (await runner.run(Job(argv=["true"], policy=job.policy))).ok
            found = {one.record.path: len([part async for part in one])
                     async for one in run.artifacts()}  # fmt: skip
            assert found == {"a": 1, "b": 3}
        assert (await runner.run(Job(argv=["true"], policy=job.policy))).ok
        assert len(os.listdir(place)) == 1, "of the tenant that there is now"


@pytest.mark.parametrize("when", ["in", "out"])
async def test_its_tenant_is_left_while_files_are_on_their_way(when: str, place: Path) -> None:
    """Nobody takes the directory away from who is at it: there is a result, or why there is none,
    which is nothing that the job did."""
    chosen = policy(LIMITS, DIRECTORY)
    files = {"a": b"x"} if when == "in" else {}
    job = Job(argv=["sh", "-c", "echo one > big"], policy=chosen, files=files, collect=["big"])
    told: list[str] = []

    async def run_it() -> None:
        try:
            told.append(str([one.data for one in (await runner.run(job)).artifacts]))
        except LaunchError as error:
            told.append(error.stage)

    async with open_runner(slots=2) as runner:
        await runner.run(job)
        (home,) = runner._known.homes
        assert home.living is not None
        (process,) = (await home.porter())._processes
        async with trio.open_nursery() as nursery:
            os.kill(process.process.pid, signal.SIGSTOP)
            nursery.start_soon(run_it)
            while not process.owes:  # noqa: ASYNC110
                await trio.sleep(0.001)
            (zygote,) = children(home.living.pid)
            with all_end([zygote, *descendants(zygote)]):
                os.kill(zygote, signal.SIGKILL)
            assert (await runner.run(Job(argv=["true"], policy=chosen))).ok
            os.kill(process.process.pid, signal.SIGCONT)
        assert told[0] in (("sandbox", "tenant") if when == "in" else (str([b"one\n"]),))
        assert len(os.listdir(place)) == 1


@pytest.mark.parametrize("driver", ["kernel", "none"])
async def test_files_that_do_not_fit_are_refused(driver: str, tmp_path: Path) -> None:
    limits = Limits(wall_time=30.0, disk=2 << 20, inodes=300)
    chosen = policy(limits, DIRECTORY)
    if driver != "none":
        chosen = overlay_policy(lower(tmp_path), driver, limits, upper="directory")
    many = {f"{number}": b"" for number in range(400)}
    async with open_runner() as runner:
        for files, limit in (({"x": bytes(3 << 20)}, "disk"), (many, "inodes")):
            with pytest.raises(JobError, match="do not fit") as caught:
                await runner.run(Job(argv=["true"], policy=chosen, files=files))
            assert f"limits.{limit}" in caught.value.hint
        fits = Job(argv=[PYTHON, "-c", ""], policy=chosen, files={"x": bytes(1 << 20)})
        assert (await runner.run(fits)).ok


@DRIVERS
async def test_a_writable_root(driver: str, tmp_path: Path) -> None:
    root = lower(tmp_path)
    chosen = overlay_policy(root, driver, LIMITS, upper="directory")
    program = PRELUDE + """
os.unlink("file")
shutil.rmtree("deep")
os.mkdir("deep")
os.mkdir("deep/closed", 0)
with open("one", "a") as file:
    file.write("more\\n")
os.mkfifo("fifo")
os.symlink("/", "out")
with open("big", "wb") as file:
    file.write(bytes(5 << 20))
print(open("one").read(), end="")
"""  # fmt: skip
    async with open_runner() as runner:
        for _ in range(2):
            result = await runner.run(Job(argv=[PYTHON, "-Bc", program], policy=chosen))
            assert (result.status, result.stdout) == ("ok", b"both\nmore\n"), result
            assert (result.usage.disk_used or 0) >= 5 << 20
    assert (root / "data/file").read_text() == "lower\n"


KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param("kernel-tmpfs", marks=pytest.mark.needs("overlay")),
        pytest.param("fuse-tmpfs", marks=pytest.mark.needs("fuse")),
        pytest.param("kernel-directory", marks=pytest.mark.needs("overlay")),
        pytest.param("fuse-directory", marks=pytest.mark.needs("fuse")),
    ],
)
BOMBS = {
    "one file": """
with open("bomb", "wb") as file:
    while True:
        file.write(bytes(1 << 20))
        file.flush()
""",
    "many files": """
for number in range(1 << 20):
    with open(f"bomb{number}", "wb") as file:
        file.write(bytes(256 << 10))
""",
    "inodes": """
for number in range(1 << 20):
    os.close(os.open(f"bomb{number}", os.O_CREAT | os.O_WRONLY))
""",
    "directories": """
for number in range(1 << 20):
    os.mkdir(f"bomb{number}")
""",
}
NAMELESS = """
import os, time
bombs = []
for number in range(200):
    bombs.append(open("bomb", "wb"))
    os.unlink("bomb")
    bombs[-1].write(bytes(1 << 20))
    bombs[-1].flush()
time.sleep(100)
"""


@KINDS
@pytest.mark.parametrize("bomb", BOMBS)
async def test_bombs(kind: str, bomb: str, tmp_path: Path) -> None:
    driver, upper = kind.split("-")
    chosen = overlay_policy(lower(tmp_path), driver, LIMITS, upper=upper)
    async with open_runner() as runner:
        result = await runner.run(Job(argv=[PYTHON, "-Bc", PRELUDE + BOMBS[bomb]], policy=chosen))
    assert result.status == "disk_limit", (result.status, result.message, result.usage)
    of = "inodes" if bomb in ("inodes", "directories") else "disk"
    assert result.limits[of].exceeded, result.limits
    if upper == "directory":  # what a disk takes in the time of a look or two
        assert (result.usage.disk_used or 0) < 1 << 30


@pytest.mark.parametrize("where", ["/box", "/data"])
@DRIVERS
async def test_bombs_without_a_name(driver: str, where: str, tmp_path: Path) -> None:
    """Nothing is found by looking at names: what processes have open counts, too."""
    chosen = overlay_policy(lower(tmp_path), driver, LIMITS, upper="directory")
    program = f"import os; os.chdir({where!r})\n" + NAMELESS
    async with open_runner() as runner:
        result = await runner.run(Job(argv=[PYTHON, "-c", program], policy=chosen))
    assert result.status == "disk_limit", (result.status, result.message, result.usage)
    assert result.message.startswith("stopped: disk ")
    assert result.limits["disk"].exceeded


@pytest.mark.parametrize("where", ["/box", "/tmp", "/dev/shm"])
async def test_bombs_without_a_root(where: str) -> None:
    result = await run(f"head -c 1G /dev/zero > {where}/bomb", policy(LIMITS, DIRECTORY))
    assert result.status == "disk_limit", result


async def test_deeper_than_is_looked_at() -> None:
    script = """
import os, time
for _ in range(1000):
    os.mkdir("d")
    os.chdir("d")
time.sleep(100)
"""
    chosen = policy(LIMITS, DIRECTORY)
    async with open_runner() as runner:
        result = await runner.run(Job(argv=[PYTHON, "-c", script], policy=chosen))
    assert result.status == "disk_limit", result
    assert "deeper directories" in result.message


async def test_a_quiet_run_is_left_alone() -> None:
    script = "for i in $(seq 100); do echo $i > /box/$i; done; head -c 10M /dev/zero > /box/x;"
    result = await run(script + "sleep 1.5; rm /box/*", policy(LIMITS, DIRECTORY))
    assert result.ok, result
    assert (result.usage.disk_used or 0) < 1 << 20


async def test_collected_files_come_from_it() -> None:
    job = Job(argv=["sh", "-c", "cat in > out"], policy=policy(LIMITS, DIRECTORY),
              files={"in": b"carried"}, collect=["out"])  # fmt: skip
    async with open_runner(spares=1) as runner:
        for _ in range(3):
            result = await runner.run(job)
            assert [one.data for one in result.artifacts] == [b"carried"]


async def test_cancelled_at_any_point(place: Path) -> None:
    async with open_runner(slots=2) as runner:
        await runner.run(Job(argv=["true"], policy=policy(LIMITS, DIRECTORY)))
        for step in range(20):
            with trio.move_on_after(step * 0.004):
                argv = ["sh", "-c", "touch a b c; sleep 1000"]
                await runner.run(Job(argv=argv, policy=policy(LIMITS, DIRECTORY)))
        (mine,) = os.listdir(place)
        assert os.listdir(place / mine) == []


async def test_no_room_is_said_before_anything_starts() -> None:
    limits = Limits(wall_time=30.0, disk=1 << 60)
    with pytest.raises(HostError, match="bytes are free") as caught:
        await run("true", policy(limits, DIRECTORY))
    assert "SANDBOXD_UPPERS" in caught.value.hint


async def test_a_place_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOXD_UPPERS", "/proc/uppers")
    with pytest.raises(HostError, match="/proc/uppers"):
        await run("true", policy(LIMITS, DIRECTORY))


async def test_nobody_else_gets_at_it(place: Path) -> None:
    """A program that changes its user, made by a job, is out of reach of the host's other users."""
    job = Job(argv=["sh", "-c", "cp /bin/id . && chmod 6755 id; echo there; exec sleep 1000"],
              policy=policy(LIMITS, DIRECTORY))  # fmt: skip
    async with open_runner() as runner:
        async with runner.start(job) as run:
            async for event in run.events:
                if event.data:
                    break
            (mine,) = place.iterdir()  # noqa: ASYNC240
            assert mine.stat().st_mode & 0o7777 == 0o700


SUPERVISOR = """
import trio
from sandboxd.job import Job
from sandboxd.supervise.runner import open_runner
from tests.supervise.test_uppers import DIRECTORY, LIMITS
from tests.supervise.variants import policy
async def main():
    script = "mkdir -p a/b; touch a/b/c; chmod 0 a/b; echo there; exec sleep 1000"
    job = Job(argv=["sh", "-c", script], policy=policy(LIMITS, DIRECTORY))
    async with open_runner() as runner, runner.start(job) as run:
        async for event in run.events:
            if event.data:
                print("there", flush=True)
trio.run(main)
"""


async def test_what_a_killed_supervisor_left_goes_with_the_next_run(place: Path) -> None:
    words = [sys.executable, "-c", SUPERVISOR]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=root) as supervisor:  # noqa: ASYNC220
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == b"there\n"
        (used,) = os.listdir(place)
        result = await run("true", policy(LIMITS, DIRECTORY))
        assert result.ok
        assert os.listdir(place) == [used]  # one that lives is left alone
        with all_end(descendants(supervisor.pid)):
            supervisor.send_signal(signal.SIGKILL)
    assert os.listdir(place) == [used]
    assert len(os.listdir(place / used)) == 1
    assert (await run("true", policy(LIMITS, DIRECTORY))).ok
    assert os.listdir(place) == []


def test_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SANDBOXD_UPPERS")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    wanted = folders.system_place("uppers") if os.geteuid() == 0 else Path("/state/sandboxd/uppers")
    assert uppers.own_place() == wanted
