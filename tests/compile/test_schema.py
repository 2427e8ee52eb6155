"""policies/schema.json is what policy.py says, and accepts what the reader of policies accepts."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sandboxd import policy as module
from sandboxd.cli.policy import schema_text
from sandboxd.compile.schema import docstrings, schema
from sandboxd.policy import Policy

POLICIES = Path(__file__).resolve().parent.parent.parent / "policies"
FILE = POLICIES / "schema.json"
SCHEMA = schema()

SAYS = {
    # a value for limits.memory, and whether it will do
    "1": True, '"256M"': True, '"1.5GiB"': True, '"unlimited"': True, '"own"': False, "0": False,
    "1.5": False, '"256X"': False, "true": False, "[]": False, '" 1"': False,
}  # fmt: skip


def admits(value: object, node: dict[str, Any]) -> bool:
    """The part of JSON Schema that ours is made of."""
    if "$ref" in node:
        return admits(value, SCHEMA["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        return any(admits(value, one) for one in node["anyOf"])
    if "const" in node or "enum" in node:
        return value in node.get("enum", [node.get("const")])
    kinds: dict[str, Any] = {
        "string": str, "boolean": bool, "array": list, "object": dict,
        "integer": int, "number": int | float,
    }  # fmt: skip
    is_number = node["type"] in ("integer", "number")
    if not isinstance(value, kinds[node["type"]]) or (is_number and isinstance(value, bool)):
        return False
    if isinstance(value, str):
        return re.search(node.get("pattern", ""), value) is not None
    if isinstance(value, list):
        return all(admits(one, node["items"]) for one in value)
    if isinstance(value, dict):
        return admits_table(value, node)
    least, over, most = (node.get(one) for one in ("minimum", "exclusiveMinimum", "maximum"))
    assert isinstance(value, int | float)
    return not (
        (least is not None and value < least)
        or (over is not None and value <= over)
        or (most is not None and value > most)
    )


def admits_table(value: dict[str, Any], node: dict[str, Any]) -> bool:
    known, others = node.get("properties", {}), node.get("additionalProperties", True)
    return set(node.get("required", ())) <= set(value) and all(
        admits(one, known[key])
        if key in known
        else isinstance(others, dict) and admits(one, others)
        for key, one in value.items()
    )


def test_the_file_is_up_to_date() -> None:
    if os.environ.get("UPDATE"):
        FILE.write_text(schema_text())
    assert FILE.read_text() == schema_text(), (
        "run: ./do sandboxd policy schema > policies/schema.json"
    )


def test_every_policy_fits_and_names_it() -> None:
    for path in sorted(POLICIES.glob("*.toml")):
        text = path.read_text()
        assert text.startswith("#:schema ./schema.json\n"), path.name
        assert admits(tomllib.loads(text), SCHEMA), path.name


@pytest.mark.parametrize("value", SAYS)
def test_units_and_words(value: str) -> None:
    assert admits(tomllib.loads(f"limits.memory = {value}"), SCHEMA) is SAYS[value]


WRONG = [
    "nothing = 1", "limits.memori = 1", 'root.proc = "all"', "[[mounts]]", "name = 'x'",
    'mounts = ["reset"]', "environment.set.A = 1", 'syscalls.rules = [{calls = "read"}]',
]  # fmt: skip
RIGHT = [
    "", 'extends = "base"', 'mounts = ["!reset", {target = "/a", source = "/a"}]',
    'syscalls.allow = ["!reset", "@base"]', 'identity.uid = "own"', "identity.uid = 0",
    'environment.set.A = "1"', 'limits.cpu_time = "500ms"', "limits.cpu_time = 0.5",
    'syscalls.rules = ["@guards", {calls = ["read"], args = [{index = 0, op = "eq", value = 1}]}]',
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_does_not_fit(text: str) -> None:
    assert not admits(tomllib.loads(text), SCHEMA)


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_right_fits(text: str) -> None:
    assert admits(tomllib.loads(text), SCHEMA)


def test_every_key_is_there() -> None:
    for one in msgspec.structs.fields(Policy):
        if one.name in ("name", "origins"):
            assert one.name not in SCHEMA["properties"]
        elif isinstance(one.type, type) and issubclass(one.type, msgspec.Struct):
            keys = SCHEMA["$defs"][one.type.__name__]["properties"]
            assert list(keys) == list(one.type.__struct_fields__)


def test_docstrings_of_keys_are_found() -> None:
    assert module.__file__ is not None
    found = docstrings(Path(module.__file__).read_text())
    assert found["Limits.cpu_time"] == "CPU seconds of the whole process tree."
    assert found["Root"].startswith("[root]")
    texts = json.loads(schema_text())["$defs"]["Limits"]["properties"]["cpu_time"]
    assert texts["description"] == found["Limits.cpu_time"]
