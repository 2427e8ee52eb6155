"""Which ids are taken, from files of every kind."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from sandboxd.host import IdRange
from sandboxd.probe import idrange

pytestmark = pytest.mark.root_ok


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{name}:100000:65536\n", IdRange(start=100000, count=65536)),
        ("{uid}:100000:65536\n", IdRange(start=100000, count=65536)),
        ("other:1:65536\n{name}:200000:4096\n", IdRange(start=200000, count=4096)),
        ("{name}:1:10\n{name}:300000:65536\n", IdRange(start=300000, count=65536)),
        ("#{name}:1:65536\n\n::\n{name}:x:y\n{name}:5:70000\n", IdRange(start=5, count=70000)),
        ("{name}:" + "9" * 5000 + ":65536\n{name}:7:65536", IdRange(start=7, count=65536)),
        ("", "has no line for {name}"),
        ("{name}x:1:65536\n", "has no line for {name}"),
        ("{name}:1:10\n{name}:20:4095\n", "gives {name} 4095 ids; 4096 are needed"),
    ],
)
def test_subordinate_ids(text: str, expected: IdRange | str, tmp_path: Path) -> None:
    words = {"name": pwd.getpwuid(os.getuid()).pw_name, "uid": str(os.getuid())}
    (tmp_path / "subuid").write_text(text.format(**words))
    found = idrange.subordinate("subuid", os.getuid(), tmp_path)
    if isinstance(expected, str):
        assert found == f"{tmp_path}/subuid {expected.format(**words)}"
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("maps", "passwd", "subuid", "expected"),
    [
        ("0 0 4294967295", "", "", (524288, 65536)),
        ("0 0 4294967295", "", "a:500000:100000", (655360, 65536)),
        ("0 0 4294967295", "a:x:589823:1::/:/bin/sh", "", (589824, 65536)),
        ("0 0 600000", "", "", (524288, 65536)),
        ("0 100000 65536", "", "", (32768, 16384)),
        ("0 100000 65536", "a:x:40000:1::/:/bin/sh", "", (20480, 16384)),
        ("0 100000 30000", "", "", (12288, 16384)),
        ("0 1000 1", "", "", None),
        ("0 1000 1\n1 100000 65536", "", "", (32768, 16384)),
        ("", "", "", None),
    ],
)
def test_free_ids(
    maps: str, passwd: str, subuid: str, expected: tuple[int, int] | None, tmp_path: Path
) -> None:
    for name, text in (
        ("uid_map", maps),
        ("gid_map", maps),
        ("passwd", passwd),
        ("subuid", subuid),
    ):
        (tmp_path / name).write_text(text + "\n")
    found = idrange.free(tmp_path, tmp_path)
    assert found == (IdRange(start=expected[0], count=expected[1]) if expected else None)
