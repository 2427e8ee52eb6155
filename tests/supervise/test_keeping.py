"""What a job changed in its root, kept: listed, made a layer, run again; whatever it left there."""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from sandboxd.errors import HostError, ImageError, JobError
from sandboxd.images import kept as keepers
from sandboxd.images.importing import import_image
from sandboxd.images.kept import KeptRoot, find_kept, kept_roots
from sandboxd.images.store import Store
from sandboxd.job import Job
from sandboxd.policy import Identity, Limits, Policy, Root
from sandboxd.result import Result
from sandboxd.stores.folders import system_place
from sandboxd.supervise import keeping
from sandboxd.supervise.runner import open_runner
from tests.images import making
from tests.images.making import END, SMALL, file, folder, ids, oci_layout, octal, tarball
from tests.supervise import variants
from tests.supervise.overlays import PRELUDE, PYTHON, lower
from tests.supervise.overlays import policy as overlay_policy

pytestmark = pytest.mark.needs("userns")
KINDS = pytest.mark.parametrize(
    ("driver", "upper"),
    [
        pytest.param("kernel", "tmpfs", marks=pytest.mark.needs("overlay")),
        pytest.param("kernel", "directory", marks=pytest.mark.needs("overlay")),
        pytest.param("fuse", "tmpfs", marks=pytest.mark.needs("fuse")),
        pytest.param("fuse", "directory", marks=pytest.mark.needs("fuse")),
    ],
)
BELOW = (
    folder(b"data") + file(b"data/kept", b"kept\n") + file(b"data/gone") + folder(b"data/deep")
    + file(b"data/deep/old") + file(b"data/deep/older") + file(b"data/changed", b"before\n")
    + folder(b"data/tree") + file(b"data/tree/leaf")
    + file(b"data/theirs", mode=octal(0o666, 8), uid=octal(1000, 8), gid=octal(5, 8))
)  # fmt: skip
ABOVE = folder(b"data") + file(b"data/.wh.gone", b"") + END
LIMITS = Limits(wall_time=60.0, disk=64 << 20, inodes=20000)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOXD_KEPT", str(tmp_path / "kept"))
    monkeypatch.setenv("SANDBOXD_UPPERS", str(tmp_path / "uppers"))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store with the image `made`."""
    monkeypatch.setenv("SANDBOXD_IMAGES", str(tmp_path / "store"))
    with making.store(tmp_path / "store") as found:
        programs = (*making.PROGRAMS, "chmod", "mkfifo", "truncate", "mknod")
        layers = [tarball(making.system(tmp_path / "system", programs)), BELOW + END, ABOVE]
        top = oci_layout(tmp_path / "layout", layers, {"Env": ["PATH=/usr/bin"]})
        import_image(found, str(top), None, ids(), dataclasses.replace(SMALL, entries=9999))
        yield found


def policy(driver: str, upper: str, name: str = "made", identity: Identity | None = None) -> Policy:
    root = Root(image=name, driver=driver, upper=upper, writable=True, proc="masked")  # type: ignore[arg-type]
    caller = identity or Identity(user="caller", uid=0)
    return variants.policy(limits=LIMITS, root=root, identity=caller)


async def run(script: str, chosen: Policy, **more: object) -> Result:
    job = Job(argv=["sh", "-ec", script], policy=chosen, keep_root=True)
    async with open_runner(slots=1) as runner:
        return await runner.run(msgspec.structs.replace(job, **more))


def listed(kept: KeptRoot) -> list[str]:
    return [f"{one.kind} {one.path}" for one in kept.changes()]


CHANGES = """
echo mine > /data/changed; rm /data/kept; echo new > /data/new; mkdir -p /made/a; ln -s /x /made/l
rm -r /data/deep; mkdir /data/deep; echo again > /data/deep/old; rm -r /data/tree
echo x > /data/short; rm /data/short; chmod 700 /srv; mkfifo /made/fifo; ln /data/new /made/hard
"""
WANTED = """
C /data
C /data/changed
C /data/deep
C /data/deep/old
D /data/deep/older
D /data/kept
A /data/new
D /data/tree
A /made
A /made/a
A /made/fifo
A /made/hard
A /made/l
C /srv
"""


@KINDS
async def test_changes(driver: str, upper: str, store: Store) -> None:
    result = await run(CHANGES, policy(driver, upper))
    assert result.ok, result
    assert result.kept is not None
    assert result.kept.complete
    (kept,) = kept_roots()
    assert find_kept(result.job) == find_kept(result.job[:7]) == kept
    assert sorted(listed(kept)) == sorted(WANTED.split("\n")[1:-1])
    assert result.kept.counts == {"added": 6, "changed": 5, "deleted": 3}
    record = kept.record
    assert (record.job, record.status, record.image) == (result.job, "ok", "made")
    assert record.bytes == (kept.folder / "layer.tar").stat().st_size
    assert {one.stat().st_uid for one in kept.folder.iterdir()} == {os.getuid()}
    kept.remove()
    assert kept_roots() == []


@KINDS
async def test_a_commit_runs(driver: str, upper: str, store: Store) -> None:
    """What the job saw at its end is what the next one sees at its start, also in between."""
    look = """
cd /; for x in data data/* data/deep/* made made/*; do stat -c '%n %F %a %u' $x; done
cat data/changed data/new data/deep/old; stat -c %h made/hard; test ! -e data/kept
"""
    first = await run(CHANGES + look, policy(driver, upper), keep_root="first")
    assert first.ok, first
    made = keeping.commit(find_kept("first"), "second")
    assert len(made.layers) == 4
    for other in ("kernel", "fuse"):
        chosen = policy(other, "tmpfs", "second")
        if not variants.as_found().fuse_overlayfs and other == "fuse":
            continue
        again = await run(look, chosen, keep_root=False)
        assert again.stdout == first.stdout, again
        assert again.kept is None
    more = await run("rm -r /made; echo last > /data/changed", policy(driver, upper, "second"))
    keeping.commit(find_kept(more.job), "third:1")
    last = await run("cat /data/changed; ls /", policy("auto", "tmpfs", "third:1"))
    assert last.stdout.startswith(b"last\n")
    assert b"made" not in last.stdout.split()


@pytest.mark.needs("overlay", "subuid")
async def test_owners_are_those_seen_inside(store: Store) -> None:
    """A run's own uid is nobody's afterwards: in the layer stands the one that it saw."""
    chosen = policy("kernel", "tmpfs", identity=Identity(uid=1234, gid=77))
    result = await run("echo x > /tmp/in; touch /var/mine", chosen)
    assert not result.ok  # /var is root's
    open_place = policy("kernel", "tmpfs")
    await run("mkdir /open; chmod 777 /open", open_place, keep_root="opened")
    keeping.commit(find_kept("opened"), "opened")
    root = msgspec.structs.replace(chosen.root, image="opened")
    chosen = msgspec.structs.replace(chosen, root=root)
    result = await run("touch /open/mine; stat -c '%u %g' /open/mine", chosen, keep_root="owned")
    assert result.stdout == b"1234 77\n", result
    with tarfile.open(find_kept("owned").folder / "layer.tar") as layer:
        (mine,) = [one for one in layer if one.name == "open/mine"]
        assert (mine.uid, mine.gid) == (1234, 77)


@KINDS
@pytest.mark.needs("subuid")
async def test_copying_up_changes_no_owner(driver: str, upper: str, store: Store) -> None:
    """Who may write to a file of somebody else's does not get it, whoever copies it up."""
    chosen = policy(driver, upper, identity=Identity())
    result = await run("echo more >> /data/theirs", chosen, keep_root="owners")
    assert result.ok, result
    with tarfile.open(find_kept("owners").folder / "layer.tar") as layer:
        (theirs,) = [one for one in layer if one.name == "data/theirs"]
        assert (theirs.uid, theirs.gid, theirs.mode, theirs.size) == (1000, 5, 0o666, 10)


HOSTILE = """
import socket
def name(text): return text.encode("latin-1")
os.mkdir("h"); os.chdir("h")
os.symlink("/etc/shadow", "link"); os.symlink("..", "up"); os.symlink("/", "root")
os.mkfifo("fifo")
socket.socket(socket.AF_UNIX).bind("socket")
open(name("\\xff\\xfe\\n name"), "w").close()
open(b"w" * 250, "w").close()
with open("sparse", "wb") as file:
    file.truncate(1 << 30); file.seek(1 << 29); file.write(b"x")
with open("huge", "wb") as file:
    file.truncate(1 << 43)
with open("set", "w"): os.chmod("set", 0o6755)
os.setxattr("set", "user.mine", b"\\xff=\\n1")
if sys.argv[1] == "kernel":
    open(".wh.not", "w").close()
os.mkdir("closed", 0); os.mkdir("deep"); os.chdir("deep")
for number in range(300):
    os.mkdir("d"); os.chdir("d")
os.chdir("/data/h")
os.symlink("/etc", "loop"); os.rename("loop", "deep/loop")
"""


@KINDS
async def test_what_is_hostile(driver: str, upper: str, tmp_path: Path, store: Store) -> None:
    """Nothing is followed, nothing is waited for, and what a layer cannot have is counted."""
    chosen = overlay_policy(lower(tmp_path), driver, LIMITS, upper=upper)
    job = Job(argv=[PYTHON, "-Bc", PRELUDE + HOSTILE, driver], policy=chosen, keep_root="hostile")
    async with open_runner() as runner:
        result = await runner.run(job)
    if upper == "directory":  # where more than 256 directories within one another end a run
        assert result.status in ("ok", "disk_limit"), result
    else:
        assert result.ok, result
    assert result.kept is not None
    kept = find_kept("hostile")
    counts = kept.record.counts
    assert counts["sockets"] == counts["large"] == counts["deep"] == counts["setid"] == 1
    assert counts.get("names", 0) == (driver == "kernel")
    paths = [os.fsencode(one.path) for one in kept.changes()]
    assert b"/data/h/\xff\xfe\n name" in paths
    assert b"/data/h/link" in paths
    assert b"/data/h/deep/loop" in paths
    assert max(path.count(b"/") for path in paths) == 256
    assert (kept.folder / "layer.tar").stat().st_size < 4 << 20
    with pytest.raises(ImageError, match="and no image"):
        keeping.commit(kept, "never")
    with (kept.folder / "layer.tar").open("rb") as layer:  # what our own importer makes of it
        (made,) = import_image(store, layer, "hostile", ids(), dataclasses.replace(
            SMALL, bytes=4 << 30))  # fmt: skip
        assert made.layers[0].setid == made.layers[0].devices == 0
    found = store.layer(made.layers[0].diff_id, "")
    assert found is not None
    top = found[0] / "root/data/h"
    assert (top / "sparse").stat().st_blocks * 512 < 1 << 20
    assert os.getxattr(top / "set", "user.mine") == b"\xff=\n1"
    assert os.readlink(top / "root") == "/"


@pytest.mark.parametrize("driver", [
    pytest.param("kernel", marks=pytest.mark.needs("overlay")),
    pytest.param("fuse", marks=pytest.mark.needs("fuse")),
    "tmpfs",
])  # fmt: skip
async def test_the_roots_of_the_host(driver: str) -> None:
    """Only what the job did: not the files that sandboxd makes there for each run."""
    root = Root(writable=True, driver=driver, proc="masked")  # type: ignore[arg-type]
    chosen = variants.policy(limits=LIMITS, root=root, identity=Identity(user="caller", uid=0))
    quiet = await run("true", chosen)
    assert quiet.kept is not None
    assert quiet.kept.counts == {}
    result = await run("echo x > /etc/mine; mkdir /new; echo y > /etc/hostname", chosen)
    assert result.ok, result
    assert result.kept is not None
    wanted = ["C /etc", "A /etc/hostname", "A /etc/mine", "A /new"]
    assert listed(find_kept(result.job)) == wanted
    with pytest.raises(ImageError, match="the host's /usr, and no image"):
        keeping.commit(find_kept(result.job), "never")


@pytest.mark.needs("overlay")
async def test_a_failed_run_is_kept_as_well(store: Store) -> None:
    result = await run("touch /made; exit 3", policy("kernel", "tmpfs"), keep_root="failed")
    assert result.status == "nonzero_exit"
    assert listed(find_kept("failed")) == ["A /made"]
    assert find_kept("failed").record.status == "nonzero_exit"


@pytest.mark.needs("overlay")
async def test_more_than_a_layer_may_have(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    few = dataclasses.replace(keeping.CAPS, entries=5)
    monkeypatch.setattr(keeping, "CAPS", few)
    script = "for i in 1 2 3 4 5 6 7 8 9; do echo $i > /srv/$i; done"
    result = await run(script, policy("kernel", "tmpfs"), keep_root="full")
    assert result.kept is not None
    assert not result.kept.complete
    with pytest.raises(ImageError, match="more was changed"):
        keeping.commit(find_kept("full"), "never")


async def test_names(tmp_path: Path) -> None:
    writable = variants.policy(root=Root(writable=True, driver="tmpfs", proc="masked"))
    for name in ("../x", ".new-x", "", "a/b"):
        if name:
            with pytest.raises(JobError, match="cannot be a name"):
                await run("true", writable, keep_root=name)
    await run("true", writable, keep_root="once")
    with pytest.raises(JobError, match="already"):
        await run("true", writable, keep_root="once")
    with pytest.raises(JobError, match="read-only"):
        await run("true", variants.policy(), keep_root="other")
    with pytest.raises(ImageError, match="there are: once"):
        find_kept("other")
    assert [one.record.name for one in kept_roots()] == ["once"]


async def test_without_a_place_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOXD_KEPT", "/proc/nowhere")
    chosen = variants.policy(root=Root(writable=True, proc="masked"))
    async with open_runner(slots=1) as runner:
        with pytest.raises(HostError, match="/proc/nowhere: No such file"):
            await runner.run(Job(argv=["true"], policy=chosen, keep_root=True))
        assert runner.statistics().tenants == 0


def test_a_place_that_is_closed_is_as_one_that_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    monkeypatch.setenv("SANDBOXD_KEPT", str(closed / "kept"))
    assert kept_roots() == []
    assert Store(closed / "images").find("x") is None
    closed.chmod(0o700)


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path) -> None:
    left = keepers.place() / ".new-0123"
    left.mkdir(parents=True)
    (left / "layer.tar").write_bytes(b"x")
    assert kept_roots() == []
    with keepers.new("one"):
        assert not left.exists()
        assert len(os.listdir(keepers.place())) == 1
    assert os.listdir(keepers.place()) == []


def test_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SANDBOXD_KEPT")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    wanted = system_place("kept") if os.geteuid() == 0 else Path("/data/sandboxd/kept")
    assert keepers.place() == wanted
