"""Programs whose root is an image: its layers, its configuration, on every driver."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from sandboxd.compile.build import compile_policy
from sandboxd.errors import HostError, ImageError, LaunchError
from sandboxd.host import Host
from sandboxd.images import store as stores
from sandboxd.images.importing import import_image
from sandboxd.images.store import Store
from sandboxd.images.unpacking import open_unpacker
from sandboxd.job import Job
from sandboxd.policy import Identity, Mount, Policy, Root
from sandboxd.result import Result
from sandboxd.supervise.runner import open_runner
from sandboxd.supervise.seen import host_for
from tests.images import making
from tests.images.making import END, SMALL, file, folder, ids, link, oci_layout, tarball
from tests.supervise import variants

pytestmark = pytest.mark.needs("userns")

DRIVERS = pytest.mark.parametrize(
    "driver",
    [
        pytest.param("kernel", marks=pytest.mark.needs("overlay")),
        pytest.param("fuse", marks=pytest.mark.needs("fuse")),
    ],
)
EITHER = pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
CONFIG: dict[str, object] = {
    "Env": ["PATH=/usr/bin", "COLOUR=green"], "WorkingDir": "/srv", "User": "app",
    "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo hello"],
}  # fmt: skip
MIDDLE = (
    folder(b"data") + file(b"data/kept", b"kept\n") + file(b"data/gone") + folder(b"data/deep")
    + file(b"data/deep/old") + file(b"data/changed", b"before\n")
)  # fmt: skip
UPPER = (
    folder(b"data") + file(b"data/.wh.gone", b"") + folder(b"data/deep")
    + file(b"data/deep/.wh..wh..opq", b"") + file(b"data/deep/new")
    + file(b"data/changed", b"after\n")
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store with the image `made` of three layers."""
    monkeypatch.setenv("SANDBOXD_IMAGES", str(tmp_path / "store"))
    with making.store(tmp_path / "store") as found:
        layers = [tarball(making.system(tmp_path / "system")), MIDDLE + END, UPPER + END]
        top = oci_layout(tmp_path / "layout", layers, CONFIG)
        import_image(found, str(top), None, ids(), dataclasses.replace(SMALL, entries=9999))
        yield found


def policy(root: Root, identity: Identity | None = None, **more: object) -> Policy:
    return msgspec.structs.replace(variants.policy(root=root, identity=identity), **more)


async def run(chosen: Policy, *argv: str, host: Host | None = None) -> Result:
    async with open_runner(slots=1, host=host) as runner:
        return await runner.run(Job(argv=argv, policy=chosen))


def root(driver: str = "auto", *, writable: bool = False, **more: object) -> Root:
    return Root(image="made", driver=driver, writable=writable, proc="masked", **more)  # type: ignore[arg-type]


@DRIVERS
@EITHER
async def test_layers_lie_on_one_another(driver: str, writable: bool, place: Store) -> None:
    script = "ls /data /data/deep; cat /data/kept /data/changed; echo /data/*; test ! -e /data/gone"
    result = await run(policy(root(driver, writable=writable)), "sh", "-ec", script)
    wanted = "/data:\nchanged\ndeep\nkept\n\n/data/deep:\nnew\nkept\nafter\n"
    assert result.stdout.decode() == wanted + "/data/changed /data/deep /data/kept\n", result
    assert result.ok, result
    assert result.enforcement["root"] == f"overlay:{driver}"


@DRIVERS
async def test_a_read_only_root_is_one(driver: str, place: Store) -> None:
    script = """
        for there in / /usr /data /etc /dev /data/deep; do
            touch $there/x 2>/dev/null && echo "made $there/x"
        done
        touch /tmp/x /box/x /dev/shm/x && echo fine
        ls /etc
        """
    caller = Identity(user="caller", uid=1000)
    result = await run(policy(root(driver, config=()), caller), "sh", "-c", script)
    assert result.stdout == b"fine\nhostname\nhosts\npasswd\nresolv.conf\n", result


@DRIVERS
async def test_a_writable_root_is_private_and_complete(driver: str, place: Store) -> None:
    script = """
        echo mine > /data/changed; rm -r /data/deep; mkdir /data/deep; ls -A /data/deep
        mv /data/kept /data/moved; ln /data/moved /data/hard; stat -c %h /data/moved
        rm -r /srv; cat /data/changed
        """
    caller = Identity(user="caller", uid=0)
    for _ in range(2):
        chosen = policy(root(driver, writable=True, config=()), caller)
        result = await run(chosen, "/bin/sh", "-ec", script)
        assert result.stdout == b"2\nmine\n", result
    with open_unpacker(ids()) as unpacker:
        for layer in place.layers():
            opened = os.open(layer / "root", os.O_PATH)
            tree = unpacker.digest(opened)
            os.close(opened)
            found = place.layer(layer.name.partition(".")[0], stores.ids_tag(ids()))
            assert found is not None
            assert found[1].tree == tree


@pytest.mark.needs("overlay")
async def test_the_configuration_counts(place: Store) -> None:
    result = await run(
        policy(root()), "sh", "-c", "echo $PATH $COLOUR; stat -c %n .; id -u; echo $PWD"
    )
    assert result.stdout == b"/usr/bin green\n.\n1000\n/srv\n", result


@pytest.mark.needs("overlay")
async def test_the_configuration_counts_as_far_as_the_policy_wants(place: Store) -> None:
    chosen = policy(root(config=()), Identity(uid=7))
    script = "echo ${COLOUR-none} $PWD; id -u"
    result = await run(chosen, "sh", "-c", script)
    assert result.stdout == b"none /box\n7\n", result
    async with open_runner(slots=1) as runner:
        env = {"COLOUR": "red"}
        job = Job(argv=["sh", "-c", script], policy=policy(root()), env=env, cwd="/data")
        result = await runner.run(job)
    assert result.stdout == b"red /data\n1000\n", result


@pytest.mark.needs("overlay")
async def test_a_read_only_image_is_put_together_once(place: Store) -> None:
    """The overlay is the template's: no sandbox mounts one."""
    host = host_for(policy(root()), variants.as_found())
    compiled = compile_policy(policy(root()), host)
    assert [step.stage for step in compiled.tenant.steps].count("overlay") == 1
    assert "overlay" not in [step.stage for step in compiled.setup.steps]
    plain = variants.policy(root=Root(proc="masked"), identity=Identity(uid=1000, gid=1000))
    shown = compile_policy(plain, variants.as_found())
    assert len(compiled.setup.steps) == len(shown.setup.steps)


@DRIVERS
@EITHER
async def test_a_hundred_layers(driver: str, writable: bool, place: Store, tmp_path: Path) -> None:
    layers = [tarball(making.system(tmp_path / "again"))]
    layers += [folder(b"n") + file(b"n/%d" % one) + file(b"top", b"%d\n" % one) + END
               for one in range(99)]  # fmt: skip
    top = oci_layout(tmp_path / "hundred", layers, {"Env": ["PATH=/usr/bin"]})
    import_image(place, str(top), "hundred", ids(), dataclasses.replace(SMALL, entries=9999))
    chosen = policy(Root(image="hundred", driver=driver, writable=writable, proc="masked"))  # type: ignore[arg-type]
    result = await run(chosen, "sh", "-c", "cat /top; set -- /n/*; echo $#")
    assert result.stdout == b"98\n99\n", result


@pytest.mark.needs("overlay")
@pytest.mark.parametrize("less", ["machine", "cgroup", "landlock"])
async def test_on_lesser_hosts(less: str, place: Store) -> None:
    host = variants.without(less)
    result = await run(policy(root()), "cat", "/data/changed", host=host)
    assert result.stdout == b"after\n", result


@pytest.mark.needs("overlay")
async def test_files_in_and_out(place: Store) -> None:
    async with open_runner(slots=1) as runner:
        job = Job(argv=["sh", "-c", "cat /box/in > /box/out"], policy=policy(root()),
                  files={"in": b"carried\n"}, collect=["out"])  # fmt: skip
        result = await runner.run(job)
    assert [one.data for one in result.artifacts] == [b"carried\n"]


@pytest.mark.needs("overlay")
async def test_mounts_over_an_image(place: Store, tmp_path: Path) -> None:
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown/file").write_text("shown\n")
    mounts = (
        Mount(source=str(tmp_path / "shown"), target="/not/there/yet"),
        Mount(source=str(tmp_path / "shown"), target="/box/in"),
        Mount(target="/scratch", type="tmpfs"),
    )
    script = "cat /not/there/yet/file /box/in/file; touch /scratch/x; ls /scratch"
    result = await run(policy(root(), mounts=mounts), "sh", "-ec", script)
    assert result.stdout == b"shown\nshown\nx\n", result
    result = await run(policy(root(), mounts=mounts[1:2]), "cat", "/box/in/file")
    assert result.stdout == b"shown\n", result


@DRIVERS
@EITHER
async def test_links_in_the_place_of_directories_lead_nowhere(
    driver: str, writable: bool, place: Store, tmp_path: Path
) -> None:
    """Where something is to be mounted or written the image has links to the host."""
    outside = tmp_path / "outside"
    outside.mkdir()
    target = str(outside).encode()
    evil = b"".join(
        link(name, target) for name in (b"etc", b"dev", b"proc", b"tmp", b"box", b"run", b"var")
    )
    layers = [tarball(making.system(tmp_path / "again")), link(b"etc", target) + evil + END]
    top = oci_layout(tmp_path / "evil", layers, {"Env": ["PATH=/usr/bin"]})
    import_image(place, str(top), "evil", ids(), dataclasses.replace(SMALL, entries=9999))
    chosen = policy(Root(image="evil", driver=driver, writable=writable, proc="masked"))  # type: ignore[arg-type]
    with suppress(LaunchError):  # a refusal is as good as a harmless start
        result = await run(chosen, "sh", "-c", "echo fine; touch /tmp/x /box/x /etc/x")
        assert result.stdout == b"fine\n", result
    assert os.listdir(outside) == []


async def test_without_an_overlay_an_image_of_layers_is_refused(place: Store) -> None:
    with pytest.raises(HostError, match="its layers need an overlay"):
        await run(policy(root("tmpfs")), "true")


async def test_without_an_overlay_one_layer_is_bound(place: Store, tmp_path: Path) -> None:
    top = making.system(tmp_path / "flat")
    for name in ("dev/shm", "proc", "tmp", "box"):
        (top / name).mkdir(parents=True)
    data = tarball(top)
    making.take(place, data, dataclasses.replace(SMALL, entries=9999), name="flat")
    chosen = policy(Root(image="flat", driver="tmpfs", proc="masked"))
    result = await run(chosen, "/bin/sh", "-c", "ls /srv; echo fine; touch /srv/x || echo refused")
    assert result.stdout == b"fine\nrefused\n", result


async def test_an_image_that_is_not_there(place: Store) -> None:
    with pytest.raises(ImageError, match=r"no image 'none'.*there are: made"):
        await run(policy(Root(image="none")), "true")


@pytest.mark.needs("overlay", "subuid")
async def test_what_is_not_as_meant_is_said(place: Store, tmp_path: Path) -> None:
    host = variants.without("subuid")
    result = await run(policy(root()), "true", host=host)
    assert result.ok, result
    said = [one.why for one in result.degraded if one.what == "image"]
    assert any("unpacked for other ids" in one for one in said), result.degraded


@pytest.mark.needs("overlay")
async def test_layers_in_use_are_not_removed(place: Store) -> None:
    async with open_runner(slots=1) as runner:
        job = Job(argv=["cat", "/data/kept"], policy=policy(root()))
        assert (await runner.run(job)).ok
        with open_unpacker(ids()) as unpacker, place.removing(unpacker):
            place.forget(place.images()[0])
            gone, used = place.collect(unpacker)
        assert (len(gone), len(used)) == (0, 3)
        assert (await runner.run(job)).stdout == b"kept\n"
    with open_unpacker(ids()) as unpacker, place.removing(unpacker):
        gone, used = place.collect(unpacker)
    assert (len(gone), len(used)) == (3, 0)


@pytest.mark.needs("overlay", "subuid")
async def test_no_run_owns_by_chance_what_another_does_not(place: Store, tmp_path: Path) -> None:
    secret = file(b"secret", mode=b"0000400\0", uid=b"0001755\0")  # uid 1005
    layers = [tarball(making.system(tmp_path / "again")), secret + END]
    top = oci_layout(tmp_path / "owned", layers, {"Env": ["PATH=/usr/bin"]})
    import_image(place, str(top), "owned", ids(), dataclasses.replace(SMALL, entries=9999))
    async with open_runner(slots=1) as runner:
        job = Job(argv=["cat", "/secret"], policy=policy(Root(image="owned")))
        for _ in range(10):
            assert not (await runner.run(job)).ok
