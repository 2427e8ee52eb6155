"""Files into a sandbox, and whatever a hostile program left out of it: with a real tmpfs."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from sandboxd.errors import JobError
from sandboxd.job import Copied, File, Job
from sandboxd.policy import Artifacts as Caps
from sandboxd.result import Artifact, ArtifactError
from sandboxd.supervise.porter import Porter, open_porter
from tests.supervise.tenants import Tenant, open_tenant

pytestmark = pytest.mark.needs("subuid")

EVERYTHING = Caps(files=200_000, bytes=1 << 30, depth=5000, path=16384)


@pytest.fixture
def tenant() -> Iterator[Tenant]:
    with open_tenant() as tenant:
        yield tenant


@asynccontextmanager
async def opened(tenant: Tenant) -> AsyncIterator[Porter]:
    async with open_porter(tenant.namespace) as porter:
        yield porter


def contents(found: list[Artifact]) -> dict[str, bytes]:
    return {one.path: one.data for one in found}


def reasons(errors: list[ArtifactError]) -> dict[str, str]:
    return {one.path: one.reason for one in errors}


# -- in --------------------------------------------------------------------------------------------


async def test_files_belong_to_the_job_and_have_their_modes(tenant: Tenant, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(b"#!/bin/sh\n")
    script.chmod(0o4750)
    files: dict[str | bytes, Copied] = {
        "plain": b"1",
        "a/b/c": b"",
        "./x//y": b"2",
        "private": File(data=b"3", mode=0o4600),
        "script": script,
        "readable": File(data=script, mode=0o444),
        b"line\nbreak \xff": b"4",
    }
    async with opened(tenant) as porter:
        await porter.copy_in(tenant.box, files, tenant.owner)
    tenant.run(f"""
import pathlib
want = {{
    "plain": 0o644, "a": 0o755, "a/b": 0o755, "a/b/c": 0o644, "x": 0o755, "x/y": 0o644,
    "private": 0o600, "script": 0o750, "readable": 0o444, os.fsdecode(b"line\\nbreak \\xff"): 0o644
}}
have = {{str(path): path.stat() for path in pathlib.Path().rglob("*")}}
assert {{name: found.st_mode & 0o7777 for name, found in have.items()}} == want, have
assert {{(found.st_uid, found.st_gid) for found in have.values()}} == {{{tenant.owner}}}
assert open("private").read() == "3" and open("readable").read() == "#!/bin/sh\\n"
open("a/b/new", "w")
""")


@pytest.mark.parametrize("size", [0, 1, 16384, 16385, 65536, 5_000_000])
async def test_a_file_of_any_size_comes_back_as_it_was(
    tenant: Tenant, tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    async with opened(tenant) as porter:
        await porter.copy_in(tenant.box, {"bytes": data, "path": tmp_path / "source"}, tenant.owner)
        found, errors = await porter.collect(tenant.box, ["path", "bytes"])
    assert not errors
    assert contents(found) == {"bytes": data, "path": data}
    assert {one.sha256 for one in found} == {hashlib.sha256(data).hexdigest()}
    assert [(one.path, one.bytes, one.mode) for one in found] == [
        ("bytes", size, 0o644),
        ("path", size, 0o644),
    ]


@pytest.mark.parametrize("name", ["/proc/version", "/proc/filesystems", "/proc/kallsyms"])
async def test_a_file_without_a_size_is_read_to_its_end(tenant: Tenant, name: str) -> None:
    data = await trio.Path(name).read_bytes()
    async with opened(tenant) as porter:
        await porter.copy_in(tenant.box, {"here": Path(name)}, tenant.owner)
        found, _ = await porter.collect(tenant.box, ["here"])
    assert contents(found) == {"here": data}


async def test_a_directory_is_copied_with_links_as_links(tenant: Tenant, tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "sub" / "deep").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "sub" / "file").write_bytes(b"inside")
    (top / "dangling").symlink_to("/etc/shadow")
    (top / "round").symlink_to(".", target_is_directory=True)
    (top / "sub").chmod(0o555)
    (tmp_path / "link").symlink_to("top")
    files: dict[str | bytes, Copied] = {
        "in": tmp_path / "link",
        ".": top,
        "in/sub/file": b"instead",
    }
    try:
        async with opened(tenant) as porter:
            await porter.copy_in(tenant.box, files, tenant.owner)
    finally:
        (top / "sub").chmod(0o755)
    tenant.run("""
for top in ".", "in":
    assert sorted(os.listdir(top)) == sorted(
        ["dangling", "empty", "round", "sub"] + ["in"] * (top == ".")
    )
    assert os.readlink(top + "/dangling") == "/etc/shadow"
    assert os.lstat(top + "/round").st_uid == os.getuid()
    assert os.stat(top + "/sub").st_mode & 0o777 == 0o555
    assert os.stat(top + "/sub").st_uid == os.getuid()
    assert os.listdir(top + "/sub/deep") == os.listdir(top + "/empty") == []
assert open("sub/file").read() == "inside" and open("in/sub/file").read() == "instead"
""")


def missing(top: Path) -> Path:
    return top / "missing"


def fifo(top: Path) -> Path:
    os.mkfifo(top / "fifo")
    return top / "fifo"


def unreadable(top: Path) -> Path:
    (top / "unreadable").touch(0)
    return top / "unreadable"


def device(top: Path) -> Path:
    return Path("/dev/zero")


def folder_with_a_socket(top: Path) -> Path:
    (top / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(top / "folder" / "socket"))
    return top / "folder"


def closed_folder(top: Path) -> Path:
    (top / "folder" / "closed").mkdir(parents=True)
    (top / "folder" / "closed").chmod(0)  # empty, so pytest can remove it all the same
    return top / "folder"


@pytest.mark.parametrize(
    ("make", "named", "reason"),
    [
        (missing, "missing", "No such file"),
        (fifo, "fifo", "is no regular file"),
        (unreadable, "unreadable", "Permission denied"),
        (device, "/dev/zero", "is no regular file"),
        (folder_with_a_socket, "folder/socket", "is no regular file"),
        (closed_folder, "folder/closed", "Permission denied"),
    ],
)
async def test_what_cannot_be_read_is_named(
    tenant: Tenant, tmp_path: Path, make: Callable[[Path], Path], named: str, reason: str
) -> None:
    async with opened(tenant) as porter:
        with pytest.raises(JobError, match=reason) as caught:
            await porter.copy_in(tenant.box, {"a": b"", "input": make(tmp_path)}, tenant.owner)
        assert named in str(caught.value)
        assert "files['input" in str(caught.value)
        await porter.copy_in(tenant.box, {"input": b""}, tenant.owner)


@pytest.mark.parametrize("name", ["", "/etc/x", "a/../../b", "..", "nul\0", "x" * 5000, "."])
async def test_names_outside_are_refused(tenant: Tenant, name: str) -> None:
    async with opened(tenant) as porter:
        with pytest.raises(JobError):
            await porter.copy_in(tenant.box, {name: b""}, tenant.owner)


async def test_no_link_is_followed_and_nothing_written_through_one(
    tenant: Tenant, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"untouched")
    tenant.run(f"""
os.symlink({str(tmp_path)!r}, "folder")
os.symlink({str(outside)!r}, "file")
open("linked", "w").write("old")
os.link("linked", "other")
os.mkdir("taken")
""")
    async with opened(tenant) as porter:
        for name in ("folder/outside", "folder/new"):
            with pytest.raises(JobError, match="Not a directory"):
                await porter.copy_in(tenant.box, {name: b"new"}, tenant.owner)
        with pytest.raises(JobError, match="Not a directory"):
            await porter.copy_in(tenant.box, {"folder": tmp_path}, tenant.owner)
        with pytest.raises(JobError, match="Is a directory"):
            await porter.copy_in(tenant.box, {"taken": b"new"}, tenant.owner)
        await porter.copy_in(tenant.box, {"file": b"new", "linked": b"new"}, tenant.owner)
        found, _ = await porter.collect(tenant.box, ["*"])
    assert contents(found) == {"file": b"new", "linked": b"new", "other": b"old"}
    assert outside.read_bytes() == b"untouched"
    assert os.listdir(tmp_path) == ["outside"]


@pytest.mark.time_limit(100)
async def test_a_hundred_thousand_files(tenant: Tenant) -> None:
    files: dict[str | bytes, Copied] = {
        f"d{number % 100}/{number}": b"%d" % number for number in range(100_000)
    }
    async with opened(tenant) as porter:
        await porter.copy_in(tenant.box, files, tenant.owner)
        found, errors = await porter.collect(tenant.box, ["**"], EVERYTHING)
    assert not errors
    assert contents(found) == files


async def test_a_directory_of_ten_thousand_files(tenant: Tenant, tmp_path: Path) -> None:
    for number in range(10_000):
        (tmp_path / str(number)).write_bytes(b"x" * (number % 50 == 0) * 20_000)
    async with opened(tenant) as porter:
        await porter.copy_in(tenant.box, {"all": tmp_path}, tenant.owner)
        found, errors = await porter.collect(tenant.box, ["all/*"], EVERYTHING)
    assert not errors
    assert len(found) == 10_000
    assert sum(one.bytes for one in found) == 200 * 20_000


@pytest.mark.parametrize(
    ("options", "files", "limit"),
    [
        ("size=64k", {"a": b"x" * 16384, "b": b"x" * 60_000}, "limits.disk"),
        ("size=64k", {"a": b"x" * 1_000_000}, "limits.disk"),
        ("size=64k", {str(number): b"x" * 5000 for number in range(20)}, "limits.disk"),
        ("nr_inodes=10", {str(number): b"" for number in range(20)}, "limits.inodes"),
        ("nr_inodes=10", {f"{number}/x/y": b"" for number in range(20)}, "limits.inodes"),
    ],
)
async def test_what_does_not_fit_names_the_limit(
    options: str, files: dict[str | bytes, Copied], limit: str
) -> None:
    with open_tenant(options=f"mode=0700,{options}") as tenant:
        async with opened(tenant) as porter:
            with pytest.raises(JobError, match=limit):
                await porter.copy_in(tenant.box, files, tenant.owner)


# -- out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["a"], ["a"]),
        (["*"], [".hidden", "a", "b.txt", "new\nline.txt", "\udcff.txt"]),
        (["*.txt"], ["b.txt", "new\nline.txt", "\udcff.txt"]),
        (["?"], ["a"]),
        (["?.txt"], ["b.txt", "\udcff.txt"]),
        (["[a-c]*"], ["a", "b.txt"]),
        (["[!a]"], []),
        (["d/*"], ["d/one"]),
        (["d/**"], ["d/e/f/three.txt", "d/e/two", "d/one"]),
        (["d/**/f/*"], ["d/e/f/three.txt"]),
        (["**/*.txt"], ["b.txt", "d/e/f/three.txt", "new\nline.txt", "\udcff.txt"]),
        (["**/**/two", "**/d/**/two"], ["d/e/two"]),
        (["*/*/two", "./d//e/two"], ["d/e/two"]),
        (["nothing*", "a/*", "d/*/*/*/*"], []),
        (["a", "*", "**"], None),
    ],
)
async def test_patterns(tenant: Tenant, patterns: list[str], found: list[str] | None) -> None:
    tree = ["a", ".hidden", "b.txt", "new\nline.txt", "\udcff.txt"]
    tree += ["d/one", "d/e/two", "d/e/f/three.txt"]
    async with opened(tenant) as porter:
        files: dict[str | bytes, Copied] = {name: os.fsencode(name) for name in tree}
        await porter.copy_in(tenant.box, files, tenant.owner)
        have, errors = await porter.collect(tenant.box, patterns)
    assert not errors
    wanted = sorted(tree if found is None else found, key=os.fsencode)
    assert [(one.path, one.data) for one in have] == [(name, os.fsencode(name)) for name in wanted]


@pytest.mark.parametrize("pattern", ["", "/etc/*", "../*", "a/../b", "nul\0", ".", "./"])
async def test_patterns_outside_are_refused(tenant: Tenant, pattern: str) -> None:
    with pytest.raises(JobError, match="collect"):
        Job(argv=["true"], collect=["ok", pattern])
    async with opened(tenant) as porter:
        with pytest.raises(JobError, match="collect"):
            await porter.collect(tenant.box, ["ok", pattern])
        with pytest.raises(JobError, match="too many"):
            await porter.collect(tenant.box, map(str, range(1000)))


async def test_only_regular_files_are_taken_and_no_link_is_followed(
    tenant: Tenant, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"of the host")
    tenant.run(f"""
os.mkdir("real")
open("real/file", "w").write("here")
os.symlink({str(secret)!r}, "link")
os.symlink({str(tmp_path)!r}, "folder")
os.symlink("real", "inner")
os.symlink("loop", "loop")
os.mkfifo("fifo")
socket.socket(socket.AF_UNIX).bind("socket")
os.mknod("device", stat.S_IFCHR, 0)
os.link("real/file", "hard")
""")
    special = {
        "device": "is a device",
        "fifo": "is a FIFO",
        "folder": "is a symbolic link",
        "inner": "is a symbolic link",
        "link": "is a symbolic link",
        "loop": "is a symbolic link",
        "socket": "is a socket",
    }
    async with opened(tenant) as porter:
        found, errors = await porter.collect(tenant.box, ["**"])
        assert contents(found) == {"hard": b"here", "real/file": b"here"}
        assert reasons(errors) == special
        found, errors = await porter.collect(tenant.box, ["*/secret", "*/file", "*/x/*"])
        assert contents(found) == {"real/file": b"here"}
        assert not errors
        named = ["folder/secret", "inner/file", "loop/x", "real", "real/file/x", "link", "no/x"]
        found, errors = await porter.collect(tenant.box, named)
    assert not found
    assert reasons(errors) == {
        **dict.fromkeys(("folder", "inner", "link", "loop"), "is a symbolic link"),
        "no/x": "missing",
        "real": "is a directory (pattern/** collects what is in it)",
        "real/file/x": "missing",
    }


async def test_a_closed_file_in_a_closed_directory_is_taken(tenant: Tenant) -> None:
    tenant.run("""
os.makedirs("a/b")
open("a/b/c", "w").write("closed")
os.chmod("a/b/c", 0)
os.chmod("a/b", 0)
os.chmod("a", 0)
open("set", "w").close()
os.chmod("set", 0o6755)
os.chmod(".", 0)
""")
    async with opened(tenant) as porter:
        found, errors = await porter.collect(tenant.box, ["**"])
    assert [(one.path, one.data, one.mode) for one in found] == [
        ("a/b/c", b"closed", 0),
        ("set", b"", 0o755),
    ]
    assert not errors


async def test_holes_count(tenant: Tenant) -> None:
    tenant.run("""
for name, size in (("huge", 1 << 45), ("small", 1 << 20)):
    with open(name, "w") as file:
        file.truncate(size)
""")
    async with opened(tenant) as porter:
        found, errors = await porter.collect(tenant.box, ["*"], Caps(bytes=2 << 20))
    assert contents(found) == {"small": bytes(1 << 20)}
    assert [(one.path, one.reason) for one in errors] == [
        ("huge", f"has {1 << 45} bytes, and {2 << 20} of {2 << 20} bytes are left")
    ]


@pytest.mark.time_limit(100)
async def test_three_thousand_directories_deep(tenant: Tenant) -> None:
    tenant.run("""
for depth in range(3000):
    open("f", "w").close()
    os.mkdir("d")
    os.chdir("d")
""")
    async with opened(tenant) as porter:
        found, errors = await porter.collect(tenant.box, ["**/f"], EVERYTHING)
        assert len(found) == 3000
        assert not errors
        found, errors = await porter.collect(tenant.box, ["**/f"])
        assert len(found) == 65
        assert reasons(errors) == {"d/" * 64 + "d": "lies deeper than 64 directories"}
        found, errors = await porter.collect(tenant.box, ["**/f"], Caps(depth=5000, path=500))
    assert len(found) == 250
    assert [one.reason for one in errors] == ["its name is longer than 500 bytes"] * 2
    assert max(len(one.path) for one in errors) < 500


async def test_twenty_thousand_files(tenant: Tenant) -> None:
    tenant.run("""
for number in range(20000):
    open(str(number), "w").close()
""")
    async with opened(tenant) as porter:
        found, errors = await porter.collect(tenant.box, ["*"], EVERYTHING)
        assert len(found) == 20_000
        found, errors = await porter.collect(tenant.box, ["*"], Caps(files=100))
        assert len(found) == 100
        assert reasons(errors) == {"": "more than 100 files match"}
        found, errors = await porter.collect(tenant.box, ["nothing*"], Caps(entries=1000))
        assert reasons(errors) == {"": "more than 1000 entries were looked at"}
        found, errors = await porter.collect(tenant.box, ["19999", "x"], Caps(entries=2))
        assert contents(found) == {"19999": b""}
        assert reasons(errors) == {"x": "missing"}


async def test_errors_are_counted_as_well(tenant: Tenant) -> None:
    tenant.run("for number in range(50): os.symlink('x', str(number))")
    async with opened(tenant) as porter:
        found, errors = await porter.collect(tenant.box, ["*"], Caps(files=10))
    assert not found
    assert len(errors) == 11
    assert errors[-1].reason == "more than 10 files could not be collected"


async def test_files_are_collected_from_the_dead(tenant: Tenant) -> None:
    async with opened(tenant) as porter:
        await porter.copy_in(tenant.box, {"a/b": b"1"}, tenant.owner)
        tenant.die()
        found, _ = await porter.collect(tenant.box, ["**"])
    assert contents(found) == {"a/b": b"1"}


async def test_who_swaps_files_for_links_gets_nothing_out(tenant: Tenant, tmp_path: Path) -> None:
    """Nobody is alive when files are collected; it would not help him either."""
    (tmp_path / "file").write_bytes(b"of the host")
    tenant.run(f"""
os.mkdir("folder"); os.mkdir("folder/sub"); open("folder/sub/file", "w").write("here")
open("file", "w").write("here")
os.symlink({str(tmp_path / "file")!r}, "a"); os.symlink({str(tmp_path)!r}, "b")
if os.fork() == 0:
    os.setsid()
    while not os.path.exists("stop"):
        for one, other in (("a", "file"), ("b", "folder/sub")):
            os.rename(one, "spare"); os.rename(other, one); os.rename("spare", other)
    os._exit(0)
""")
    try:
        async with opened(tenant) as porter:
            seen: set[bytes] = set()
            for _ in range(1500):
                found, _ = await porter.collect(tenant.box, ["file", "**/file", "a", "b/file"])
                seen |= set(contents(found).values())
    finally:
        tenant.run("open('stop', 'w')")
    assert seen == {b"here"}
