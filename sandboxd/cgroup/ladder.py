"""Finds the cgroup subtree for a runner: a ladder of rungs, each tried by doing.

    given     `cgroup=`, --cgroup or $SANDBOXD_CGROUP: that one or none, nothing else is tried
    own       our own cgroup, if it was delegated (own.py); we move into a leaf of it
    systemd   a scope of its own from the user's systemd, root's from the system's (systemd.py)
    prepared  /sys/fs/cgroup/sandboxd-UID, made by an administrator (`sandboxd setup`)

The first rung is taken whose leaves can limit memory and processes. If there is none, the one with
the most controllers: even without any, CPU time is exact and cgroup.kill works.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import msgspec

from sandboxd.cgroup import own, subtree, systemd
from sandboxd.cgroup.subtree import PROC, Found
from sandboxd.errors import HostError
from sandboxd.host import CgroupSubtree

VARIABLE = "SANDBOXD_CGROUP"
NONE = "none"
"""As the cgroup that is given: do without."""
RUNGS: Mapping[str, str] = {
    "given": "given by --cgroup or $SANDBOXD_CGROUP",
    "own": "our own cgroup",
    "systemd": "a scope of our own from systemd",
    "prepared": "a subtree prepared by an administrator",
}

_NO_V2 = "no cgroup v2 hierarchy is mounted here"
_OUTSIDE = "our own cgroup lies outside of what is mounted here"


class Climb(msgspec.Struct, frozen=True, kw_only=True):
    """What the ladder led to: `found` on `rung`, and why each other one tried was passed."""

    found: Found
    rung: str = ""
    passed: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def subtree(self) -> CgroupSubtree | None:
        return self.found.subtree


Look: TypeAlias = Callable[[ExitStack], Found]
"""Tries a rung; what the finding needs to stay true is put on the stack."""


@contextmanager
def climbed(
    cgroup: str | None = None, environment: Mapping[str, str] = os.environ, proc: Path = PROC
) -> Iterator[Climb]:
    """The subtree for leaves, which is there at least as long as the block lasts.

    `cgroup` is a directory, "none", or None for the environment's word and then all the rungs.
    """
    named = cgroup if cgroup is not None else environment.get(VARIABLE, "")
    with ExitStack() as stack:
        if named:
            name = f"{VARIABLE}={named}" if cgroup is None else f"cgroup {named}"
            found = _given(named, name, proc)
            yield Climb(found=found, rung="given" if found.subtree else "", passed=_why(found))
            return
        top, here = subtree.mounted(proc)
        if top is None or here is None:
            yield Climb(found=Found(why_not=_NO_V2 if top is None else _OUTSIDE))
            return
        yield choose(_rungs(top, here, proc), stack)


def _why(found: Found) -> dict[str, str]:
    return {} if found.subtree else {"given": found.why_not}


def _given(named: str, name: str, proc: Path) -> Found:
    if named == NONE:
        return Found(why_not=f"{name}: done without")
    return subtree.examine(Path(named), name, subtree.mounted(proc)[1])


def _rungs(top: Path, here: Path, proc: Path) -> dict[str, Look]:
    return {
        "own": lambda _: own.find(top, here, proc),
        "systemd": _from_systemd,
        "prepared": lambda _: _prepared(top, here),
    }


def choose(rungs: Mapping[str, Look], stack: ExitStack) -> Climb:
    """The first rung that has what limits need, else the best; none is tried after that."""
    passed: dict[str, str] = {}
    best, held = Climb(found=Found()), stack.enter_context(ExitStack())
    for rung, look in rungs.items():
        with ExitStack() as holding:
            found = look(holding)
            passed[rung] = _lacks(found)
            if found.subtree is not None and _better(found.subtree, best.subtree):
                held.close()  # a scope that another rung beats
                held.enter_context(holding.pop_all())
                best = Climb(found=found, rung=rung)
        if not passed[rung]:
            break
    passed.pop(best.rung, None)
    if best.subtree is None:
        best = Climb(found=Found(why_not="; ".join(passed.values())))
    return msgspec.structs.replace(best, passed=passed)


def _better(one: CgroupSubtree, other: CgroupSubtree | None) -> bool:
    if other is None:
        return True
    grades = [(subtree.limits(each), len(each.controllers)) for each in (one, other)]
    return grades[0] > grades[1]


def _lacks(found: Found) -> str:
    """Why a rung is passed if there is a better one; "" if nothing needed is missing."""
    if found.subtree is None:
        return found.why_not
    missing = [name for name in ("memory", "pids") if name not in found.subtree.controllers]
    reasons = dict.fromkeys(found.notes.get(f"cgroup.{name}", "off") for name in missing)
    if not missing:
        return ""
    return f"{found.subtree.path}: no {' and '.join(missing)} controller ({'; '.join(reasons)})"


def _from_systemd(stack: ExitStack) -> Found:
    try:
        scope = stack.enter_context(systemd.open_scope())
    except HostError as error:
        return Found(why_not=str(error.args[0]))
    found = subtree.examine(scope.path, scope.name, None, let_in=True)
    if found.subtree is None:
        return found
    return msgspec.structs.replace(
        found, subtree=msgspec.structs.replace(found.subtree, scope=scope.name)
    )


def prepared_place(top: Path, uid: int) -> Path:
    """Where `sandboxd setup` makes a user's subtree."""
    return top / f"sandboxd-{uid}"


def _prepared(top: Path, here: Path) -> Found:
    path = prepared_place(top, os.geteuid())
    if not path.exists():
        return Found(why_not=f"no {path} was prepared")
    return subtree.examine(path, str(path), here)
