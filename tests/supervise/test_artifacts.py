"""Collected files on their way to the caller: his directory, his disk, his patience."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Literal

import msgspec
import pytest
import trio

from sandboxd import Job, Limits, find_policy, open_runner
from sandboxd.errors import JobError, PolicyError, SandboxError
from sandboxd.job import Pattern
from sandboxd.linux.packets import FILE, Entry
from sandboxd.policy import Artifacts, Policy
from sandboxd.result import Result
from sandboxd.supervise.artifacts import Folder
from sandboxd.supervise.run import Run
from sandboxd.supervise.runner import Runner
from tests.supervise.tenants import open_tenant

MIB = 1 << 20


def roomy(**artifacts: int | None) -> Policy:
    """A policy for large files."""
    base = find_policy("base")
    limits = msgspec.structs.replace(base.limits, disk=64 * MIB, memory=None, inodes=60_000)
    caps = msgspec.structs.replace(base.artifacts, **artifacts)
    return msgspec.structs.replace(base, limits=limits, artifacts=caps)


def python(code: str) -> list[str]:
    return ["/usr/bin/python3", "-I", "-c", f"import os, socket\n{code}"]


def peak(*, reset: bool = False) -> int:
    """The most memory we had, perhaps from now on (VmHWM, clear_refs: proc(5))."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


async def run(job: Job) -> Result:
    async with open_runner(slots=1) as runner:
        return await runner.run(job)


def tree(top: Path) -> dict[bytes, bytes]:
    """Relative name -> content of all files."""
    found = {}
    for folder, _, names in os.walk(os.fsencode(top)):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, os.fsencode(top))] = file.read()
    return found


# -- a directory, without a run ------------------------------------------------------------------


@pytest.fixture
def top(tmp_path: Path) -> Path:
    return tmp_path / "top"


def save(top: Path, *files: tuple[str, bytes], mode: int = 0o644) -> None:
    folder = Folder(top)
    try:
        folder.open()
        for path, data in files:
            folder.take(Entry(FILE, os.fsencode(path), mode, data), None)
        folder.publish()
    finally:
        folder.close()


def test_names_and_modes(tmp_path: Path) -> None:
    top = tmp_path / "a/b"
    before = os.umask(0o027)
    try:
        save(top, ("x", b"new"), mode=0o6755)
    finally:
        os.umask(before)
    assert stat.S_IMODE((top / "x").stat().st_mode) == 0o750
    save(top, ("d/e/f", b"deep"), ("d/\udcff\n", b""), ("x", b"newer"))
    assert tree(top) == {b"x": b"newer", b"d/e/f": b"deep", b"d/\xff\n": b""}


@pytest.mark.parametrize("path", ["", ".", "..", "/etc/x", "a/../../x", "a//b", "a/", "./a"])
def test_names_that_lead_elsewhere(tmp_path: Path, top: Path, path: str) -> None:
    with pytest.raises(JobError, match="is no name of a file"):
        save(top, ("good", b""), (path, b""))
    assert os.listdir(tmp_path) == ["top"]
    assert os.listdir(top) == []


def test_no_link_is_followed(tmp_path: Path, top: Path) -> None:
    outside = tmp_path / "outside"
    top.mkdir()
    outside.mkdir()
    (outside / "f").write_text("old")
    (top / "folder").symlink_to(outside)
    (top / "file").symlink_to(outside / "f")
    (top / "up").symlink_to("..")
    for path in ("folder/f", "folder/new", "file", "up/outside/f", "folder/a/b"):
        with pytest.raises(JobError, match=f"collect_to: {top}/{path}: "):
            save(top, ("good", b"x"), (path, b"new"))
    assert tree(outside) == {b"f": b"old"}
    assert sorted(os.listdir(top)) == ["file", "folder", "up"]


def test_only_a_file_gives_way(top: Path) -> None:
    """And who has the old one open still sees the old one: it is replaced, not written to."""
    top.mkdir()
    os.mkfifo(top / "pipe")
    (top / "folder").mkdir()
    (top / "old").write_text("old")
    for path in ("pipe", "folder", "pipe/x", "old/x"):
        with pytest.raises(JobError, match="collect_to"):
            save(top, ("good", b"x"), (path, b"new"))
    with (top / "old").open() as before:
        save(top, ("old", b"new"))
        assert before.read() == "old"
    assert sorted(os.listdir(top)) == ["folder", "old", "pipe"]
    assert (top / "old").read_text() == "new"


@pytest.mark.needs("subuid")
def test_a_full_disk() -> None:
    with open_tenant(options="mode=0777,size=64k") as tenant:
        top = Path(f"/proc/self/fd/{tenant.box}")
        (top / "large").write_text("old")
        with pytest.raises(JobError, match=r"collect_to: .*/large: No space left.*make room") as no:
            save(top, ("small", b"x"), ("large", bytes(100_000)))
        assert "small" not in str(no.value)
        assert tree(top) == {b"large": b"old"}
        assert os.listdir(top) == ["large"]


# -- after a run ---------------------------------------------------------------------------------

LEAVES = """
os.mkdir("out")
open("out/small", "w").write("small")
open("out/large", "wb").write(b"large" * 100_000)
open(b"out/\\xff", "w").write("bytes")
os.chmod("out/small", 0o750)
os.symlink("small", "out/link"); os.mkfifo("out/fifo"); socket.socket(socket.AF_UNIX).bind("out/s")
"""
LEFT = {b"out/small": b"small", b"out/large": b"large" * 100_000, b"out/\xff": b"bytes"}
SPECIAL = {"out/link": "is a symbolic link", "out/fifo": "is a FIFO", "out/s": "is a socket"}


def check(result: Result) -> None:
    assert result.status == "artifact_error"
    assert {os.fsencode(one.path): (one.bytes, one.sha256) for one in result.artifacts} == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in LEFT.items()
    }
    assert {one.path: one.reason for one in result.artifact_errors} == SPECIAL


@pytest.mark.needs("userns")
async def test_into_a_directory(top: Path) -> None:
    result = await run(Job(argv=python(LEAVES), collect=["out/*"], collect_to=top))
    check(result)
    assert tree(top) == LEFT
    assert stat.S_IMODE((top / "out/small").stat().st_mode) & 0o700 == 0o700
    assert os.listdir(top) == ["out"]
    assert {one.data for one in result.artifacts} == {b""}


@pytest.mark.needs("userns")
async def test_into_memory() -> None:
    result = await run(Job(argv=python(LEAVES), collect=["out/*"]))
    check(result)
    assert {os.fsencode(one.path): one.data for one in result.artifacts} == LEFT


async def drained(run: Run) -> None:
    async for _ in run.events:
        pass


@pytest.mark.needs("userns")
async def test_as_a_stream() -> None:
    """When the sandbox is dead and others have come and gone."""
    job = Job(argv=python(LEAVES), collect=["out/*"], collect_to="stream")
    found: dict[bytes, bytes] = {}
    async with open_runner(slots=1) as runner:
        async with runner.start(job) as run:
            await drained(run)
            check(await run.wait())
            for _ in range(3):
                await runner.run(Job(argv=["/bin/true"], files={"x": b""}, collect=["x"]))
            last = None
            async for one in run.artifacts():
                pieces = [piece async for piece in one]
                found[os.fsencode(one.record.path)] = b"".join(pieces)
                assert await one.read(3, one.record.bytes - 1) == pieces[-1][-1:]
                last = last or one
            assert last is not None
            assert last.record.path == "out/large"
            with pytest.raises(SandboxError, match="not open any more"):
                await last.read(1)
            left = run.artifacts()
        with pytest.raises(StopAsyncIteration):
            await anext(left)
    assert found == LEFT


@pytest.mark.needs("userns")
async def test_a_stream_that_nobody_reads() -> None:
    many = "for one in range(40): open(str(one), 'wb').write(bytes(20_000))"
    job = Job(argv=python(many), collect=["*"], collect_to="stream")
    async with open_runner(slots=1) as runner:
        async with runner.start(job) as run:
            await drained(run)
            assert len((await run.wait()).artifacts) == 40
        async with runner.start(job) as run:
            await drained(run)
            one = await anext(run.artifacts())
            assert one.record.bytes == 20_000
        with pytest.raises(SandboxError, match="was left"):
            await anext(run.artifacts())
        with pytest.raises(JobError, match="nobody to read it"):
            await runner.run(job)


@pytest.mark.needs("userns")
async def test_artifacts_that_are_not_streamed() -> None:
    job = Job(argv=python("open('x', 'w')"), collect=["x"])
    async with open_runner(slots=1) as runner, runner.start(job) as run:
        await drained(run)
        with pytest.raises(SandboxError, match="elsewhere"):
            await anext(run.artifacts())


SPARSE = """
with open("sparse", "wb") as file:
    file.truncate(1 << 30)
    for at in (0, 1 << 29, (1 << 30) - 5):
        file.seek(at)
        file.write(b"data!")
"""


def digest_of_sparse() -> str:
    digest = hashlib.sha256(b"data!" + bytes((1 << 20) - 5))
    zeros = bytes(MIB)
    for at in range(1, 1024):
        digest.update({512: b"data!" + zeros[5:], 1023: zeros[5:] + b"data!"}.get(at, zeros))
    return digest.hexdigest()


@pytest.mark.needs("userns")
@pytest.mark.time_limit(100)
@pytest.mark.parametrize("kind", ["directory", "stream"])
async def test_a_gigabyte_of_holes(top: Path, kind: str) -> None:
    """Neither on the disk nor in memory is there more of it than there is data."""
    to: Path | Literal["stream"] = top if kind == "directory" else "stream"
    job = Job(argv=python(SPARSE), policy=roomy(bytes=2 << 30), collect=["sparse"], collect_to=to)
    before = peak(reset=True)
    async with open_runner(slots=1) as runner, runner.start(job) as run:
        await drained(run)
        (record,) = (await run.wait()).artifacts
        assert (record.bytes, record.sha256) == (1 << 30, digest_of_sparse())
        if kind == "stream":
            one = await anext(run.artifacts())
            assert await one.read(5, 1 << 29) == b"data!"
            assert sum([len(piece) async for piece in one]) == 1 << 30
    assert peak() - before < 64 * MIB
    if kind == "directory":
        there = (top / "sparse").stat()
        assert there.st_size == 1 << 30
        assert there.st_blocks * 512 < MIB
        with (top / "sparse").open("rb") as file:
            assert os.pread(file.fileno(), 7, (1 << 29) - 1) == b"\0data!\0"


@pytest.mark.needs("userns")
@pytest.mark.time_limit(100)
async def test_more_files_than_anybody_wants(top: Path) -> None:
    """What is found beyond the cap takes no memory, whatever there is."""
    make = """
for folder in range(50):
    os.mkdir(str(folder))
    for name in range(1000):
        os.mknod(f"{folder}/{name}")
"""
    job = Job(argv=python(make), policy=roomy(), collect=["**"], collect_to=top)
    before = peak(reset=True)
    result = await run(job)
    assert peak() - before < 32 * MIB
    assert result.status == "artifact_error"
    assert len(result.artifacts) == len(tree(top)) == 1000
    assert result.artifact_errors[0].reason == "more than 1000 files match"


@pytest.mark.needs("userns")
@pytest.mark.time_limit(100)
async def test_what_is_written_is_not_held(top: Path) -> None:
    """50 MB of small files; only their names and sums stay."""
    make = "for name in range(5000): open(str(name), 'wb').write(bytes([name % 251]) * 10_000)"
    policy = roomy(files=60_000)
    before = peak(reset=True)
    result = await run(Job(argv=python(make), policy=policy, collect=["*"], collect_to=top))
    assert peak() - before < 32 * MIB
    assert result.status == "ok"
    assert len(result.artifacts) == 5000
    assert (top / "77").read_bytes() == bytes([77]) * 10_000


PATTERNS: list[tuple[list[str | Pattern], dict[str, str]]] = [
    (["a", "missing"], {"missing": "missing"}),
    (["a", Pattern("missing", required=False)], {}),
    (["x*"], {}),
    ([Pattern("x*", required=True)], {"x*": "nothing matches"}),
    ([Pattern("*", required=True)], {}),
    ([Pattern("a*b", literal=True)], {}),
    ([Pattern("a?b", literal=True)], {"a?b": "missing"}),
    ([Pattern("**", literal=True, required=False)], {}),
    ([Pattern("link", required=False)], {"link": "is a symbolic link"}),
]


@pytest.mark.needs("userns")
async def test_required_and_optional() -> None:
    make = "[open(name, 'w') for name in ('a', 'a*b')]; os.symlink('a', 'link') if {} else 0"
    async with open_runner(slots=1) as runner:
        for patterns, errors in PATTERNS:
            link = any("is a symbolic" in reason for reason in errors.values())
            job = Job(argv=python(make.format(link)), collect=patterns)
            result = await runner.run(job)
            assert {one.path: one.reason for one in result.artifact_errors} == errors, patterns
            assert result.status == ("artifact_error" if errors else "ok")


CAPS: list[tuple[Artifacts, str]] = [
    (Artifacts(files=2), "more than 2 files match"),
    (Artifacts(bytes=1000), "has 1500 bytes, and 1000 of 1000 bytes are left"),
    (Artifacts(depth=2), "lies deeper than 2 directories"),
    (Artifacts(path=20), "its name is longer than 20 bytes"),
    (Artifacts(entries=3), "more than 3 entries were looked at"),
]


@pytest.mark.needs("userns")
@pytest.mark.parametrize(("caps", "reason"), CAPS)
async def test_caps(caps: Artifacts, reason: str) -> None:
    """Of the policy, or of the job, which may not have more than the policy."""
    make = """
os.makedirs("a/b/c/d"); open("a/b/c/d/deep", "w"); open("n" * 30, "w"); open("x", "w")
open("large", "wb").write(bytes(1500))
"""
    (field,) = [name for name in caps.__struct_fields__ if getattr(caps, name)]
    value = getattr(caps, field)
    async with open_runner(slots=1) as runner:
        for policy, asked in ((roomy(), caps), (roomy(**{field: value}), None)):
            job = Job(argv=python(make), policy=policy, artifacts=asked, collect=["**"])
            result = await runner.run(job)
            assert reason in [one.reason for one in result.artifact_errors]
        more = Artifacts(**{field: value + 1})
        job = Job(argv=["true"], policy=roomy(**{field: value}), artifacts=more)
        with pytest.raises(PolicyError, match=rf"artifacts\.{field}: .* is more than .* allows"):
            await runner.run(job)


@pytest.mark.needs("userns")
async def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    """Said before anything runs."""
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir(0o500)
    wrong = {"file": "Not a directory", "file/below": "Not a directory"}
    if os.getuid():
        wrong["closed/new"] = "Permission denied"
    async with open_runner(slots=1) as runner:
        for name, reason in wrong.items():
            job = Job(argv=["true"], collect=["*"], collect_to=tmp_path / name)
            with pytest.raises(JobError, match=f"collect_to: .*: {reason}"):
                await runner.run(job)
        assert runner.statistics().finished == 0


@pytest.mark.needs("subuid")
async def test_a_disk_that_is_full_after_a_run() -> None:
    make = "open('a', 'w'); open('b', 'wb').write(bytes(200_000))"
    with open_tenant(options="mode=0777,size=64k") as tenant:
        top = Path(f"/proc/self/fd/{tenant.box}")
        async with open_runner(slots=1) as runner:
            job = Job(argv=python(make), collect=["*"], collect_to=top)
            with pytest.raises(JobError, match="/b: No space left"):
                await runner.run(job)
            assert os.listdir(top) == []
            again = await runner.run(Job(argv=python(make), collect=["*"]))
    assert len(again.artifacts) == 2


@pytest.mark.needs("userns")
async def test_cancelled_wherever_it_is(top: Path) -> None:
    """Before, while and after files are written: all are there, or none and nothing else."""
    make = "for one in range(100): open(str(one), 'wb').write(bytes(200_000))"
    job = Job(argv=python(make), policy=roomy(), collect=["*"], collect_to=top)

    async def given_up(runner: Runner, scope: trio.CancelScope) -> None:
        with scope:
            await runner.run(job)

    seen = set()
    async with open_runner(slots=1) as runner:
        await runner.run(Job(argv=["/bin/true"], files={"a": b""}))
        for steps in range(0, 200, 10):
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()
                nursery.start_soon(given_up, runner, scope)
                with trio.move_on_after(20):
                    while not stages(top):  # noqa: ASYNC110
                        await trio.sleep(0.001)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
            found = os.listdir(top)
            seen.add(len(found))
            assert len(found) in (0, 100), found
            for name in found:
                (top / name).unlink()
    assert 0 in seen


def stages(top: Path) -> list[Path]:
    return [*top.glob(".sandboxd-*")] if top.exists() else []


@pytest.mark.needs("userns")
async def test_files_into_a_spare_and_out_of_it() -> None:
    async with open_runner(slots=1, spares=1) as runner:
        await runner.run(Job(argv=["/bin/true"]))
        with trio.fail_after(20):
            while not runner.statistics().spares:  # noqa: ASYNC110
                await trio.sleep(0.01)
        code = "open('out', 'w').write(open('in').read() + 'b')"
        result = await runner.run(Job(argv=python(code), files={"in": b"a"}, collect=["out"]))
    assert [one.data for one in result.artifacts] == [b"ab"]
    assert result.ok


@pytest.mark.needs("userns")
async def test_more_than_the_disk_holds_is_the_callers_mistake() -> None:
    async with open_runner(slots=1) as runner:
        job = Job(argv=["/bin/true"], files={"a": bytes(2 * MIB)}, limits=Limits(disk=MIB))
        with pytest.raises(JobError, match=r"files\['a'\]: the files do not fit.*limits\.disk"):
            await runner.run(job)
        assert (await runner.run(Job(argv=["/bin/true"], files={"a": b""}))).ok


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../b", "."])
def test_patterns_are_checked_when_the_job_is_made(name: str) -> None:
    for pattern in (name, os.fsencode(name)):
        with pytest.raises(JobError, match="names nothing below"):
            Job(argv=["x"], collect=[pattern])
        with pytest.raises(JobError, match="names nothing below"):
            Pattern(pattern)
