"""The line of every key, in all the ways that TOML has of writing one."""

from __future__ import annotations

import tomllib

import pytest

from sandboxd.compile.places import key_lines

TEXT = '''\
# a = 1
one = 1
two.three = """
four = 4
[five]
\\""" six = 6 """"
"quoted key" = 1 # [seven]

[table]  # a comment
list = [
    # eight = 8
    {nine = 1},
    "]", ']',
]
  indented   =   1
'dotted . not' = 1
[table . "inner one"]
key = \'\'\'
[ten]
\'\'\'
[[rows]]
a = 1
[[rows]]
[rows.sub]
b = 2
[[rows.many]]
[[rows.many]]
c = "#"
inline = { x = [
  1 ], y = 2 }
last = 1
'''
LINES = {
    "one": 2, "two.three": 3, "quoted key": 7, "table": 9, "table.list": 10, "table.indented": 15,
    "table.dotted . not": 16, "table.inner one": 17, "table.inner one.key": 18, "rows[0]": 21,
    "rows[0].a": 22, "rows[1]": 23, "rows[1].sub": 24, "rows[1].sub.b": 25, "rows[1].many[0]": 26,
    "rows[1].many[1]": 27, "rows[1].many[1].c": 28, "rows[1].many[1].inline": 29,
    "rows[1].many[1].last": 31,
}  # fmt: skip


def test_every_key_has_its_line() -> None:
    tomllib.loads(TEXT)
    assert key_lines(TEXT) == LINES


def test_windows_has_the_same_lines() -> None:
    assert key_lines(TEXT.replace("\n", "\r\n")) == LINES


@pytest.mark.parametrize("text", ["", "\n", "#", "a=1", '"""', "[[[[", "]]]]\na = 1", "'"])
def test_any_text_will_do(text: str) -> None:
    key_lines(text)
