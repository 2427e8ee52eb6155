"""TOML text -> Policy, and a job's limits held against it.

How files add up. `extends = "base"` names one parent, which may have a parent itself. Tables merge
key by key, and the child's value counts. Lists add up: the parent's entries, then the child's, each
once. A list that begins with "!reset" leaves the parent's entries out. A key that no file of the
chain writes has the default of policy.py.

So a child that says nothing about a list goes along when its parent's grows, and what it takes away
it says aloud. The groups of syscalls.rules are made so that their order does not matter.

A profile that `syscalls.oci` names takes the place of the lists: those of the files that its file
extends no longer count, and beside it or after it there must be none.

Reading files is not done here: `read` gives the text for a name, `attach` that of a profile.
"""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from sandboxd import units
from sandboxd.compile.decisions import problems, problems_of_profiles
from sandboxd.compile.egress import problems as network_problems
from sandboxd.compile.meaning import problems_of_file
from sandboxd.compile.reading import Entries, File, Reading, limit_unit
from sandboxd.errors import PolicyError, PolicyErrors
from sandboxd.policy import Artifacts, Attached, Limits, Policy, Section

Read = Callable[[str], tuple[str, str]]
"""Name of a policy -> its file's name for messages, and its text; PolicyError if there is none."""

Attach = Callable[[str, str], tuple[str, str]]
"""A policy file's name for messages and a path in it -> the whole path, and the text there."""

DEEPEST = 16
"""Files of one chain."""
JOB = "the job"
"""The origin of a limit that a job lowered."""

_POSITION = re.compile(r" \(at line (\d+), column (\d+)\)$")
_AT_END = " (at end of document)"


def load(name: str, read: Read, attach: Attach | None = None) -> Policy:
    """The policy of this name; PolicyErrors with everything that is wrong in its files."""
    errors: list[PolicyError] = []
    merged = _Merged()
    files = _chain(name, read, errors)
    complete = not errors
    for file in reversed(files):
        reading = Reading(file)
        values = reading.policy()
        for key, message, hint in problems_of_file(values):
            reading.refuse(key, message, hint=hint)
        for key in merged.beside_oci(values):
            message = "a profile decides on system calls, not this"
            reading.refuse(key, message, hint='leave it out, or write oci = "" in [syscalls]')
        merged.add(file, values)
        errors += reading.errors
    if errors:
        if complete:
            errors = _in_order([*errors, *_entries_of_the_rest(name, merged)])
        raise PolicyErrors(tuple(errors))
    policy = _put_together(name, merged)
    wrong = _of_whole(policy, merged)
    if policy.syscalls.oci and not wrong:
        policy, wrong = _attached(policy, merged, attach)
    if wrong:
        raise PolicyErrors(tuple(wrong))
    return policy


def _put_together(name: str, merged: _Merged) -> Policy:
    own = name.rpartition("/")[2].removesuffix(".toml") or "custom"
    policy: Policy = msgspec.convert(
        _with_defaults(merged.values) | {"name": own, "origins": merged.origins()}, Policy
    )
    return policy


def _entries_of_the_rest(name: str, merged: _Merged) -> list[PolicyError]:
    """What is wrong besides, where something is left out because it is wrong by itself.

    Of entries only: what is said of a list as a whole may be due to what is not in it.
    """
    try:
        found = _of_whole(_put_together(name, merged), merged)
    except msgspec.ValidationError:
        return []
    return [one for one in found if one.where.endswith("]")]


def _in_order(errors: list[PolicyError]) -> list[PolicyError]:
    """By line, where all are in one file."""
    places = [re.match(r"(.*?):(\d+): ", f"{one.where}: ") for one in errors]
    if len({place[1] for place in places if place}) != 1 or None in places:
        return errors
    lines = {id(one): int(place[2]) for one, place in zip(errors, places, strict=True) if place}
    return sorted(errors, key=lambda one: lines[id(one)])


def _attached(
    policy: Policy, merged: _Merged, attach: Attach | None
) -> tuple[Policy, list[PolicyError]]:
    """The policy with the profile that it names."""
    file, key = merged.places["syscalls.oci"]
    where = file.where(key)
    if attach is None:
        return policy, [PolicyError(where, "no profile can be read here")]
    try:
        path, text = attach(file.label, policy.syscalls.oci)
    except PolicyError as error:
        message = str(error.args[0]).removeprefix(f"{error.where}: ")
        return policy, [PolicyError(where, f"{error.where}: {message}", hint=error.hint)]
    syscalls = Attached(oci=path, profile=text)
    errors = list(problems_of_profiles(syscalls))
    return msgspec.structs.replace(policy, syscalls=syscalls), errors


def _with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of Policy where no file says anything; a section's own ones are not the same."""
    found: dict[str, Any] = msgspec.to_builtins(Policy())
    for key, value in values.items():
        found[key] = found[key] | value if isinstance(value, dict) else value
    for mount in found["mounts"]:
        if mount.get("type") == "tmpfs":
            mount["writable"] = True  # it would be of no use else, so nobody need write it
    return found


def _chain(name: str, read: Read, errors: list[PolicyError]) -> list[File]:
    """The file of this name and those it extends. One that cannot be read ends the chain."""
    files: list[File] = []
    wanted: str | None = name
    while wanted is not None:
        why = files[-1].where("extends") if files else ""
        try:
            label, text = read(wanted)
        except PolicyError as error:
            if not files:
                raise
            errors.append(PolicyError(why, str(error.args[0]), hint=error.hint))
            break
        known = [(file.label, file.text) for file in files]
        if (label, text) in known:
            labels = [one for one, _ in known[known.index((label, text)) :]]
            cycle = " -> ".join([*labels, label])
            errors.append(PolicyError(why, f"a cycle: {cycle}"))
            break
        if len(files) == DEEPEST:
            errors.append(PolicyError(why, f"more than {DEEPEST} files that extend each other"))
            break
        try:
            file = File(label, text, table(label, text))
        except PolicyError as error:
            errors.append(error)
            break
        files.append(file)
        wanted = _parent(file, errors)
    return files


def table(label: str, text: str) -> dict[str, Any]:
    """The tables of a TOML text; PolicyError with line and column."""
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or a number with thousands of digits
        message = str(error)
    except RecursionError:
        message = "nested too deeply"
    place = _POSITION.search(message)
    if place:
        where, message = f"{label}:{place[1]}:{place[2]}", message[: place.start()]
    elif message.endswith(_AT_END):
        where, message = f"{label}:{text.count(chr(10)) + 1}", message.removesuffix(_AT_END)
    else:
        where = label
    raise PolicyError(where, f"not TOML: {message[:1].lower()}{message[1:]}")


def _parent(file: File, errors: list[PolicyError]) -> str | None:
    parent = file.table.get("extends")
    if parent is None or (isinstance(parent, str) and parent.isprintable() and parent):
        return parent
    hint = 'one name, such as extends = "base"'
    errors.append(PolicyError(file.where("extends"), f"{parent!r} is no policy", hint=hint))
    return None


class _Merged(msgspec.Struct):
    """The values of a chain of files so far, and for each which file and key it is from."""

    values: dict[str, Any] = msgspec.field(default_factory=dict)
    places: dict[str, tuple[File, str]] = msgspec.field(default_factory=dict)

    def beside_oci(self, values: Mapping[str, Any]) -> list[str]:
        """Keys that count for nothing, because a profile does; a new one ends what was before."""
        section = values.get("syscalls", {})
        if section.get("oci"):
            self.values.pop("syscalls", None)
            for stale in [key for key in self.places if key.startswith("syscalls.")]:
                del self.places[stale]
        named = section.get("oci", self.values.get("syscalls", {}).get("oci"))
        return [f"syscalls.{key}" for key in section if key != "oci"] if named else []

    def add(self, file: File, values: Mapping[str, Any]) -> None:
        self._table(self.values, values, "", file)

    def _table(self, into: dict[str, Any], table: Mapping[str, Any], key: str, file: File) -> None:
        for name, value in table.items():
            here = f"{key}.{name}" if key else name
            if isinstance(value, Entries):
                self._extend(into, name, here, value, file)
            elif isinstance(value, dict):
                self._table(into.setdefault(name, {}), value, here, file)
            else:
                into[name] = value
                self.places[here] = (file, here)

    def _extend(self, into: dict[str, Any], name: str, key: str, new: Entries, file: File) -> None:
        old = [] if new.reset else into.get(name, [])
        found = [(one, self.places[f"{key}[{at}]"]) for at, one in enumerate(old)]
        known = {one for one in old if isinstance(one, str)}
        for at, one in new.items:
            if isinstance(one, str):
                if one in known:
                    continue
                known.add(one)
            found.append((one, (file, f"{key}[{at}]")))
        for stale in range(len(into.get(name, []))):
            del self.places[f"{key}[{stale}]"]
        into[name] = [one for one, _ in found]
        self.places[key] = (file, key)
        self.places |= {f"{key}[{at}]": place for at, (_, place) in enumerate(found)}

    def origins(self) -> dict[str, str]:
        return {key: f"{file.label}: {inner}" for key, (file, inner) in self.places.items()}

    def where(self, key: str, value: object = None) -> str:
        """Where the file stands that a key of the whole policy is from."""
        rest = ""
        while key not in self.places:
            cut = max(key.rfind("."), key.rfind("["))
            if cut <= 0:
                return key + rest
            key, rest = key[:cut], key[cut:] + rest
        file, inner = self.places[key]
        return file.where(inner + rest, value)


def _of_whole(policy: Policy, merged: _Merged) -> list[PolicyError]:
    """What only shows when all files are put together."""
    found: list[PolicyError] = []
    seen: dict[str, int] = {}
    for at, mount in enumerate(policy.mounts):
        first = seen.setdefault(mount.target, at)
        if first != at:
            key = f"mounts[{at}].target"
            if len(found) < PolicyErrors.MOST:  # the rest is only counted
                key, other = merged.where(key), merged.where(f"mounts[{first}]")
                message = f"something is mounted on {mount.target} already ({other})"
            else:
                message = "something is mounted there already"
            hint = 'to replace what is inherited, write mounts = ["!reset", {...}]'
            found.append(PolicyError(key, message, hint=hint))
    for error in (*problems(policy.syscalls), *network_problems(policy.network)):
        if len(found) < PolicyErrors.MOST:
            message = str(error.args[0]).removeprefix(f"{error.where}: ")
            where = merged.where(error.where, _entry(policy, error.where))
            error = PolicyError(where, message, hint=error.hint)
        found.append(error)
    return found


def _entry(policy: Policy, key: str) -> object:
    """The string that a key such as syscalls.allow[3] means."""
    place = re.fullmatch(r"(syscalls|network)\.(\w+)\[(\d+)\]", key)
    return getattr(getattr(policy, place[1]), place[2])[int(place[3])] if place else None


# -- a job's limits --------------------------------------------------------------------------


def tighten(policy: Policy, limits: Limits | None) -> Policy:
    """The policy with a job's limits, each of which may be lower and none higher.

    None in the policy is unlimited, and None in the job's is not given. The policy itself comes
    back where nothing changes, so that one who prepared it need not do so again.
    """
    changes = _lowered(policy, "limits", limits) if limits is not None else {}
    if not changes:
        return policy
    origins = policy.origins | {f"limits.{name}": f"{JOB}: limits.{name}" for name in changes}
    lower = msgspec.structs.replace(policy.limits, **changes)
    return msgspec.structs.replace(policy, limits=lower, origins=origins)


def tighten_artifacts(policy: Policy, artifacts: Artifacts | None) -> Artifacts:
    """The policy's [artifacts] with a job's, by the rules of `tighten`."""
    if artifacts is None:
        return policy.artifacts
    changes = _lowered(policy, "artifacts", artifacts)
    return msgspec.structs.replace(policy.artifacts, **changes)


def _lowered(policy: Policy, section: str, asked: Limits | Artifacts) -> dict[str, Any]:
    """The keys of a section that a job makes lower; PolicyErrors for those it would raise."""
    errors: list[PolicyError] = []
    changes: dict[str, Any] = {}
    allowed = getattr(policy, section)
    for name in allowed.__struct_fields__:
        wanted, most = getattr(asked, name), getattr(allowed, name)
        if wanted is None or wanted == most:
            continue
        key = f"{section}.{name}"
        if not isinstance(wanted, int | float) or not 0 < wanted < math.inf:
            errors.append(PolicyError(key, f"{wanted!r} is no limit", hint="it must be above 0"))
        elif most is not None and wanted > most:
            who = policy.origin(key).partition(": ")[0]
            much, allows = (_amount(type(allowed), name, value) for value in (wanted, most))
            errors.append(PolicyError(key, f"{much} is more than {who} allows ({allows})"))
        else:
            changes[name] = wanted
    if errors:
        raise errors[0] if len(errors) == 1 else PolicyErrors(tuple(errors))
    return changes


def _amount(section: type[Section], name: str, value: float) -> str:
    what = limit_unit(name, section)
    if what == "bytes":
        return units.format_size(int(value))
    return units.format_time(value) if what == "seconds" else f"{value:g}"


def digest(policy: Policy) -> str:
    """SHA-256 of what the policy says, the same wherever its keys were written."""
    plain = msgspec.to_builtins(msgspec.structs.replace(policy, origins={}))
    del plain["origins"]
    canonical = msgspec.json.encode(plain, order="sorted")
    return hashlib.sha256(canonical).hexdigest()
