"""Archives among a job's files: unpacked as they were, or refused; whoever made them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from sandboxd.errors import HostError, JobError
from sandboxd.images import streams
from sandboxd.job import Copied, File, Job, Tar
from sandboxd.supervise.porter import open_porter
from sandboxd.supervise.runner import open_runner
from tests.images.making import END, binary, file, folder, hard, header, link, octal, pax
from tests.supervise.tenants import Tenant, open_tenant
from tests.supervise.test_artifacts import peak
from tests.supervise.test_porter import contents, opened

pytestmark = pytest.mark.needs("subuid")

LARGE = os.urandom(300_000)
THEN = 1_234_567_890


@pytest.fixture
def tenant() -> Iterator[Tenant]:
    with open_tenant(options="mode=0700,size=16m,nr_inodes=3000") as tenant:
        yield tenant


def archive() -> bytes:
    """What a well-meaning program packs."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as made:

        def add(
            name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **more: object
        ) -> None:
            one = tarfile.TarInfo(name)
            one.type, one.size, one.mtime = kind, len(data), THEN
            for key, value in more.items():
                setattr(one, key, value)
            made.addfile(one, io.BytesIO(data))

        add("./", tarfile.DIRTYPE, mode=0o700)
        add("./sub", tarfile.DIRTYPE, mode=0o550)
        add("./sub/file", data=b"inside", mode=0o4755, uid=0, uname="root")
        add("./large", data=LARGE, mode=0o640)
        add("./sub/again", tarfile.LNKTYPE, linkname="./sub/file")
        add("./link", tarfile.SYMTYPE, linkname="/etc/shadow")
        add("./implied/" + "n" * 150 + "/file", data=b"deep")
        add("./n\xfcll")
        add("./large", data=LARGE[1:], mode=0o600)
    return packed.getvalue()


CHECK = f"""
import stat
def mode(name): return stat.S_IMODE(os.lstat(name).st_mode)
assert sorted(os.listdir("t")) == ["implied", "large", "link", "n\\xfcll", "sub"], os.listdir("t")
assert (mode("t"), mode("t/sub"), mode("t/sub/file"), mode("t/large")) == (
    0o700, 0o550, 0o755, 0o600)
assert os.stat("t/large").st_size == {len(LARGE) - 1}
assert open("t/sub/again").read() == "inside"
assert os.path.samefile("t/sub/again", "t/sub/file")
assert os.readlink("t/link") == "/etc/shadow"
assert open("t/implied/" + "n" * 150 + "/file").read() == "deep"
for name in "t", "t/sub", "t/sub/file", "t/large", "t/link":
    assert os.lstat(name).st_mtime == {THEN}, name
    assert os.lstat(name).st_uid == os.getuid()
"""


def plain(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize("packed", [plain, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("kind", ["bytes", "path", "pipe"])
async def test_from_anywhere(
    tenant: Tenant, tmp_path: Path, kind: str, packed: Callable[[bytes], bytes]
) -> None:
    data = packed(archive())
    (tmp_path / "a").write_bytes(data)
    async with opened(tenant) as porter:
        if kind == "pipe":
            command = ["cat", str(tmp_path / "a")]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as cat:  # noqa: ASYNC220
                assert cat.stdout is not None
                files: dict[str, Copied] = {"t": Tar(cat.stdout.fileno())}
                await porter.copy_in(tenant.box, files, tenant.owner)
            assert cat.returncode == 0
        else:
            source = data if kind == "bytes" else tmp_path / "a"
            await porter.copy_in(tenant.box, {"t": Tar(source)}, tenant.owner)
        found, errors = await porter.collect(tenant.box, ["t/large"])
    assert contents(found) == {"t/large": LARGE[1:]}
    assert not errors
    tenant.run(CHECK)


async def test_zstd(tenant: Tenant) -> None:
    try:
        streams._zstd()
    except HostError:
        pytest.skip("needs zstd: this Python has no module for it")
    import importlib

    module = importlib.import_module("backports.zstd")
    async with opened(tenant) as porter:
        files = {"t": Tar(module.compress(archive()))}
        await porter.copy_in(tenant.box, files, tenant.owner)
    tenant.run(CHECK)


async def test_the_working_directory_itself_and_what_lies_over_it(tenant: Tenant) -> None:
    files: dict[str, Copied] = {
        ".": Tar(file(b"a", b"1") + file(b"b/c", b"2") + END),
        "./.": Tar(file(b"d", b"3") + END),
        "b/c": File(data=b"mine"),
    }
    async with opened(tenant) as porter:
        await porter.copy_in(tenant.box, files, tenant.owner)
        found, _ = await porter.collect(tenant.box, ["**"])
    assert contents(found) == {"a": b"1", "b/c": b"mine", "d": b"3"}


def sparse(size: int) -> bytes:
    """pax 0.1: three bytes of data in the middle, the rest holes."""
    said = [(b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.map", b"%d,3" % (size // 2))]
    return pax(said) + file(b"sparse", b"abc")


async def test_holes_stay_holes(tenant: Tenant, tmp_path: Path) -> None:
    """Twice as large as the file system is."""
    size = 32 << 20
    with (tmp_path / "host").open("wb") as made:
        made.truncate(size)
        made.seek(size // 2)
        made.write(b"abc")
    async with opened(tenant) as porter:
        files: dict[str, Copied] = {".": Tar(sparse(size) + END), "host": tmp_path / "host"}
        await porter.copy_in(tenant.box, files, tenant.owner)
    tenant.run(f"""
for name in "sparse", "host":
    there = os.stat(name)
    assert (there.st_size, there.st_blocks) == ({size}, 8), (name, there)
    with open(name, "rb") as file:
        file.seek({size // 2 - 1})
        assert file.read(5) == b"\\0abc\\0"
""")


ESCAPE = link(b"out", b"/tmp") + file(b"out/x") + END
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated: the mark of its end is missing"),
    "no archive": (b"hello" * 200, "wrong checksum|no number"),
    "truncated in a file": (file(b"a", bytes(5000))[:3000], "truncated"),
    "truncated in a header": (file(b"a")[:300], "truncated"),
    "truncated between files": (file(b"a"), "truncated: the mark of its end is missing"),
    "truncated gzip": (gzip.compress(file(b"a", LARGE) + END)[:-200], "truncated"),
    "damaged gzip": (gzip.compress(file(b"a") + END)[:-8] + bytes(8), "damaged gzip"),
    "something behind": (file(b"a") + END + b"more" * 128, "after the end"),
    "above": (file(b"../a") + END, r"\.\. in it"),
    "above, inside": (file(b"a/../../b") + END, r"\.\. in it"),
    "through a link": (ESCAPE, "Not a directory"),
    "through a link, by a directory": (link(b"out", b"/") + folder(b"out/x") + END, "directory"),
    "hard link out": (hard(b"a", b"/etc/passwd") + END, "No such file"),
    "hard link above": (hard(b"a", b"../a") + END, r"\.\. in it"),
    "hard link to nothing": (hard(b"a", b"b") + END, "No such file"),
    "hard link to itself": (hard(b"a", b"a") + END, "a link to itself"),
    "hard link through a link": (
        link(b"out", b"/etc") + hard(b"a", b"out/passwd") + END, "Not a directory",
    ),
    "device": (header(b"null", b"3") + END, "null: is a device"),
    "fifo": (header(b"pipe", b"6") + END, "pipe: is a FIFO"),
    "a file where a directory is": (file(b"a/b") + file(b"a") + END, "Is a directory"),
    "a directory where a file is": (file(b"a") + folder(b"a") + END, "Not a directory"),
    "too large": (file(b"a", bytes(17 << 20)) + END, "limits.disk"),
    "says it is too large": (header(b"a", size=octal(1 << 32, 12)) + END, "limits.disk"),
    "says it is endless": (header(b"a", size=binary(1 << 61, 12)) + END, "limits.disk"),
    "too large, compressed": (gzip.compress(file(b"a", bytes(99 << 20)) + END), "limits.disk"),
    "too large together": (
        b"".join(file(b"%d" % one, bytes(1 << 20)) for one in range(20)) + END, "limits.disk",
    ),
    "too many": (b"".join(file(b"%d" % one) for one in range(4000)) + END, "limits.inodes"),
    "long name": (pax([(b"path", b"a/" * 2500 + b"b")]) + file(b"x") + END, "too long"),
    "huge header": (header(b"x", b"x", size=octal(1 << 31, 12)) + END, "extension header"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", ["bytes", "path"])
async def test_what_is_refused(tenant: Tenant, tmp_path: Path, kind: str, name: str) -> None:
    data, reason = REFUSED[name]
    (tmp_path / "a.tar").write_bytes(data)
    source = data if kind == "bytes" else tmp_path / "a.tar"
    async with opened(tenant) as porter:
        with pytest.raises(JobError, match=reason) as caught:
            await porter.copy_in(tenant.box, {"t": Tar(source)}, tenant.owner)
        assert "files['t" in str(caught.value)
        assert await porter.collect(tenant.box, ["nothing*"]) == ([], [])


@pytest.mark.parametrize(
    ("source", "reason"),
    [(Path("/nowhere/a.tar"), "No such file"), (Path("/etc"), "Is a directory"), (9999, "Bad")],
)
async def test_archives_that_are_not_there(tenant: Tenant, source: Path | int, reason: str) -> None:
    async with opened(tenant) as porter:
        with pytest.raises(JobError, match=reason):
            await porter.copy_in(tenant.box, {"t": Tar(source)}, tenant.owner)


async def test_a_bomb_takes_no_memory(tenant: Tenant) -> None:
    """512 MB of zeros behind 3 MB: files of a size that there is room for, until there is none."""
    bomb = gzip.compress(b"".join(file(b"%d" % one, bytes(8 << 20)) for one in range(64)) + END, 1)
    before = peak(reset=True)
    async with opened(tenant) as porter:
        with pytest.raises(JobError, match=r"limits\.disk"):
            await porter.copy_in(tenant.box, {"t": Tar(bomb)}, tenant.owner)
    assert peak() - before < 100 << 20


async def test_nobody_waits_for_a_silent_pipe(tenant: Tenant) -> None:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        async with open_porter(tenant.namespace) as porter, trio.open_nursery() as nursery:
            files = {"t": Tar(reading)}
            for _ in range(50):  # trio has 40 threads for everybody
                nursery.start_soon(porter.copy_in, tenant.box, files, tenant.owner)
            await trio.testing.wait_all_tasks_blocked()
            for number in range(20):
                few = {f"{number}/{one}": Path("/etc/passwd") for one in range(3)}
                await porter.copy_in(tenant.box, few, tenant.owner)
            nursery.cancel_scope.cancel()
    finally:
        os.close(reading)
        os.close(writing)


async def test_killed_while_files_are_on_their_way() -> None:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        async with open_runner(slots=1) as runner:
            job = Job(argv=["/bin/true"], files={"t": Tar(reading)})
            with trio.fail_after(20):
                async with runner.start(job) as run:
                    await trio.testing.wait_all_tasks_blocked()
                    run.kill()
                    result = await run.wait()
            assert (result.status, result.exit_code) == ("cancelled", None)
            assert (await runner.run(Job(argv=["/bin/true"], files={"a": b""}))).ok
    finally:
        os.close(reading)
        os.close(writing)
