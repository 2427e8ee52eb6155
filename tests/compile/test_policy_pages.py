"""docs/reference/policy.md has every key with its type and default; the how-to's examples load."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from sandboxd.compile.explain import written
from sandboxd.compile.load import load
from sandboxd.compile.reading import unit
from sandboxd.policy import Argument, Io, Mount, Policy, Rule
from sandboxd.supervise import policies

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
REFERENCE = (DOCS / "reference" / "policy.md").read_text()
HOWTO = (DOCS / "howto" / "write-a-policy.md").read_text()
PARTS = {
    part.split("\n")[0]: part for part in re.split(r"^##+ ", REFERENCE, flags=re.MULTILINE)[1:]
}
STRUCTS = {
    "[[mounts]]": Mount,
    "[[resources.io]]": Io,
    "[[syscalls.rules]]": Rule,
    "[[syscalls.rules.args]]": Argument,
    **{
        f"[{one.name}]": getattr(Policy(), one.name)
        for one in msgspec.structs.fields(Policy)
        if isinstance(one.type, type) and issubclass(one.type, msgspec.Struct)
    },
}  # fmt: skip
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", HOWTO, flags=re.MULTILINE | re.DOTALL)


def rows(part: str) -> dict[str, tuple[str, str, str]]:
    """Key -> type, default and meaning, of the first table of a part."""
    lines = [line for line in PARTS[part].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {key.strip(" `"): (kind, default, meaning) for key, kind, default, meaning in cells}


def named(kind: Any) -> str:
    """A type, as the reference calls it."""
    if what := {"bytes": "size", "seconds": "time"}.get(unit(kind)):
        return what
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        return " and ".join(sorted({named(one) for one in args if one is not type(None)}))
    if origin is Literal:
        *most, last = [f"`{written('', one)}`" for one in args]
        return f"{', '.join(most)} or {last}" if most else last
    if origin is tuple:
        plural = {"table": "tables", "table and text": "text and tables"}
        inner = named(args[0])
        return f"list of {plural.get(inner, inner)}"
    if origin is dict:
        return "table of text"
    if origin is typing.Annotated:
        metas = kind.__metadata__
        if any(meta.pattern == "^/" for meta in metas):
            return "path"
        return (
            "count"
            if any((meta.ge, meta.le) == (1, (1 << 31) - 1) for meta in metas)
            else named(args[0])
        )
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return "table"
    return {int: "number", float: "number", bool: "boolean", str: "text"}[kind]


@pytest.mark.parametrize("part", STRUCTS)
def test_every_key_is_there_with_type_and_default(part: str) -> None:
    struct, found = STRUCTS[part], rows(part)
    fields = {one.name: one for one in msgspec.structs.fields(struct)}
    assert list(found) == list(fields)
    for name, one in fields.items():
        kind, default, meaning = found[name]
        assert kind == named(one.type), name
        assert meaning, name
        if isinstance(struct, msgspec.Struct):
            assert default == f"`{written(f'{part[1:-1]}.{name}', getattr(struct, name))}`", name
        elif one.required or one.default is None:
            assert default == "", name
        else:
            assert default == f"`{written('', one.default)}`", name


def test_there_are_no_other_parts() -> None:
    assert {part for part in PARTS if part.startswith("[")} == set(STRUCTS)
    assert list(rows("Top level")) == ["extends", "description", "allow_sources"]


def test_the_packaged_policies_are_listed() -> None:
    listed = re.findall(r"^\| `([\w-]+)`", PARTS["Where policies are looked for"], re.MULTILINE)
    assert sorted(listed) == sorted(one.stem for one in policies.packaged().glob("*.toml"))


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_load(text: str) -> None:
    def read(name: str) -> tuple[str, str]:
        if name == "example":
            return "example.toml", text
        return f"{name}.toml", (policies.packaged() / f"{name}.toml").read_text()

    assert load("example", read).name == "example"
