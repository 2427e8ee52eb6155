"""Where mounts come from and go to: never outside of allow_sources, never outside of the root."""

from __future__ import annotations

import errno
from pathlib import Path

import msgspec
import pytest

from sandboxd.cli.main import main
from sandboxd.errors import LaunchError, PolicyError
from sandboxd.job import Job
from sandboxd.policy import Identity, Mount, Policy, Root
from sandboxd.result import Result
from sandboxd.supervise.runner import open_runner
from tests.supervise.variants import policy

pytestmark = pytest.mark.needs("userns")
CALLER = Identity(user="caller", uid=1000)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What is allowed, what is not, and links of all kinds between them."""
    (tmp_path / "allowed/deep").mkdir(parents=True)
    (tmp_path / "allowed-not").mkdir()
    (tmp_path / "secret/inner").mkdir(parents=True)
    for folder in ("allowed", "allowed/deep", "allowed-not", "secret", "secret/inner"):
        (tmp_path / folder / "file").write_text(f"{folder}\n")
    (tmp_path / "allowed/out").symlink_to(tmp_path / "secret")
    (tmp_path / "allowed/up").symlink_to("../secret")
    (tmp_path / "allowed/in").symlink_to("deep")
    (tmp_path / "allowed/file-out").symlink_to("../secret/file")
    (tmp_path / "way").symlink_to("allowed")
    return tmp_path


def showing(source: Path, allowed: Path | str, **more: object) -> Policy:
    mounts = (Mount(source=str(source), target="/data", **more),)  # type: ignore[arg-type]
    return msgspec.structs.replace(policy(), mounts=mounts, allow_sources=(str(allowed),))


async def run(script: str, chosen: Policy) -> Result:
    async with open_runner() as runner:
        return await runner.run(Job(argv=["sh", "-c", script], policy=chosen))


@pytest.mark.parametrize("allowed", ["allowed", "way", ""])
@pytest.mark.parametrize("source", ["allowed", "allowed/deep", "allowed/in", "way/deep"])
async def test_what_lies_within_is_shown(tree: Path, source: str, allowed: str) -> None:
    result = await run("cat /data/file", showing(tree / source, tree / allowed))
    assert result.stdout.decode() == f"{(tree / source).resolve().relative_to(tree)}\n"


@pytest.mark.parametrize(
    "source",
    ["secret", "allowed-not", "allowed/out", "allowed/up/inner", "allowed/file-out", "."],
)
@pytest.mark.parametrize("optional", [False, True])
async def test_what_lies_outside_is_refused(tree: Path, source: str, optional: bool) -> None:
    chosen = showing(tree / source, tree / "allowed", optional=optional)
    with pytest.raises(PolicyError, match=r"mounts\[0\]: .* is not in what .*allow_sources") as one:
        await run("cat /data/file", chosen)
    assert str(tree / "allowed") in str(one.value)


async def test_nothing_allowed_is_nothing(tree: Path) -> None:
    chosen = msgspec.structs.replace(showing(tree / "allowed", "/"), allow_sources=())
    with pytest.raises(PolicyError, match="nothing"):
        await run("true", chosen)
    assert (await run("true", msgspec.structs.replace(chosen, mounts=()))).ok


async def test_a_root_is_a_source_too(tree: Path) -> None:
    chosen = policy(root=Root(source=str(tree / "secret")))
    chosen = msgspec.structs.replace(chosen, allow_sources=(str(tree / "allowed"),))
    with pytest.raises(PolicyError, match=r"root.source: .*secret is not in"):
        await run("true", chosen)


@pytest.mark.parametrize("what", ["allowed/deep", "allowed"])
async def test_a_link_that_comes_later_is_not_followed(tree: Path, what: str) -> None:
    """Between the look and the mount: the last part of the path, or one on the way."""
    chosen = showing(tree / "allowed/deep", tree / "allowed")
    async with open_runner() as runner:
        runner._known.ready(Job(argv=["true"], policy=chosen))  # it is found to be allowed
        (tree / what).rename(tree / "gone")
        (tree / "secret/deep").symlink_to("inner")
        (tree / what).symlink_to(tree / "secret")
        with pytest.raises(LaunchError, match="open_tree") as error:
            await runner.run(Job(argv=["true"], policy=chosen))
        assert error.value.errno == errno.ELOOP


def test_flags_do_not_reach_further(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tree / "narrow.toml"
    file.write_text(f'extends = "base"\nallow_sources = ["{tree}/allowed"]\n')
    for flags in (
        ["-v", f"{tree}/secret:/data:ro"],
        ["--mount", f"type=bind,source={tree}/allowed/out,target=/data,readonly"],
        ["--root", f"{tree}/secret"],
    ):
        assert main(["run", "-p", str(file), *flags, "--", "cat", "/data/file"]) == 125
        said = capfd.readouterr().err
        assert "is not in what" in said
        assert f"allows: {tree}/allowed" in said
    allowed = ["-v", f"{tree}/allowed/in:/data:ro"]
    assert main(["run", "-q", "-p", str(file), *allowed, "--", "cat", "/data/file"]) == 0
    assert capfd.readouterr().out == "allowed/deep\n"


# -- where they go ---------------------------------------------------------------------------------


FOLDERS = ("usr", "etc", "srv", "box", "dev/shm", "proc", "tmp")
LINKS = ("absolute", "climbing", "nowhere")


def root_with_links(folder: Path) -> Path:
    """A root of a stranger's: links in it lead to other places of the root, never out of it."""
    root = folder / "root"
    for name in FOLDERS:
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "absolute").symlink_to("/srv")
    (root / "climbing").symlink_to("../../../../../../../srv")
    (root / "nowhere").symlink_to("/none")
    return root


DRIVERS = pytest.mark.parametrize(
    "root",
    [
        Root(driver="tmpfs"),
        pytest.param(Root(writable=True, driver="kernel"), marks=pytest.mark.needs("overlay")),
        pytest.param(Root(writable=True, driver="fuse"), marks=pytest.mark.needs("fuse")),
    ],
    ids=["tmpfs", "kernel", "fuse"],
)


@DRIVERS
@pytest.mark.parametrize("link", ["absolute", "climbing"])
@pytest.mark.parametrize("kind", ["bind", "tmpfs", "sized"])
async def test_a_target_is_looked_up_in_the_root(
    tree: Path, root: Root, link: str, kind: str
) -> None:
    made = root_with_links(tree)
    if root.driver == "tmpfs":  # nothing can be made in a root that is bound
        (made / "srv/data").mkdir()
    mount = {
        "bind": Mount(source=str(tree / "allowed"), target=f"/{link}/data"),
        "tmpfs": Mount(type="tmpfs", target=f"/{link}/data", writable=True),
        "sized": Mount(type="tmpfs", target=f"/{link}/data", size=1 << 20, writable=True),
    }[kind]
    chosen = msgspec.structs.replace(
        policy(root=msgspec.structs.replace(root, source=str(made), proc="masked"),
               identity=CALLER),
        mounts=(Mount(source="/usr", target="/usr"), mount),
    )  # fmt: skip
    script = "grep -c ' /srv/data ' /proc/self/mountinfo; ls -A /srv/data"
    result = await run(script, chosen)
    assert result.stdout.startswith(b"1\n"), result
    if kind == "bind":
        assert b"file\n" in result.stdout
    assert sorted(path.name for path in made.iterdir()) == sorted(
        ["usr", "etc", "srv", "box", "dev", "proc", "tmp", "bin", "lib", "lib64", "sbin", *LINKS]
    )


@pytest.mark.needs("overlay")
async def test_a_target_behind_a_dead_link_names_its_line(tree: Path) -> None:
    made = root_with_links(tree)
    root = Root(writable=True, driver="kernel", source=str(made), proc="masked")
    mounts = (
        Mount(source="/usr", target="/usr"),
        Mount(source=str(tree / "allowed"), target="/nowhere/data"),
    )
    chosen = msgspec.structs.replace(policy(root=root, identity=CALLER), mounts=mounts)
    with pytest.raises(LaunchError, match=r"/nowhere/data .*No such file.*mounts\[1\]"):
        await run("true", chosen)
