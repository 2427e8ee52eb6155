"""Roots a job may write to: private, complete, gone afterwards; one suite over all drivers."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from sandboxd.errors import LaunchError
from sandboxd.job import Job
from sandboxd.policy import Identity, Limits, Mount, Policy, Root
from sandboxd.result import Result
from sandboxd.supervise.runner import open_runner
from tests.supervise.variants import hosts, policy, without

DRIVERS = pytest.mark.parametrize(
    "driver",
    [
        pytest.param("kernel", marks=pytest.mark.needs("overlay")),
        pytest.param("fuse", marks=pytest.mark.needs("fuse")),
    ],
)
CALLER = Identity(user="caller", uid=1000)


async def run(script: str, chosen: Policy) -> Result:
    async with open_runner() as runner:
        return await runner.run(Job(argv=["sh", "-ec", script], policy=chosen))


def image(folder: Path) -> Path:
    """A directory to be a root: the host's programs by links are not enough, so bind /usr."""
    root = folder / "image"
    for name in ("usr", "etc", "data/deep"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "data/file").write_text("from the image\n")
    (root / "data/deep/other").write_text("other\n")
    return root


def directory_policy(root: Path, driver: str, *, writable: bool, mounts: bool = True) -> Policy:
    base = policy(
        root=Root(source=str(root), writable=writable, driver=driver, proc="masked"),  # type: ignore[arg-type]
        identity=CALLER,
    )
    usr = (Mount(source="/usr", target="/usr"),) if mounts else ()
    return msgspec.structs.replace(base, mounts=usr)


@DRIVERS
async def test_a_writable_host_root_is_private(driver: str) -> None:
    chosen = policy(root=Root(writable=True, driver=driver, proc="masked"), identity=CALLER)  # type: ignore[arg-type]
    script = "test ! -e /made; touch /made /etc/made /var/made /usr/made; ls -d /made /usr/made"
    for _ in range(2):
        result = await run(script, chosen)
        assert result.stdout == b"/made\n/usr/made\n", result
        assert result.enforcement["root"] == f"overlay:{driver}"
        assert "made" not in os.listdir("/usr")


@DRIVERS
async def test_a_directory_as_root(driver: str, tmp_path: Path) -> None:
    root = image(tmp_path)
    chosen = directory_policy(root, driver, writable=True)
    script = (
        "cat /data/file; echo changed > /data/file; rm -r /data/deep; mkdir /data/deep;"
        "ls -A /data/deep; cat /data/file; mv /data/file /data/moved; ln /data/moved /data/hard;"
        "stat -c %h /data/moved"
    )
    for _ in range(2):
        result = await run(script, chosen)
        assert result.stdout == b"from the image\nchanged\n2\n", result
    assert (root / "data/file").read_text() == "from the image\n"
    assert sorted(os.listdir(root / "data")) == ["deep", "file"]


@DRIVERS
async def test_a_directory_as_a_read_only_root(driver: str, tmp_path: Path) -> None:
    chosen = directory_policy(image(tmp_path), driver, writable=False)
    script = "cat /data/file; touch /data/no 2>&1 || echo refused; touch /tmp/yes"
    result = await run(script, chosen)
    assert result.stdout.startswith(b"from the image\n")
    assert result.stdout.endswith(b"refused\n")


@DRIVERS
async def test_the_upper_layer_is_limited(driver: str) -> None:
    chosen = policy(root=Root(writable=True, driver=driver, proc="masked"), identity=CALLER)  # type: ignore[arg-type]
    chosen = msgspec.structs.replace(chosen, limits=Limits(disk=8 << 20, wall_time=30.0))
    result = await run("head -c 20M /dev/zero > /usr/big", chosen)
    assert not result.ok
    assert b"No space left" in result.stderr


async def test_without_any_overlay_binds_on_a_tmpfs_do() -> None:
    chosen = policy(root=Root(writable=True, driver="tmpfs", proc="masked"), identity=CALLER)
    result = await run("touch /made; touch /usr/made 2>/dev/null || echo refused", chosen)
    assert result.stdout == b"refused\n"
    assert result.enforcement["root"] == "tmpfs and binds"


async def test_binds_read_only_and_writable(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("shown\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "single").write_text("a file\n")
    mounts = (
        Mount(source=str(tmp_path / "in"), target="/data/in"),
        Mount(source=str(tmp_path / "out"), target="/data/out", writable=True),
        Mount(source=str(tmp_path / "single"), target="/data/single"),
        Mount(source=str(tmp_path / "none"), target="/data/none", optional=True),
        Mount(target="/scratch", type="tmpfs", size=1 << 20, exec=False),
    )
    chosen = msgspec.structs.replace(policy(identity=CALLER), mounts=mounts)
    script = (
        "cat /data/in/file /data/single; touch /data/in/no 2>/dev/null || echo read-only;"
        "echo written > /data/out/result; cp /bin/true /scratch/t;"
        "/scratch/t 2>/dev/null || echo noexec"
    )
    result = await run(script, chosen)
    assert result.stdout == b"shown\na file\nread-only\nnoexec\n", result
    written = tmp_path / "out/result"
    assert written.read_text() == "written\n"
    if os.getuid():  # as root nothing of the map is ours
        assert written.stat().st_uid == os.getuid()


ROOTS = {
    "shared": Root(proc="masked"),
    "private": Root(writable=True, proc="masked"),
    "tmpfs": Root(writable=True, driver="tmpfs", proc="masked"),
}


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("place", ["/data", "/box/deep", "/tmp"])
@pytest.mark.parametrize("root", ROOTS)
async def test_writable_binds(tmp_path: Path, root: str, place: str, optional: bool) -> None:
    """A directory and a single file, in the root and in a private place; Landlock lets both be."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old\n")
    mounts = tuple(
        Mount(source=str(tmp_path / name), target=f"{place}/{name}", writable=True,
              optional=optional)
        for name in ("folder", "file")
    )  # fmt: skip
    chosen = policy(identity=CALLER, root=ROOTS[root])
    script = f"cd {place}; cat file; echo new > file; echo more >> file; mkdir folder/made"
    result = await run(script, msgspec.structs.replace(chosen, mounts=mounts))
    assert (result.stdout, result.stderr, result.status) == (b"old\n", b"", "ok")
    assert (tmp_path / "file").read_text() == "new\nmore\n"
    assert (tmp_path / "folder/made").is_dir()


@pytest.mark.parametrize("place", ["/data", "/box/deep"])
async def test_an_optional_writable_bind_that_is_not_there(tmp_path: Path, place: str) -> None:
    """Its empty place is nobody's to write to: it belongs to the template of all jobs."""
    mount = Mount(source=str(tmp_path / "none"), target=place, writable=True, optional=True)
    chosen = msgspec.structs.replace(policy(identity=CALLER), mounts=(mount,))
    result = await run(f"ls -A {place}; touch {place}/made 2>/dev/null || echo no", chosen)
    assert result.stdout == b"no\n"


async def test_a_bind_source_that_is_not_there_names_its_line(tmp_path: Path) -> None:
    chosen = msgspec.structs.replace(
        policy(), mounts=(Mount(source=str(tmp_path / "none"), target="/x"),)
    )
    with pytest.raises(LaunchError, match=r"open_tree: step \d+ .*/none: No such file") as caught:
        await run("true", chosen)
    assert "mounts[0]" in caught.value.hint
    assert caught.value.errno == 2


@pytest.mark.parametrize(
    "writable", [False, pytest.param(True, marks=pytest.mark.needs("overlay"))]
)
async def test_an_alias_leads_to_the_working_directory(writable: bool) -> None:
    chosen = policy(root=Root(writable=writable, aliases=("w", "work")))
    result = await run("cd /w; echo x > /w/file; cat /box/file /work/file; readlink /w", chosen)
    assert result.stdout == b"x\nx\nbox\n", result


@hosts("nothing", "subuid", "machine", "landlock")
@pytest.mark.parametrize(
    "identity",
    [Identity(), Identity(uid=0), Identity(user="caller", uid=1000)],
    ids=["own", "root", "caller"],
)
async def test_no_proc_is_an_empty_directory(host: str, identity: Identity) -> None:
    chosen = policy(root=Root(proc="none"), identity=identity)
    script = "echo /proc/*; test -d /proc; ! touch /proc/x 2>/dev/null"
    async with open_runner(host=without(host)) as runner:
        result = await runner.run(Job(argv=["sh", "-ec", script], policy=chosen))
    assert (result.status, result.stdout) == ("ok", b"/proc/*\n"), result
