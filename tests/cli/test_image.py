"""`sandboxd image` and `run --image`: what they print, and how they end."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.images.importing import import_image
from sandboxd.images.store import Store
from tests.images import making
from tests.images.making import END, SMALL, docker_archive, file, header, oci_layout, take, tarball

pytestmark = pytest.mark.needs("userns")

CONFIG: dict[str, object] = {
    "Env": ["PATH=/usr/bin"], "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo from the image"],
    "User": "1000",
}  # fmt: skip
LARGE = dataclasses.replace(SMALL, entries=9999)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("SANDBOXD_IMAGES", str(tmp_path / "store"))
    with making.store(tmp_path / "store") as found:
        yield found


def sandboxd(*words: str, stdin: bytes = b"") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sandboxd", *words], input=stdin, capture_output=True,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_life_of_an_image(place: Store) -> None:
    data = docker_archive([file(b"a") + header(b"dev", b"3") + END], "fruit:1", {"Cmd": ["x"]})
    status, out, err = sandboxd("image", "import", "-", stdin=data)
    assert (status, out.split()[0]) == (0, "fruit:1")
    assert "1 layer (1 new)" in out
    assert err == "sandboxd: 1 device nodes were left out\n"

    status, out, _ = sandboxd("image", "ls")
    assert status == 0
    assert out.split()[0] == "fruit:1"
    status, out, _ = sandboxd("image", "ls", "--json")
    (found,) = json.loads(out)["images"]
    status, out, _ = sandboxd("image", "inspect", found["id"][7:20])
    assert json.loads(out) == found
    assert found["layers"][0]["devices"] == 1
    assert (Path(found["layers"][0]["path"]) / "a").read_text() == "data\n"

    assert sandboxd("image", "verify")[:2] == (
        0, f"fruit:1  {found['layers'][0]['diff_id'][7:19]}  ok\n",
    )  # fmt: skip
    (Path(found["layers"][0]["path"]) / "a").write_text("DATA\n")
    status, out, _ = sandboxd("image", "verify", "fruit:1")
    assert status == 1
    assert "it is not what was unpacked" in out

    assert sandboxd("image", "rm", "fruit:1") == (0, "1 layer removed\n", "")
    assert sandboxd("image", "ls") == (0, "", "")
    assert os.listdir(place.place / "layers") == []


def test_layers_are_shared_and_outlive_one_of_their_images(place: Store) -> None:
    data = file(b"a") + END
    take(place, data, name="one")
    take(place, data, name="two")
    assert sandboxd("image", "rm", "one")[1] == "0 layers removed\n"
    assert sandboxd("image", "gc")[1] == "0 layers removed\n"
    assert sandboxd("image", "rm", "two")[1] == "1 layer removed\n"


@pytest.mark.usefixtures("place")
def test_a_file_that_is_no_archive_is_named() -> None:
    status, _, err = sandboxd("image", "import", "/etc/passwd", "--name", "x")
    assert (status, err.partition(" checksum")[0]) == (
        1,
        "sandboxd: /etc/passwd: a header with a wrong",
    )


def test_errors_have_a_way_out(place: Store) -> None:
    assert sandboxd("image", "inspect", "none")[0] == 1
    assert sandboxd("image", "rm", "none")[0] == 1
    assert sandboxd("image", "import", "/nonexistent")[0] == 1
    status, _, err = sandboxd("image", "import", "-", stdin=file(b"x") + END)
    assert status == 1
    assert "--name NAME" in err
    status, _, err = sandboxd("image", "import", "-", "--name", "x", stdin=file(b"../x") + END)
    assert (status, err) == (1, "sandboxd: stdin: ../x: a name with .. in it\n")
    words = ["image", "import", "-", "--name", "x", "--max-size", "1K"]
    status, _, err = sandboxd(*words, stdin=file(b"x", b"x" * 2000) + END)
    assert (status, err) == (1, "sandboxd: more than 1024 bytes when unpacked\n")
    status, _, err = sandboxd("run", "--image", "none", "--", "true")
    assert status == 125
    assert "no image 'none'" in err


def test_run_takes_what_is_not_said_from_the_image(tmp_path: Path, place: Store) -> None:
    top = oci_layout(tmp_path / "layout", [tarball(making.system(tmp_path / "system"))], CONFIG)
    import_image(place, str(top), "made", making.ids(), LARGE)
    run = ("run", "-q", "--image", "made")
    assert sandboxd(*run)[1] == "from the image\n"
    assert sandboxd(*run, "--", "echo $0; id -u")[1] == "/bin/sh\n1000\n"
    assert sandboxd(*run, "-u", "77:78", "--", "id -u; id -g")[1] == "77\n78\n"
    assert sandboxd(*run, "-u", "app", "--entrypoint", "", "--", "id", "-u")[1] == "1000\n"
    assert sandboxd(*run, "--entrypoint", "/bin/cat", "--", "/etc/hostname")[1] == "sandbox\n"
    status, out, _ = sandboxd("plan", "--image", "made")
    assert status == 0
    assert "echo from the image" in out
    file_ = tmp_path / "mine.toml"
    file_.write_text('extends = "base"\n[root]\nimage = "made"\nconfig = ["!reset", "env"]\n')
    assert sandboxd("run", "-q", "-p", str(file_))[1] == "from the image\n"
    assert sandboxd("run", "-q", "-p", str(file_), "--root", "host", "--", "true")[0] == 0
    status, _, err = sandboxd(*run, "-u", "nobody-there")
    assert status == 125
    assert "app" in err
