"""The JSON Schema of policy files, for editors: `#:schema ./schema.json` in a file's first line.

Derived from the types of policy.py, as the reader of policy files is (reading.py), so that the two
accept the same. A schema knows nothing of what a file extends; `sandboxd policy check` does.
"""

from __future__ import annotations

import ast
from typing import Any

import msgspec

from sandboxd import units
from sandboxd.compile.reading import NOTHING, RESET, unit
from sandboxd.policy import Policy

_PATTERNS = {"bytes": f"^{units.SIZE_PATTERN}$", "seconds": f"^{units.TIME_PATTERN}$"}
_NULL = {"type": "null"}
_EXAMPLES = {"bytes": ["256M", "1.5G"], "seconds": ["1.5s", "500ms", "2min"]}


def schema(source: str = "") -> dict[str, Any]:
    """The schema; with the source text of policy.py also what its keys mean, as written there."""
    _, components = msgspec.json.schema_components([Policy], ref_template="#/$defs/{name}")
    texts = docstrings(source)
    definitions = {
        name: _definition(components[name], name, kind, texts)
        for name, kind in sorted(_structs(Policy).items())
    }
    policy = definitions.pop("Policy")
    extends = {
        "type": "string",
        "minLength": 1,
        "description": "The policy that this one changes: a name, or a path relative to this file.",
    }
    keys = {key: one for key, one in policy["properties"].items() if key not in ("name", "origins")}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "a policy of sandboxd",
        "type": "object",
        "properties": {"extends": extends, **keys},
        "additionalProperties": False,
        "$defs": definitions,
    }


def _definition(
    was: dict[str, Any], name: str, kind: type[msgspec.Struct], texts: dict[str, str]
) -> dict[str, Any]:
    found = {
        "type": "object",
        "description": texts.get(name, ""),
        "properties": {
            one.name: _key(was["properties"][one.name], name, one, texts)
            for one in msgspec.structs.fields(kind)
        },
        "required": was["required"],
        "additionalProperties": False,
    }
    return {key: value for key, value in found.items() if value not in ("", [])}


def docstrings(source: str) -> dict[str, str]:
    """`Limits.memory` -> the string below it; `Limits` -> that of the class."""
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        found[node.name] = " ".join((ast.get_docstring(node) or "").split())
        for key, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr):
                value = ast.literal_eval(text.value)
                found[f"{node.name}.{ast.unparse(key.target)}"] = " ".join(str(value).split())
    return found


def _structs(kind: Any) -> dict[str, type[msgspec.Struct]]:
    """Every struct that a type is made of, by name."""
    found: dict[str, type[msgspec.Struct]] = {}
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        found[kind.__name__] = kind
        for one in msgspec.structs.fields(kind):
            found |= _structs(one.type)
    for one in getattr(kind, "__args__", ()):
        found |= _structs(one)
    return found


def _key(was: dict[str, Any], struct: str, one: Any, texts: dict[str, str]) -> dict[str, Any]:
    """The schema of one key, with units, with a word for None, and with "!reset" in lists."""
    if "$ref" in was:
        return {"$ref": was["$ref"]}
    found = {key: value for key, value in was.items() if key not in ("anyOf", "default")}
    choices = [choice for choice in was.get("anyOf", [found]) if choice != _NULL]
    what = unit(one.type)
    if what:
        choices.append({"type": "string", "pattern": _PATTERNS[what]})
    if len(choices) < len(was.get("anyOf", [])) + bool(what) and struct.lower() in NOTHING:
        choices.append({"const": NOTHING[struct.lower()]})
    found = choices[0] if len(choices) == 1 else {"anyOf": choices}
    if was.get("default") is not None:
        found["default"] = was["default"]
    if what:
        found["examples"] = _EXAMPLES[what]
    if struct == "Policy" and one.name in ("mounts", "allow_sources"):
        found["items"] = {"anyOf": [found["items"], {"const": RESET}]}
    if text := texts.get(f"{struct}.{one.name}"):
        found["description"] = text
    return found
