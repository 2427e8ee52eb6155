"""What a program may do to files in a writable root, and how they behave: one suite, both drivers.

Where the drivers differ, the test says so and docs/explanation/overlays.md has it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from sandboxd.job import Job
from sandboxd.supervise.runner import open_runner
from tests.supervise.overlays import DRIVERS, OLD, PRELUDE, PYTHON, lower, policy, python

pytestmark = [DRIVERS, pytest.mark.needs("userns")]


async def check(program: str, driver: str, tmp_path: Path) -> None:
    """The program's assertions hold, and what lies below is as it was."""
    root = lower(tmp_path)
    before = snapshot(root)
    result = await python(program, policy(root, driver))
    assert (result.status, result.stderr) == ("ok", b""), result.stderr.decode()
    assert result.enforcement["root"] == f"overlay:{driver}"
    assert snapshot(root) == before


def snapshot(root: Path) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for path in sorted(root.rglob("*")):
        seen = path.lstat()
        large = seen.st_size > 1 << 20
        text = path.read_bytes() if path.is_file() and not path.is_symlink() and not large else b""
        found.append((str(path), seen.st_mode, seen.st_mtime_ns, seen.st_nlink, seen.st_size, text))
    return found


async def test_copy_up_of_data(driver: str, tmp_path: Path) -> None:
    program = """
with open("file", "a") as file:
    file.write("upper\\n")
assert open("file").read() == "lower\\nupper\\n"
with open("link", "w") as file:
    file.write("through the link\\n")
assert open("file").read() == "through the link\\n"
os.truncate("deep/x", 1)
assert open("deep/x").read() == "x"
"""
    await check(program, driver, tmp_path)


async def test_copy_up_of_metadata(driver: str, tmp_path: Path) -> None:
    program = f"""
before = os.stat("file")
assert (before.st_mode & 0o7777, before.st_mtime) == (0o640, {OLD})
os.chmod("file", 0o604)
seen = os.stat("file")
assert (seen.st_mode & 0o7777, seen.st_mtime) == (0o604, {OLD}), seen
assert (seen.st_uid, seen.st_gid) == (before.st_uid, before.st_gid) == (1000, 1000), seen
assert (seen.st_size, open("file").read()) == (6, "lower\\n")
os.utime("file", (5, 6))
os.utime("link", (7, 8), follow_symlinks=False)
assert (os.stat("file").st_mtime, os.lstat("link").st_mtime) == (6, 8)
os.chmod("deep", 0o700)
assert sorted(os.listdir("deep")) == ["er", "x"]
os.chown("file", 1000, 1000)
"""
    await check(program, driver, tmp_path)


async def test_extended_attributes(driver: str, tmp_path: Path) -> None:
    program = """
assert os.getxattr("file", "user.colour") == b"green"
os.setxattr("file", "user.size", b"small")
os.setxattr("deep", "user.size", b"large")
os.removexattr("file", "user.colour")
assert os.listxattr("file") == ["user.size"]
assert os.getxattr("file", "user.size") == b"small"
assert [name for name in os.listxattr("deep") if "overlay" not in name] == ["user.size"]
open("new", "w").close()
os.setxattr("new", "user.x", b"y")
assert os.getxattr("new", "user.x") == b"y"
"""
    await check(program, driver, tmp_path)


async def test_hard_links(driver: str, tmp_path: Path) -> None:
    """Two names of a lower file: with the kernel two files once one was written to (index is off).

    Nor do the numbers of two names agree that a copied file got in one run (overlayfs.rst,
    "Inode properties"); what is in them does.
    """
    program = f"""
with open("one", "w") as file:
    file.write("changed\\n")
assert open("two").read() == ("both\\n" if {driver!r} == "kernel" else "changed\\n")
os.link("file", "again")
with open("again", "a") as file:
    file.write("more\\n")
assert open("file").read() == "lower\\nmore\\n"
assert os.stat("file").st_nlink == os.stat("again").st_nlink == 2
os.unlink("file")
assert os.stat("again").st_nlink == 1 and open("again").read() == "lower\\nmore\\n"
"""
    await check(program, driver, tmp_path)


async def test_whiteouts(driver: str, tmp_path: Path) -> None:
    program = """
os.unlink("file")
assert not os.path.exists("file") and "file" not in os.listdir(".")
assert refused(os.stat, "link") == "ENOENT"
with open("file", "x") as file:
    file.write("again\\n")
seen = os.stat("file")
assert (open("file").read(), seen.st_size) == ("again\\n", 6)
assert os.listxattr("file") == []
os.unlink("file")
assert "file" not in os.listdir(".")
os.mkdir("file")
assert os.listdir("file") == []
os.rmdir("file")
os.symlink("nowhere", "file")
assert os.readlink("file") == "nowhere"
assert refused(os.rmdir, "deep") == "ENOTEMPTY"
"""
    await check(program, driver, tmp_path)


async def test_opaque_directories(driver: str, tmp_path: Path) -> None:
    """fuse-overlayfs lists such a directory as empty, and yet finds by name what lies below: a bug
    of its own (its issues 444 and 478).
    """
    program = f"""
for again in range(3):
    shutil.rmtree("deep")
    assert not os.path.exists("deep/x")
    os.mkdir("deep")
    assert os.listdir("deep") == [], os.listdir("deep")
    if {driver!r} == "fuse":
        sys.exit(0)
    os.makedirs("deep/er")
    assert os.listdir("deep/er") == []
    open("deep/er/new", "w").close()
    assert os.listdir("deep/er") == ["new"]
assert refused(os.stat, "deep/er/y") == refused(os.stat, "deep/x") == "ENOENT"
"""
    await check(program, driver, tmp_path)


async def test_renaming_files(driver: str, tmp_path: Path) -> None:
    """Where a name was taken over from below and left again, fuse-overlayfs shows the old file."""
    program = f"""
os.rename("file", "moved")
assert "file" not in os.listdir(".") and open("moved").read() == "lower\\n"
assert os.getxattr("moved", "user.colour") == b"green"
os.rename("moved", "deep/x")
assert open("deep/x").read() == "lower\\n"
os.rename("deep/x", "file")
assert open("file").read() == "lower\\n"
assert {driver!r} == "fuse" or os.listdir("deep") == ["er"]
os.rename("one", "two")
assert open("two").read() == "both\\n"
os.rename("link", "tree/link")
assert os.readlink("tree/link") == "file"
"""
    await check(program, driver, tmp_path)


async def test_renaming_directories(driver: str, tmp_path: Path) -> None:
    """A directory that lies below: the kernel says EXDEV (redirect_dir is off); mv copies then."""
    program = """
os.mkdir("new")
open("new/x", "w").close()
os.rename("new", "newer")
assert os.listdir("newer") == ["x"]
how = refused(os.rename, "tree", "wood")
assert how in ("EXDEV", "ok"), how
if how == "EXDEV":
    subprocess.run(["mv", "tree", "wood"], check=True)
assert not os.path.exists("tree")
assert open("wood/a/b/leaf").read() == "leaf\\n" and open("wood/a/top").read() == "top\\n"
subprocess.run(["mv", "wood/a/b", "wood/c"], check=True)
assert open("wood/c/leaf").read() == "leaf\\n" and os.listdir("wood/a") == ["top"]
os.mkdir("tree")
assert os.listdir("tree") == []
shutil.rmtree("wood")
assert refused(os.rename, "newer", "deep") == "ENOTEMPTY"
shutil.rmtree("deep")
os.rename("newer", "deep")
assert os.listdir("deep") == ["x"]
"""
    await check(program, driver, tmp_path)


async def test_mmap(driver: str, tmp_path: Path) -> None:
    program = """
with open("file", "r+b") as file:
    shared = mmap.mmap(file.fileno(), 0)
    shared[:5] = b"LOWER"
    shared.flush()
    assert open("file").read() == "LOWER\\n"
    file.seek(0)
    file.write(b"again")
    file.flush()
    assert shared[:] == b"again\\n"
    shared.close()
with open("new", "w+b") as file:
    file.truncate(1 << 20)
    shared = mmap.mmap(file.fileno(), 0)
    shared[1 << 19] = 7
    shared.flush()
    assert os.pread(file.fileno(), 1, 1 << 19) == b"\\x07"
    if os.fork() == 0:
        shared[0] = 9
        os._exit(0)
    os.wait()
    assert shared[0] == 9
"""
    await check(program, driver, tmp_path)


async def test_what_is_open_stays(driver: str, tmp_path: Path) -> None:
    program = """
below, above = open("file", "rb"), open("made", "w+b")
above.write(b"mine")
above.flush()
for name in ("file", "made"):
    os.unlink(name)
assert below.read() == b"lower\\n"
above.seek(0)
assert above.read() == b"mine"
above.write(b" and more")
above.flush()
assert os.fstat(above.fileno()).st_size == 13
open("made", "w").close()
assert os.stat("made").st_size == 0
changing = open("deep/x", "r+b")
os.rename("deep/x", "deep/w")
changing.write(b"W")
changing.flush()
assert open("deep/w", "rb").read() == b"W\\n"
folder = os.open("tree/a/b", os.O_RDONLY)
shutil.rmtree("tree/a/b")
assert os.listdir(folder) == [] and refused(os.mkdir, "x", dir_fd=folder) == "ENOENT"
"""
    await check(program, driver, tmp_path)


async def test_fsync_and_locks(driver: str, tmp_path: Path) -> None:
    program = """
for name, flags in (("file", os.O_RDWR), ("new", os.O_RDWR | os.O_CREAT)):
    opened = os.open(name, flags)
    os.write(opened, b"x")
    os.fsync(opened)
    os.fdatasync(opened)
folder = os.open(".", os.O_RDONLY)
os.fsync(folder)
os.close(os.open("synced", os.O_WRONLY | os.O_CREAT | os.O_SYNC))
os.sync()
with open("locked", "w") as one, open("locked") as other:
    fcntl.flock(one, fcntl.LOCK_EX)
    assert refused(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB) == "EAGAIN"
"""
    await check(program, driver, tmp_path)


async def test_unnamed_files(driver: str, tmp_path: Path) -> None:
    """O_TMPFILE: the kernel's overlay has it since Linux 6.1, fuse-overlayfs has it not."""
    program = f"""
def make():
    opened = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(opened, b"unnamed")
    assert os.fstat(opened).st_nlink == 0
    os.link(f"/proc/self/fd/{{opened}}", "named", src_dir_fd=os.open("/", 0), follow_symlinks=True)
    assert open("named").read() == "unnamed"
how = refused(make)
old = tuple(map(int, os.uname().release.split(".")[:2])) < (6, 1)
assert how == ("ENOTSUP" if old or {driver!r} == "fuse" else "ok"), how
import tempfile
with tempfile.TemporaryFile(dir=".") as file:  # which does without where need be
    file.write(b"x")
"""
    await check(program, driver, tmp_path)


async def test_sparse_files(driver: str, tmp_path: Path) -> None:
    """512 MiB that are nearly all hole, above 64 MiB of upper: fuse-overlayfs copies the holes."""
    program = f"""
with open("new", "wb") as file:
    file.truncate(1 << 40)
    file.seek(1 << 39)
    file.write(b"x")
seen = os.stat("new")
assert seen.st_size == 1 << 40 and seen.st_blocks * 512 < 1 << 20, seen
before = os.stat("sparse").st_blocks
def change():
    with open("sparse", "r+b") as file:
        file.write(b"at the start")
how = refused(change)
assert how == ("ok" if {driver!r} == "kernel" else "ENOSPC"), how
if how == "ENOSPC":
    assert os.stat("sparse").st_blocks == before
    sys.exit(0)
seen = os.stat("sparse")
assert seen.st_size == 512 << 20 and seen.st_blocks * 512 < 8 << 20, seen
with open("sparse", "rb") as file:
    assert file.read(12) == b"at the start"
    file.seek(256 << 20)
    assert file.read(13) == b"in the middle" and file.read(1) == b"\\0"
"""
    await check(program, driver, tmp_path)


async def test_special_files_and_odd_names(driver: str, tmp_path: Path) -> None:
    program = """
os.mkfifo("fifo")
if os.fork() == 0:
    with open("fifo", "w") as fifo:
        fifo.write("through")
    os._exit(0)
assert open("fifo").read() == "through"
os.wait()
import socket
made = socket.socket(socket.AF_UNIX)
made.bind("socket")
assert stat.S_ISSOCK(os.stat("socket").st_mode)
for name in (b"\\xff\\xfe", b"new\\nline", b"n" * 255, b".wh.not", b" "):
    open(name, "w").close()
    assert name in os.listdir(b"."), name
    os.rename(name, b"other")
    os.unlink(b"other")
assert refused(os.mknod, "device", stat.S_IFCHR | 0o600, os.makedev(1, 3)) in ("EPERM", "EACCES")
assert refused(open, "n" * 256, "w") == "ENAMETOOLONG"
"""
    if driver == "fuse":  # it takes names with .wh. for marks of its own, and needs room for them
        program = program.replace(' b".wh.not",', "").replace('b"n" * 255', 'b"n" * 251')
    await check(program, driver, tmp_path)


async def test_many_files(driver: str, tmp_path: Path) -> None:
    program = """
os.mkdir("many")
for number in range(2000):
    with open(f"many/{number}", "w") as file:
        file.write(str(number))
assert len(os.listdir("many")) == 2000
for number in range(0, 2000, 2):
    os.unlink(f"many/{number}")
assert sorted(map(int, os.listdir("many"))) == list(range(1, 2000, 2))
deep = "/data/down"
for _ in range(100):
    os.mkdir(deep)
    deep += "/d"
shutil.rmtree("down")
shutil.rmtree("many")
assert not os.path.exists("many")
"""
    await check(program, driver, tmp_path)


async def test_many_jobs_share_what_lies_below(driver: str, tmp_path: Path) -> None:
    """Each sees what lies below as it is, and its own changes only."""
    root = lower(tmp_path)
    before = snapshot(root)
    chosen = policy(root, driver)
    program = PRELUDE + """
name = sys.argv[1]
assert open("file").read() == "lower\\n"
assert sorted(os.listdir("deep")) == ["er", "x"]
with open("file", "w") as file:
    file.write(name)
shutil.rmtree("deep/er")
open(f"deep/{name}", "w").close()
sys.stdin.read()
assert open("file").read() == name and sorted(os.listdir("deep")) == sorted(["x", name])
print(name)
"""  # fmt: skip
    found: list[bytes] = []
    async with open_runner(slots=6) as runner:

        async def one(number: int) -> None:
            words = [PYTHON, "-Bc", program, f"job{number}"]
            result = await runner.run(Job(argv=words, policy=chosen))
            assert (result.status, result.stderr) == ("ok", b"")
            found.append(result.stdout)

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(one, number)
    assert sorted(found) == sorted(b"job%d\n" % number for number in range(12))
    assert snapshot(root) == before
    assert os.listdir(root / "data/deep/er") != []
