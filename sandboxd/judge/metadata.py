"""The YAML files of a problem package: read without YAML's surprises, held against a class.

Whatever bytes a file holds, it is converted or ProblemError says what is wrong with which key.

Every scalar is read as text and made a number or a boolean only where the class wants one: no
octal, no sexagesimal, no date and no "no" that became false. Aliases (which let a small file stand
for a huge one) and keys given twice are refused.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar, get_args

import msgspec
import yaml

from sandboxd.errors import SandboxError

T = TypeVar("T", bound=msgspec.Struct)

LARGEST = 1 << 18
_NULL = ("", "~", "null", "Null", "NULL")


class ProblemError(SandboxError):
    """A problem package is wrong, or asks for what is not supported. `where` names file and key."""

    def __init__(self, where: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{where}: {message}", hint=hint)
        self.where = where


def read(name: str, data: bytes, into: type[T]) -> T:
    """The file `name` of a package as `into`; keys without a value are as if not there."""
    if len(data) > LARGEST:
        raise ProblemError(name, f"larger than {LARGEST} bytes")
    try:
        node = yaml.compose(data, Loader=yaml.BaseLoader)
        value = _plain(node, set()) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ProblemError(name, f"not YAML: {error.problem or 'cannot be read'}{line}") from None
    except (yaml.YAMLError, UnicodeError, ValueError):
        raise ProblemError(name, "not YAML in UTF-8") from None
    except RecursionError:
        raise ProblemError(name, "nested too deeply") from None
    if value is None:
        value = {}
    try:
        return msgspec.convert(value, into, strict=False)
    except msgspec.ValidationError as error:
        raise _explain(name, str(error), into) from None


def _explain(name: str, message: str, into: type[msgspec.Struct]) -> ProblemError:
    """msgspec's message as one that names the key as people write it."""
    message, _, path = message.partition(" - at ")
    key = re.sub(r"^\$\.?|\[\.\.\.\]", "", path.strip("`").replace("key in ", ""))
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", message, re.DOTALL)
    if unknown:
        near = difflib.get_close_matches(unknown[1], _keys(into, key), 1)
        hint = f"did you mean {near[0]}?" if near else ""
        full = f"{key}.{unknown[1]}" if key else unknown[1]
        return ProblemError(f"{name}: {full[:200]}", "there is no such key", hint=hint)
    where = f"{name}: {key}" if key else name
    if message.startswith("Expected `object`"):
        message = "not a map of keys and values"
    return ProblemError(where, message[:1].lower() + message[1:])


def _keys(into: type[msgspec.Struct], key: str) -> list[str]:
    """The keys of the table at the dotted `key` of `into`."""
    kind: Any = into
    for part in filter(None, key.split(".")):
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        options = (fields.get(part), *get_args(fields.get(part)))
        kind = next((t for t in options if _is_struct(t)), None)
        if kind is None:
            return []
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def _is_struct(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _plain(node: yaml.Node, seen: set[int]) -> Any:
    """Maps, lists and text; keys without a value are left out."""
    if id(node) in seen:
        raise yaml.MarkedYAMLError(
            problem="aliases are not supported", problem_mark=node.start_mark
        )
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, seen) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _map(node, seen)
    return None if getattr(node, "style", None) is None and node.value in _NULL else node.value


def _map(node: yaml.MappingNode, seen: set[int]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.value:
        name = key.value
        if not isinstance(name, str) or name in values:
            what = f"the key {name} is given twice" if isinstance(name, str) else "a key is no text"
            raise yaml.MarkedYAMLError(problem=what[:200], problem_mark=key.start_mark)
        values[name] = _plain(value, seen)
    return {name: value for name, value in values.items() if value is not None}
