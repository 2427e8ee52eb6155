"""Volumes, caches and their locks, and what a run may do to them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from sandboxd.errors import Busy, HostError, JobError, PolicyError
from sandboxd.job import Job
from sandboxd.policy import Identity, Limits, Mount, Policy, Root
from sandboxd.result import Result
from sandboxd.stores.volumes import Shelf, used
from sandboxd.supervise.runner import Runner, open_runner
from tests.supervise.variants import policy, without

pytestmark = pytest.mark.needs("userns")
CALLER = Identity(user="caller", uid=1000)
ROOTS = {
    "shared": Root(proc="masked"),
    "kernel": Root(writable=True, driver="kernel", proc="masked"),
    "tmpfs": Root(writable=True, driver="tmpfs", proc="masked"),
}
EVERY_ROOT = pytest.mark.parametrize(
    "root", ["shared", pytest.param("kernel", marks=pytest.mark.needs("overlay")), "tmpfs"]
)
EVERY_PLACE = pytest.mark.parametrize("place", ["/data", "/deep/er/data", "/box/in/data", "/tmp/d"])


@pytest.fixture(autouse=True)
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setenv("SANDBOXD_VOLUMES", str(tmp_path / "volumes"))
    monkeypatch.setenv("SANDBOXD_CACHES", str(tmp_path / "caches"))
    return Shelf.own("volume")


def caches() -> Shelf:
    return Shelf.own("cache")


def with_mounts(*mounts: Mount, root: str = "shared", **more: Any) -> Policy:
    chosen = policy(root=ROOTS[root], identity=more.pop("identity", CALLER), **more)
    return msgspec.structs.replace(chosen, mounts=mounts)


def volume(target: str = "/data", *, writable: bool = True) -> Mount:
    return Mount(type="volume", name="data", target=target, writable=writable)


def cache(lock: Any, target: str = "/cache", wait: float = 0.0) -> Mount:
    return Mount(type="cache", name="pip", target=target, lock=lock, wait=wait)


async def run(script: str, chosen: Policy) -> Result:
    async with open_runner() as runner:
        return await runner.run(Job(argv=["sh", "-c", script], policy=chosen))


# -- volumes ---------------------------------------------------------------------------------------


@EVERY_ROOT
@EVERY_PLACE
async def test_a_volume_outlives_a_run(volumes: Shelf, root: str, place: str) -> None:
    assert volumes.create("data", None)
    script = f"echo one >> {place}/log; mkdir {place}/made"
    assert (await run(script, with_mounts(volume(place), root=root))).ok
    result = await run(
        f"cat {place}/log; echo no > {place}/log",
        with_mounts(volume(place, writable=False), root=root),
    )
    assert (result.stdout, result.status) == (b"one\n", "nonzero_exit")
    assert (volumes.data("data") / "log").read_text() == "one\n"
    assert used(volumes.data("data")).entries == 2


async def test_a_volume_that_is_not_there() -> None:
    with pytest.raises(PolicyError, match=r"mounts\[0\]: no volume 'data' .*volume create data"):
        await run("true", with_mounts(volume()))


async def test_a_volume_in_use_is_not_removed(volumes: Shelf) -> None:
    volumes.create("data", None)
    async with open_runner() as runner:
        await runner.run(Job(argv=["true"], policy=with_mounts(volume())))
        assert not volumes.remove("data")
    assert volumes.remove("data")
    assert not [*volumes.place.glob("*data*")]
    with pytest.raises(JobError, match="no volume 'data'"):
        volumes.remove("data")


async def test_a_size_is_looked_at_before_and_during_a_run(volumes: Shelf) -> None:
    volumes.create("data", 1 << 20)
    chosen = with_mounts(volume())
    result = await run("head -c 3000000 /dev/zero > /data/big; sleep 100", chosen)
    assert (result.status, result.fault) == ("disk_limit", "job")
    assert "the volume data: 1048576 bytes" in result.message
    assert "volume data" in {one.what for one in result.degraded}
    with pytest.raises(JobError, match=r"the volume data is full: .* of 1M"):
        await run("true", chosen)
    read_only = with_mounts(volume(writable=False))
    assert (await run("rm /data/big", read_only)).status == "nonzero_exit"
    (volumes.data("data") / "big").unlink()
    result = await run("echo 1 > /data/small", chosen)
    assert result.ok


def test_names_of_volumes(volumes: Shelf) -> None:
    for wrong in ("", "a/b", "..", ".x", "a" * 65, "-a", "lock"):
        with pytest.raises(JobError, match="cannot be the name"):
            volumes.create(wrong, None)
        assert volumes.find(wrong) is None
    assert volumes.create("a", None)
    assert not volumes.create("a", 5)
    assert [(one.name, one.size) for one in volumes.every()] == [("a", None)]


def test_what_interrupted_makers_left_is_swept(volumes: Shelf) -> None:
    volumes.create("a", None)
    dead = volumes.place / ".new-1-dead"
    (dead / "data").mkdir(parents=True)
    volumes.create("b", None)
    assert [one.name for one in volumes.every()] == ["a", "b"]
    assert not dead.exists()


def test_files_of_several_names_count_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 8192)
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert (used(tmp_path).bytes, used(tmp_path).entries) == (8192, 2)


# -- caches ----------------------------------------------------------------------------------------


async def test_one_run_at_a_time_writes_to_a_cache() -> None:
    chosen = with_mounts(cache("exclusive"))
    waits = with_mounts(cache("exclusive", wait=50.0))
    found: list[bytes] = []

    async def later(runner: Runner) -> None:
        job = Job(argv=["cat", "/cache/x"], policy=waits)
        found.append((await runner.run(job)).stdout)

    async with open_runner(slots=3) as runner, trio.open_nursery() as nursery:
        writing = Job(argv=["sh", "-c", "echo in; cat > /cache/x"], policy=chosen, stdin=None)
        async with runner.start(writing) as one:
            async for event in one.events:
                if event.type == "stdout":
                    break
            for lock in ("exclusive", "shared-ro", "copy"):
                with pytest.raises(Busy, match="another run has had the cache pip for 0 s"):
                    await runner.run(Job(argv=["true"], policy=with_mounts(cache(lock))))
            nursery.start_soon(later, runner)
            assert one.stdin is not None
            await one.stdin.send_all(b"written")
            await one.stdin.aclose()
            async for _ in one.events:
                pass
    assert found == [b"written"]


async def test_many_read_a_cache_at_once() -> None:
    await run("echo there > /cache/x", with_mounts(cache("exclusive")))
    reading = with_mounts(cache("shared-ro"))
    job = Job(argv=["sh", "-c", "cat /cache/x; cat"], policy=reading, stdin=None)
    async with open_runner(slots=3) as runner, runner.start(job) as one:
        async for event in one.events:
            if event.type == "stdout":
                break
        for lock in ("shared-ro", "copy"):
            chosen = with_mounts(cache(lock))
            result = await runner.run(Job(argv=["cat", "/cache/x"], policy=chosen))
            assert result.stdout == b"there\n"
        writer = with_mounts(cache("exclusive"))
        with pytest.raises(Busy):
            await runner.run(Job(argv=["true"], policy=writer))
    result = await run("echo no > /cache/x", reading)
    assert b"Read-only" in result.stderr


@pytest.mark.needs("overlay")
@EVERY_ROOT
@EVERY_PLACE
async def test_a_copy_is_thrown_away(root: str, place: str) -> None:
    await run("echo old > /cache/x; mkdir /cache/d; echo 1 > /cache/d/y",
              with_mounts(cache("exclusive")))  # fmt: skip
    chosen = with_mounts(cache("copy", place), root=root)
    script = f"cd {place}; cat x d/y; echo new > x; rm -r d; echo 2 > z; cat x; ls"
    for _ in range(2):
        result = await run(script, chosen)
        assert (result.stdout, result.stderr) == (b"old\n1\nnew\nx\nz\n", b"")
    data = caches().data("pip")
    assert sorted(os.listdir(data)) == ["d", "x"]
    assert (data / "x").read_text() == "old\n"
    small = with_mounts(cache("copy", place), root=root, limits=Limits(disk=1 << 20, wall_time=30))
    result = await run(f"head -c 4000000 /dev/zero > {place}/big", small)
    assert b"No space left" in result.stderr


async def test_without_an_overlay_there_is_no_copy() -> None:
    async with open_runner(host=without("overlay")) as runner:
        with pytest.raises(HostError, match=r"mounts\[0\]: no copy of the cache pip.*shared-ro"):
            await runner.run(Job(argv=["true"], policy=with_mounts(cache("copy"))))


async def test_another_process_has_the_cache() -> None:
    caches().create("pip", None)
    lock = os.open(caches().lock_file("pip"), os.O_RDWR)  # as another process would
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(Busy, match=r"mounts\[0\].*wait"):
            await run("true", with_mounts(cache("exclusive")))
        assert (await run("true", with_mounts(cache("shared-ro")))).ok
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = Job(argv=["true"], policy=with_mounts(cache("exclusive", wait=1000.0)))
        async with open_runner(slots=1) as runner:
            async with runner.start(waiting) as one:
                # Who waits for a cache has no slot.
                assert (await runner.run(Job(argv=["true"], policy=policy()))).ok
                one.kill()
                async for _ in one.events:
                    pass
                assert (await one.wait()).status == "cancelled"
    finally:
        os.close(lock)


async def test_two_caches_in_any_order_do_not_lock_each_other_out() -> None:
    a, b = (Mount(type="cache", name=name, target=f"/{name}", wait=50.0) for name in "ab")
    async with open_runner(slots=4) as runner, trio.open_nursery() as nursery:
        for number in range(12):
            mounts = (a, b) if number % 2 else (b, a)
            job = Job(argv=["sh", "-c", "echo 1 >> /a/x; echo 1 >> /b/x"],
                      policy=with_mounts(*mounts))  # fmt: skip
            nursery.start_soon(runner.run, job)
    for name in "ab":
        assert (caches().data(name) / "x").read_text() == "1\n" * 12


async def test_an_isolated_run_reads_what_the_caller_has(volumes: Shelf) -> None:
    volumes.create("data", None)
    (volumes.data("data") / "x").write_text("1\n")
    isolated = Identity(user="isolated")
    chosen = with_mounts(volume(writable=False), identity=isolated)
    assert (await run("cat /data/x", chosen)).stdout == b"1\n"
