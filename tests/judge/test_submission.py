"""Reading a stranger's files: nothing outside is followed, nothing is read beyond the limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandboxd.judge.submission import SourceError, check_names, load


def test_a_file(tmp_path: Path) -> None:
    source = tmp_path / "a b.py"
    source.write_bytes(b"\xff\0")
    assert load(source, 2).files == {"a b.py": b"\xff\0"}
    assert load(source, 2, "python3").language == "python3"


def test_a_link_to_the_submission_itself_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "link.py").symlink_to("a.py")
    assert load(tmp_path / "link.py", 9).files == {"link.py": b"1"}


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "b.c").write_text("b")
    (tmp_path / "sub" / "deep" / "a.h").write_text("a")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / os.fsdecode(b"\xff.c")).write_text("?")
    found = load(tmp_path, 100)
    assert found.name == tmp_path.name
    assert found.files == {"b.c": b"b", "sub/deep/a.h": b"a", "\udcff.c": b"?"}
    assert found.size == 3


@pytest.mark.parametrize("size", [5, 5_000_000])
def test_the_limit_covers_all_files_together(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.c").write_bytes(bytes(size - 1))
    (tmp_path / "b.c").write_bytes(b"1")
    assert load(tmp_path, size).size == size
    with pytest.raises(SourceError, match=f"larger than {size - 1} bytes"):
        load(tmp_path, size - 1)


def test_a_sparse_terabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.c").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SourceError, match="larger than 100 bytes"):
        load(tmp_path, 100)


def make_link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def make_folder_link(path: Path) -> None:
    path.symlink_to("/etc")


@pytest.mark.parametrize("make", [make_link, make_folder_link, os.mkfifo])
def test_what_is_no_file_is_refused(tmp_path: Path, make: object) -> None:
    assert callable(make)
    (tmp_path / "a.c").write_text("int main(void) { return 0; }")
    make(tmp_path / "b.c")
    with pytest.raises(SourceError, match=r"b\.c: only ordinary files and directories"):
        load(tmp_path, 1000)


def test_a_pipe_as_the_submission_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.c")
    with pytest.raises(SourceError, match="not an ordinary file"):
        load(tmp_path / "a.c", 1000)


def test_too_deep(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["d"] * 40)
    folder.mkdir(parents=True)
    with pytest.raises(SourceError, match="nested more than 16 deep"):
        load(tmp_path, 1000)


def test_too_many(tmp_path: Path) -> None:
    for number in range(1001):
        (tmp_path / f"{number}.c").touch()
    with pytest.raises(SourceError, match="more than 1000 files"):
        load(tmp_path, 1000)


def test_a_missing_one_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.c", 1000)


@pytest.mark.parametrize(
    "name", ["a.c", "-o.c", "sub/a b.c", "\udcff.c", "é.c", "a..c/x", "a" * 255]
)
def test_names_that_may_be(name: str) -> None:
    check_names({name: b""})


@pytest.mark.parametrize(
    "names",
    [
        [""],
        ["/etc/passwd"],
        ["../a.c"],
        ["a/../b.c"],
        ["./a.c"],
        ["a//b.c"],
        ["a/"],
        ["a\0.c"],
        ["\ud800.c"],
        ["a" * 1025],
        ["a", "a/b"],
        ["a/b", "a"],
        [f"{number:0250}.c" for number in range(300)],
        [f"{number}.c" for number in range(1001)],
    ],
)
def test_names_that_no_directory_holds(names: list[str]) -> None:
    with pytest.raises(SourceError) as raised:
        check_names(dict.fromkeys(names, b""))
    assert len(str(raised.value)) < 500
