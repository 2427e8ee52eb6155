"""What cannot be a job is told with its place, when it is made."""

from __future__ import annotations

from typing import Any

import pytest

from sandboxd import Job
from sandboxd.errors import JobError


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"argv": "ls"}, "argv is one string"),
        ({"argv": []}, "argv is empty"),
        ({"argv": ["a", 1]}, r"argv\[1\] is int"),
        ({"argv": ["a", "b\0"]}, r"argv\[1\] contains a NUL byte"),
        ({"argv": ["a"], "env": {"A": None}}, r"env\['A'\] is NoneType"),
        ({"argv": ["a"], "env": {1: "b"}}, "a name in env or files, 1 is int"),
        ({"argv": ["a"], "env": {"A=B": "c"}}, "cannot be set"),
        ({"argv": ["a"], "files": {2.5: b""}}, "a name in env or files, 2.5 is float"),
        ({"argv": ["a"], "files": {"x": "text"}}, r"files\['x'\] is str"),
        ({"argv": ["a"], "stdin": "text"}, "stdin is str"),
        ({"argv": ["a"], "policy": 3}, "policy is int"),
        ({"argv": ["a"], "cwd": "\0"}, "cwd contains a NUL byte"),
    ],
)
def test_the_place_is_told(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        Job(**fields)


def test_text_is_str_bytes_or_a_path() -> None:
    Job(argv=["a", b"b"], env={"A": b"c"}, files={b"d": b""})
